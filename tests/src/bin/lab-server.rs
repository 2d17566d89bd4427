//! `lab-server ADDRESS:PORT`: the tests' deterministic server as a program of its own, which can be
//! killed like one.

use std::net::TcpListener;

use anyhow::{Context, bail};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(address), None) = (arguments.next(), arguments.next()) else {
        bail!("usage: lab-server ADDRESS:PORT");
    };
    let listener =
        TcpListener::bind(&address).with_context(|| format!("listening on {address}"))?;
    println!("serving {address}");
    unbroken_tests::server::serve(&listener).context("serving")
}

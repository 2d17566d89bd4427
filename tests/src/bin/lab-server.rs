//! `lab-server ADDRESS:PORT`: the tests' deterministic server as a program of its own, which can be
//! killed like one. SIGTERM makes it close all its connections and, as many a server does, live on for
//! a while: until it is killed.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Connections that live, by the order in which they were accepted.
type Accepted = Arc<Mutex<BTreeMap<u64, TcpStream>>>;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(address), None) = (arguments.next(), arguments.next()) else {
        bail!("usage: lab-server ADDRESS:PORT");
    };
    let accepted = Accepted::default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut terminate = {
        let _inside = runtime.enter();
        signal(SignalKind::terminate()).context("installing the handler of SIGTERM")?
    };
    let all = Arc::clone(&accepted);
    thread::spawn(move || {
        while runtime.block_on(terminate.recv()).is_some() {
            for stream in lock(&all).values() {
                // One that has just ended cannot be shut down.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    });
    let listener =
        TcpListener::bind(&address).with_context(|| format!("listening on {address}"))?;
    println!("serving {address}");
    for number in 0.. {
        let (stream, _) = listener.accept().context("accepting")?;
        let copy = stream.try_clone().context("a second descriptor")?;
        lock(&accepted).insert(number, copy);
        let accepted = Arc::clone(&accepted);
        thread::spawn(move || {
            // The client sees the same as we: a connection that ends.
            let _ = unbroken_tests::server::serve_one(stream);
            lock(&accepted).remove(&number);
        });
    }
    Ok(())
}

fn lock(accepted: &Accepted) -> MutexGuard<'_, BTreeMap<u64, TcpStream>> {
    accepted.lock().unwrap_or_else(PoisonError::into_inner)
}

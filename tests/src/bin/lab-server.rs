//! `lab-server ADDRESS:PORT`: the tests' deterministic server as a program of its own, which can be
//! killed like one. SIGTERM makes it close all its connections and, as many a server does, live on for
//! a while: until it is killed.
//!
//! `lab-server ADDRESS:PORT --prefork`: a master that listens, and a worker that serves. Each worker is named by a line
//! `worker PID`; one that dies has a successor.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::Signal;
use socket2::SockRef;
use tokio::signal::unix::{SignalKind, signal};
use unbroken_tests::server;

/// Connections that live, by the order in which they were accepted.
type Accepted = Arc<Mutex<BTreeMap<u64, TcpStream>>>;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [address] => serve(&listen(address)?),
        [address, "--prefork"] => prefork(listen(address)?),
        // The listener is its standard input.
        [_, "--worker"] => {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            let listener = std::io::stdin().as_fd().try_clone_to_owned()?;
            serve(&TcpListener::from(listener))
        }
        _ => bail!("usage: lab-server ADDRESS:PORT [--prefork]"),
    }
}

fn listen(address: &str) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address);
    listener.with_context(|| format!("listening on {address}"))
}

fn prefork(listener: TcpListener) -> anyhow::Result<()> {
    let address = listener.local_addr()?.to_string();
    let listener = OwnedFd::from(listener);
    loop {
        let mut worker = Command::new(std::env::current_exe()?);
        worker.args([&address, "--worker"]);
        worker.stdin(listener.try_clone()?);
        let mut worker = worker.spawn().context("starting a worker")?;
        println!("worker {}", worker.id());
        worker.wait().context("waiting for a worker")?;
    }
}

fn serve(listener: &TcpListener) -> anyhow::Result<()> {
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
    println!("serving {}", listener.local_addr()?);
    for number in 0.. {
        let (stream, _) = listener.accept().context("accepting")?;
        if server::is_broken_off().context(server::RESET)? {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            continue;
        }
        let copy = stream.try_clone().context("a second descriptor")?;
        lock(&accepted).insert(number, copy);
        let accepted = Arc::clone(&accepted);
        thread::spawn(move || {
            // The client sees the same as we: a connection that ends.
            let served = server::serve_one(stream);
            lock(&accepted).remove(&number);
            if served.is_ok() && std::fs::exists(server::DIE).unwrap_or(false) {
                let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
            }
        });
    }
    Ok(())
}

fn lock(accepted: &Accepted) -> MutexGuard<'_, BTreeMap<u64, TcpStream>> {
    accepted.lock().unwrap_or_else(PoisonError::into_inner)
}

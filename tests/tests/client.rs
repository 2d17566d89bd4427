//! The clients are content with a right server and find out a wrong one.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use unbroken_tests::client::{ClientError, Outcome, Progress, download, exchange, upload};
use unbroken_tests::server;

/// A client's stream to a server that runs `serve` on its one connection.
fn served_by(serve: impl FnOnce(TcpStream) + Send + 'static) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    std::thread::spawn(move || serve(listener.accept().unwrap().0));
    stream
}

/// The right server behind a relay that alters each chunk either way: (chunk, whether from the client,
/// offset) to what is passed on.
fn altered(alter: impl Fn(&mut Vec<u8>, bool, u64) + Send + Sync + Copy + 'static) -> TcpStream {
    let pass = move |mut from: TcpStream, mut to: TcpStream, upstream: bool| {
        let (mut buffer, mut offset) = (vec![0; 10_000], 0);
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let mut chunk = buffer[..n].to_vec();
            alter(&mut chunk, upstream, offset);
            offset += n as u64;
            if to.write_all(&chunk).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    };
    served_by(move |client| {
        let server = served_by(|stream| {
            let _ = server::serve_one(stream);
        });
        let (a, b) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let up = std::thread::spawn(move || pass(a, b, true));
        pass(server, client, false);
        up.join().unwrap();
    })
}

const LENGTH: u64 = 300_001;

fn down(stream: TcpStream, progress: &Arc<Progress>) -> Result<Outcome, ClientError> {
    download(stream, 5, LENGTH, None, progress)
}

fn up(stream: TcpStream, progress: &Arc<Progress>) -> Result<Outcome, ClientError> {
    upload(stream, 6, LENGTH, None, progress)
}

fn ask(stream: TcpStream, progress: &Arc<Progress>) -> Result<Outcome, ClientError> {
    let mut left = 50;
    exchange(stream, 100, Duration::ZERO, progress, move || {
        left -= 1;
        left >= 0
    })
}

#[test]
fn content_with_the_right_server() {
    let right = || altered(|_, _, _| ());
    for client in [down, up] {
        let progress = Progress::shared();
        let outcome = client(right(), &progress).unwrap();
        assert_eq!((outcome.bytes, progress.sample().bytes), (LENGTH, LENGTH));
        assert!(progress.sample().finished);
    }
    let progress = Progress::shared();
    let outcome = ask(right(), &progress).unwrap();
    assert_eq!(
        (outcome.latencies.len(), progress.sample().operations),
        (50, 50)
    );
}

#[test]
fn a_flipped_bit_is_found() {
    let flip = |chunk: &mut Vec<u8>, _: bool, offset: u64| {
        // Beyond the request itself, in whichever direction there is that much.
        if offset <= 1000 && offset + chunk.len() as u64 > 1000 {
            chunk[1000 - usize::try_from(offset).unwrap()] ^= 1;
        }
    };
    let progress = Progress::shared();
    assert!(matches!(
        down(altered(flip), &progress),
        Err(ClientError::Wrong { offset: 1000 })
    ));
    assert!(matches!(
        up(altered(flip), &progress),
        Err(ClientError::Digest)
    ));
    assert!(matches!(
        ask(altered(flip), &progress),
        Err(ClientError::Wrong { .. })
    ));
}

#[test]
fn a_doubled_or_lost_request_is_found() {
    // The request as it was is passed on once more, and its answer withheld: only what the answers
    // depend on tells.
    let double = served_by(|client| {
        let mut first = [0; 17];
        let mut request = [0; 100];
        let (mut client, mut server) = (
            client,
            served_by(|stream| {
                let _ = server::serve_one(stream);
            }),
        );
        client.read_exact(&mut first).unwrap();
        server.write_all(&first).unwrap();
        for round in 0.. {
            if client.read_exact(&mut request).is_err() {
                return;
            }
            let again = if round == 3 { 2 } else { 1 };
            let mut answer = [0; 100];
            for _ in 0..again {
                server.write_all(&request).unwrap();
                server.read_exact(&mut answer).unwrap();
            }
            client.write_all(&answer).unwrap();
        }
    });
    let error = ask(double, &Progress::shared()).unwrap_err();
    assert!(
        matches!(error, ClientError::Wrong { offset: 300 }),
        "{error}"
    );
}

#[test]
fn an_early_end_is_found() {
    let cut = |chunk: &mut Vec<u8>, from_client: bool, offset: u64| {
        if !from_client && offset > 100_000 {
            chunk.clear();
        }
    };
    let error = down(altered(cut), &Progress::shared()).unwrap_err();
    assert!(
        matches!(
            error,
            ClientError::Length {
                expected: LENGTH,
                ..
            }
        ),
        "{error}"
    );
    let silent = served_by(drop);
    assert!(ask(silent, &Progress::shared()).is_err());
}

#[test]
fn a_rate_is_kept() {
    let stream = served_by(|stream| server::serve_one(stream).unwrap());
    let outcome = download(stream, 5, 100_000, Some(1_000_000), &Progress::shared()).unwrap();
    assert!(
        outcome.elapsed >= Duration::from_millis(99),
        "{:?}",
        outcome.elapsed
    );
}

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};

use super::measure::Sample;
use super::report::Spread;
use super::*;
use crate::cli::bench::measure::percentile_us;
use crate::cli::bench::protocol::{ECHO, ECHO_BYTES_MAX, SEND, TAKE, header, pattern};

/// A server on a port of its own; it lives as long as the test process.
fn start_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || server::serve(&listener));
    address
}

#[test]
fn the_server_answers_from_the_connections_bytes_alone() {
    let address = start_server();
    let block = pattern();
    let mut request = Vec::new();
    request.extend(header(ECHO, 5));
    request.extend(b"hello");
    request.extend(header(SEND, 100_000));
    request.extend(header(TAKE, 9));
    request.extend(b"123456789");
    request.extend(header(ECHO, 0));
    let mut expected = b"hello".to_vec();
    expected.extend(block.iter().cycle().take(100_000));
    // RFC 3720 B.4's polynomial; the check value of CRC-32C.
    expected.extend(0xe306_9283_u32.to_be_bytes());
    // Whole, and in pieces that cut every header.
    for piece in [request.len(), 1, 7] {
        let mut stream = TcpStream::connect(address).unwrap();
        for part in request.chunks(piece) {
            stream.write_all(part).unwrap();
        }
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(
            answer == expected,
            "pieces of {piece}: {} bytes",
            answer.len()
        );
    }
}

#[test]
fn the_server_closes_on_nonsense() {
    let address = start_server();
    for request in [header(b'X', 1), header(ECHO, ECHO_BYTES_MAX + 1)] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&request).unwrap();
        let mut answer = Vec::new();
        assert_eq!(stream.read_to_end(&mut answer).unwrap(), 0);
    }
}

#[test]
fn every_measurement_works_and_is_reported() {
    let (direct, through) = (start_server(), start_server());
    let targets = [("direct", direct), ("through", through)].map(|(name, address)| Target {
        name: name.to_owned(),
        address,
    });
    // A connection takes 1 MiB: bulk goes through several of them.
    let limits = Limits {
        duration: Duration::from_millis(20),
        connection_bytes: 1 << 20,
    };
    let mut report = Report::new(&targets, 2, 0.02);
    let process = Process::parse(&format!("test={}", std::process::id())).unwrap();
    for _ in 0..2 {
        for measurement in MEASUREMENTS {
            for (index, target) in targets.iter().enumerate() {
                let sample = measurement.run(target.address, limits).unwrap();
                report.add(measurement, index, sample);
            }
            // 2 ms of CPU for 1,000 requests, or for 1 GB.
            let used = Usage {
                cpu_ns: 2_000_000,
                wakeups: 500,
            };
            let sample = match measurement {
                Measurement::RoundTrip { .. } => Sample::RoundTrip {
                    p50_us: 1.0,
                    p99_us: 1.0,
                    requests: 1_000,
                },
                Measurement::Down | Measurement::Up => Sample::Bulk {
                    gbps: 1.0,
                    bytes: 1_000_000_000,
                },
            };
            report.charge(measurement, &process, used, sample);
        }
    }
    let table = report.table();
    assert_eq!(
        table.lines().count(),
        (1 + 8 + 1) + 1 + (1 + 5 + 1),
        "{table}"
    );
    let json = report.to_json();
    let figures = json["figures"].as_array().unwrap();
    assert_eq!(figures.len(), 8);
    for figure in figures {
        assert!(
            figure["targets"]["through"]["median"].as_f64().unwrap() > 0.0,
            "{figure}"
        );
        assert_eq!(
            figure["targets"]["direct"]["rounds"]
                .as_array()
                .unwrap()
                .len(),
            2
        );
        assert!(
            figure["ratio_to_direct"]["through"]["median"]
                .as_f64()
                .unwrap()
                > 0.0,
            "{figure}"
        );
    }
    let costs = json["costs"].as_array().unwrap();
    let cpu_of = |at: usize| (&costs[at]["per"], &costs[at]["cpu_us"]["median"]);
    assert_eq!(cpu_of(0), (&"request".into(), &2.0.into()));
    assert_eq!(cpu_of(4), (&"GB".into(), &2_000.0.into()));
    assert_eq!(costs[0]["wakeups"]["median"], 0.5);
}

#[test]
fn a_process_is_charged_for_what_it_does() {
    let process = Process::parse(&format!("test={}", std::process::id())).unwrap();
    let before = process.usage().unwrap();
    let mut sum = 0_u64;
    let used = loop {
        sum = std::hint::black_box((0..100_000).fold(sum, u64::wrapping_add));
        let used = process.usage().unwrap() - before;
        if used.cpu_ns > 0 {
            break used;
        }
    };
    assert!(used.cpu_ns < 60_000_000_000, "{used:?}");
    for wrong in ["test", "test=one", "test=4294967295"] {
        assert!(Process::parse(wrong).is_err(), "{wrong}");
    }
}

/// A server whose bytes are wrong must not be measured as if they were right.
#[test]
fn a_wrong_byte_is_found() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // Enough for any answer asked for below, and wrong.
            let _ = stream.write_all(&vec![0; 8 << 20]);
        }
    });
    let limits = Limits {
        duration: Duration::from_millis(1),
        connection_bytes: 1 << 20,
    };
    for measurement in MEASUREMENTS {
        let error = measurement.run(address, limits).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("differs") || text.contains("checksum"),
            "{measurement:?}: {text}"
        );
    }
}

#[test]
fn medians_and_percentiles() {
    let spread = |median, min, max| Spread { median, min, max };
    assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), spread(2.0, 1.0, 3.0));
    assert_eq!(Spread::of(&[4.0, 1.0]), spread(2.5, 1.0, 4.0));
    let sorted: Vec<Duration> = (1..=200).map(Duration::from_micros).collect();
    let near = |percent, expected: f64| (percentile_us(&sorted, percent) - expected).abs() < 1e-6;
    assert!(near(50, 100.0) && near(99, 198.0) && near(100, 200.0));
    assert!((percentile_us(&sorted[..1], 99) - 1.0).abs() < 1e-6);
}

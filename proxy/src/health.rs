//! Health checks: whether a server that is there also answers.
//!
//! A server that hangs keeps its connections and its listener: nothing about its process or its sockets
//! says so. So it is asked, from a thread of its own, at an interval; the data plane only looks at the
//! answer.

use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use socket2::{Domain, SockAddr, Socket, Type};
use tracing::{debug, info, warn};

use crate::config::{HealthCheck, HealthConfig, Upstream};

/// How much of an answer is looked through.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// How often a command is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// The standing of one service's server.
#[derive(Debug, Clone)]
pub(crate) struct Health(Arc<AtomicBool>);

impl Health {
    /// Begins to ask, and goes on until the last handle is gone. Until the first failures are counted,
    /// the server passes for healthy.
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn watch(service: &str, at: &Upstream, config: &HealthConfig) -> io::Result<Self> {
        let failing = Arc::new(AtomicBool::new(false));
        let weak = Arc::downgrade(&failing);
        let (service, at, config) = (service.to_owned(), at.clone(), config.clone());
        thread::Builder::new()
            .name(format!("health {service}"))
            .spawn(move || keep_asking(&service, &at, &config, &weak))?;
        Ok(Self(failing))
    }

    /// Whether the server failed its last checks.
    pub(crate) fn is_failing(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

fn keep_asking(service: &str, at: &Upstream, config: &HealthConfig, failing: &Weak<AtomicBool>) {
    let mut failures = 0;
    loop {
        let begun = Instant::now();
        let outcome = ask(service, at, config);
        let Some(failing) = failing.upgrade() else {
            return;
        };
        match outcome {
            Ok(()) => {
                failures = 0;
                if failing.swap(false, Ordering::Relaxed) {
                    info!(service, "the server passes its health check again");
                }
            }
            Err(error) => {
                failures += 1;
                debug!(service, failures, %error, "health check failed");
                if failures == config.failures {
                    warn!(service, failures, %error, "the server fails its health check");
                    failing.store(true, Ordering::Relaxed);
                }
            }
        }
        drop(failing);
        thread::sleep(config.interval.saturating_sub(begun.elapsed()));
    }
}

/// One check.
fn ask(service: &str, at: &Upstream, config: &HealthConfig) -> io::Result<()> {
    let deadline = Instant::now() + config.timeout;
    match &config.check {
        HealthCheck::Connect => connect(at, deadline).map(drop),
        HealthCheck::Answer { send, expect } => {
            let mut socket = connect(at, deadline)?;
            socket.set_write_timeout(Some(left(deadline)?))?;
            socket.write_all(send.as_bytes())?;
            let mut answer = Vec::new();
            loop {
                if answered(&answer, expect.as_deref()) {
                    return Ok(());
                }
                socket.set_read_timeout(Some(left(deadline)?))?;
                let mut buffer = [0; 4096];
                let n = match socket.read(&mut buffer) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(late()),
                    other => other?,
                };
                if n == 0 || answer.len() > ANSWER_BYTES_MAX {
                    return Err(io::Error::other("the answer is another than expected"));
                }
                answer.extend_from_slice(&buffer[..n]);
            }
        }
        HealthCheck::Command(words) => command(service, at, words, deadline),
    }
}

fn answered(answer: &[u8], expect: Option<&str>) -> bool {
    match expect.map(str::as_bytes) {
        Some([]) => true,
        Some(expect) => answer.windows(expect.len()).any(|part| part == expect),
        None => !answer.is_empty(),
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
}

/// What is left of the time; never zero, which would mean for ever.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(late())
    } else {
        Ok(left)
    }
}

fn connect(at: &Upstream, deadline: Instant) -> io::Result<Socket> {
    let (domain, address): (Domain, SockAddr) = match at {
        Upstream::Tcp(address) => (Domain::for_address(*address), SocketAddr::into(*address)),
        Upstream::Unix(path) => (Domain::UNIX, SockAddr::unix(path)?),
    };
    let socket = Socket::new(domain, Type::STREAM, None)?;
    // With a Unix listener whose queue is full this fails at once, and does not wait for ever.
    socket.connect_timeout(&address, left(deadline)?)?;
    Ok(socket)
}

/// Runs a command; it is right if it exits with 0 in time. Else it is killed, with what it started.
fn command(service: &str, at: &Upstream, words: &[String], deadline: Instant) -> io::Result<()> {
    let (program, arguments) = words.split_first().expect("a command is never empty");
    let mut child = Command::new(program)
        .args(arguments)
        .env("UNBROKEN_SERVICE", service)
        .env("UNBROKEN_UPSTREAM", at.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    loop {
        if let Some(status) = child.try_wait()? {
            return if status.success() {
                Ok(())
            } else {
                Err(io::Error::other(format!("{program}: {status}")))
            };
        }
        if left(deadline).is_err() {
            // It is not reaped yet, so the group is still its own.
            if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            child.wait()?;
            return Err(late());
        }
        thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn config(check: HealthCheck, timeout: Duration) -> HealthConfig {
        HealthConfig {
            check,
            interval: Duration::from_millis(1),
            timeout,
            failures: 2,
        }
    }

    fn answer(send: &str, expect: Option<&str>) -> HealthCheck {
        let (send, expect) = (send.to_owned(), expect.map(str::to_owned));
        HealthCheck::Answer { send, expect }
    }

    /// A server that answers "+PONG" to everything, or nothing.
    fn server(answers: bool) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        thread::spawn(move || {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept() {
                if answers {
                    let _ = stream.read(&mut [0; 16]);
                    let _ = stream.write_all(b"so: +PO");
                    let _ = stream.write_all(b"NG\r\n");
                } else {
                    open.push(stream);
                }
            }
        });
        Upstream::Tcp(at)
    }

    #[test]
    fn a_server_is_asked_for_what_it_should_answer() {
        let asked = |at, check| ask("s", at, &config(check, TIMEOUT));
        let good = server(true);
        asked(&good, HealthCheck::Connect).unwrap();
        asked(&good, answer("PING", Some("+PONG"))).unwrap();
        asked(&good, answer("PING", None)).unwrap();
        let wrong = asked(&good, answer("PING", Some("+PANG"))).unwrap_err();
        assert_eq!(wrong.kind(), io::ErrorKind::Other);
        // The kernel accepts for a server that hangs: only an answer proves anything.
        let hung = server(false);
        asked(&hung, HealthCheck::Connect).unwrap();
        let short = config(answer("PING", Some("+PONG")), Duration::from_millis(50));
        let error = ask("s", &hung, &short).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_command_says_by_its_exit_code_and_in_time() {
        let at = Upstream::Tcp(([127, 0, 0, 1], 9).into());
        let run = |line: &str, timeout| {
            let words = ["sh", "-c", line].map(str::to_owned).to_vec();
            ask("web", &at, &config(HealthCheck::Command(words), timeout))
        };
        run(
            "test $UNBROKEN_SERVICE,$UNBROKEN_UPSTREAM = web,127.0.0.1:9",
            TIMEOUT,
        )
        .unwrap();
        assert!(
            run("exit 3", TIMEOUT)
                .unwrap_err()
                .to_string()
                .contains('3')
        );
        let late = run("sleep 600 & wait", Duration::from_millis(50)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let words = vec!["/nonexistent".to_owned()];
        let missing = config(HealthCheck::Command(words), TIMEOUT);
        assert!(ask("web", &at, &missing).is_err());
    }

    #[test]
    fn some_failures_in_a_row_make_it_fail_and_one_success_heals_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let config = config(HealthCheck::Connect, TIMEOUT);
        let health = Health::watch("s", &Upstream::Tcp(at), &config).unwrap();
        let wait = |failing| {
            let begun = Instant::now();
            while health.is_failing() != failing && begun.elapsed() < TIMEOUT {
                thread::yield_now();
            }
            assert_eq!(health.is_failing(), failing);
        };
        wait(false);
        drop(listener);
        wait(true);
        let _again = TcpListener::bind(at).unwrap();
        wait(false);
    }
}

//! iperf3 between the same hosts: one stream to each receiver at the same time.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use unbroken_tests::netns::{Host, wait_until};

use super::LONG;

/// What carries the bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    /// 8 KiB writes.
    Tcp,
    /// Datagrams that fit an Ethernet frame, as many as go.
    Udp,
}

/// Whether there is such a program.
pub(super) fn is_there() -> bool {
    let version = Command::new("iperf3")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    version.is_ok_and(|status| status.success())
}

struct Servers(Vec<Child>);

impl Drop for Servers {
    fn drop(&mut self) {
        for server in &mut self.0 {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

/// Bytes a second that the slowest of `to` received, all at the same time.
pub(super) fn run(from: &Host, to: &[&Host], over: Over, time: Duration) -> Result<f64> {
    let mut servers = Servers(Vec::new());
    for host in to {
        let mut command = Command::new("iperf3");
        command
            .args(["-s", "-1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        servers.0.push(host.enter(move || command.spawn())?);
    }
    for host in to {
        wait_until("iperf3 listening", LONG, || {
            host.enter(|| {
                let sockets = std::fs::read_to_string(Path::new("/proc/thread-self/net/tcp6"));
                let v4 = std::fs::read_to_string(Path::new("/proc/thread-self/net/tcp"));
                // Port 5201.
                let sockets = sockets.unwrap_or_default() + &v4.unwrap_or_default();
                sockets.contains(":1451 ")
            })
        })?;
    }
    let seconds = format!("{:.1}", time.as_secs_f64());
    let clients: Vec<_> = to
        .iter()
        .map(|host| {
            let mut command = Command::new("iperf3");
            let address = host.address().to_string();
            command.args(["-J", "-c", &address, "-t", &seconds]);
            match over {
                Over::Tcp => command.args(["-l", "8192"]),
                Over::Udp => command.args(["-u", "-b", "0", "-l", "1400"]),
            };
            let from = from.clone();
            thread::spawn(move || from.output(command))
        })
        .collect();
    let mut least = f64::INFINITY;
    for client in clients {
        let output = client.join().expect("it does not panic")?;
        let found: serde_json::Value =
            serde_json::from_slice(&output.stdout).context("what iperf3 prints")?;
        let end = &found["end"];
        let rate = match over {
            Over::Tcp => end["sum_received"]["bits_per_second"].as_f64(),
            Over::Udp => {
                // What is lost was not received.
                let sum = &end["sum"];
                let lost = sum["lost_percent"].as_f64().unwrap_or(0.0);
                let sent = sum["bits_per_second"].as_f64();
                sent.map(|rate| rate * (1.0 - lost / 100.0))
            }
        };
        let Some(rate) = rate else {
            bail!("iperf3 failed: {}", found["error"]);
        };
        least = least.min(rate / 8.0);
    }
    Ok(least)
}

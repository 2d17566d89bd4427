//! What one has without us: a connection to a server itself, and an address that is moved by hand.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use unbroken_tests::cluster::PATIENCE;
use unbroken_tests::netns::{Host, Lab, LabOptions, Process, wait_until};

use crate::pace::now_us;
use crate::pulse::Ask;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 200);
const PORT: u16 = 9000;
const PACE_US: u64 = 1_000;
/// A client that cannot connect tries again after this.
const AGAIN: Duration = Duration::from_millis(1);
/// One that hears nothing does so after this, much sooner than any program would.
const ATTEMPT_MAX: Duration = Duration::from_millis(10);

/// Two hosts with the same server, one of which has the address.
pub(super) struct Pair {
    lab: Lab,
    servers: [Process; 2],
    /// Which one has it.
    at: usize,
}

/// What the death of a server did to a client that connects again at once.
pub(super) struct Broken {
    /// From the death to the first byte of another connection, in microseconds.
    pub(super) gap_us: u64,
}

impl Pair {
    pub(super) fn start(program: &Path, dir: &Path) -> Result<Self> {
        let lab = Lab::new(LabOptions { replicas: 2 })?;
        let server = |name: &str| server(lab.host(name), program, &dir.join(format!("{name}.log")));
        let servers = [server("r1")?, server("r2")?];
        lab.host("r1")
            .ip(&format!("addr add {ADDRESS}/24 dev eth0"))?;
        Ok(Self {
            lab,
            servers,
            at: 0,
        })
    }

    /// Kills the server that a client is connected to and at once moves the address, as somebody would who knows of the
    /// death without being told.
    pub(super) fn kill(&mut self, program: &Path, dir: &Path) -> Result<Broken> {
        let address = SocketAddr::from((ADDRESS, PORT));
        let client = self.lab.host("c");
        let names = ["r1", "r2"];
        let (dying, heir) = (names[self.at], names[1 - self.at]);
        let mut stream = client.enter(|| first_byte(address))?;
        let broken = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                // The connection is lost: it ends, or is reset.
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
                client.enter(|| {
                    loop {
                        match first_byte(address) {
                            Ok(_) => return now_us(),
                            Err(_) => std::thread::sleep(AGAIN),
                        }
                    }
                })
            });
            let died_us = now_us();
            self.servers[self.at].kill()?;
            let (off, on) = (self.lab.host(dying), self.lab.host(heir));
            off.ip(&format!("addr del {ADDRESS}/24 dev eth0"))?;
            on.ip(&format!("addr add {ADDRESS}/24 dev eth0"))?;
            // In place of an announcement, and sooner than one.
            client.ip("neigh flush dev eth0")?;
            let back_us = waiting
                .join()
                .map_err(|_| anyhow::anyhow!("the client panicked"))?;
            Ok::<_, anyhow::Error>(Broken {
                gap_us: back_us.saturating_sub(died_us),
            })
        })?;
        let log = dir.join(format!("{dying}.log"));
        self.servers[self.at] = server(self.lab.host(dying), program, &log)?;
        self.at = 1 - self.at;
        Ok(broken)
    }
}

fn server(host: &Host, program: &Path, log: &Path) -> Result<Process> {
    let mut command = Command::new(program);
    command.args(["serve", "pulses", "--listen", &format!("0.0.0.0:{PORT}")]);
    let process = host.spawn("the server", command, log)?;
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let listening = || host.enter(|| TcpStream::connect(listen).is_ok());
    wait_until("the server listens", PATIENCE, listening)?;
    Ok(process)
}

/// Connects and waits for the first byte.
fn first_byte(address: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, ATTEMPT_MAX)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let ask = Ask::Pulses {
        seed: 0,
        start_us: now_us(),
        period_us: PACE_US,
    };
    stream.write_all(&ask.encode())?;
    let got = stream.read(&mut [0; 64]).context("reading")?;
    ensure!(got > 0, "the connection ended");
    Ok(stream)
}

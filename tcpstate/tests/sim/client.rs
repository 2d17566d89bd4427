//! A client: a TCP of its own (smoltcp's), on its own interface, that knows nothing of replicas.
#![allow(
    unreachable_pub,
    dead_code,
    reason = "shared: each test uses a part of it"
)]

use std::cell::Cell;
use std::collections::VecDeque;
use std::net::IpAddr;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use super::app::pattern;

/// When the client closes its side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// When everything is sent.
    Sent,
    /// When this many bytes have come.
    Received(u64),
    /// When the server has closed.
    ServerClosed,
}

/// What the client does.
#[derive(Debug, Clone, Copy)]
pub struct Script {
    pub sends: u64,
    pub close: Close,
    /// Sends its bytes in pieces of this size, the next when the last was echoed.
    pub ping_pong: Option<u64>,
    /// Breaks off when it has received so much.
    pub aborts_after: Option<u64>,
    /// Reads at most so many bytes each 3 ms.
    pub reads_slowly: Option<usize>,
    pub timestamps: bool,
    /// Bytes of receive buffer.
    pub buffer: usize,
    /// Says nothing for so many microseconds when half of its bytes are sent and as many have come.
    pub idles_us: Option<u64>,
    /// Probes a silent server this often, in microseconds.
    pub keep_alive_us: Option<u64>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            sends: 8,
            close: Close::ServerClosed,
            ping_pong: None,
            aborts_after: None,
            reads_slowly: None,
            timestamps: true,
            buffer: 30_000,
            idles_us: None,
            keep_alive_us: None,
        }
    }
}

thread_local! {
    static TSVAL: Cell<u32> = const { Cell::new(0) };
}

#[derive(Default)]
pub struct Queues {
    pub incoming: VecDeque<Vec<u8>>,
    pub outgoing: VecDeque<Vec<u8>>,
}

pub struct Rx(Vec<u8>);
pub struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut buf = vec![0; len];
        let r = f(&mut buf);
        self.0.push_back(buf);
        r
    }
}

impl Device for Queues {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;
    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        Some((Rx(self.incoming.pop_front()?), Tx(&mut self.outgoing)))
    }
    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.outgoing))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = 1500;
        caps
    }
}

pub struct Client {
    interface: Interface,
    pub device: Queues,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    script: Script,
    pub sent: Vec<u8>,
    pub received: Vec<u8>,
    closed: bool,
    pub aborted: bool,
    read_at: u64,
    /// When it goes on.
    idle_until: Option<u64>,
    pub ever_open: bool,
}

impl Client {
    pub fn new(own: IpAddr, vip: IpAddr, script: Script, seed: u64) -> Self {
        let mut device = Queues::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut device, Instant::from_micros(0));
        let prefix = if own.is_ipv6() { 64 } else { 24 };
        interface.update_ip_addrs(|a| a.push(IpCidr::new(IpAddress::from(own), prefix)).unwrap());
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; script.buffer]),
            tcp::SocketBuffer::new(vec![0; 40_000]),
        );
        if script.timestamps {
            socket.set_tsval_generator(Some(|| TSVAL.get()));
        }
        let keep_alive = script
            .keep_alive_us
            .map(smoltcp::time::Duration::from_micros);
        socket.set_keep_alive(keep_alive);
        let remote = (IpAddress::from(vip), 80);
        socket.connect(interface.context(), remote, 49_500).unwrap();
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        Self {
            interface,
            device,
            sockets,
            handle,
            script,
            sent: Vec::new(),
            received: Vec::new(),
            closed: false,
            aborted: false,
            read_at: 0,
            idle_until: None,
            ever_open: false,
        }
    }

    pub fn state(&self) -> tcp::State {
        self.sockets.get::<tcp::Socket>(self.handle).state()
    }

    pub fn debug(&self) -> String {
        let s = self.sockets.get::<tcp::Socket>(self.handle);
        format!(
            "{} sendq {} recvq {}",
            s.state(),
            s.send_queue(),
            s.recv_queue()
        )
    }

    /// Everything the client has to do now.
    pub fn turn(&mut self, now: u64) {
        TSVAL.set((now / 1000) as u32);
        let at = Instant::from_micros(now as i64);
        loop {
            self.interface.poll(at, &mut self.device, &mut self.sockets);
            if !self.act(now) {
                break;
            }
        }
    }

    fn act(&mut self, now: u64) -> bool {
        let s = self.sockets.get_mut::<tcp::Socket>(self.handle);
        self.ever_open |= s.may_send();
        let mut progress = false;
        if s.may_send() && !self.closed {
            let window = match self.script.ping_pong {
                Some(n) => (self.received.len() as u64 / n + 1) * n,
                None => u64::MAX,
            };
            let half = self.script.sends / 2;
            let end = match self.script.idles_us {
                Some(time) => {
                    let said = self.sent.len() as u64 >= half;
                    if said && self.received.len() as u64 >= half {
                        self.idle_until.get_or_insert(now + time);
                    }
                    let idle = self.idle_until.is_none_or(|until| now < until);
                    let allowed = if idle { half } else { self.script.sends };
                    allowed.min(window)
                }
                None => self.script.sends.min(window),
            };
            while (self.sent.len() as u64) < end && s.can_send() {
                let from = self.sent.len() as u64;
                let piece: Vec<u8> = (from..end.min(from + 4096))
                    .map(|o| pattern(o, 0x33))
                    .collect();
                let n = s.send_slice(&piece).unwrap();
                self.sent.extend(&piece[..n]);
                progress = true;
            }
        }
        while s.can_recv() {
            let max = match self.script.reads_slowly {
                Some(n) if now >= self.read_at => {
                    self.read_at = now + 3_000;
                    n
                }
                Some(_) => break,
                None => 100_000,
            };
            let mut buf = vec![0; max];
            let n = s.recv_slice(&mut buf).unwrap();
            self.received.extend(&buf[..n]);
            progress = true;
        }
        let all_sent = self.sent.len() as u64 == self.script.sends;
        let received = self.received.len() as u64;
        if self.script.aborts_after.is_some_and(|n| received >= n) && !self.aborted {
            self.aborted = true;
            s.abort();
            return true;
        }
        let close = match self.script.close {
            Close::Sent => all_sent,
            Close::Received(n) => all_sent && received >= n,
            Close::ServerClosed => all_sent && self.ever_open && !s.may_recv() && !s.can_recv(),
        };
        if close && !self.closed && self.ever_open {
            self.closed = true;
            s.close();
            progress = true;
        }
        progress
    }

    pub fn poll_at(&mut self, now: u64) -> Option<u64> {
        let at = Instant::from_micros(now as i64);
        let socket = self
            .interface
            .poll_at(at, &self.sockets)
            .map(|t| t.total_micros() as u64);
        let slow = (self.script.reads_slowly.is_some()
            && self.sockets.get::<tcp::Socket>(self.handle).can_recv())
        .then_some(self.read_at);
        let idle = self.idle_until.filter(|until| *until > now);
        socket.into_iter().chain(slow).chain(idle).min()
    }

    /// The library's own fault, as a client: when a third duplicate ACK finds only its FIN
    /// outstanding, it drops its timer, and never sends that FIN again. (Our stack never shows it
    /// duplicate ACKs then.)
    pub fn forgot_its_fin(&self) -> bool {
        let s = self.sockets.get::<tcp::Socket>(self.handle);
        let closing = [
            tcp::State::FinWait1,
            tcp::State::Closing,
            tcp::State::LastAck,
        ];
        s.send_queue() == 0 && closing.contains(&s.state())
    }

    /// Whether it is through, and has read everything.
    pub fn finished(&self) -> bool {
        let s = self.sockets.get::<tcp::Socket>(self.handle);
        let over = matches!(s.state(), tcp::State::Closed | tcp::State::TimeWait);
        self.ever_open && over && !s.can_recv()
    }
}

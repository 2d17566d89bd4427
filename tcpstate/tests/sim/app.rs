//! Deterministic servers: their output is a function of their input.
#![allow(
    unreachable_pub,
    dead_code,
    reason = "shared: each test uses a part of it"
)]

/// What a server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum App {
    /// Sends `bytes` after an 8-byte request (or at once), then closes or waits for the client.
    Download {
        bytes: u64,
        asks: bool,
        closes: bool,
    },
    /// Sends back what it gets; closes when the client has.
    Echo,
    /// Takes everything; when the client closes, answers with length and hash, and closes.
    Upload,
    /// Greets, closes its side at once, and takes everything.
    ClosesFirst { bytes: u64 },
    /// Breaks the connection off after so many bytes of input.
    Breaks { after: u64 },
}

/// One server's side of one connection.
#[derive(Debug)]
pub struct Server {
    app: App,
    pub input: Vec<u8>,
    pub fin: bool,
    /// Bytes of output that were read from it.
    pub out: u64,
    /// The newest event that it was given.
    pub tag: u64,
    pub end_told: bool,
}

pub fn pattern(offset: u64, salt: u64) -> u8 {
    (offset.wrapping_mul(131) ^ (offset >> 7) ^ salt) as u8
}

pub fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
    })
}

impl Server {
    pub fn new(app: App, tag: u64) -> Self {
        Self {
            app,
            input: Vec::new(),
            fin: false,
            out: 0,
            tag,
            end_told: false,
        }
    }

    /// How much it has said so far, and whether it closes after that.
    pub fn said(&self) -> (u64, bool) {
        match self.app {
            App::Download {
                bytes,
                asks,
                closes,
            } => {
                let go = !asks || self.input.len() >= 8;
                (if go { bytes } else { 0 }, (closes && go) || self.fin)
            }
            App::Echo => (self.input.len() as u64, self.fin),
            App::Upload => (if self.fin { 16 } else { 0 }, self.fin),
            App::ClosesFirst { bytes } => (bytes, true),
            App::Breaks { after } => ((self.input.len() as u64).min(after), false),
        }
    }

    pub fn breaks(&self) -> bool {
        matches!(self.app, App::Breaks { after } if self.input.len() as u64 >= after)
    }

    pub fn read(&mut self, max: usize) -> Vec<u8> {
        let (said, _) = self.said();
        let n = (said - self.out).min(max as u64);
        let bytes = (self.out..self.out + n).map(|o| self.byte(o)).collect();
        self.out += n;
        bytes
    }

    fn byte(&self, o: u64) -> u8 {
        match self.app {
            App::Download { .. } | App::ClosesFirst { .. } => pattern(o, 0x5a),
            App::Echo | App::Breaks { .. } => self.input[o as usize],
            App::Upload => {
                let mut answer = (self.input.len() as u64).to_be_bytes().to_vec();
                answer.extend(hash(&self.input).to_be_bytes());
                answer[o as usize]
            }
        }
    }

    /// What a client that sends `sent` must have got in the end.
    pub fn whole_answer(app: App, sent: &[u8]) -> Vec<u8> {
        let mut server = Self::new(app, 0);
        server.input = sent.to_vec();
        server.fin = true;
        server.read(usize::MAX)
    }
}

//! A plain connection that speaks the ZooKeeper protocol: as little as can be between the clock and
//! the server.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use unbroken_coord::wire::{
    Acl, ConnectRequest, ConnectResponse, CreateMode, CreateOp, ErrorCode, REPLY_BYTES_MAX,
    ReplyHeader, Request, WatcherEvent, encode_connect_request, encode_request, split_frame, xid,
};

/// How long an answer may take before a server counts as dead, and how long a handshake.
const PATIENCE: Duration = Duration::from_secs(10);
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);

/// What takes a session up again.
#[derive(Debug, Clone)]
pub(super) struct Credentials {
    pub(super) session: i64,
    password: Option<Bytes>,
    last_zxid: i64,
}

/// A session on a connection.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) stream: TcpStream,
    pub(super) credentials: Credentials,
    /// Session timeout that the server granted.
    pub(super) granted: Duration,
    inbound: Inbound,
    xid: i32,
}

/// The session of a [`Link`] has expired.
#[derive(Debug, thiserror::Error)]
#[error("the session has expired")]
pub(super) struct Expired;

/// Bytes that came and were not looked at yet.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    bytes: Vec<u8>,
    start: usize,
}

impl Inbound {
    /// Reads once, at most `buffer`, and says how much.
    pub(super) fn fill(
        &mut self,
        stream: &mut impl io::Read,
        buffer: &mut [u8],
    ) -> io::Result<usize> {
        let count = stream.read(buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(&buffer[..count]);
        Ok(count)
    }

    /// The next whole frame without its length.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<&[u8]>> {
        let rest = &self.bytes[self.start..];
        let Some((frame, _)) = split_frame(rest, REPLY_BYTES_MAX)? else {
            return Ok(None);
        };
        let end = self.start + 4 + frame.len();
        let frame = self.start + 4..end;
        self.start = end;
        Ok(Some(&self.bytes[frame]))
    }
}

impl Link {
    /// Opens a session.
    pub(super) fn open(address: SocketAddr, timeout: Duration) -> anyhow::Result<Self> {
        let credentials = Credentials {
            session: 0,
            password: Some(Bytes::from_static(&[0; 16])),
            last_zxid: 0,
        };
        Self::resume(address, timeout, credentials)
    }

    /// Takes a session up again; [`Expired`] if it is gone.
    pub(super) fn resume(
        address: SocketAddr,
        timeout: Duration,
        credentials: Credentials,
    ) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(HANDSHAKE_MAX))?;
        let request = ConnectRequest {
            protocol_version: 0,
            last_zxid_seen: credentials.last_zxid,
            timeout_ms: i32::try_from(timeout.as_millis())?,
            session_id: credentials.session,
            password: credentials.password.clone(),
            read_only: Some(false),
        };
        let mut link = Self {
            stream,
            credentials,
            granted: Duration::ZERO,
            inbound: Inbound::default(),
            xid: 0,
        };
        link.stream.write_all(&encode_connect_request(&request))?;
        let response = ConnectResponse::decode(&link.frame()?)?;
        let granted = u64::try_from(response.timeout_ms).unwrap_or(0);
        ensure!(granted > 0, Expired);
        link.stream.set_read_timeout(Some(PATIENCE))?;
        link.granted = Duration::from_millis(granted);
        link.credentials.session = response.session_id;
        link.credentials.password = response.password;
        Ok(link)
    }

    /// The number of the next request.
    pub(super) fn next_xid(&mut self) -> i32 {
        self.xid += 1;
        self.xid
    }

    /// The next frame that comes.
    fn frame(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(frame) = self.inbound.next()? {
                return Ok(frame.to_vec());
            }
            self.inbound.fill(&mut self.stream, &mut buffer)?;
        }
    }

    /// Asks, waits, and passes over events. Returns the error that the server answered.
    pub(super) fn call(&mut self, request: &Request) -> anyhow::Result<Option<ErrorCode>> {
        let asked = self.next_xid();
        self.stream.write_all(&encode_request(asked, request))?;
        loop {
            let frame = self.frame()?;
            let (header, _) = ReplyHeader::split(&frame)?;
            if header.xid == xid::NOTIFICATION || header.xid == xid::PING {
                continue;
            }
            ensure!(
                header.xid == asked,
                "request {asked} was answered as {}",
                header.xid
            );
            self.credentials.last_zxid = self.credentials.last_zxid.max(header.zxid);
            return Ok(header.err);
        }
    }

    /// Asks for what must succeed.
    pub(super) fn must(&mut self, request: &Request) -> anyhow::Result<()> {
        match self.call(request)? {
            None => Ok(()),
            Some(code) => bail!("{:?} was refused: {code:?}", request.op()),
        }
    }

    /// The path of the next event.
    pub(super) fn event(&mut self) -> anyhow::Result<String> {
        loop {
            let frame = self.frame()?;
            let (header, body) = ReplyHeader::split(&frame)?;
            if header.xid == xid::NOTIFICATION {
                return Ok(WatcherEvent::decode(body)?.path);
            }
        }
    }

    /// A sign of life. The answer is passed over by whoever reads next.
    pub(super) fn ping(&mut self) -> io::Result<()> {
        self.stream
            .write_all(&encode_request(xid::PING, &Request::Ping))
    }
}

/// Creates `path`, or finds it there.
pub(super) fn ensure_znode(link: &mut Link, path: &str, data: &[u8]) -> anyhow::Result<()> {
    match link.call(&create(path, data, CreateMode::Persistent))? {
        None | Some(ErrorCode::NodeExists) => Ok(()),
        Some(code) => bail!("creating {path} was refused: {code:?}"),
    }
}

pub(super) fn create(path: &str, data: &[u8], mode: CreateMode) -> Request {
    Request::Create {
        op: CreateOp::Create,
        path: path.to_owned(),
        data: Some(Bytes::copy_from_slice(data)),
        acl: Acl::open(),
        flags: mode.flags(),
    }
}

pub(super) fn set(path: &str, data: &[u8]) -> Request {
    Request::SetData {
        path: path.to_owned(),
        data: Some(Bytes::copy_from_slice(data)),
        version: -1,
    }
}

pub(super) fn get(path: &str, watch: bool) -> Request {
    Request::GetData {
        path: path.to_owned(),
        watch,
    }
}

/// Whether the server at `address` leads, by its four-letter word.
pub(super) fn leads(address: SocketAddr) -> anyhow::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(b"srvr")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .with_context(|| format!("asking {address} whether it leads"))?;
    Ok(answer.contains("Mode: leader"))
}

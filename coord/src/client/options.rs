//! How to reach the servers.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;

use crate::tls::ClientTls;
use crate::wire::{PathError, validate_path};

/// The port of a server that does not name one.
const DEFAULT_PORT: u16 = 2181;

/// The same, with TLS.
const DEFAULT_TLS_PORT: u16 = 2281;

/// How to reach the servers, and how patient to be.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnectOptions {
    /// `host:port` of each server, the preferred one first. Names are resolved at every attempt.
    pub hosts: Vec<String>,
    /// Prefix of all paths, invisible to the caller; empty for none.
    pub chroot: String,
    /// Session timeout to ask for; the servers bound it. Rounded to whole ms.
    pub session_timeout: Duration,
    /// After how long a silence a server is given up for another, where that is to be sooner than
    /// the session's timeout asks for (two thirds of it). Apache ZooKeeper grants no session below
    /// two of its ticks, four seconds by default; a caller that cannot wait for so long says so here.
    pub silence_max: Option<Duration>,
    /// How long one server may take to accept and, again, to answer the handshake, which for a
    /// new session is a write of the quorum. Doubled (to 4 s at most) in each round of attempts
    /// that fails, so that it may be short.
    pub attempt_timeout: Duration,
    /// After how long without a connection the next server is tried as well.
    pub stagger: Duration,
    /// Longest pause between rounds of attempts, once every server has failed. The first is a
    /// few ms, and each is twice the one before.
    pub retry_pause_max: Duration,
    /// How long a request may take, waiting for a connection included. `None`: for ever.
    pub request_timeout: Option<Duration>,
    /// Whether to open a new session when the session has expired. Requests under way and
    /// watches fail with `SessionExpired` all the same, and the ephemerals are gone.
    pub renew_session: bool,
    /// Whether a server that is cut off from its quorum will do, for reads that may be stale, while
    /// no other is found. See [`super::SessionState::ConnectedReadOnly`].
    pub read_only: bool,
    /// Who the session's holder is: proven on every connection before anything else is asked.
    pub identities: Vec<Identity>,
    /// TLS, if the servers speak it: whom to trust, and who the client is.
    pub tls: Option<ClientTls>,
}

/// Something that a session's holder can prove to be.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// `digest`, ...
    pub scheme: String,
    /// What the scheme wants.
    pub auth: Bytes,
}

impl Identity {
    /// The scheme `digest`: a name and a password, of which the servers keep a hash. It goes over
    /// the network as it is, so use TLS where others listen.
    pub fn digest(user: &str, password: &str) -> Self {
        Self {
            scheme: "digest".to_owned(),
            auth: format!("{user}:{password}").into(),
        }
    }
}

/// Without the secret.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("scheme", &self.scheme)
            .finish_non_exhaustive()
    }
}

impl ConnectOptions {
    /// Options for these servers, the preferred one first: a session of 10 s, requests that wait
    /// at most 30 s, no chroot, no renewal.
    pub fn new(hosts: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            hosts: hosts.into_iter().map(Into::into).collect(),
            chroot: String::new(),
            session_timeout: Duration::from_secs(10),
            silence_max: None,
            attempt_timeout: Duration::from_millis(250),
            stagger: Duration::from_millis(20),
            retry_pause_max: Duration::from_millis(100),
            request_timeout: Some(Duration::from_secs(30)),
            renew_session: false,
            read_only: false,
            identities: Vec::new(),
            tls: None,
        }
    }

    /// Sets [`Self::session_timeout`].
    #[must_use]
    pub fn session_timeout(mut self, timeout: Duration) -> Self {
        self.session_timeout = timeout;
        self
    }

    /// Sets [`Self::request_timeout`].
    #[must_use]
    pub fn request_timeout(mut self, timeout: Option<Duration>) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// Sets [`Self::silence_max`].
    #[must_use]
    pub fn silence_max(mut self, silence: Duration) -> Self {
        self.silence_max = Some(silence);
        self
    }

    /// Sets [`Self::attempt_timeout`].
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = timeout;
        self
    }

    /// Sets [`Self::renew_session`].
    #[must_use]
    pub fn renew_session(mut self, renew: bool) -> Self {
        self.renew_session = renew;
        self
    }

    /// Sets [`Self::read_only`].
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Adds to [`Self::identities`].
    #[must_use]
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identities.push(identity);
        self
    }

    /// Sets [`Self::tls`]. What is wrong with the files is said in the log, at each attempt to
    /// connect; [`ClientTls::check`] says it at once.
    #[must_use]
    pub fn tls(mut self, tls: ClientTls) -> Self {
        self.tls = Some(tls);
        self
    }
}

/// Why a connection string cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConnectStringError {
    /// It names no server.
    #[error("no server named; expected host:port,host:port/chroot")]
    NoServer,
    /// A port is not a number from 1 to 65535.
    #[error("{0:?} has no port between 1 and 65535")]
    BadPort(String),
    /// `zks://` does not say whom to trust, or says what cannot be understood.
    #[error(
        "zks:// is followed by host:port,host:port/chroot?ca=FILE, and by &cert=FILE&key=FILE \
         and &name=NAME where they are needed: {0}"
    )]
    BadTls(String),
    /// The chroot is not a path.
    #[error("chroot: {0}")]
    BadChroot(#[from] PathError),
}

impl FromStr for ConnectOptions {
    type Err = ConnectStringError;

    /// Reads ZooKeeper's connection string, `host:port,host:port/chroot`; `zk://` may stand
    /// before it, and a missing port is 2181. IPv6 addresses stand in brackets.
    ///
    /// `zks://host:port,host:port/chroot?ca=FILE` is TLS: `ca` holds the authorities to trust,
    /// `cert` and `key` the client's own certificate, and `name` is what the servers' certificates
    /// show where it is not the host. A missing port is 2281 then.
    fn from_str(text: &str) -> Result<Self, ConnectStringError> {
        let (text, tls, port) = match text.strip_prefix("zks://") {
            None => (
                text.strip_prefix("zk://").unwrap_or(text),
                None,
                DEFAULT_PORT,
            ),
            Some(text) => {
                let (text, files) = text.split_once('?').unwrap_or((text, ""));
                (text, Some(tls_files(files)?), DEFAULT_TLS_PORT)
            }
        };
        let (hosts, chroot) = match text.find('/') {
            Some(slash) => text.split_at(slash),
            None => (text, ""),
        };
        if !chroot.is_empty() {
            validate_path(chroot)?;
        }
        let hosts = hosts
            .split(',')
            .map(str::trim)
            .filter(|host| !host.is_empty())
            .map(|host| with_port(host, port))
            .collect::<Result<Vec<_>, _>>()?;
        if hosts.is_empty() {
            return Err(ConnectStringError::NoServer);
        }
        let chroot = if chroot == "/" { "" } else { chroot };
        Ok(Self {
            chroot: chroot.to_owned(),
            tls,
            ..Self::new(hosts)
        })
    }
}

fn tls_files(text: &str) -> Result<ClientTls, ConnectStringError> {
    let bad = |reason: String| ConnectStringError::BadTls(reason);
    let (mut ca, mut cert, mut key, mut name) = (None, None, None, None);
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (what, value) = pair.split_once('=').unwrap_or((pair, ""));
        let place = match what {
            "ca" => &mut ca,
            "cert" => &mut cert,
            "key" => &mut key,
            "name" => &mut name,
            other => return Err(bad(format!("{other:?} is none of them"))),
        };
        if value.is_empty() || place.replace(value).is_some() {
            return Err(bad(format!("{what} once, with a value")));
        }
    }
    let mut tls = ClientTls::new(ca.ok_or_else(|| bad("ca is missing".to_owned()))?);
    match (cert, key) {
        (Some(cert), Some(key)) => tls = tls.identity(cert, key),
        (None, None) => {}
        _ => return Err(bad("cert and key go together".to_owned())),
    }
    tls.server_name = name.map(str::to_owned);
    Ok(tls)
}

fn with_port(host: &str, port: u16) -> Result<String, ConnectStringError> {
    let bad = || ConnectStringError::BadPort(host.to_owned());
    match host.rsplit_once(':') {
        // The last colon of a bracketed address without port stands inside the brackets.
        Some((name, port)) if !port.ends_with(']') => {
            let port: u16 = port.parse().map_err(|_| bad())?;
            if name.is_empty() || port == 0 {
                return Err(bad());
            }
            Ok(host.to_owned())
        }
        _ => Ok(format!("{host}:{port}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_strings() {
        let read = |text: &str| {
            text.parse::<ConnectOptions>()
                .map(|options| (options.hosts.join(","), options.chroot))
        };
        let ok = |hosts: &str, chroot: &str| Ok((hosts.to_owned(), chroot.to_owned()));
        assert_eq!(read("a:1,b:2"), ok("a:1,b:2", ""));
        assert_eq!(read("zk://a,b:2/x/y"), ok("a:2181,b:2", "/x/y"));
        assert_eq!(read("[::1]:7,[::2]/"), ok("[::1]:7,[::2]:2181", ""));
        assert_eq!(read(" a:1 , b:2"), ok("a:1,b:2", ""));
        assert_eq!(read(""), Err(ConnectStringError::NoServer));
        assert_eq!(read("/x"), Err(ConnectStringError::NoServer));
        assert_eq!(read("a:0"), Err(ConnectStringError::BadPort("a:0".into())));
        assert_eq!(read("a:x"), Err(ConnectStringError::BadPort("a:x".into())));
        assert_eq!(read("a:1/x/"), Err(PathError::TrailingSlash.into()));
        assert_eq!(read("zks://a,b:2/x?ca=/ca.pem"), ok("a:2281,b:2", "/x"));
    }

    #[test]
    fn tls_in_connection_strings() {
        let read = |text: &str| text.parse::<ConnectOptions>().map(|options| options.tls);
        let tls = ClientTls::new("/ca")
            .identity("/cert", "/key")
            .server_name("zk");
        let text = "zks://a/x?ca=/ca&cert=/cert&key=/key&name=zk";
        assert_eq!(read(text), Ok(Some(tls)));
        assert_eq!(read("zk://a/x"), Ok(None));
        for bad in [
            "",
            "?cert=/c&key=/k",
            "?ca=/a&cert=/c",
            "?ca=",
            "?ca=/a&ca=/b",
            "?ca=/a&x=1",
        ] {
            let read = read(&format!("zks://a{bad}"));
            assert!(matches!(read, Err(ConnectStringError::BadTls(_))), "{bad}");
        }
    }
}

//! TLS for clients and between servers: which files it takes, and what is wrong with them.
//!
//! Certificates and keys are PEM files, and are read again when they change: a renewed certificate
//! is used for the next connection, and those that are there go on. A file that has become unusable
//! is complained of, and the one before is used on.

mod reload;
mod subject;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::ServerCertVerifier;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::{ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};

pub(crate) use reload::Reloading;
pub(crate) use subject::subject;

/// What a server asks of its clients' certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ClientAuth {
    /// Nothing.
    #[default]
    None,
    /// Who shows one is who it says (scheme `x509`), and one that the authority has not signed is
    /// refused; nobody has to show one.
    Request,
    /// Everybody has to show one.
    Require,
}

/// The files of a server, and what it does with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// Its certificate, and those between it and the authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities that sign clients' and peers' certificates.
    pub ca: Option<PathBuf>,
    /// What clients have to show.
    pub client_auth: ClientAuth,
    /// Whether the clients' port takes connections without TLS as well.
    pub plain: bool,
    /// Whether servers speak TLS to each other: both sides show a certificate that the authority
    /// has signed and that names the server (as a DNS name). The cluster's key is needed all the
    /// same.
    pub peers: bool,
}

impl ServerTls {
    /// TLS for clients, who need no certificate; without TLS they are served as well.
    #[must_use]
    pub fn new(cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self {
            cert: cert.into(),
            key: key.into(),
            ca: None,
            client_auth: ClientAuth::None,
            plain: true,
            peers: false,
        }
    }

    /// Reads the files and finds out what is wrong with them.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn check(&self) -> Result<(), TlsError> {
        self.for_clients()?;
        if self.peers {
            self.for_peers()?;
        }
        Ok(())
    }

    fn files(&self) -> Vec<PathBuf> {
        let files = [&self.cert, &self.key].into_iter().chain(&self.ca);
        files.cloned().collect()
    }

    fn for_clients(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let verifier = match self.client_auth {
            ClientAuth::None => None,
            ClientAuth::Request => Some((self.authority("client_auth")?, true)),
            ClientAuth::Require => Some((self.authority("client_auth")?, false)),
        };
        let accept = accepting(&self.cert, &self.key, verifier)?;
        Ok(Arc::new(accept))
    }

    fn for_peers(&self) -> Result<PeerTls, TlsError> {
        let ca = self.authority("peers")?;
        Ok(PeerTls {
            accept: Arc::new(accepting(&self.cert, &self.key, Some((ca, false)))?),
            dial: Arc::new(dialling(ca, Some((&self.cert, &self.key)))?),
        })
    }

    fn authority(&self, needed_by: &'static str) -> Result<&Path, TlsError> {
        let ca = self.ca.as_deref();
        ca.ok_or(TlsError::NoAuthority { needed_by })
    }

    /// What connections of clients take, and of peers.
    pub(crate) fn load_for_clients(&self) -> Result<Reloading<Arc<ServerConfig>>, TlsError> {
        let this = self.clone();
        Reloading::new(self.files(), move || this.for_clients())
    }

    pub(crate) fn load_for_peers(&self) -> Result<Reloading<PeerTls>, TlsError> {
        let this = self.clone();
        Reloading::new(self.files(), move || this.for_peers())
    }
}

/// Both ends of a link between servers.
#[derive(Clone, Debug)]
pub(crate) struct PeerTls {
    pub(crate) accept: Arc<ServerConfig>,
    pub(crate) dial: Arc<ClientConfig>,
}

/// The files of a client, and whom it expects.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientTls {
    /// The authorities that sign the servers' certificates.
    pub ca: PathBuf,
    /// The client's certificate and private key, if it has one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that the servers' certificates have to show, where it is not the host's.
    pub server_name: Option<String>,
}

impl ClientTls {
    /// Servers have to show a certificate that this authority has signed.
    #[must_use]
    pub fn new(ca: impl Into<PathBuf>) -> Self {
        Self {
            ca: ca.into(),
            identity: None,
            server_name: None,
        }
    }

    /// Sets [`Self::identity`].
    #[must_use]
    pub fn identity(mut self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.identity = Some((cert.into(), key.into()));
        self
    }

    /// Sets [`Self::server_name`].
    #[must_use]
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Reads the files and finds out what is wrong with them.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn check(&self) -> Result<(), TlsError> {
        self.config()?;
        if let Some(name) = &self.server_name {
            server_name(name)?;
        }
        Ok(())
    }

    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let identity = self.identity.as_ref();
        let identity = identity.map(|(cert, key)| (cert.as_path(), key.as_path()));
        Ok(Arc::new(dialling(&self.ca, identity)?))
    }

    /// As [`Self::config`], read when it is first asked for.
    pub(crate) fn load(&self) -> Reloading<Arc<ClientConfig>> {
        let mut files = vec![self.ca.clone()];
        if let Some((cert, key)) = &self.identity {
            files.extend([cert.clone(), key.clone()]);
        }
        let this = self.clone();
        Reloading::later(files, move || this.config())
    }

    /// Whom to expect at `host`, a name or an address without its port.
    pub(crate) fn expected(&self, host: &str) -> Result<ServerName<'static>, TlsError> {
        server_name(self.server_name.as_deref().unwrap_or(host))
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls")
            .field("ca", &self.ca)
            .field("cert", &self.identity.as_ref().map(|(cert, _)| cert))
            .field("server_name", &self.server_name)
            .finish_non_exhaustive()
    }
}

/// What is wrong with the files of TLS, or with a name.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{what} {}: {source}", path.display())]
    Read {
        /// `cert`, `key` or `ca`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not PEM, or holds nothing of what it should.
    #[error("{what} {}: {reason}", path.display())]
    Content {
        /// `cert`, `key` or `ca`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate and key do not go together, or cannot be used.
    #[error("cert {} and key {}: {source}", cert.display(), key.display())]
    Pair {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// Certificates are to be verified and nothing says by whom they are signed.
    #[error("{needed_by} needs ca, the authorities that sign the certificates")]
    NoAuthority {
        /// The setting that needs it.
        needed_by: &'static str,
    },
    /// What a certificate should show is neither a DNS name nor an address.
    #[error("{0:?} is neither a DNS name nor an address")]
    Name(String),
}

impl TlsError {
    /// The setting that is to blame: `cert`, `key`, `ca`, `client_auth`, `peers`, `server_name`.
    #[must_use]
    pub fn setting(&self) -> &'static str {
        match self {
            Self::Read { what, .. } | Self::Content { what, .. } => what,
            Self::Pair { .. } => "cert",
            Self::NoAuthority { needed_by } => needed_by,
            Self::Name(_) => "server_name",
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn accepting(
    cert: &Path,
    key: &Path,
    clients: Option<(&Path, bool)>,
) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider knows the default versions");
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some((ca, optional)) => {
            let roots = Arc::new(roots(ca)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
            let verifier = if optional {
                verifier.allow_unauthenticated()
            } else {
                verifier
            };
            let verifier = verifier.build().map_err(|error| unusable(ca, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    builder
        .with_single_cert(certificates("cert", cert)?, private_key(key)?)
        .map_err(|source| pair(cert, key, source))
}

fn dialling(ca: &Path, identity: Option<(&Path, &Path)>) -> Result<ClientConfig, TlsError> {
    let roots = Arc::new(roots(ca)?);
    let verifier: Arc<dyn ServerCertVerifier> =
        WebPkiServerVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| unusable(ca, &error))?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider knows the default versions")
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    match identity {
        None => Ok(builder.with_no_client_auth()),
        Some((cert, key)) => builder
            .with_client_auth_cert(certificates("cert", cert)?, private_key(key)?)
            .map_err(|source| pair(cert, key, source)),
    }
}

fn unusable(ca: &Path, error: &VerifierBuilderError) -> TlsError {
    TlsError::Content {
        what: "ca",
        path: ca.to_owned(),
        reason: error.to_string(),
    }
}

fn pair(cert: &Path, key: &Path, source: rustls::Error) -> TlsError {
    TlsError::Pair {
        cert: cert.to_owned(),
        key: key.to_owned(),
        source,
    }
}

fn roots(ca: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("ca", ca)? {
        roots.add(certificate).map_err(|error| TlsError::Content {
            what: "ca",
            path: ca.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(roots)
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(what, path)?;
    let certificates = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| malformed(what, path, &error))?;
    if certificates.is_empty() {
        return Err(TlsError::Content {
            what,
            path: path.to_owned(),
            reason: "holds no certificate".to_owned(),
        });
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read("key", path)?).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::Content {
            what: "key",
            path: path.to_owned(),
            reason: "holds no private key".to_owned(),
        },
        error => malformed("key", path, &error),
    })
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read {
        what,
        path: path.to_owned(),
        source,
    })
}

fn malformed(what: &'static str, path: &Path, error: &pem::Error) -> TlsError {
    TlsError::Content {
        what,
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

/// What a certificate has to show.
pub(crate) fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(bare.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))
}

/// Whether a peer's certificate shows its name.
pub(crate) fn names(certificate: &CertificateDer<'_>, name: &str) -> bool {
    let Ok(name) = server_name(name) else {
        return false;
    };
    ParsedCertificate::try_from(certificate)
        .is_ok_and(|parsed| rustls::client::verify_server_name(&parsed, &name).is_ok())
}

//! TLS on three real servers: for clients, and between the servers.

#![expect(clippy::unwrap_used, reason = "a test")]

#[allow(dead_code, reason = "each test file uses its part of it")]
mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::Cluster;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use unbroken_coord::client::{Client, ClientError, ConnectOptions};
use unbroken_coord::driver::{self, ServerConfig, StartError};
use unbroken_coord::tls::{ClientAuth, ClientTls, ServerTls};
use unbroken_coord::wire::{Acl, CreateMode, ErrorCode, Id, perms};

/// An authority, and the files of those it has signed.
struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let pid = std::process::id();
        let dir = std::env::temp_dir().join(format!("unbroken-coord-tls-{pid}-{name}"));
        std::fs::create_dir_all(&dir).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let cert = params.self_signed(&key).unwrap();
        std::fs::write(dir.join("ca.pem"), cert.pem()).unwrap();
        let issuer = Issuer::new(params, key);
        Self { dir, issuer }
    }

    fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// A certificate that shows these names, and its key, in files of this name.
    fn sign(&self, file: &str, names: &[&str]) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Us");
        params.distinguished_name.push(DnType::CommonName, file);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let (cert_file, key_file) = self.files(file);
        std::fs::write(&cert_file, cert.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        (cert_file, key_file)
    }

    fn files(&self, file: &str) -> (PathBuf, PathBuf) {
        (
            self.dir.join(format!("{file}.pem")),
            self.dir.join(format!("{file}.key")),
        )
    }

    /// What server `config` needs, with certificates for it.
    fn give(&self, config: &mut ServerConfig) {
        let (cert, key) = self.sign(&config.name, &["zk.test", &config.name]);
        let mut tls = ServerTls::new(cert, key);
        tls.ca = Some(self.ca());
        config.tls = Some(tls);
    }

    fn client(&self) -> ClientTls {
        ClientTls::new(self.ca()).server_name("zk.test")
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn options(cluster: &Cluster, tls: Option<ClientTls>) -> ConnectOptions {
    let mut options = ConnectOptions::new(cluster.hosts("a"))
        .session_timeout(Duration::from_secs(8))
        .attempt_timeout(Duration::from_secs(2));
    options.tls = tls;
    options
}

fn tls_of(config: &mut ServerConfig) -> &mut ServerTls {
    config.tls.as_mut().expect("it was given")
}

/// Waits until whichever server the client has by now knows all that was committed. A request that was on its way when the
/// client's server died ends with the connection, as it must.
async fn reach(client: &Client) {
    while let Err(error) = client.sync("/").await {
        assert_eq!(error, ClientError::ConnectionLoss);
    }
}

async fn refused(options: ConnectOptions) {
    let options = options.request_timeout(Some(Duration::from_millis(700)));
    let refused = Client::connect(options).await.err();
    assert_eq!(refused, Some(ClientError::NotConnected));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_clients_port_takes_tls_and_certificates_are_identities() {
    let authority = Authority::new("clients");
    let stranger = Authority::new("stranger");
    let cluster = Cluster::start(|config| {
        authority.give(config);
        tls_of(config).client_auth = ClientAuth::Request;
    })
    .await;
    // Who shows nothing is nobody, with TLS and without.
    let plain = Client::connect(options(&cluster, None)).await.unwrap();
    let nobody = options(&cluster, Some(authority.client()));
    let nobody = Client::connect(nobody).await.unwrap();
    let (cert, key) = authority.sign("me", &["me"]);
    let me = authority.client().identity(&cert, &key);
    let me = Client::connect(options(&cluster, Some(me))).await.unwrap();
    let mine = vec![Acl {
        perms: perms::ALL,
        id: Id {
            scheme: "x509".into(),
            id: "CN=me,O=Us".into(),
        },
    }];
    me.create("/mine", "x", CreateMode::Persistent, mine)
        .await
        .unwrap();
    for other in [&plain, &nobody] {
        other.sync("/").await.unwrap();
        let refused = other.get("/mine").await.err();
        assert_eq!(refused, Some(ClientError::Zk(ErrorCode::NoAuth)));
    }
    let who = me.who_am_i().await.unwrap();
    assert!(who.iter().any(|id| id.scheme == "x509"), "{who:?}");
    assert_eq!(me.get("/mine").await.unwrap().0, "x");

    // More than TLS and the socket hold, both ways, and many at once.
    let large = vec![7_u8; 900_000];
    let path = |i: usize| format!("/large-{i}");
    for i in 0..8 {
        nobody
            .create(&path(i), large.clone(), CreateMode::Persistent, Acl::open())
            .await
            .unwrap();
    }
    let reads = (0..64).map(|i| {
        let (client, large) = (nobody.clone(), large.clone());
        tokio::spawn(async move {
            let (data, _) = client.get(&path(i % 8)).await.unwrap();
            assert!(data == large);
        })
    });
    for read in reads.collect::<Vec<_>>() {
        read.await.unwrap();
    }

    // One whose authority signs nobody here, one who trusts another, and one who expects another.
    let (cert, key) = stranger.sign("they", &["they"]);
    refused(options(
        &cluster,
        Some(authority.client().identity(cert, key)),
    ))
    .await;
    refused(options(&cluster, Some(stranger.client()))).await;
    refused(options(
        &cluster,
        Some(authority.client().server_name("other.test")),
    ))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_can_be_required_and_plain_connections_refused() {
    let authority = Authority::new("required");
    let cluster = Cluster::start(|config| {
        authority.give(config);
        let tls = tls_of(config);
        (tls.client_auth, tls.plain) = (ClientAuth::Require, false);
    })
    .await;
    refused(options(&cluster, None)).await;
    refused(options(&cluster, Some(authority.client()))).await;
    let (cert, key) = authority.sign("me", &["me"]);
    let me = authority.client().identity(cert, key);
    let me = Client::connect(options(&cluster, Some(me))).await.unwrap();
    me.sync("/").await.unwrap();
    me.close().await.unwrap();
}

/// Silent in the middle of the handshake, or before it: dropped after a time, and nobody waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_handshake_ends_and_keeps_nobody_waiting() {
    let authority = Authority::new("silent");
    let cluster = Cluster::start(|config| {
        authority.give(config);
        config.secure_listen = Some((config.client_listen.ip(), 2281).into());
    })
    .await;
    let (_, server) = cluster.running().next().unwrap();
    let mut silent = Vec::new();
    for address in [server.client_address(), server.secure_address().unwrap()] {
        for said in [&b""[..], &[0x16, 3, 1, 2, 0, 1]] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(said).await.unwrap();
            silent.push(stream);
        }
    }
    let mut options = options(&cluster, Some(authority.client()));
    options.hosts = vec![server.secure_address().unwrap().to_string()];
    let client = Client::connect(options).await.unwrap();
    client.sync("/").await.unwrap();
    // The clients' port still answers without TLS.
    let mut stream = TcpStream::connect(server.client_address()).await.unwrap();
    stream.write_all(b"ruok").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "imok");
    for mut stream in silent {
        let mut rest = Vec::new();
        // It may end by a reset as well: what matters is that it ends.
        let _ = stream.read_to_end(&mut rest).await;
    }
    client.sync("/").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_certificates_are_used_for_the_next_connection() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let cluster = Cluster::start(|config| old.give(config)).await;
    let before = options(&cluster, Some(old.client()));
    let before = Client::connect(before).await.unwrap();
    let copy = |from: &Path, to: &Path| std::fs::copy(from, to).map(drop).unwrap();
    for name in ["a", "b", "c"] {
        let (cert, key) = new.sign(name, &["zk.test", name]);
        let (old_cert, old_key) = old.files(name);
        copy(&cert, &old_cert);
        copy(&key, &old_key);
    }
    // The servers look at their files once a second.
    let after = options(&cluster, Some(new.client()));
    let after = Client::connect(after).await.unwrap();
    after.sync("/").await.unwrap();
    // Connections that are there go on.
    assert!(before.session_id().is_some());
    before.sync("/").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_speak_tls_to_each_other() {
    let authority = Authority::new("peers");
    let mut cluster = Cluster::start(|config| {
        authority.give(config);
        tls_of(config).peers = true;
    })
    .await;
    let client = cluster.client("a", 8000).await;
    for i in 0..20 {
        client
            .create(&format!("/{i}"), "", CreateMode::Persistent, Acl::open())
            .await
            .unwrap();
    }
    let leader = cluster.leader().await;
    cluster.kill(&leader);
    reach(&client).await;
    cluster.up(&leader).await;
    reach(&client).await;
    assert_eq!(client.children("/").await.unwrap().len(), 21);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_the_files_is_said_at_the_start() {
    let authority = Authority::new("wrong");
    let any = "127.0.0.1:0".parse().unwrap();
    let peers = [("a".to_owned(), any)].into();
    let data_dir = authority.dir.join("data");
    let mut config = ServerConfig::new("a", any, peers, data_dir, [7; 32]);
    config.secure_listen = Some(any);
    let error = driver::start(config.clone())
        .await
        .expect_err("no certificates");
    assert!(matches!(error, StartError::NoCertificates), "{error}");
    config.tls = Some(ServerTls::new("/none.pem", "/none.key"));
    let error = driver::start(config).await.expect_err("no file");
    assert!(
        error.to_string().starts_with("tls: cert /none.pem: "),
        "{error}"
    );
}

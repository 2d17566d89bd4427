//! A way to the servers on which answers get lost, and with each the connection: what was asked for is
//! done, and nobody hears of it.

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

use unbroken_coord::client::{Client, ConnectOptions};

use crate::Dice;
use crate::common::Cluster;

/// Until it is dropped.
pub(crate) struct Lossy(AbortHandle);

impl Drop for Lossy {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Lossy {
    /// A client that loses every sixth answer or so.
    pub(crate) async fn client(cluster: &Cluster, server: &str, seed: u64) -> (Client, Self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let servers = cluster.hosts(server);
        let task = tokio::spawn(async move {
            let mut dice = Dice(seed);
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, servers.clone(), Dice(dice.below(1 << 30))));
            }
        });
        let mut options = ConnectOptions::new([address.to_string()]);
        options.session_timeout = std::time::Duration::from_secs(8);
        let client = Client::connect(options).await.unwrap();
        (client, Self(task.abort_handle()))
    }
}

async fn pass(client: TcpStream, servers: Vec<String>, mut dice: Dice) {
    let mut server = None;
    for host in servers {
        server = TcpStream::connect(host).await.ok();
        if server.is_some() {
            break;
        }
    }
    let Some(server) = server else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let forth = tokio::spawn(async move { copy(&mut from_client, &mut to_server).await });
    let mut answers = 0;
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(bytes @ 1..) = from_server.read(&mut buffer).await {
        answers += 1;
        // The first one is the handshake's.
        if answers > 1 && dice.below(6) == 0 {
            break;
        }
        if to_client.write_all(&buffer[..bytes]).await.is_err() {
            break;
        }
    }
    forth.abort();
}

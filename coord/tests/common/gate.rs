//! A way to a server that can be shut: what a client sees when the network fails.

use std::net::SocketAddr;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Listens for clients and passes them on to the servers, the first one that takes them.
pub(crate) struct Gate {
    address: SocketAddr,
    open: watch::Sender<bool>,
    task: tokio::task::AbortHandle,
}

impl Gate {
    /// A gate to these servers, open.
    pub(crate) async fn to(servers: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (open, state) = watch::channel(true);
        let task = tokio::spawn(serve(listener, servers, state)).abort_handle();
        Self {
            address,
            open,
            task,
        }
    }

    /// `host:port` for clients.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    /// Ends every connection, and lets none through.
    pub(crate) fn shut(&self) {
        self.open.send_replace(false);
    }

    /// Lets new connections through.
    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, servers: Vec<String>, state: watch::Receiver<bool>) {
    while let Ok((client, _)) = listener.accept().await {
        let (mut state, servers) = (state.clone(), servers.clone());
        if !*state.borrow() {
            continue; // dropped at once
        }
        tokio::spawn(async move {
            let shut = state.wait_for(|open| !*open);
            tokio::select! {
                _ = shut => {}
                () = pass(client, &servers) => {}
            }
        });
    }
}

async fn pass(mut client: TcpStream, servers: &[String]) {
    for server in servers {
        if let Ok(mut server) = TcpStream::connect(server).await {
            let _ = server.set_nodelay(true);
            let _ = client.set_nodelay(true);
            let _ = copy_bidirectional(&mut client, &mut server).await;
            return;
        }
    }
}

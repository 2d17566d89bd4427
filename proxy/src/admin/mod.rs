//! The page for operators and scripts: `/`, `/status.json`, `/metrics`, `/healthz`; and, from this machine
//! alone, `POST /handover` and `POST /maintenance`.
//!
//! It listens on the loopback address unless it is configured otherwise. What it shows is for everybody
//! who can reach it.

mod client;
mod page;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::Context as _;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse};
use axum::routing::{get, post as on_post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use client::{fetch_status, post};

use crate::metrics::NodeMetrics;
use crate::operator::{HandOver, Maintenance, Operator, Outcome};
use crate::status::{Board, Role, Status};

/// What the page shows.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The node's status.
    pub board: Board,
    /// The node's metrics.
    pub metrics: Arc<NodeMetrics>,
    /// Carries out requests; `None` where there is nothing to move (a coordinator alone).
    pub operator: Option<Operator>,
}

/// Listens on `address`, so that an occupied port is found before anything else starts.
///
/// # Errors
/// The address cannot be listened on; the message names it and `admin.listen`.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on admin.listen = \"{address}\""))
}

/// Serves the page until `shutdown` turns true or its sender is gone.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    listener: TcpListener,
    admin: Admin,
    mut shutdown: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/", get(status_page))
        .route("/status.json", get(status_json))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/handover", on_post(handover))
        .route("/maintenance", on_post(maintenance))
        .with_state(admin)
        .into_make_service_with_connect_info::<Ends>();
    // Connections are dropped, not drained, when the node stops: every answer is short.
    tokio::select! {
        result = async { axum::serve(listener, router).await } => result.context("serving the admin page"),
        _ = shutdown.wait_for(|stop| *stop) => Ok(()),
    }
}

async fn status_page(State(admin): State<Admin>) -> impl IntoResponse {
    (
        [(header::CACHE_CONTROL, "no-store")],
        Html(page::render(&admin.board.read())),
    )
}

async fn status_json(State(admin): State<Admin>) -> impl IntoResponse {
    (
        [(header::CACHE_CONTROL, "no-store")],
        Json(admin.board.read()),
    )
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (
        [(header::CONTENT_TYPE, OPEN_METRICS)],
        admin.metrics.encode(),
    )
}

/// The two ends of a connection to the page.
#[derive(Debug, Clone, Copy)]
struct Ends {
    peer: IpAddr,
    /// `None`: the connection was gone before it could be asked.
    local: Option<IpAddr>,
}

impl Connected<IncomingStream<'_, TcpListener>> for Ends {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        let local = stream.io().local_addr().ok();
        Self {
            peer: stream.remote_addr().ip().to_canonical(),
            local: local.map(|address| address.ip().to_canonical()),
        }
    }
}

impl Ends {
    /// A process that connects to an address of its own machine does so from that very address.
    fn same_machine(self) -> bool {
        self.peer.is_loopback() || self.local == Some(self.peer)
    }
}

type Refusal = (StatusCode, String);

/// Who may change something: processes of this machine, and no web page through a browser on it.
fn operator(admin: Admin, ends: Ends, headers: &HeaderMap) -> Result<Operator, Refusal> {
    if !ends.same_machine() {
        let why = format!("only from the node's own machine, not from {}\n", ends.peer);
        return Err((StatusCode::FORBIDDEN, why));
    }
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(host) = text(header::HOST).filter(|host| is_numeric(host)) else {
        let why = "the header Host is neither an address nor localhost\n".to_owned();
        return Err((StatusCode::FORBIDDEN, why));
    };
    let origin = text(header::ORIGIN).and_then(|origin| origin.split_once("://"));
    if headers.contains_key(header::ORIGIN) && origin.is_none_or(|(_, origin)| origin != host) {
        let why = "the header Origin names another site\n".to_owned();
        return Err((StatusCode::FORBIDDEN, why));
    }
    if !headers.contains_key(client::OPERATOR_HEADER) {
        let why = format!("the header {} is missing\n", client::OPERATOR_HEADER);
        return Err((StatusCode::FORBIDDEN, why));
    }
    let none = || (StatusCode::NOT_FOUND, "no services here\n".to_owned());
    admin.operator.ok_or_else(none)
}

/// Whether a `Host` says where the page is by itself. A name may be one that a web site has pointed at
/// this machine, and then a browser takes the page for a part of that site.
fn is_numeric(host: &str) -> bool {
    host.parse::<SocketAddr>().is_ok()
        || format!("{host}:80").parse::<SocketAddr>().is_ok()
        || host.split(':').next() == Some("localhost")
}

/// A request that makes no sense on this node.
fn refused(why: String) -> Refusal {
    (StatusCode::CONFLICT, why + "\n")
}

async fn handover(
    State(admin): State<Admin>,
    ConnectInfo(ends): ConnectInfo<Ends>,
    headers: HeaderMap,
    Json(request): Json<HandOver>,
) -> Result<Json<Outcome>, Refusal> {
    let operator = operator(admin, ends, &headers)?;
    operator
        .hand_over(&request)
        .await
        .map(Json)
        .map_err(refused)
}

async fn maintenance(
    State(admin): State<Admin>,
    ConnectInfo(ends): ConnectInfo<Ends>,
    headers: HeaderMap,
    Json(request): Json<Maintenance>,
) -> Result<Json<Outcome>, Refusal> {
    let operator = operator(admin, ends, &headers)?;
    operator.maintain(request).await.map(Json).map_err(refused)
}

/// 200 while this node does its part for every service, else 503 with a line for each that it does
/// not. A backup is healthy: what a load balancer in front should ask is `/status.json`.
async fn healthz(State(admin): State<Admin>) -> impl IntoResponse {
    let complaints = complaints(&admin.board.read());
    if complaints.is_empty() {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            complaints.join("\n") + "\n",
        )
    }
}

fn complaints(status: &Status) -> Vec<String> {
    let mut complaints = Vec::new();
    if status.stopping {
        complaints.push("stopping".to_owned());
    }
    for service in &status.services {
        let wrong = match service.role {
            Role::Leader | Role::Backup => continue,
            Role::Joining => "joining",
            Role::Wedged => "between two views",
            Role::Outside => "in no view",
        };
        complaints.push(format!("{}: {wrong}", service.name));
    }
    let coordinator = &status.coordinator;
    // Connections outlive a coordinator that is away; a coordinator that runs alone has nothing else.
    if status.services.is_empty() && coordinator.leader.is_none() {
        complaints.push("coordinator: no leader is known".to_owned());
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{Redundancy, ServiceStatus};

    fn example() -> Status {
        let mut service = ServiceStatus::starting("web", "10.98.0.100".parse().unwrap(), &[80]);
        service.role = Role::Backup;
        service.redundancy = Redundancy::Protected;
        service.leader = Some("r2".to_owned());
        let board = Board::new("r1", vec![service]);
        assert!(board.try_update(|status| status.coordinator.zxid = 123));
        board.read()
    }

    #[test]
    fn a_backup_is_healthy_and_an_outsider_is_not() {
        let mut status = example();
        assert_eq!(complaints(&status), Vec::<String>::new());
        status.services[0].role = Role::Outside;
        assert_eq!(complaints(&status), ["web: in no view"]);
        status.stopping = true;
        assert_eq!(complaints(&status), ["stopping", "web: in no view"]);
        status.services.clear();
        assert_eq!(
            complaints(&status),
            ["stopping", "coordinator: no leader is known"]
        );
        status.coordinator.leader = Some("r1".to_owned());
        assert_eq!(complaints(&status), ["stopping"]);
    }

    #[test]
    fn the_page_escapes_what_it_shows() {
        let mut status = example();
        status.services[0].redundancy = Redundancy::Degraded;
        status.services[0].redundancy_reason = Some("<script>alert(1)</script>".to_owned());
        let html = page::render(&status);
        assert!(html.contains("&lt;script&gt;alert(1)"));
        assert!(!html.contains("<script>"));
    }

    #[test]
    fn a_machine_is_known_by_any_of_its_addresses() {
        let ends = |peer: &str, local: &str| Ends {
            peer: peer.parse().unwrap(),
            local: Some(local.parse().unwrap()),
        };
        assert!(ends("10.98.0.11", "10.98.0.11").same_machine());
        assert!(ends("127.0.0.1", "127.0.0.2").same_machine());
        assert!(ends("fd00::11", "fd00::11").same_machine());
        assert!(!ends("10.98.0.12", "10.98.0.11").same_machine());
        let unknown = Ends {
            local: None,
            ..ends("10.98.0.11", "10.98.0.11")
        };
        assert!(!unknown.same_machine());
    }

    #[tokio::test]
    async fn the_page_is_served_and_read_back() {
        let status = example();
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let board = Board::new("r1", status.services.clone());
        let admin = Admin {
            board: board.clone(),
            metrics: Arc::new(NodeMetrics::new("r1")),
            operator: None,
        };
        let (stop, shutdown) = watch::channel(false);
        let server = tokio::spawn(serve(listener, admin, shutdown));

        let read = |path: &'static str| {
            let address = address.to_string();
            tokio::task::spawn_blocking(move || client::get(&address, path))
        };
        let fetch = tokio::task::spawn_blocking(move || fetch_status(&address.to_string()));
        let fetched = fetch.await.unwrap().unwrap();
        assert_eq!(
            fetched,
            Status {
                uptime_ms: fetched.uptime_ms,
                ..board.read()
            }
        );
        let (code, body) = read("/healthz").await.unwrap().unwrap();
        assert_eq!((code, body.as_str()), (200, "ok\n"));
        let (code, body) = read("/").await.unwrap().unwrap();
        assert!(code == 200 && body.contains("10.98.0.100"), "{code} {body}");
        let (code, body) = read("/metrics").await.unwrap().unwrap();
        assert!(code == 200 && body.ends_with("# EOF\n"), "{code} {body}");
        let (code, _) = read("/nothing").await.unwrap().unwrap();
        assert_eq!(code, 404);
        let put = |path: &'static str, json: &'static str| {
            let address = address.to_string();
            tokio::task::spawn_blocking(move || post(&address, path, json).unwrap())
        };
        // There is nothing to be moved here; what is nonsense is said to be.
        let (code, body) = put("/handover", "{}").await.unwrap();
        assert!(code == 404 && body.contains("no services"), "{code} {body}");
        let (code, body) = put("/maintenance", r#"{"off": true}"#).await.unwrap();
        assert!(code == 422 && body.contains("off"), "{code} {body}");
        let raw = |headers: String| {
            let request = format!(
                "POST /handover HTTP/1.0\r\nContent-Type: application/json\r\n{headers}Content-Length: 2\r\n\r\n{{}}"
            );
            tokio::task::spawn_blocking(move || {
                use std::io::{Read as _, Write as _};
                let mut stream = std::net::TcpStream::connect(address).unwrap();
                stream.write_all(request.as_bytes()).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                answer
            })
        };
        let header = client::OPERATOR_HEADER;
        for (headers, code) in [
            (format!("Host: {address}\r\n"), 403),
            (format!("Host: {address}\r\n{header}: 1\r\n"), 404),
            (format!("Host: localhost:9600\r\n{header}: 1\r\n"), 404),
            (format!("Host: [::1]\r\n{header}: 1\r\n"), 404),
            (format!("Host: evil.test:9600\r\n{header}: 1\r\n"), 403),
            (format!("Host: localhost.evil.test\r\n{header}: 1\r\n"), 403),
            (format!("{header}: 1\r\n"), 403),
            (
                format!("Host: {address}\r\nOrigin: http://{address}\r\n{header}: 1\r\n"),
                404,
            ),
            (
                format!("Host: {address}\r\nOrigin: http://evil.test\r\n{header}: 1\r\n"),
                403,
            ),
            (
                format!("Host: {address}\r\nOrigin: null\r\n{header}: 1\r\n"),
                403,
            ),
        ] {
            let answer = raw(headers.clone()).await.unwrap();
            assert!(
                answer.starts_with(&format!("HTTP/1.0 {code}")),
                "{headers}{answer}"
            );
        }

        stop.send(true).unwrap();
        server.await.unwrap().unwrap();
    }
}

//! The page for operators and scripts: `/`, `/status.json`, `/metrics`, `/healthz`.
//!
//! It only reads. It listens on the loopback address unless it is configured otherwise.

mod client;
mod page;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use client::fetch_status;

use crate::metrics::NodeMetrics;
use crate::status::{Board, Role, Status};

/// What the page shows.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The node's status.
    pub board: Board,
    /// The node's metrics.
    pub metrics: Arc<NodeMetrics>,
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
        .with_state(admin);
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

    #[tokio::test]
    async fn the_page_is_served_and_read_back() {
        let status = example();
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let board = Board::new("r1", status.services.clone());
        let admin = Admin {
            board: board.clone(),
            metrics: Arc::new(NodeMetrics::new("r1")),
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

        stop.send(true).unwrap();
        server.await.unwrap().unwrap();
    }
}

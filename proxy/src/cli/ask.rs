//! Which node a command asks, and how it puts its request.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Serialize;

use crate::admin;
use crate::config::Config;
use crate::operator::Outcome;

pub(super) const DEFAULT_ADMIN: &str = "127.0.0.1:9600";

/// The node that is asked: it takes such requests from its own machine alone.
#[derive(Debug, Args)]
pub(super) struct AdminArgs {
    /// Admin page of the node on this machine [default: 127.0.0.1:9600]
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "config")]
    admin: Option<String>,
    /// Take the admin page's address from this configuration
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl AdminArgs {
    pub(super) fn address(&self) -> anyhow::Result<String> {
        Ok(match (&self.config, &self.admin) {
            (Some(file), _) => Config::load(file)?.admin.listen.to_string(),
            (None, Some(admin)) => admin.clone(),
            (None, None) => DEFAULT_ADMIN.to_owned(),
        })
    }

    /// Puts a request and gives back what became of it.
    ///
    /// # Errors
    /// The node cannot be reached, or refuses; the message says why.
    pub(super) fn post(&self, path: &str, request: &impl Serialize) -> anyhow::Result<Outcome> {
        let address = self.address()?;
        let (code, body) = admin::post(&address, path, &serde_json::to_string(request)?)?;
        if code != 200 {
            bail!("{address}: {}", body.trim());
        }
        serde_json::from_str(&body).with_context(|| format!("{address} answered: {body}"))
    }
}

/// One line for each service that moved, or did not.
pub(super) fn lines(outcome: &Outcome) -> Vec<String> {
    let moved = outcome.moved.iter().map(|m| {
        if m.from == m.to {
            format!("{}: {} leads already (view {})", m.service, m.to, m.view)
        } else {
            let (from, to) = (&m.from, &m.to);
            format!(
                "{}: {from} -> {to}, view {}, {} ms",
                m.service, m.view, m.took_ms
            )
        }
    });
    let failed = outcome.failed.iter().map(|why| format!("failed: {why}"));
    moved.chain(failed).collect()
}

//! The coordinator's metrics: what its server counts and times, as it stands when somebody asks.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use unbroken_coord::driver::{Meter, Role};
use unbroken_coord::metrics::Histogram;

/// The server, where one runs here.
#[derive(Debug, Clone, Default)]
pub(super) struct Coordinator(Arc<Mutex<Option<Meter>>>);

#[derive(Debug, EncodeLabelSet)]
struct OperationLabels {
    operation: &'static str,
}

impl Coordinator {
    pub(super) fn show(&self, meter: Meter) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(meter);
    }

    fn meter(&self) -> Option<Meter> {
        let meter = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        meter.clone()
    }
}

/// As much as fits; there is never more.
fn gauge(level: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(level).unwrap_or(i64::MAX))
}

fn write(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: &impl EncodeMetric,
) -> fmt::Result {
    let name = format!("coordinator_{name}");
    metric.encode(encoder.encode_descriptor(&name, help, unit, metric.metric_type())?)
}

impl Collector for Coordinator {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(meter) = self.meter() else {
            return Ok(());
        };
        let (status, metrics) = (meter.status(), meter.metrics());
        let out = &mut encoder;
        let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let leads = u64::from(status.role == Role::Leader);
        for (name, help, level) in [
            ("leads", "1 while this server leads", leads),
            (
                "sessions",
                "Sessions of the ensemble",
                count(status.sessions),
            ),
            (
                "connections",
                "Clients connected here",
                count(status.connections),
            ),
            (
                "watches",
                "Watches of clients connected here",
                count(status.watches),
            ),
            ("znodes", "Znodes", count(status.znodes)),
            ("ephemerals", "Ephemeral znodes", count(status.ephemerals)),
            (
                "outstanding_writes",
                "Writes of clients under way",
                count(status.outstanding),
            ),
            (
                "unsynced_writes",
                "Writes not yet on disk",
                metrics.writes_not_durable,
            ),
        ] {
            write(out, name, help, None, &gauge(level))?;
        }
        for (name, help, level) in [
            ("outbound", "On its way to clients", metrics.outbound_bytes),
            (
                "peer_backlog",
                "On its way to other servers",
                metrics.peer_backlog_bytes,
            ),
        ] {
            write(out, name, help, Some(&Unit::Bytes), &gauge(level))?;
        }
        let received = ConstCounter::new(metrics.bytes_received);
        write(
            out,
            "received",
            "Frames of clients",
            Some(&Unit::Bytes),
            &received,
        )?;
        for (name, help, counted) in [
            (
                "applied_entries",
                "The last log entry applied here, a zxid",
                status.zxid,
            ),
            (
                "committed_entries",
                "The last log entry known to be committed",
                status.committed,
            ),
            (
                "frames_received",
                "Frames of clients",
                status.frames_received,
            ),
            ("frames_sent", "Frames to clients", status.frames_sent),
            (
                "events_sent",
                "Watch events sent to clients",
                metrics.events_sent,
            ),
            (
                "connections_opened",
                "Clients that have connected",
                metrics.connections_opened,
            ),
            (
                "slow_clients_cut",
                "Clients cut off for not reading",
                metrics.slow_clients_cut,
            ),
            (
                "sessions_expired",
                "Sessions ended by their silence",
                metrics.sessions_expired,
            ),
            (
                "auth_failed",
                "Failed proofs of identity",
                metrics.auth_failed,
            ),
            (
                "proposals_dropped",
                "Proposals without room, sent again",
                status.proposals_dropped,
            ),
        ] {
            write(out, name, help, None, &ConstCounter::new(counted))?;
        }
        for (name, help, histogram) in [
            (
                "sync_duration",
                "Syncs of the log to the disk",
                metrics.sync,
            ),
            (
                "durable_duration",
                "Writes to the log until durable",
                metrics.durable,
            ),
            (
                "write_duration",
                "Writes of clients until applied here",
                metrics.write,
            ),
            (
                "read_duration",
                "Other requests until answered",
                metrics.read,
            ),
        ] {
            write(out, name, help, Some(&Unit::Seconds), &Shown(histogram))?;
        }
        let (name, help) = ("coordinator_requests", "Requests of clients by operation");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (operation, counted) in metrics.requests {
            let labels = OperationLabels { operation };
            ConstCounter::new(counted).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

struct Shown(Histogram);

impl EncodeMetric for Shown {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let Self(histogram) = self;
        let mut below = 0;
        let mut buckets = Vec::new();
        for (bound, count) in histogram.cumulative() {
            buckets.push((bound.as_secs_f64(), count - below));
            below = count;
        }
        buckets.push((f64::INFINITY, histogram.count() - below));
        let sum = histogram.sum().as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, histogram.count(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

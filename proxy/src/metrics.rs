//! Counters and gauges of one node, for Prometheus.
//!
//! There is no global registry: many nodes may live in one test process. Handles are cheap to
//! clone and to update (one atomic each), so that the data plane updates them where things happen.

mod coordinator;

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::status::Redundancy;

/// A gauge of things that are never negative.
pub type Level = Gauge<u64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceLabels {
    service: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    service: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MemberLabels {
    service: String,
    member: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RedundancyLabels {
    service: String,
    state: Redundancy,
}

impl EncodeLabelValue for Redundancy {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.write_str(match self {
            Self::Unprotected => "unprotected",
            Self::CatchingUp => "catching-up",
            Self::Degraded => "degraded",
            Self::Protected => "protected",
        })
    }
}

/// Declares the metrics that have one value a service, and their registration.
macro_rules! service_metrics {
    ($($(#[doc = $help:literal])+ $field:ident: $kind:ty = $name:literal $([$unit:expr])?;)+) => {
        /// The metrics of one service on one node.
        #[derive(Debug, Clone)]
        pub struct ServiceMetrics {
            $($(#[doc = $help])+ pub $field: $kind,)+
            service: String,
            redundancy: Family<RedundancyLabels, Gauge>,
            datagrams_dropped: Family<ReasonLabels, Counter>,
            packets_dropped: Family<ReasonLabels, Counter>,
            member_lag: Family<MemberLabels, Level>,
        }

        #[derive(Debug, Clone, Default)]
        struct Families {
            $($field: Family<ServiceLabels, $kind>,)+
            redundancy: Family<RedundancyLabels, Gauge>,
            datagrams_dropped: Family<ReasonLabels, Counter>,
            packets_dropped: Family<ReasonLabels, Counter>,
            member_lag: Family<MemberLabels, Level>,
        }

        impl Families {
            fn register(&self, registry: &mut Registry) {
                $(register!(registry, $name, concat!($($help),+), self.$field $(, $unit)?);)+
            }

            fn service(&self, service: &str) -> ServiceMetrics {
                let labels = ServiceLabels { service: service.to_owned() };
                ServiceMetrics {
                    $($field: self.$field.get_or_create_owned(&labels),)+
                    service: service.to_owned(),
                    redundancy: self.redundancy.clone(),
                    datagrams_dropped: self.datagrams_dropped.clone(),
                    packets_dropped: self.packets_dropped.clone(),
                    member_lag: self.member_lag.clone(),
                }
            }
        }
    };
}

macro_rules! register {
    ($registry:expr, $name:literal, $help:expr, $family:expr) => {
        $registry.register($name, $help.trim().trim_end_matches('.'), $family.clone())
    };
    ($registry:expr, $name:literal, $help:expr, $family:expr, $unit:expr) => {
        $registry.register_with_unit(
            $name,
            $help.trim().trim_end_matches('.'),
            $unit,
            $family.clone(),
        )
    };
}

service_metrics! {
    /// Frames for the VIP taken from the wire.
    frames_received: Counter = "frames_received";
    /// Frames given to the wire.
    frames_sent: Counter = "frames_sent";
    /// Connections that live now.
    connections: Level = "connections";
    /// Connections opened.
    connections_opened: Counter = "connections_opened";
    /// Connections that ended by a reset.
    connections_reset: Counter = "connections_reset";
    /// Closes of the leader's server that were shown although other replicas' servers went on, or closed otherwise.
    close_divergences: Counter = "close_divergences";
    /// Bytes of clients' input given to the event log.
    client_input: Counter = "client_input" [Unit::Bytes];
    /// Bytes of server output given to clients, each counted once.
    client_output: Counter = "client_output" [Unit::Bytes];
    /// Times the server here answered otherwise than the leader's.
    divergences: Counter = "divergences";
    /// Events issued as leader.
    events_issued: Counter = "events_issued";
    /// Events delivered as backup.
    events_delivered: Counter = "events_delivered";
    /// Events issued that are not stable yet.
    stable_lag: Level = "stable_lag_events";
    /// Bytes of clients' input kept for replay in memory.
    history: Level = "history" [Unit::Bytes];
    /// Bytes of clients' input kept for replay on disk.
    history_disk: Level = "history_disk" [Unit::Bytes];
    /// Connections whose input is not kept as a whole.
    not_replayable: Level = "connections_not_replayable";
    /// Times this node became leader while another led before.
    takeovers: Counter = "takeovers";
    /// Views installed.
    views_installed: Counter = "views_installed";
    /// Number of the view installed last.
    view_id: Level = "view_id";
    /// Full members of the view.
    full_members: Level = "full_members";
    /// 1 on the leader, else 0.
    leading: Level = "leading";
    /// 1 while this node holds the lease, else 0.
    lease_held: Level = "lease_held";
    /// Frames not sent because the lease was over.
    fenced: Counter = "frames_fenced";
    /// Announcements of the VIP by somebody else.
    foreign_announcements: Counter = "foreign_announcements";
}

impl ServiceMetrics {
    /// Shows `state` and no other.
    pub fn set_redundancy(&self, state: Redundancy) {
        let all = [
            Redundancy::Unprotected,
            Redundancy::CatchingUp,
            Redundancy::Degraded,
            Redundancy::Protected,
        ];
        for each in all {
            let labels = RedundancyLabels {
                service: self.service.clone(),
                state: each,
            };
            self.redundancy
                .get_or_create(&labels)
                .set(i64::from(each == state));
        }
    }

    /// Counter of the group's datagrams dropped for `reason`; keep it where drops are frequent.
    #[must_use]
    pub fn datagrams_dropped(&self, reason: &'static str) -> Counter {
        self.datagrams_dropped.get_or_create_owned(&ReasonLabels {
            service: self.service.clone(),
            reason,
        })
    }

    /// Counter of clients' packets dropped for `reason`; keep it where drops are frequent.
    #[must_use]
    pub fn packets_dropped(&self, reason: &'static str) -> Counter {
        self.packets_dropped.get_or_create_owned(&ReasonLabels {
            service: self.service.clone(),
            reason,
        })
    }

    /// Gauge of the events that `member` is not known to hold.
    #[must_use]
    pub fn member_lag(&self, member: &str) -> Level {
        let labels = MemberLabels {
            service: self.service.clone(),
            member: member.to_owned(),
        };
        self.member_lag.get_or_create_owned(&labels)
    }
}

/// The metrics of one node.
#[derive(Debug)]
pub struct NodeMetrics {
    registry: Registry,
    families: Families,
    coordinator: coordinator::Coordinator,
}

impl NodeMetrics {
    /// Metrics of the node `name`, all named `unbroken_...`.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let labels = [("node".into(), name.to_owned().into())];
        let mut registry = Registry::with_prefix_and_labels("unbroken", labels.into_iter());
        let families = Families::default();
        families.register(&mut registry);
        register!(
            registry,
            "redundancy",
            "1 for the state that the service is in, 0 for the others",
            families.redundancy
        );
        register!(
            registry,
            "datagrams_dropped",
            "Group datagrams dropped",
            families.datagrams_dropped
        );
        register!(
            registry,
            "packets_dropped",
            "Packets of clients dropped",
            families.packets_dropped
        );
        register!(
            registry,
            "member_lag_events",
            "Events that a member is not known to hold",
            families.member_lag
        );
        let coordinator = coordinator::Coordinator::default();
        registry.register_collector(Box::new(coordinator.clone()));
        Self {
            registry,
            families,
            coordinator,
        }
    }

    /// The metrics of one service.
    #[must_use]
    pub fn service(&self, name: &str) -> ServiceMetrics {
        self.families.service(name)
    }

    /// Shows what this coordinator's server counts and times, too.
    pub fn show_coordinator(&self, meter: unbroken_coord::driver::Meter) {
        self.coordinator.show(meter);
    }

    /// Everything in the OpenMetrics text format.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if prometheus_client::encoding::text::encode(&mut text, &self.registry).is_err() {
            // Only a label that refuses to be written could do this; none of ours does.
            text.clear();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_and_reasons_are_told_apart() {
        let node = NodeMetrics::new("r1");
        let (web, echo) = (node.service("web"), node.service("echo"));
        web.frames_received.inc_by(3);
        echo.frames_received.inc();
        web.client_input.inc_by(1500);
        web.set_redundancy(Redundancy::Protected);
        web.set_redundancy(Redundancy::Degraded);
        web.datagrams_dropped("wrong-view").inc();
        web.member_lag("r2").set(7);
        let text = node.encode();
        for line in [
            r#"unbroken_frames_received_total{node="r1",service="web"} 3"#,
            r#"unbroken_frames_received_total{node="r1",service="echo"} 1"#,
            r#"unbroken_client_input_bytes_total{node="r1",service="web"} 1500"#,
            r#"unbroken_redundancy{node="r1",service="web",state="degraded"} 1"#,
            r#"unbroken_redundancy{node="r1",service="web",state="protected"} 0"#,
            r#"unbroken_datagrams_dropped_total{node="r1",service="web",reason="wrong-view"} 1"#,
            r#"unbroken_member_lag_events{node="r1",service="web",member="r2"} 7"#,
            "# HELP unbroken_frames_sent Frames given to the wire.",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "no line {line} in:\n{text}"
            );
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn a_second_handle_is_the_same_metric() {
        let node = NodeMetrics::new("r1");
        node.service("web").takeovers.inc();
        node.service("web").takeovers.inc();
        assert_eq!(node.service("web").takeovers.get(), 2);
    }
}

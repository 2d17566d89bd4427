//! Quotas: limits of how many znodes and how much data there may be from a path downwards.
//!
//! They stand in the namespace itself, where ZooKeeper's tools put them:
//! `/zookeeper/quota/PATH/zookeeper_limits` holds `count=N,bytes=N`, and may add `countHardLimit=N`
//! and `byteHardLimit=N`; -1 is no limit. What there is stands beside it, in `zookeeper_stats`, once
//! somebody has created it: its data follows by itself, without a version of its own. A limit of
//! the first two kinds is soft and only logged when it is passed; a hard one refuses what would pass
//! it. Quotas inside each other all count.

use bytes::Bytes;

use super::{Tree, parent, signed};
use crate::wire::ErrorCode;

const QUOTAS: &str = "/zookeeper/quota";
const RESERVED: &str = "/zookeeper";
const LIMITS: &str = "zookeeper_limits";
const STATS: &str = "zookeeper_stats";

/// Both for znodes (itself included) and for bytes of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Amount {
    count: i64,
    bytes: i64,
}

/// -1 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    soft: Amount,
    hard: Amount,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Quota {
    limits: Limits,
    used: Amount,
}

impl Limits {
    /// What is not understood is no limit: the znode is anybody's to write.
    fn parse(data: Option<&Bytes>) -> Self {
        const NONE: Amount = Amount {
            count: -1,
            bytes: -1,
        };
        let mut limits = Self {
            soft: NONE,
            hard: NONE,
        };
        let data = data.map_or(&b""[..], |data| data);
        for pair in std::str::from_utf8(data)
            .unwrap_or_default()
            .split([',', ';'])
        {
            let Some((name, value)) = pair.split_once('=') else {
                continue;
            };
            let limit = match name.trim() {
                "count" => &mut limits.soft.count,
                "bytes" => &mut limits.soft.bytes,
                "countHardLimit" => &mut limits.hard.count,
                "byteHardLimit" => &mut limits.hard.bytes,
                _ => continue,
            };
            *limit = value.trim().parse().unwrap_or(-1).max(-1);
        }
        limits
    }
}

/// The path that a znode under [`QUOTAS`] speaks of, and which of the two it is.
fn subject(path: &str) -> Option<(&str, &str)> {
    let (subject, name) = path.strip_prefix(QUOTAS)?.rsplit_once('/')?;
    // What is shown of quotas must not itself be counted.
    let own = subject.strip_prefix(RESERVED);
    let reserved = own.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let is_quota = !subject.is_empty() && !reserved && matches!(name, LIMITS | STATS);
    is_quota.then_some((subject, name))
}

/// `path` and all above it, the root excluded.
fn upwards(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| parent(path)).take_while(|path| *path != "/")
}

impl Tree {
    /// Is there room for `count` more znodes and `bytes` more data at `path`?
    pub(super) fn check_quota(
        &self,
        path: &str,
        count: i64,
        bytes: usize,
    ) -> Result<(), ErrorCode> {
        if self.quotas.is_empty() {
            return Ok(());
        }
        let over = |limit: i64, used: i64, more: i64| limit > -1 && more > 0 && used + more > limit;
        let bytes = signed(bytes);
        for subject in upwards(path) {
            let Some(Quota { limits, used }) = self.quotas.get(subject) else {
                continue;
            };
            if over(limits.hard.count, used.count, count)
                || over(limits.hard.bytes, used.bytes, bytes)
            {
                return Err(ErrorCode::QuotaExceeded);
            }
            // Once, when it is passed.
            if over(limits.soft.count, used.count, count) && used.count <= limits.soft.count {
                tracing::warn!(
                    subject,
                    limit = limits.soft.count,
                    "quota of znodes exceeded"
                );
            }
            if over(limits.soft.bytes, used.bytes, bytes) && used.bytes <= limits.soft.bytes {
                tracing::warn!(
                    subject,
                    limit = limits.soft.bytes,
                    "quota of bytes exceeded"
                );
            }
        }
        Ok(())
    }

    /// `path` has come (1), gone (-1) or changed (0), and with it so many bytes of data.
    pub(super) fn account(&mut self, path: &str, count: i64, bytes: i64) {
        if !self.quotas.is_empty() {
            let mut changed = Vec::new();
            for subject in upwards(path) {
                if let Some(quota) = self.quotas.get_mut(subject) {
                    quota.used.count += count;
                    quota.used.bytes += bytes;
                    changed.push(subject.to_owned());
                }
            }
            for subject in changed {
                self.show_quota(&subject);
            }
        }
        match subject(path) {
            Some((subject, LIMITS)) => self.limit(subject, path),
            Some((subject, _)) => self.show_quota(subject),
            None => {}
        }
    }

    /// The limits of `subject` may have changed.
    fn limit(&mut self, subject: &str, limits_path: &str) {
        let Some(limits) = self.nodes.get(limits_path) else {
            self.quotas.remove(subject);
            return;
        };
        let limits = Limits::parse(limits.data.as_ref());
        if let Some(quota) = self.quotas.get_mut(subject) {
            quota.limits = limits;
            return;
        }
        let itself = self.nodes.get_key_value(subject).into_iter();
        let all = itself.chain(self.below(subject));
        let used = all.fold(Amount::default(), |sum, (_, znode)| Amount {
            count: sum.count + 1,
            bytes: sum.bytes + signed(znode.data.as_ref().map_or(0, Bytes::len)),
        });
        self.quotas
            .insert(subject.to_owned(), Quota { limits, used });
        self.show_quota(subject);
    }

    /// Writes what there is at `subject` where people look for it.
    fn show_quota(&mut self, subject: &str) {
        let Some(Quota { used, .. }) = self.quotas.get(subject) else {
            return;
        };
        let text = format!("count={},bytes={}", used.count, used.bytes);
        if let Some(stats) = self.nodes.get_mut(&format!("{QUOTAS}{subject}/{STATS}")) {
            let data = Bytes::from(text);
            let before = stats.data.as_ref().map_or(0, Bytes::len);
            let (before, after) = (signed(before), signed(data.len()));
            stats.data = Some(data);
            let bytes = self.data_bytes.checked_add_signed(after - before);
            self.data_bytes = bytes.expect("what was counted is there");
        }
    }
}

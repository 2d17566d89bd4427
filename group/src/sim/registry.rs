//! The coordinator: linearizable, slow, and its answers may be lost. A write whose outcome is unknown may also land late.

use crate::output::{CasResult, Output, ReadResult, RegistryReply};
use bytes::Bytes;

#[derive(Clone, Debug)]
pub(super) enum Request {
    ReadView,
    ReadLease,
    CompareAndSet { expected: Option<i32>, value: Bytes },
    RenewLease { view_version: i32, value: Bytes },
}

impl Request {
    pub(super) fn of(output: &Output) -> Option<Self> {
        Some(match output {
            Output::ReadView => Self::ReadView,
            Output::ReadLease => Self::ReadLease,
            Output::CompareAndSet {
                expected_version,
                value,
            } => Self::CompareAndSet {
                expected: *expected_version,
                value: value.clone(),
            },
            Output::RenewLease {
                view_version,
                value,
            } => Self::RenewLease {
                view_version: *view_version,
                value: value.clone(),
            },
            _ => return None,
        })
    }

    pub(super) fn unknown(&self) -> RegistryReply {
        match self {
            Self::ReadView => RegistryReply::View(ReadResult::Unknown),
            Self::ReadLease => RegistryReply::Lease(ReadResult::Unknown),
            Self::CompareAndSet { .. } => RegistryReply::Cas(CasResult::Unknown),
            Self::RenewLease { .. } => RegistryReply::Renew(CasResult::Unknown),
        }
    }
}

#[derive(Default)]
pub(super) struct Registry {
    view: Option<(Bytes, i32)>,
    lease: Option<(Bytes, i32)>,
}

fn read(node: Option<&(Bytes, i32)>) -> ReadResult {
    node.map_or(ReadResult::Absent, |(value, version)| ReadResult::Value {
        value: value.clone(),
        version: *version,
    })
}

impl Registry {
    pub(super) fn apply(&mut self, request: &Request) -> RegistryReply {
        match request {
            Request::ReadView => RegistryReply::View(read(self.view.as_ref())),
            Request::ReadLease => RegistryReply::Lease(read(self.lease.as_ref())),
            Request::CompareAndSet { expected, value } => {
                let have = self.view.as_ref().map(|(_, v)| *v);
                RegistryReply::Cas(if have == *expected {
                    let version = have.map_or(0, |v| v + 1);
                    self.view = Some((value.clone(), version));
                    CasResult::Written { version }
                } else {
                    CasResult::BadVersion
                })
            }
            Request::RenewLease {
                view_version,
                value,
            } => {
                let have = self.view.as_ref().map(|(_, v)| *v);
                RegistryReply::Renew(if have == Some(*view_version) {
                    let version = self.lease.as_ref().map_or(0, |(_, v)| v + 1);
                    self.lease = Some((value.clone(), version));
                    CasResult::Written { version }
                } else {
                    CasResult::BadVersion
                })
            }
        }
    }
}

//! Between the wire and the log: what a client's write does, and how its outcome is told.

use bytes::Bytes;

use super::Config;
use crate::members::Reconfig;
use crate::session::SessionId;
use crate::tree::{Kind, NewZnode, TTL_MS_MAX};
use crate::txn::{Done, Op, Refused};
use crate::wire::{
    Acl, CreateMode, CreateOp, ErrorCode, MultiOp, MultiResult, Request, Response, validate_path,
};

/// How a write's success is told: operations that do the same differ in their replies.
#[derive(Debug)]
pub(super) enum Shape {
    Create(CreateOp),
    /// One for each part; `None` for parts that are not creations.
    Multi(Vec<Option<CreateOp>>),
    Stat,
    Empty,
}

pub(super) fn valid(path: &str) -> Result<(), ErrorCode> {
    validate_path(path).map_err(|_| ErrorCode::BadArguments)
}

/// What is no path but looks like one is a znode that is not there.
fn deletable(path: &str) -> Result<(), ErrorCode> {
    if !path.contains('/') || path.contains('\0') {
        return Err(ErrorCode::BadArguments);
    }
    valid(path).map_err(|_| ErrorCode::NoNode)
}

/// What a client's write does, and how its success is told. What is malformed is refused here, and
/// never reaches the log.
pub(super) fn operation(
    request: Request,
    session: SessionId,
    config: &Config,
) -> Result<(Op, Shape), ErrorCode> {
    Ok(match request {
        Request::Create {
            op,
            path,
            data,
            acl,
            flags,
        } => (
            creation(op, path, data, acl, flags, session, config)?,
            Shape::Create(op),
        ),
        Request::Delete { path, version } => {
            deletable(&path)?;
            (Op::Delete { path, version }, Shape::Empty)
        }
        Request::SetData {
            path,
            data,
            version,
        } => {
            valid(&path)?;
            (
                Op::SetData {
                    path,
                    data,
                    version,
                },
                Shape::Stat,
            )
        }
        Request::SetAcl { path, acl, version } => {
            valid(&path)?;
            (Op::SetAcl { path, acl, version }, Shape::Stat)
        }
        Request::Check { path, version } => {
            valid(&path)?;
            (Op::Check { path, version }, Shape::Empty)
        }
        Request::Multi(parts) => {
            let mut ops = Vec::with_capacity(parts.len());
            let mut shapes = Vec::with_capacity(parts.len());
            for part in parts {
                shapes.push(match &part {
                    MultiOp::Create { op, .. } => Some(*op),
                    _ => None,
                });
                // The others must be told that this one was at fault, so it goes into the log.
                ops.push(part_operation(part, session, config).unwrap_or_else(Op::Malformed));
            }
            (Op::Multi(ops), Shape::Multi(shapes))
        }
        Request::CloseSession => (Op::Close, Shape::Empty),
        Request::Reconfig {
            joining,
            leaving,
            new_members,
            config_version,
        } => {
            let change = Reconfig::parse(
                joining.as_deref(),
                leaving.as_deref(),
                new_members.as_deref(),
                config_version,
            );
            (Op::Reconfig(change?), Shape::Stat)
        }
        Request::Exists { .. }
        | Request::GetData { .. }
        | Request::GetAcl { .. }
        | Request::GetChildren { .. }
        | Request::GetChildren2 { .. }
        | Request::Sync { .. }
        | Request::Ping
        | Request::RemoveWatches { .. }
        | Request::CheckWatches { .. }
        | Request::Auth { .. }
        | Request::SetWatches(_)
        | Request::AddWatch { .. }
        | Request::MultiRead(_)
        | Request::Sasl { .. }
        | Request::GetEphemerals { .. }
        | Request::GetAllChildrenNumber { .. }
        | Request::WhoAmI => unreachable!("no writes"),
    })
}

fn part_operation(part: MultiOp, session: SessionId, config: &Config) -> Result<Op, ErrorCode> {
    Ok(match part {
        MultiOp::Create {
            op,
            path,
            data,
            acl,
            flags,
        } => creation(op, path, data, acl, flags, session, config)?,
        MultiOp::Delete { path, version } => {
            deletable(&path)?;
            Op::Delete { path, version }
        }
        MultiOp::SetData {
            path,
            data,
            version,
        } => {
            valid(&path)?;
            Op::SetData {
                path,
                data,
                version,
            }
        }
        MultiOp::Check { path, version } => {
            valid(&path)?;
            Op::Check { path, version }
        }
    })
}

fn creation(
    op: CreateOp,
    path: String,
    data: Option<Bytes>,
    acl: Vec<Acl>,
    flags: i32,
    session: SessionId,
    config: &Config,
) -> Result<Op, ErrorCode> {
    // Of the rest of the path the log judges: whether its parent is there comes first.
    if !path.contains('/') || path.contains('\0') {
        return Err(ErrorCode::BadArguments);
    }
    let mode = CreateMode::from_flags(flags)?;
    let ttl_ms = match op {
        CreateOp::Ttl(ttl_ms) => Some(ttl_ms),
        CreateOp::Create | CreateOp::Create2 | CreateOp::Container => None,
    };
    let kind = match (mode, ttl_ms) {
        (CreateMode::PersistentWithTtl | CreateMode::PersistentSequentialWithTtl, _)
            if !config.extended_types =>
        {
            return Err(ErrorCode::Unimplemented);
        }
        (
            CreateMode::PersistentWithTtl | CreateMode::PersistentSequentialWithTtl,
            Some(ttl_ms @ 1..=TTL_MS_MAX),
        ) => Kind::Ttl(ttl_ms),
        (CreateMode::PersistentWithTtl | CreateMode::PersistentSequentialWithTtl, _)
        | (_, Some(_)) => return Err(ErrorCode::BadArguments),
        (CreateMode::Persistent | CreateMode::PersistentSequential, None) => Kind::Persistent,
        (CreateMode::Ephemeral | CreateMode::EphemeralSequential, None) => Kind::Ephemeral(session),
        (CreateMode::Container, None) => Kind::Container,
    };
    Ok(Op::Create(NewZnode {
        path,
        data,
        acl,
        kind,
        sequential: mode.is_sequential(),
    }))
}

/// The reply to a write. A `multi` that failed is a success with bad news in it.
pub(super) fn respond(result: Result<Done, Refused>, shape: &Shape) -> Result<Response, ErrorCode> {
    let done = match (result, shape) {
        (Ok(done), _) => done,
        (
            Err(Refused {
                code,
                part: Some(fault),
            }),
            Shape::Multi(parts),
        ) => {
            let result = |part| match usize::cmp(&part, &fault) {
                std::cmp::Ordering::Less => None,
                std::cmp::Ordering::Equal => Some(code),
                std::cmp::Ordering::Greater => Some(ErrorCode::RuntimeInconsistency),
            };
            let results = (0..parts.len()).map(|part| MultiResult::Error(result(part)));
            return Ok(Response::Multi(results.collect()));
        }
        (Err(refused), _) => return Err(refused.code),
    };
    Ok(match (done, shape) {
        (Done::Created(path, stat), Shape::Create(op)) if op.replies_stat() => {
            Response::Created2 { path, stat }
        }
        (Done::Created(path, _), _) => Response::Created { path },
        (Done::Set(stat), _) => Response::Stat(stat),
        (Done::Configured(text, stat), _) => Response::Data {
            data: Some(text),
            stat,
        },
        (Done::Multi(parts), Shape::Multi(shapes)) => Response::Multi(
            parts
                .into_iter()
                .zip(shapes)
                .map(|(done, shape)| part_result(done, *shape))
                .collect(),
        ),
        (Done::Deleted | Done::Checked | Done::Closed | Done::Multi(_), _) => Response::Empty,
    })
}

fn part_result(done: Done, shape: Option<CreateOp>) -> MultiResult {
    match (done, shape) {
        (Done::Created(path, stat), Some(op)) if op.replies_stat() => {
            MultiResult::Created2 { path, stat }
        }
        (Done::Created(path, _), _) => MultiResult::Created { path },
        (Done::Set(stat), _) => MultiResult::Set(stat),
        (Done::Deleted, _) => MultiResult::Deleted,
        (Done::Checked | Done::Closed | Done::Multi(_) | Done::Configured(..), _) => {
            MultiResult::Checked
        }
    }
}

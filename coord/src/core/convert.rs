//! Between the wire and the log: what a client's write does, and how its outcome is told.

use bytes::Bytes;

use crate::session::SessionId;
use crate::tree::{Kind, NewZnode};
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

/// What a client's write does, and how its success is told. What is malformed is refused here, and
/// never reaches the log.
pub(super) fn operation(request: Request, session: SessionId) -> Result<(Op, Shape), ErrorCode> {
    Ok(match request {
        Request::Create {
            op,
            path,
            data,
            acl,
            flags,
        } => (
            creation(op, path, data, acl, flags, session)?,
            Shape::Create(op),
        ),
        Request::Delete { path, version } => {
            valid(&path)?;
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
                ops.push(part_operation(part, session).unwrap_or_else(Op::Malformed));
            }
            (Op::Multi(ops), Shape::Multi(shapes))
        }
        Request::CloseSession => (Op::Close, Shape::Empty),
        Request::Reconfig { .. } => return Err(ErrorCode::ReconfigDisabled),
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

fn part_operation(part: MultiOp, session: SessionId) -> Result<Op, ErrorCode> {
    Ok(match part {
        MultiOp::Create {
            op,
            path,
            data,
            acl,
            flags,
        } => creation(op, path, data, acl, flags, session)?,
        MultiOp::Delete { path, version } => {
            valid(&path)?;
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
) -> Result<Op, ErrorCode> {
    let mode = CreateMode::from_flags(flags)?;
    let kind = match mode {
        CreateMode::Persistent | CreateMode::PersistentSequential => Kind::Persistent,
        CreateMode::Ephemeral | CreateMode::EphemeralSequential => Kind::Ephemeral(session),
        CreateMode::Container => Kind::Container,
        CreateMode::PersistentWithTtl | CreateMode::PersistentSequentialWithTtl => {
            return Err(ErrorCode::Unimplemented);
        }
    };
    if op == CreateOp::Container && kind != Kind::Container {
        return Err(ErrorCode::BadArguments);
    }
    if mode.is_sequential() {
        // The name may be nothing but its number.
        valid(&format!("{path}1"))?;
    } else {
        valid(&path)?;
    }
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
        (Done::Created(path, stat), Some(op)) if op.replies_stat() => MultiResult::Created2 {
            op: op.op(),
            path,
            stat,
        },
        (Done::Created(path, _), _) => MultiResult::Created { path },
        (Done::Set(stat), _) => MultiResult::Set(stat),
        (Done::Deleted, _) => MultiResult::Deleted,
        (Done::Checked | Done::Closed | Done::Multi(_), _) => MultiResult::Checked,
    }
}

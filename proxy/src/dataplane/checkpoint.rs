//! What a joining replica is given: the records of all connections, and their inputs for replay.
//!
//! ```text
//! u32 header length | header (postcard, version in front) | bytes of every input, in header order
//!                   | the history of all inputs, with one order for all connections
//! ```
//! The bytes are shared with the log, not copied; the joiner cuts them out of one buffer.

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use unbroken_tcpstate::{DecodeError, Image};

use super::servers::{InputHeader, OrderHeader};

const VERSION: u16 = 2;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u16,
    /// [`Image::encode`]: it has a version of its own.
    tcp: Vec<u8>,
    inputs: Vec<InputHeader>,
    order: Option<OrderHeader>,
}

/// Why a checkpoint cannot be used: its donor speaks another version, or it is damaged.
#[derive(Debug, Error)]
pub(crate) enum CheckpointError {
    #[error("the checkpoint is shorter than it says")]
    Short,
    #[error("the checkpoint's header cannot be read: {0}")]
    Header(#[from] postcard::Error),
    #[error("the checkpoint's records: {0}")]
    Records(#[from] DecodeError),
    #[error("the checkpoint has version {0}, this program reads {VERSION}")]
    Version(u16),
}

/// A checkpoint taken apart.
pub(crate) struct Checkpoint {
    pub(crate) tcp: Image,
    pub(crate) inputs: Vec<(InputHeader, Bytes)>,
    pub(crate) order: Option<(OrderHeader, Bytes)>,
}

/// Writes a checkpoint as a list of segments.
pub(crate) fn encode(
    tcp: &Image,
    inputs: (Vec<InputHeader>, Vec<Bytes>),
    order: Option<(OrderHeader, Vec<Bytes>)>,
) -> Vec<Bytes> {
    let (order, history) = order.unzip();
    let header = Header {
        version: VERSION,
        tcp: tcp.encode(),
        inputs: inputs.0,
        order,
    };
    let header = postcard::to_stdvec(&header).expect("a header of ours is serialisable");
    let length = u32::try_from(header.len()).expect("records of bounded connections fit 4 GiB");
    let mut head = BytesMut::with_capacity(4 + header.len());
    head.extend_from_slice(&length.to_le_bytes());
    head.extend_from_slice(&header);
    let mut segments = vec![head.freeze()];
    segments.extend(inputs.1);
    segments.extend(history.unwrap_or_default());
    segments
}

/// Reads a checkpoint.
///
/// # Errors
/// It is short, unreadable, or of another version.
pub(crate) fn decode(mut all: Bytes) -> Result<Checkpoint, CheckpointError> {
    let length = all.get(..4).ok_or(CheckpointError::Short)?;
    let length = u32::from_le_bytes(length.try_into().expect("four bytes"));
    let length = usize::try_from(length).map_err(|_| CheckpointError::Short)?;
    if all.len() - 4 < length {
        return Err(CheckpointError::Short);
    }
    let mut rest = all.split_off(4 + length);
    let header: Header = postcard::from_bytes(&all[4..])?;
    if header.version != VERSION {
        return Err(CheckpointError::Version(header.version));
    }
    let mut inputs = Vec::with_capacity(header.inputs.len());
    for input in header.inputs {
        let n = input
            .end
            .checked_sub(input.base)
            .and_then(|n| usize::try_from(n).ok());
        let n = n
            .filter(|n| *n <= rest.len())
            .ok_or(CheckpointError::Short)?;
        inputs.push((input, rest.split_to(n)));
    }
    let order = match header.order {
        Some(order) if order.total_bytes() == Some(rest.len() as u64) => Some((order, rest)),
        Some(_) => return Err(CheckpointError::Short),
        None => None,
    };
    Ok(Checkpoint {
        tcp: Image::decode(&header.tcp)?,
        inputs,
        order,
    })
}

//! Whole frames: a 4-byte length, then a header and a body.

use bytes::Bytes;

use super::{
    ConnectRequest, ConnectResponse, ErrorCode, FrameError, ReplyHeader, Request, RequestHeader,
    Response, Stat, WatcherEvent, Writer, xid,
};

/// A frame without its length, and the bytes after it.
pub type Split<'a> = (&'a [u8], &'a [u8]);

/// Splits the first whole frame (without its length) off `bytes`; `None` while more must arrive.
///
/// A length is judged as soon as its 4 bytes are there, so that nothing waits for, or makes room
/// for, a frame that will be refused.
///
/// # Errors
/// [`FrameError`] for a length that is negative or above `limit_bytes`.
pub fn split_frame(bytes: &[u8], limit_bytes: usize) -> Result<Option<Split<'_>>, FrameError> {
    let Some((prefix, rest)) = bytes.split_first_chunk() else {
        return Ok(None);
    };
    let len = i32::from_be_bytes(*prefix);
    let len = usize::try_from(len).map_err(|_| FrameError::Negative(len))?;
    if len > limit_bytes {
        return Err(FrameError::TooLong {
            bytes: len,
            limit_bytes,
        });
    }
    Ok(rest.split_at_checked(len))
}

/// A request as a frame.
pub fn encode_request(xid: i32, request: &Request) -> Bytes {
    let mut w = Writer::frame(64);
    RequestHeader {
        xid,
        op: request.op().code(),
    }
    .encode(&mut w);
    request.encode(&mut w);
    w.finish_frame()
}

/// A successful reply as a frame.
pub fn encode_reply(xid: i32, zxid: i64, response: &Response) -> Bytes {
    let mut w = Writer::frame(32 + Stat::BYTES);
    ReplyHeader {
        xid,
        zxid,
        err: None,
    }
    .encode(&mut w);
    response.encode(&mut w);
    w.finish_frame()
}

/// A failed reply as a frame: a header alone.
pub fn encode_error(xid: i32, zxid: i64, err: ErrorCode) -> Bytes {
    let mut w = Writer::frame(16);
    ReplyHeader {
        xid,
        zxid,
        err: Some(err),
    }
    .encode(&mut w);
    w.finish_frame()
}

/// A watch event as a frame; the same for every session, so encode it once.
pub fn encode_event(event: &WatcherEvent) -> Bytes {
    let mut w = Writer::frame(32 + event.path.len());
    ReplyHeader {
        xid: xid::NOTIFICATION,
        zxid: -1,
        err: None,
    }
    .encode(&mut w);
    event.encode(&mut w);
    w.finish_frame()
}

/// The first frame of a connection.
pub fn encode_connect_request(request: &ConnectRequest) -> Bytes {
    let mut w = Writer::frame(48);
    request.encode(&mut w);
    w.finish_frame()
}

/// The answer to the first frame of a connection.
pub fn encode_connect_response(response: &ConnectResponse) -> Bytes {
    let mut w = Writer::frame(40);
    response.encode(&mut w);
    w.finish_frame()
}

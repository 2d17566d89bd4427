//! A server without a quorum, for those who asked for it.
//!
//! Clients that say `readOnly` when they connect are served reads from the state as it is here,
//! which may be old; writes and `sync` are refused. Nothing of them enters the log: who comes with a
//! session that is known here goes on under its name, without having it; who comes with none gets a
//! name that lives as long as the connection. When the quorum is back they are closed, and open or
//! take up a real session.

use bytes::Bytes;

use super::{CloseReason, ConnId, Core};
use crate::session::{SessionId, same_password};
use crate::wire::{
    ConnectRequest, ConnectResponse, ErrorCode, Request, Response, encode_connect_response,
    encode_error, encode_reply,
};

impl Core {
    /// Has this server been without a leader for so long that it serves reads alone?
    pub(super) fn serves_read_only(&self) -> bool {
        self.config.read_only
            && self
                .leaderless_since
                .is_some_and(|since| self.now.since(since) > self.config.leaderless_max)
    }

    /// This server has known no leader for too long: those who accept it stay, the others had better
    /// look for another server.
    pub(super) fn on_leaderless(&mut self) {
        let others = self.conns.iter().filter(|(_, state)| !state.is_read_only());
        let others: Vec<ConnId> = others.map(|(conn, _)| *conn).collect();
        for conn in others {
            let wish = self.conns.get(&conn).and_then(|state| state.wish());
            match wish.filter(|wish| wish.read_only == Some(true)).cloned() {
                Some(request) if self.config.read_only => {
                    let early = self.take_opening(conn);
                    self.open_read_only(conn, &request);
                    for frame in early {
                        self.handle_frame(self.now, conn, &frame);
                    }
                }
                _ => self.close(conn, CloseReason::Leaderless),
            }
        }
    }

    /// Answers the first frame of a client that accepts a server which is read-only.
    pub(super) fn open_read_only(&mut self, conn: ConnId, request: &ConnectRequest) {
        if request.last_zxid_seen > self.state.zxid.cast_signed() {
            self.close(conn, CloseReason::FromTheFuture);
            return;
        }
        let wanted = SessionId(request.session_id);
        let shown = request.password.as_deref().unwrap_or_default();
        let (session, password, timeout_ms) = if request.session_id == 0 {
            let local = SessionId::local(self.rng.next());
            (local, self.new_password(), self.granted_ms(request))
        } else {
            match self.state.sessions.get(&wanted) {
                Some(record) if same_password(&record.password, shown) => {
                    (wanted, record.password, record.timeout_ms)
                }
                Some(_) => return self.refuse_session(conn, request),
                // It may have ended, or it may be newer than what is known here.
                None => return self.close(conn, CloseReason::Leaderless),
            }
        };
        let response = ConnectResponse {
            protocol_version: 0,
            timeout_ms: i32::try_from(timeout_ms).unwrap_or(i32::MAX),
            session_id: session.0,
            password: Some(Bytes::copy_from_slice(&password)),
            read_only: Some(true),
        };
        self.opening.remove(&conn);
        if let Some(state) = self.conns.get_mut(&conn) {
            state.become_read_only(session, timeout_ms);
        }
        self.reply(conn, encode_connect_response(&response));
    }

    /// A request on a read-only connection.
    pub(super) fn on_read_only_request(&mut self, conn: ConnId, xid: i32, request: &Request) {
        let zxid = self.state.zxid.cast_signed();
        match request {
            Request::CloseSession => {
                self.reply(conn, encode_reply(xid, zxid, &Response::Empty));
                self.close(conn, CloseReason::Goodbye);
            }
            request if request.is_write() || matches!(request, Request::Sync { .. }) => {
                self.reply(conn, encode_error(xid, zxid, ErrorCode::NotReadOnly));
            }
            request => self.answer_read(conn, xid, request),
        }
    }

    /// Closes read-only connections: all, if there is a quorum again; else those that are silent for
    /// longer than their session's timeout.
    pub(super) fn end_read_only(&mut self, all: bool) {
        let now = self.now;
        let over = self.conns.iter().filter(|(_, state)| {
            state.is_read_only() && (all || now.since(state.heard) > state.patience)
        });
        let over: Vec<ConnId> = over.map(|(conn, _)| *conn).collect();
        let reason = if all {
            CloseReason::QuorumIsBack
        } else {
            CloseReason::Expired
        };
        for conn in over {
            self.close(conn, reason);
        }
    }
}

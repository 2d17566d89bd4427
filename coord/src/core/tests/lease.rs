//! An answered sync tells its client that the session lives for its timeout from when it was sent.

use super::*;

fn sync() -> Request {
    Request::Sync { path: "/".into() }
}

#[test]
fn a_sync_is_a_sign_of_life_that_counts_from_its_coming() {
    let mut bench = Bench::alone();
    bench.connect(1);
    for xid in 1..10 {
        bench.pass(95);
        bench.disk();
        bench.send(1, xid, &sync());
        assert!(bench.expect(1, xid, OpCode::Sync).is_ok());
    }
    bench.pass(125);
    bench.disk();
    bench.expect_closed(1, CloseReason::Expired);
}

/// The leader has put the session's end into the log, and it cannot be taken back: a sync that
/// comes now must not be answered, or its client would believe that the session lives on.
#[test]
fn a_sync_that_comes_after_the_end_is_in_the_log_is_not_answered() {
    let mut bench = Bench::alone();
    bench.connect(1);
    bench.pass(125);
    bench.send(1, 1, &sync());
    bench.pass(400);
    bench.expect_nothing(1);
    bench.disk();
    bench.expect_closed(1, CloseReason::Expired);
}

/// One that is taken up by another connection before lives on, and its syncs are answered.
#[test]
fn a_session_that_is_taken_up_in_time_is_answered_again() {
    let mut bench = Bench::alone();
    let session = bench.connect(1);
    bench.pass(95);
    bench.core.handle_connect(bench.now, ConnId(2), caller());
    let hello = ConnectRequest {
        protocol_version: 0,
        last_zxid_seen: 0,
        timeout_ms: 100,
        session_id: session.session_id,
        password: session.password,
        read_only: None,
    };
    bench.frame(2, &encode_connect_request(&hello));
    // The takeover is in the log, and the disk is slow: the end follows it, and is void.
    bench.pass(200);
    bench.expect_nothing(2);
    bench.disk();
    let answer = ConnectResponse::decode(&bench.next(2)).unwrap();
    assert_eq!(answer.session_id, session.session_id);
    bench.send(2, 1, &sync());
    assert!(bench.expect(2, 1, OpCode::Sync).is_ok());
}

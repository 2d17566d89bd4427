use super::history::Frame;
use super::*;
use crate::faults::{self, Fault};
use crate::wire::{ErrorCode, Request, Response};

/// `SEED=17` runs one seed, `SEEDS=1000..2000` a range.
fn seeds() -> std::ops::Range<u64> {
    let parse = |text: &str| text.trim().parse::<u64>().expect("a seed is a number");
    if let Ok(seed) = std::env::var("SEED") {
        let seed = parse(&seed);
        return seed..seed + 1;
    }
    match std::env::var("SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").expect("SEEDS=FROM..TO");
            parse(from)..parse(to)
        }
        Err(_) => 0..150,
    }
}

#[test]
fn promises_hold_in_every_storm() {
    let mut total = Summary::default();
    let seeds = seeds();
    for seed in seeds.clone() {
        match run(seed, false) {
            Ok(run) => total.add(&run),
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
    println!("{total:?}");
    // A test that does nothing proves nothing.
    let (report, happened) = (total.report, total.happened);
    let counts = [
        report.updates,
        report.unknown_done,
        report.unknown - report.unknown_done,
        report.reads,
        report.syncs,
        report.events,
        report.caught_up,
        report.expired,
        happened.stops,
        happened.snapshots_installed,
        happened.disk_failures,
        happened.damaged,
        happened.resumed,
        happened.leaders,
    ];
    assert!(
        seeds.end - seeds.start < 100 || counts.iter().all(|count| *count > 0),
        "{total:?}"
    );
}

#[test]
fn a_seed_is_a_run() {
    assert_eq!(run(4711, false), run(4711, false));
}

/// What is found within a few seeds; the others take more, and the example `sim` finds them.
#[test]
fn planted_defects_are_found() {
    for fault in [
        Fault::SyncIsLocal,
        Fault::WatchAfterReply,
        Fault::EndInTwoSteps,
        Fault::NumberUnchecked,
        Fault::MultiHalfDone,
        Fault::SnapshotWithoutSessions,
        Fault::DamageCutOff,
        Fault::SyncErrorIgnored,
        Fault::WatchesNotCaughtUp,
        Fault::SequentialByCount,
        Fault::ResetForgotten,
        Fault::TailNotRewritten,
    ] {
        faults::plant(Some(fault));
        let found = (0..150).any(|seed| run(seed, false).is_err());
        faults::plant(None);
        assert!(found, "{fault:?} was not found in 150 seeds");
    }
}

/// A history that is sound, to be spoilt.
fn history() -> history::History {
    let world = played(3, false).unwrap();
    check::check(&world.history).unwrap();
    world.history
}

/// The places of the answered requests of this kind.
fn places(history: &history::History, wanted: impl Fn(&Request) -> bool) -> Vec<usize> {
    let ops = history.ops.iter().enumerate();
    let places: Vec<usize> = ops
        .filter(|(_, op)| op.answer.is_some() && wanted(&op.request))
        .map(|(place, _)| place)
        .collect();
    assert!(places.len() > 3, "{} are too few", places.len());
    places
}

fn refused(history: &history::History, why: &str) {
    let judged = check::check(history).map(|(_, report)| report);
    let error = judged.expect_err("it was spoilt");
    assert!(error.contains(why), "{error}");
}

#[test]
fn the_checker_refuses_a_read_of_another_value() {
    let mut history = history();
    let reads = places(&history, |request| {
        matches!(request, Request::GetData { .. })
    });
    let read = reads.into_iter().find(|place| {
        let answer = history.ops[*place].answer.as_ref().unwrap();
        matches!(answer.result, Ok(Response::Data { .. }))
    });
    let answer = history.ops[read.unwrap()].answer.as_mut().unwrap();
    if let Ok(Response::Data { data, .. }) = &mut answer.result {
        *data = Some("nobody wrote this".into());
    }
    refused(&history, "should have been");
}

#[test]
fn the_checker_refuses_an_update_that_was_refused_and_done() {
    let mut history = history();
    let sets = places(&history, |request| {
        matches!(request, Request::SetData { .. })
    });
    let done = sets.into_iter().find(|place| {
        let answer = history.ops[*place].answer.as_ref().unwrap();
        answer.result.is_ok()
    });
    let answer = history.ops[done.unwrap()].answer.as_mut().unwrap();
    answer.result = Err(ErrorCode::BadVersion);
    refused(&history, "should have been");
}

#[test]
fn the_checker_refuses_an_update_in_another_place() {
    let mut history = history();
    let sets = places(&history, |request| {
        matches!(request, Request::SetData { .. })
    });
    history.ops[sets[1]].answer.as_mut().unwrap().zxid += 1;
    refused(&history, "stands at");
}

#[test]
fn the_checker_refuses_an_acknowledged_update_that_is_lost() {
    let mut history = history();
    let last = history.log.len();
    let sets = places(&history, |request| request.is_write());
    let newest = sets
        .iter()
        .max_by_key(|place| history.ops[**place].answer.as_ref().unwrap().zxid);
    let zxid = history.ops[*newest.unwrap()].answer.as_ref().unwrap().zxid;
    history.log.truncate(usize::try_from(zxid).unwrap() - 1);
    assert!(history.log.len() < last);
    let judged = check::check(&history).map(|(_, report)| report);
    judged.expect_err("it was acknowledged");
}

#[test]
fn the_checker_refuses_an_order_that_does_not_fit_time() {
    let mut history = history();
    // As if the last one had been sent before the run began, and been answered at once.
    let sets = places(&history, |request| {
        matches!(request, Request::SetData { .. })
    });
    let (first, last) = (sets[0], *sets.last().unwrap());
    history.ops[last].answer.as_mut().unwrap().at = 1;
    history.ops[first].sent = 2;
    refused(&history, "had been shown before it was sent");
}

#[test]
fn the_checker_refuses_a_sync_that_lags_behind() {
    let mut history = history();
    let syncs = places(&history, |request| matches!(request, Request::Sync { .. }));
    let sets = places(&history, |request| {
        matches!(request, Request::SetData { .. })
    });
    // Some update is shown to be newer than a sync, and to have been answered before it was sent.
    let (sync, set) = syncs
        .iter()
        .flat_map(|sync| sets.iter().map(move |set| (*sync, *set)))
        .find(|(sync, set)| {
            let zxid = |place: &usize| history.ops[*place].answer.as_ref().unwrap().zxid;
            zxid(set) > zxid(sync) && history.ops[*sync].sent > 10
        })
        .unwrap();
    history.ops[set].sent = 0;
    history.ops[set].answer.as_mut().unwrap().at = 1;
    let syncs_only: Vec<usize> = (0..history.ops.len())
        .filter(|place| *place != sync && *place != set)
        .collect();
    // The others would show it first.
    for place in syncs_only {
        history.ops[place].sent = 0;
    }
    refused(&history, "a sync of connection");
}

/// The connection with the most events, and the places of its events.
fn told(history: &history::History) -> (u64, Vec<usize>) {
    let events = |conn: &history::Conn| {
        let frames = conn.frames.iter().enumerate();
        let events = frames.filter(|(_, frame)| matches!(frame, Frame::Event { .. }));
        events.map(|(place, _)| place).collect::<Vec<_>>()
    };
    let conns = history.conns.iter();
    let conns = conns.filter(|(_, conn)| conn.restores.is_none());
    conns
        .map(|(id, conn)| (*id, events(conn)))
        .max_by_key(|(_, events)| events.len())
        .filter(|(_, events)| events.len() > 2)
        .unwrap()
}

#[test]
fn the_checker_refuses_events_that_are_missing_twice_late_or_made_up() {
    let sound = history();
    let (conn, events) = told(&sound);
    let first = events[0];
    let spoil = |spoil: &dyn Fn(&mut Vec<Frame>)| {
        let mut history = sound.clone();
        spoil(&mut history.conns.get_mut(&conn).unwrap().frames);
        let judged = check::check(&history).map(|(_, report)| report);
        judged.expect_err("the events are not what they should be");
    };
    spoil(&|frames| drop(frames.remove(first)));
    spoil(&|frames| frames.insert(first, frames[first].clone()));
    spoil(&|frames| {
        let reply = (first..frames.len()).find(|place| matches!(frames[*place], Frame::Reply(_)));
        let event = frames.remove(first);
        frames.insert(reply.unwrap(), event);
    });
    spoil(&|frames| {
        if let Frame::Event { path, .. } = &mut frames[first] {
            path.push('x');
        }
    });
    spoil(&|frames| {
        if let Frame::Event { at, .. } = &mut frames[first] {
            *at = 0;
        }
    });
}

#[test]
fn the_checker_refuses_a_session_that_goes_back() {
    let mut history = history();
    let zxid = |history: &history::History, frame: &Frame| match frame {
        Frame::Reply(place) => history.ops[*place]
            .answer
            .as_ref()
            .map(|answer| answer.zxid),
        Frame::Pong { zxid } => Some(*zxid),
        Frame::Event { .. } => None,
    };
    // A pong that shows no more than the answer before it.
    let (conn, place) = history
        .conns
        .iter()
        .flat_map(|(conn, record)| (1..record.frames.len()).map(move |place| (*conn, place)))
        .filter(|(conn, place)| {
            let frames = &history.conns[conn].frames;
            matches!(frames[*place], Frame::Pong { .. })
                && zxid(&history, &frames[*place]) == zxid(&history, &frames[place - 1])
        })
        .max()
        .unwrap();
    let frames = &mut history.conns.get_mut(&conn).unwrap().frames;
    if let Frame::Pong { zxid } = &mut frames[place] {
        *zxid -= 1;
    }
    refused(&history, "was taken back");
}

#[test]
fn the_checker_refuses_a_session_told_to_have_ended_that_lives() {
    let mut history = history();
    let conn = history.conns.values_mut().find(|conn| conn.wanted != 0);
    let conn = conn.unwrap();
    conn.refused = Some(1);
    refused(&history, "was told that session");
}

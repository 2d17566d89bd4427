use super::*;
use crate::config::Config;
use crate::process::cbcast::THREADS_MAX;
use crate::process::lane;
use crate::process::ledger::Loading;
use crate::process::types::ThreadId;
use crate::process::wire::{Envelope, Header, Kind, Small};
use crate::wire::{Pos, Reader};

/// What an endpoint works on.
struct Bench {
    config: ProcessConfig,
    out: VecDeque<Output>,
    requests: Vec<Op>,
    resend_left: usize,
    allowance: Allowance,
}

impl Bench {
    fn new(config: ProcessConfig) -> Self {
        Self {
            config,
            out: VecDeque::new(),
            requests: Vec::new(),
            resend_left: 0,
            allowance: Allowance::default(),
        }
    }

    fn cx(&mut self) -> Cx<'_> {
        Cx {
            now: Instant::from_micros(1),
            config: &self.config,
            out: &mut self.out,
            requests: &mut self.requests,
            resend_left: &mut self.resend_left,
            allowance: &mut self.allowance,
        }
    }
}

fn site(i: u128) -> MemberId {
    MemberId::new(format!("r{i}"), i)
}

fn begun(id: u64, members: &[u128], loading: &[(u128, u64, u128)], init: Option<u128>) -> Begun {
    let loading = loading.iter().map(|(member, since, donor)| {
        let loading = Loading {
            since: *since,
            donors: vec![site(*donor)],
        };
        (site(*member), loading)
    });
    Begun {
        group: GroupId(1),
        name: "g".into(),
        cut: Some(vec![0; 3]),
        gbcasts: Vec::new(),
        view: GroupView {
            id,
            members: members.iter().copied().map(site).collect(),
            joined: Vec::new(),
            departed: Vec::new(),
        },
        wished: BTreeSet::new(),
        init: init.map(site),
        loading: loading.collect(),
    }
}

/// However many requests for what is missing one datagram holds: they are answered together, not each as if it were alone.
#[test]
fn what_one_datagram_makes_us_send_again_is_bounded() {
    let (me, other) = (site(1), site(2));
    let config = ProcessConfig::new(Config::new(1, me.clone(), vec!["r1".into()], 9));
    let mut bench = Bench::new(config);
    bench.allowance.bytes = u64::MAX;
    let mut cx = bench.cx();
    let mut endpoint = Endpoint::new(&mut cx, &me, &begun(1, &[1, 2], &[], Some(1)));
    for _ in 0..100 {
        let message = Multicast::new(Order::Fifo, vec![b'x'; 1000]);
        endpoint.multicast(&mut cx, message).unwrap();
    }
    endpoint.flush(&mut cx);
    *cx.resend_left = 50_000;
    cx.out.clear();
    let header = Header {
        flags: 0,
        lane: 0,
        group: 1,
        view: 1,
        sent: 0,
        stable: 0,
        trim: 0,
    };
    let nak = Small::Nak(vec![(Pos::start(1), Pos::start(101))]);
    for body in vec![lane::body(&header, &[nak]); 9] {
        let (header, items) = Header::read(&body).unwrap();
        endpoint.on_datagram(&mut cx, &other, &header, Reader::over(items), None);
    }
    let sent = cx.out.iter().map(|o| match o {
        Output::Send { bodies, .. } => bodies.iter().map(Bytes::len).sum(),
        _ => 0,
    });
    let sent: usize = sent.sum();
    assert!((40_000..60_000).contains(&sent), "{sent}");
}

/// cbcasts that wait for what never comes: their sender fills its window, and not our memory, while the view lasts.
#[test]
fn what_is_kept_of_one_sender_is_bounded_within_a_view() {
    let (me, other) = (site(1), site(2));
    let names = vec!["r1".into(), "r2".into()];
    let mut config = ProcessConfig::new(Config::new(1, me.clone(), names, 9));
    config.core.limits.datagram_bytes_max = 65_000;
    config.core.limits.flight_bytes_max = u64::MAX;
    let mut bench = Bench::new(config);
    let mut all = Allowance {
        bytes: u64::MAX,
        missed: false,
    };
    let mut cx = bench.cx();
    let mut endpoint = Endpoint::new(&mut cx, &me, &begun(1, &[1, 2], &[], Some(1)));
    let mut faulty = Outgoing::new(1);
    let mut send = |endpoint: &mut Endpoint, cx: &mut Cx<'_>, kind: Kind| {
        let envelope = Envelope {
            kind,
            safe: false,
            call: None,
        };
        faulty.push(envelope.put(&[b'x'; 60_000]), false);
        let mut header = Header {
            lane: 1,
            group: 1,
            view: 1,
            ..Header::default()
        };
        let limits = &cx.config.core.limits;
        for body in faulty.burst(cx.now, &mut header, &[], limits, &mut all) {
            let (header, items) = Header::read(&body).unwrap();
            endpoint.on_datagram(cx, &other, &header, Reader::over(items), None);
        }
        endpoint.ins[1].log.held()
    };
    let never = |n| Kind::Causal {
        thread: ThreadId(0),
        stamp: crate::process::vclock::VClock(vec![1, n]),
    };
    let mut held = 0;
    for n in 1..2000 {
        held = send(&mut endpoint, &mut cx, never(n));
    }
    let kept = endpoint.threads.kept_bytes(1);
    let most = KEPT_BYTES_MAX + 70_000;
    assert!(
        (KEPT_BYTES_MAX..most).contains(&kept) && held < 1999,
        "{kept}"
    );
    assert!(!endpoint.takes_from(1) && endpoint.takes());
    // The end of the view needs what there is.
    endpoint.block();
    assert!(endpoint.takes_from(1));
    let mut next = begun(2, &[1, 2], &[], None);
    next.cut = Some(vec![0, held]);
    assert!(endpoint.install(&mut cx, &next));
    assert!(endpoint.takes_from(1), "a new view, and nothing kept");
}

/// More threads than a view may have wait for the next view: it takes as many as it may, and asks once for one more.
#[test]
fn what_has_a_thread_too_many_waits_for_the_view_after_the_next() {
    let me = site(1);
    let config = ProcessConfig::new(Config::new(1, me.clone(), vec!["r1".into()], 9));
    let mut bench = Bench::new(config);
    let mut cx = bench.cx();
    let view = |id| {
        let mut view = begun(id, &[1], &[], (id == 1).then_some(1));
        view.cut = Some(vec![0]);
        view
    };
    let mut endpoint = Endpoint::new(&mut cx, &me, &view(1));
    endpoint.block();
    for thread in 0..THREADS_MAX + 2 {
        let thread = ThreadId(u16::try_from(thread).unwrap());
        let message = Multicast::new(Order::Causal(thread), vec![b'x'; 10]);
        endpoint.multicast(&mut cx, message).unwrap();
    }
    assert!(endpoint.install(&mut cx, &view(2)));
    assert_eq!((endpoint.queue.len(), endpoint.queue_bytes), (2, 20));
    assert_eq!(cx.requests.len(), 1);
    assert!(endpoint.install(&mut cx, &view(3)));
    assert_eq!((endpoint.queue.len(), endpoint.queue_bytes), (0, 0));
}

/// The last that had the state departs when this member has just got it and nobody knows: another begins the state anew,
/// and this one must not go on with the old.
#[test]
fn a_state_that_was_begun_anew_is_taken_by_all() {
    let me = site(3);
    let names = vec!["r1".into(), "r2".into(), "r3".into()];
    let config = ProcessConfig::new(Config::new(1, me.clone(), names, 9));
    let mut bench = Bench::new(config);
    let mut cx = bench.cx();
    let mut first = begun(2, &[1, 2, 3], &[(2, 2, 1), (3, 2, 1)], None);
    first.view.joined = vec![site(2), site(3)];
    let mut endpoint = Endpoint::new(&mut cx, &me, &first);
    assert!(endpoint.load.is_some());
    endpoint.load = None; // the state has come
    endpoint.release(&mut cx);
    let next = begun(3, &[1, 2, 3], &[(2, 2, 1), (3, 2, 1)], None);
    assert!(endpoint.install(&mut cx, &next) && endpoint.load.is_none());
    let anew = begun(4, &[2, 3], &[(3, 4, 2)], Some(2));
    assert!(endpoint.install(&mut cx, &anew));
    assert_eq!(
        endpoint.load.map(|l| (l.since, l.donors)),
        Some((4, vec![site(2)]))
    );
    let views = bench.out.iter().filter_map(|o| match o {
        Output::Group {
            event: GroupEvent::View(v),
            ..
        } => Some(v.id),
        _ => None,
    });
    assert_eq!(
        views.collect::<Vec<_>>(),
        [2, 3],
        "the fourth waits for its state"
    );
}

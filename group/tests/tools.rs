//! The tools on real nodes: replicated machines stay alike, counters are exact, locks exclude and outlive their holders.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that asks for free ports and bounds its waiting"
)]

mod site;

use bytes::Bytes;
use site::{LONG, Site};
use tokio::time::timeout;
use unbroken_group::node::Node;
use unbroken_group::tools::{
    Locks, Machine, Map, Replicated, Succession, Token, UpdateError, Value,
};

async fn soon<T>(what: &str, f: impl Future<Output = T>) -> T {
    let done = timeout(LONG, f).await;
    done.unwrap_or_else(|_| panic!("not within a minute: {what}"))
}

async fn join<M: Machine>(node: &Node, name: &str) -> Replicated<M> {
    let (replicated, work) = soon("join", Replicated::join(node, name)).await.unwrap();
    tokio::spawn(work);
    soon("the state", replicated.until(|_| true)).await.unwrap();
    replicated
}

fn number(bytes: Option<&Bytes>) -> u64 {
    bytes.map_or(0, |b| {
        String::from_utf8(b.to_vec()).unwrap().parse().unwrap()
    })
}

/// Adds one to a key by compare-and-set.
async fn add(map: &Replicated<Map>, key: &'static str) {
    let mut seen = map.get(key.as_bytes());
    loop {
        let next = (number(seen.as_ref()) + 1).to_string();
        let had = soon("replace", map.replace(key, seen.clone(), next)).await;
        let had = had.unwrap();
        if had == seen {
            return;
        }
        seen = had;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_map_counts_exactly_and_comes_to_those_who_join() {
    const EACH: u64 = 40;
    let site = Site::new(3);
    let (one, two) = (site.start(1), site.start(2));
    let maps = [join::<Map>(&one, "map").await, join(&two, "map").await];
    let adding = maps.clone().map(|map| {
        tokio::spawn(async move {
            for _ in 0..EACH {
                add(&map, "n").await;
            }
        })
    });
    // It joins while the others write.
    let three = site.start(3);
    let late: Replicated<Map> = join(&three, "map").await;
    for a in adding {
        soon("adding", a).await.unwrap();
    }
    add(&late, "n").await;
    for map in maps.iter().chain([&late]) {
        let all = |m: &Map| number(m.get(b"n")) == 2 * EACH + 1;
        soon("the same everywhere", map.until(all)).await.unwrap();
    }
    assert_eq!(late.remove("n").await.unwrap(), Some("81".into()));
    assert_eq!(late.get(b"n"), None);
    assert_eq!(late.set("k", "one").await.unwrap(), None);
    assert_eq!(late.set("k", "two").await.unwrap(), Some("one".into()));
    assert_eq!(late.get(b"k"), Some("two".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_has_one_holder_and_goes_on_when_it_dies() {
    let site = Site::new(3);
    let mut nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let mut locks = Vec::new();
    for node in &nodes {
        locks.push(join::<Locks>(node, "locks").await);
    }
    let whole = |l: &Replicated<Locks>| l.group().view().map(|v| v.members.len());
    soon("the lock", locks[2].acquire("door")).await.unwrap();
    assert_eq!(whole(&locks[2]), Some(3));
    let waiting = locks[0].clone();
    let waiting = tokio::spawn(async move { waiting.acquire("door").await });
    let queued = |l: &Locks| l.queue("door").count() == 2;
    soon("it waits", locks[1].until(queued)).await.unwrap();
    assert!(!waiting.is_finished(), "held by another");
    // The holder's process dies.
    drop(nodes.pop());
    soon("the next holder", waiting).await.unwrap().unwrap();
    let me = locks[0].group().me().clone();
    let mine = |l: &Locks| l.holder("door") == Some(&me);
    soon("seen elsewhere", locks[1].until(mine)).await.unwrap();
    locks[0].release("door").await.unwrap();
    soon("free again", locks[1].acquire("door")).await.unwrap();
    let dead = soon("the dead learn it", locks[2].acquire("door")).await;
    assert!(
        matches!(dead, Err(UpdateError::Send(_) | UpdateError::Out)),
        "{dead:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_has_one_history() {
    let site = Site::new(3);
    let (one, two) = (site.start(1), site.start(2));
    let first: Replicated<Value> = join(&one, "value").await;
    let second: Replicated<Value> = join(&two, "value").await;
    assert_eq!(first.value(), Some((Bytes::new(), 0)));
    assert_eq!(soon("put", first.put("a")).await.unwrap(), 1);
    let (seen, version) = soon("seen", second.newer_than(0)).await.unwrap();
    assert_eq!((&seen[..], version), (&b"a"[..], 1));
    // Of two that replace the same version one does.
    let (a, b) = tokio::join!(first.put_if(1, "b"), second.put_if(1, "c"));
    let (a, b) = (a.unwrap(), b.unwrap());
    assert!(matches!((a, b), (Ok(2), Err(2)) | (Err(2), Ok(2))));
    let expected = if a.is_ok() { "b" } else { "c" };
    drop((first, one));
    let three = site.start(3);
    let third: Replicated<Value> = join(&three, "value").await;
    assert_eq!(third.value(), Some((expected.into(), 2)));
    assert_eq!(soon("put", second.put("d")).await.unwrap(), 3);
    let late = soon("late", third.newer_than(2)).await.unwrap();
    assert_eq!(late, ("d".into(), 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_has_one_holder_who_passes_it_or_dies() {
    let site = Site::new(3);
    let mut nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let mut tokens: Vec<Replicated<Token>> = Vec::new();
    for node in &nodes {
        tokens.push(join(node, "token").await);
    }
    let me = |t: &Replicated<Token>| t.group().me().clone();
    let ids: Vec<_> = tokens.iter().map(me).collect();
    // The founder has it, and all agree.
    for t in &tokens {
        assert_eq!(t.holder().as_ref(), Some(&ids[0]));
    }
    assert!(
        !soon("not its own", tokens[1].pass_to(&ids[2]))
            .await
            .unwrap()
    );
    assert!(soon("pass", tokens[0].pass_to(&ids[2])).await.unwrap());
    let third = soon("it comes", tokens[2].hold()).await.unwrap();
    assert_eq!(third, 2);
    // Nobody waits: the next in rank after the dead one has it.
    let dead = tokens.pop().unwrap();
    drop(nodes.pop());
    let heir = |t: &Token| t.holder() == Some(&ids[0]);
    for t in &tokens {
        soon("an heir", t.until(heir)).await.unwrap();
        assert_eq!(t.read(Token::turn), Some(3));
    }
    let gone = soon("the dead learn it", dead.pass()).await;
    assert!(gone.is_err(), "{gone:?}");
    // It comes to whoever waits when it is passed, and when the holder dies.
    let node = site.start(3);
    let back: Replicated<Token> = join(&node, "token").await;
    let waits = |id| move |t: &Token| t.waiting().any(|m| *m == id);
    let waiting = back.clone();
    let waiting = tokio::spawn(async move { waiting.hold().await });
    soon("it waits", tokens[0].until(waits(me(&back))))
        .await
        .unwrap();
    assert!(!waiting.is_finished(), "held by another");
    drop(nodes.remove(0));
    let turn = soon("the one that waits", waiting).await.unwrap();
    assert_eq!(turn, Ok(4), "and not the next in rank");
    let last = |t: &Token| t.holder() == Some(&me(&back));
    soon("all agree", tokens[1].until(last)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_follow_age_and_the_next_leads() {
    let site = Site::new(3);
    let mut nodes: Vec<Node> = (1..=3).map(|i| site.start(i)).collect();
    let mut machines: Vec<Replicated<Value>> = Vec::new();
    for node in &nodes {
        machines.push(join(node, "ranks").await);
    }
    let mut second = Succession::of(machines[1].group());
    let mut third = Succession::of(machines[2].group());
    let first = machines[0].group().me().clone();
    let at = soon("a rank", third.changed()).await.unwrap();
    assert_eq!((at.rank, at.size, at.leads()), (2, 3, false));
    assert_eq!(third.leader(), Some(first));
    assert_eq!(third.member(2).as_ref(), Some(machines[2].group().me()));
    assert_eq!(third.member(3), None);
    let within = soon("within the first two", second.until_rank(1));
    assert_eq!(within.await.unwrap().rank, 1);
    let parts = machines.iter().map(|m| Succession::of(m.group()).now());
    let parts: Vec<u64> = parts.flat_map(|r| r.unwrap().part(10)).collect();
    assert_eq!(parts, (0..10).collect::<Vec<_>>());
    let leading = tokio::spawn(async move { second.until_leader().await });
    assert!(!leading.is_finished());
    drop(nodes.remove(0));
    let reign = soon("the next leads", leading).await.unwrap().unwrap();
    let at = soon("told", third.changed()).await.unwrap();
    assert_eq!((at.rank, at.size), (1, 2));
    // A later leader's view is a later one.
    machines[1].group().leave().await.unwrap();
    let later = soon("alone", third.until_leader()).await.unwrap();
    assert!(later.view > reign.view);
    let mut gone = Succession::of(machines[1].group());
    while gone.changed().await.is_some() {}
    assert_eq!((gone.now(), gone.leader()), (None, None));
}

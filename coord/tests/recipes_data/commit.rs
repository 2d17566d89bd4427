//! Two-phase and three-phase commit.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use unbroken_coord::client::Client;
use unbroken_coord::recipes::commit::{
    CommitError, Commits, Outcome, Participant, Protocol, Vote, Work,
};
use unbroken_coord::wire::{Acl, CreateMode, CreateOp, MultiOp};

use crate::common::Cluster;
use crate::{clients, create, harass};

const NAMES: [&str; 3] = ["p", "q", "r"];

/// Longer than the tests take.
const PATIENT: Duration = Duration::from_secs(60);

/// How often each method was called for each transaction.
type Calls = Arc<Mutex<BTreeMap<(String, &'static str), usize>>>;

/// Leaves a znode for whatever it does.
#[derive(Clone)]
struct Recorder {
    name: &'static str,
    calls: Calls,
}

impl Recorder {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            calls: Calls::default(),
        }
    }

    fn called(&self, work: &Work, method: &'static str) {
        let mut calls = self.calls.lock().unwrap();
        *calls.entry((work.id.clone(), method)).or_default() += 1;
    }

    fn trace(&self, work: &Work, what: &str) -> Vec<MultiOp> {
        vec![MultiOp::Create {
            op: CreateOp::Create,
            path: format!("/{what}/{}.{}", work.id, self.name),
            data: None,
            acl: Acl::open(),
            flags: CreateMode::Persistent.flags(),
        }]
    }
}

impl Participant for Recorder {
    async fn prepare(&mut self, work: &Work) -> Vote {
        self.called(work, "prepare");
        tokio::task::yield_now().await;
        let refused = String::from_utf8_lossy(&work.payload).contains(self.name);
        if refused { Vote::No } else { Vote::Yes }
    }

    async fn commit(&mut self, work: &Work) -> Vec<MultiOp> {
        self.called(work, "commit");
        tokio::task::yield_now().await;
        self.trace(work, "committed")
    }

    async fn abort(&mut self, work: &Work) -> Vec<MultiOp> {
        self.called(work, "abort");
        self.trace(work, "aborted")
    }
}

async fn stage(client: &Client) {
    create(client, "/committed", "").await;
    create(client, "/aborted", "").await;
}

fn start(commits: &Commits, recorder: &Recorder) -> AbortHandle {
    let (commits, mut recorder) = (commits.clone(), recorder.clone());
    let name = recorder.name;
    tokio::spawn(async move {
        let Err(error) = commits.participate(name, &mut recorder).await;
        // A refused effect would be one that was done twice.
        assert!(matches!(error, CommitError::Client(_)), "{error}");
    })
    .abort_handle()
}

/// Waits until every journal is gone, and so every participant done.
async fn settled(client: &Client) {
    loop {
        client.sync("/tx").await.unwrap();
        let (journals, _, changed) = client.children_and_watch("/commits/tx").await.unwrap();
        if journals.is_empty() {
            return;
        }
        changed.await.unwrap();
    }
}

async fn traces(client: &Client, what: &str, id: &str) -> usize {
    let all = client.children(&format!("/{what}")).await.unwrap();
    all.iter().filter(|name| name.starts_with(id)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_or_none_whoever_stops() {
    let mut cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    stage(&clients[0]).await;
    let mut places = Vec::new();
    for client in &clients {
        places.push(Commits::open(client, "/commits").await.unwrap());
    }
    let recorders = NAMES.map(Recorder::new);
    // Participants that are stopped in the middle of whatever they do, and start again.
    let chaos = tokio::spawn({
        let (places, recorders) = (places.clone(), recorders.clone());
        async move {
            loop {
                let mut tasks: Vec<_> = places
                    .iter()
                    .zip(&recorders)
                    .map(|(place, recorder)| start(place, recorder))
                    .collect();
                for task in tasks.drain(..) {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    task.abort();
                }
            }
        }
    });
    let mut coordinators = JoinSet::new();
    for (i, place) in places.iter().enumerate() {
        let place = place.clone();
        coordinators.spawn(async move {
            let mut decided = Vec::new();
            for round in 0..8 {
                let protocol = if round % 2 == 0 {
                    Protocol::TwoPhase
                } else {
                    Protocol::ThreePhase
                };
                let payload = if (i + round) % 3 == 0 { "not q" } else { "all" };
                let running = place
                    .begin(protocol, NAMES, payload, PATIENT)
                    .await
                    .unwrap();
                let id = running.id().to_owned();
                let outcome = running.finish().await.unwrap();
                let expected = match payload {
                    "all" => Outcome::Committed,
                    _ => Outcome::Aborted,
                };
                assert_eq!(outcome, expected);
                decided.push((id, outcome));
            }
            decided
        });
    }
    harass(&mut cluster, 2).await;
    let decided: Vec<_> = coordinators
        .join_all()
        .await
        .into_iter()
        .flatten()
        .collect();
    chaos.abort();
    let last: Vec<_> = places
        .iter()
        .zip(&recorders)
        .map(|(place, recorder)| start(place, recorder))
        .collect();
    settled(&clients[0]).await;
    for (id, outcome) in decided {
        let done = match outcome {
            Outcome::Committed => [3, 0],
            Outcome::Aborted => [0, 3],
        };
        let committed = traces(&clients[0], "committed", &id).await;
        let aborted = traces(&clients[0], "aborted", &id).await;
        assert_eq!([committed, aborted], done, "{id}: {outcome:?}");
    }
    for name in NAMES {
        let work = clients[0]
            .children(&format!("/commits/work/{name}"))
            .await
            .unwrap();
        assert!(work.is_empty(), "{name} has {work:?} left");
    }
    last.iter().for_each(AbortHandle::abort);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_dies_is_recovered_by_what_it_had_written() {
    let cluster = Cluster::start(|_| {}).await;
    let client = cluster.client("a", 8000).await;
    stage(&client).await;
    let place = Commits::open(&client, "/commits").await.unwrap();
    let recorders = NAMES.map(Recorder::new);
    for (protocol, written, outcome) in [
        (Protocol::TwoPhase, "preparing", "aborted"),
        (Protocol::ThreePhase, "preparing", "aborted"),
        (Protocol::ThreePhase, "pre-committed", "committed"),
        (Protocol::TwoPhase, "committed", "committed"),
    ] {
        let doomed = cluster.client("b", 8000).await;
        let coordinator = Commits::open(&doomed, "/commits").await.unwrap();
        let running = coordinator
            .begin(protocol, NAMES, "all", PATIENT)
            .await
            .unwrap();
        let path = format!("/commits/tx/{}", running.id());
        let tasks = recorders.each_ref().map(|recorder| start(&place, recorder));
        client.sync(&path).await.unwrap();
        // It has everybody's vote, and dies when it has written this.
        loop {
            let votes = format!("{path}/votes");
            let (votes, _, changed) = client.children_and_watch(&votes).await.unwrap();
            if votes.len() == NAMES.len() {
                break;
            }
            changed.await.unwrap();
        }
        if written != "preparing" {
            doomed
                .set(&format!("{path}/phase"), written, 0)
                .await
                .unwrap();
        }
        doomed.close().await.unwrap();
        settled(&client).await;
        assert_eq!(
            traces(&client, outcome, running.id()).await,
            3,
            "{protocol:?} {written}"
        );
        for recorder in &recorders {
            let calls = recorder.calls.lock().unwrap();
            let prepared = calls.get(&(running.id().to_owned(), "prepare"));
            assert_eq!(prepared, Some(&1), "{} is asked once", recorder.name);
        }
        tasks.iter().for_each(AbortHandle::abort);
    }
    assert_eq!(
        place.recover().await.unwrap(),
        0,
        "nothing was left to recover"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_phases_pass_over_a_coordinator_that_hangs() {
    let cluster = Cluster::start(|_| {}).await;
    let clients = clients(&cluster).await;
    stage(&clients[0]).await;
    let place = Commits::open(&clients[0], "/commits").await.unwrap();
    let hung = Commits::open(&clients[1], "/commits").await.unwrap();
    let patience = Duration::from_millis(50);
    let running = hung
        .begin(Protocol::ThreePhase, NAMES, "all", patience)
        .await
        .unwrap();
    let id = running.id().to_owned();
    let tasks = NAMES.map(|name| start(&place, &Recorder::new(name)));
    let phase = format!("/commits/tx/{id}/phase");
    clients[2].sync(&phase).await.unwrap();
    loop {
        let (phase, _, changed) = clients[2].get_and_watch(&phase).await.unwrap();
        if phase != "preparing" {
            assert_eq!(phase, "aborted");
            break;
        }
        changed.await.unwrap();
    }
    assert_eq!(place.outcome(&id).await.unwrap(), Some(Outcome::Aborted));
    // It wakes up, and learns what the others have decided.
    assert_eq!(running.finish().await.unwrap(), Outcome::Aborted);
    settled(&clients[0]).await;
    assert_eq!(place.outcome(&id).await.unwrap(), None);
    tasks.iter().for_each(AbortHandle::abort);

    // One who never answers makes a transaction fail, of either kind.
    for protocol in [Protocol::TwoPhase, Protocol::ThreePhase] {
        let running = place
            .begin(protocol, ["absent"], "", patience)
            .await
            .unwrap();
        assert_eq!(running.finish().await.unwrap(), Outcome::Aborted);
    }
    let nobody = place.begin(Protocol::TwoPhase, [""; 0], "", patience).await;
    assert!(
        matches!(nobody, Err(CommitError::NobodyTakesPart)),
        "{nobody:?}"
    );
    let bad = place.begin(Protocol::TwoPhase, ["a/b"], "", patience).await;
    assert!(matches!(bad, Err(CommitError::BadName(_))), "{bad:?}");
}

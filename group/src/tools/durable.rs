//! A replicated machine that outlives the failure of all its members: each keeps the state on its disk, and when all have
//! failed, those that come back find out who was last, whose state the group goes on with.
//!
//! Skeen 1985 (the last process to fail); Isis' logging tool. Two groups: in the *roll call* are all processes; in the group
//! itself are those that have the state. Who comes back says in the roll call what its disk says, and waits until somebody is
//! known to have been last, or the group lives. Then it joins, gets the state as any joiner does, writes it to disk, and is let
//! in when the others have it on their disks that it may be (see `last.rs`).

mod last;
mod log;

pub use self::log::DiskError;

use self::last::{Book, Last, Summary};
use self::log::Disk;
use super::{Machine, Replicated, UpdateError};
use crate::node::tasks::{first, look};
use crate::node::{Event, Events, Group, Inputs, JoinError, Node};
use crate::process::{GroupView, Multicast, Order, ThreadId};
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use thiserror::Error;
use tokio::sync::{Notify, oneshot};

/// Version of the checkpoint, and of what is said.
const FORMAT: u8 = 1;
/// Bytes that may wait for the disk before no more events are taken.
const UNWRITTEN_BYTES_MAX: usize = 16 << 20;

/// Why a durable machine cannot go on here.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DurableError {
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A group cannot be joined.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// What is on the disk, or what came from another member, is no state of this machine.
    #[error("no state of this machine: {0}")]
    State(&'static str),
    /// The process is out of the group.
    #[error(transparent)]
    Out(#[from] UpdateError),
}

/// The roll call: what is known of all disks, and who is there.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Roll {
    known: BTreeMap<String, Summary>,
    /// They have said what is on their disks, and wait.
    present: BTreeSet<MemberId>,
    /// They have the state and were let in.
    running: BTreeSet<MemberId>,
    /// Not to be waited for, until the group runs.
    without: BTreeSet<String>,
}

#[derive(Serialize, Deserialize)]
enum Call {
    Here(Summary),
    /// It joins the group; its disk may change.
    Joins,
    Runs(Summary),
    Without(BTreeSet<String>),
}

enum Decision {
    SayAgain,
    Join,
    Found(u64),
}

impl Roll {
    fn last(&self) -> Last {
        let present = self.present.iter().map(|m| m.name.to_string()).collect();
        last::last(&self.known, &present, &self.without)
    }

    fn decision(&self, me: &MemberId) -> Option<Decision> {
        if !self.present.contains(me) {
            return Some(Decision::SayAgain);
        }
        if !self.running.is_empty() {
            return Some(Decision::Join);
        }
        match self.last() {
            Last::Is(name, era) if *name == *me.name => Some(Decision::Found(era)),
            Last::Is(..) | Last::Awaits(_) => None,
        }
    }
}

impl Machine for Roll {
    fn apply(&mut self, from: &MemberId, update: &Bytes) -> Bytes {
        match postcard::from_bytes(update) {
            Ok(Call::Here(summary)) => {
                self.known.insert(from.name.to_string(), summary);
                self.running.remove(from);
                self.present.insert(from.clone());
            }
            Ok(Call::Joins) => {
                self.present.remove(from);
            }
            Ok(Call::Runs(summary)) => {
                self.known.insert(from.name.to_string(), summary);
                self.present.remove(from);
                self.running.insert(from.clone());
                self.without.clear();
            }
            Ok(Call::Without(names)) => self.without.extend(names),
            Err(_) => {}
        }
        Bytes::new()
    }

    fn view(&mut self, view: &GroupView) {
        self.present.retain(|m| view.members.contains(m));
        self.running.retain(|m| view.members.contains(m));
    }

    fn snapshot(&self) -> Vec<Bytes> {
        vec![encode(self)]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }
}

fn encode<T: Serialize>(value: &T) -> Bytes {
    let bytes =
        postcard::to_stdvec(value).expect("there is nothing in it that cannot be serialised");
    bytes.into()
}

/// What is said in the group in one order, and stands in the log.
#[derive(Serialize, Deserialize)]
enum Said {
    Update {
        number: u64,
        body: Bytes,
    },
    /// The sender has the state on its disk: write down that it may be let in.
    Ask,
    /// All have written it down.
    Admit,
}

/// What happens in the group in one order.
#[derive(Serialize, Deserialize)]
enum Record {
    Said(MemberId, Bytes),
    View(GroupView),
}

/// A checkpoint, and what a joiner is given.
#[derive(Serialize, Deserialize)]
struct Image {
    format: u8,
    book: Book,
    full: bool,
    members: Vec<MemberId>,
    machine: Bytes,
}

struct State<M> {
    machine: M,
    book: Book,
    full: bool,
    members: Vec<MemberId>,
    group: Option<Group>,
    /// Who has ordered messages up to which on its disk.
    on_disk: BTreeMap<String, u64>,
    unwritten_bytes: usize,
    /// Counts the states that this member began with: what is said of an earlier one's records is not about this.
    copy: u64,
    failed: Option<DiskError>,
    next: u64,
    waiting: BTreeMap<u64, oneshot::Sender<(u64, Bytes)>>,
    over: bool,
}

/// Which copy of the state, and which ordered message is the last in it.
type Place = (u64, u64);

enum Write {
    Record(Place, Bytes),
    Checkpoint(Place, Bytes),
}

struct Shared<M> {
    me: MemberId,
    roll: Replicated<Roll>,
    state: Mutex<State<M>>,
    changed: Notify,
    writes: mpsc::Sender<Write>,
}

/// A handle of a durable machine. Clones are handles of the same.
pub struct Durable<M> {
    shared: Arc<Shared<M>>,
}

impl<M> Clone for Durable<M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<M: Machine> State<M> {
    fn image(&self) -> Bytes {
        encode(&Image {
            format: FORMAT,
            book: self.book.clone(),
            full: self.full,
            members: self.members.clone(),
            machine: self.machine.snapshot().concat().into(),
        })
    }

    fn begin_with(&mut self, image: &[u8]) -> Result<(), DurableError> {
        let image: Image =
            postcard::from_bytes(image).map_err(|_| DurableError::State("it cannot be read"))?;
        if image.format != FORMAT {
            return Err(DurableError::State("its version is not known"));
        }
        let machine = M::restore(&image.machine);
        self.machine = machine.ok_or(DurableError::State("the machine does not know it"))?;
        (self.book, self.full, self.members) = (image.book, image.full, image.members);
        Ok(())
    }

    /// The answer, if it was this member's own update.
    fn take(&mut self, me: &str, record: &Record) -> Option<(u64, Bytes)> {
        let mut answer = None;
        match record {
            Record::View(view) => {
                let departed = view.departed.iter().map(|m| &*m.name);
                self.book.depart(departed);
                self.members.clone_from(&view.members);
                self.machine.view(view);
            }
            Record::Said(from, said) => match postcard::from_bytes(said) {
                Ok(Said::Update { number, body }) => {
                    self.book.index += 1;
                    answer = Some((number, self.machine.apply(from, &body)));
                }
                Ok(Said::Ask) => self.book.ask(&from.name),
                Ok(Said::Admit) => self.book.admit(&from.name),
                // The same nothing everywhere.
                Err(_) => self.book.index += 1,
            },
        }
        self.full |= self.book.roster.contains(me);
        answer
    }

    fn renew(&mut self) {
        self.copy += 1;
        self.on_disk.clear();
    }

    fn all_have(&self, index: u64) -> bool {
        let has = |name: &String| self.on_disk.get(name).is_some_and(|i| *i >= index);
        self.book.roster.iter().all(has)
    }

    fn summary(&self) -> Summary {
        Summary {
            book: self.book.clone(),
            full: self.full,
        }
    }
}

impl<M: Machine> Durable<M> {
    /// Opens what this process has on its disk (nothing, the first time) and takes part. A first beginning waits for all
    /// `founders`, names of nodes, the same everywhere; each process has a `directory` of its own. The future that comes with
    /// the handle does the work: spawn it; it ends when this process is out, or its disk fails.
    ///
    /// # Errors
    /// [`DurableError`].
    pub async fn open(
        node: &Node,
        name: &str,
        directory: &Path,
        founders: &BTreeSet<String>,
    ) -> Result<
        (
            Self,
            impl Future<Output = Result<(), DurableError>> + Send + use<M>,
        ),
        DurableError,
    > {
        let (disk, found) = Disk::open(directory)?;
        let (roll, roll_work) = Replicated::join(node, &format!("{name} (roll call)")).await?;
        let me = roll.group().me().clone();
        let mut state = State {
            machine: M::default(),
            book: Book::blank(founders),
            full: true,
            members: Vec::new(),
            group: None,
            on_disk: BTreeMap::new(),
            unwritten_bytes: 0,
            copy: 0,
            failed: None,
            next: 0,
            waiting: BTreeMap::new(),
            over: false,
        };
        if let Some(image) = found.checkpoint {
            state.begin_with(&image)?;
        }
        for record in found.records {
            let record = postcard::from_bytes(&record);
            let record = record.map_err(|_| DurableError::State("a record cannot be read"))?;
            state.take(&me.name, &record);
        }
        let (writes, receiver) = mpsc::channel();
        let shared = Arc::new(Shared {
            me,
            roll,
            state: Mutex::new(state),
            changed: Notify::new(),
            writes,
        });
        let weak = Arc::downgrade(&shared);
        let write = move || {
            write(disk, &receiver, |done| {
                if let Some(shared) = weak.upgrade() {
                    shared.on_written(done);
                }
            });
        };
        std::thread::Builder::new()
            .name("group log".into())
            .spawn(write)
            .map_err(|source| DiskError::Io {
                path: directory.to_owned(),
                source,
            })?;
        let (inputs, name, handle) = (node.inputs.clone(), name.to_owned(), Arc::clone(&shared));
        let work = async move {
            let result = first(
                pin!(attend(&shared, inputs, &name)),
                pin!(async {
                    roll_work.await;
                    Err(UpdateError::Out.into())
                }),
            )
            .await;
            let mut state = shared.state();
            state.over = true;
            state.waiting.clear();
            drop(state);
            shared.changed.notify_waiters();
            result
        };
        Ok((Self { shared: handle }, work))
    }

    /// Reads the state as it is here, once this member was let in. It may be ahead of what is acknowledged.
    pub fn read<T>(&self, f: impl FnOnce(&M) -> T) -> Option<T> {
        let state = self.shared.state();
        state.runs().then(|| f(&state.machine))
    }

    /// Waits until this member was let in and the state here is like this.
    ///
    /// # Errors
    /// [`UpdateError::Out`].
    pub async fn until(&self, f: impl Fn(&M) -> bool) -> Result<(), UpdateError> {
        self.shared.when(|s| s.runs() && f(&s.machine)).await
    }

    /// Sends an update, and gives the machine's answer when all members that may go on alone have it on disk. Then it is not
    /// lost, if the last to fail comes back.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn update(&self, update: &[u8]) -> Result<Bytes, UpdateError> {
        self.until(|_| true).await?;
        let (done, applied) = oneshot::channel();
        let (number, group) = {
            let mut state = self.shared.state();
            state.next += 1;
            let number = state.next;
            state.waiting.insert(number, done);
            (number, state.group.clone())
        };
        let body = Bytes::copy_from_slice(update);
        let said = encode(&Said::Update { number, body });
        let group = group.ok_or(UpdateError::Out)?;
        if let Err(error) = group.abcast(said).await {
            self.shared.state().waiting.remove(&number);
            return Err(error.into());
        }
        let (index, answer) = applied.await.map_err(|_| UpdateError::Out)?;
        self.shared.when(|s| s.all_have(index)).await?;
        Ok(answer)
    }

    /// Who is waited for: they may have been last to fail, and are not there (or have lost their disks). Empty where the group
    /// runs, or is about to.
    pub fn awaits(&self) -> BTreeSet<String> {
        let awaits = self.shared.roll.read(|roll| match roll.last() {
            Last::Awaits(names) if roll.running.is_empty() => names,
            Last::Awaits(_) | Last::Is(..) => BTreeSet::new(),
        });
        awaits.unwrap_or_default()
    }

    /// The operator's word that these do not come back: the group goes on without them, and without what only they have. Start
    /// all others first: the newest state of those that are there when this is said, this one among them, is gone on with.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn go_without(&self, names: BTreeSet<String>) -> Result<(), UpdateError> {
        let me = &self.shared.me;
        let said = |roll: &Roll| roll.present.contains(me) || !roll.running.is_empty();
        self.shared.roll.until(said).await?;
        let call = encode(&Call::Without(names));
        self.shared.roll.update(&call).await.map(|_| ())
    }
}

impl<M> State<M> {
    fn runs(&self) -> bool {
        self.full && self.group.is_some() && !self.over
    }
}

/// The disk's thread: what has come meanwhile is written together.
fn write(
    mut disk: Disk,
    writes: &mpsc::Receiver<Write>,
    done: impl Fn(Result<(Place, usize, bool), DiskError>),
) {
    let mut next = writes.recv().ok();
    while let Some(write) = next.take() {
        let result = match write {
            Write::Checkpoint(index, image) => {
                disk.checkpoint(&image).map(|()| (index, image.len()))
            }
            Write::Record(mut index, record) => {
                let mut bytes = record.len();
                let mut records = vec![record];
                while let Ok(more) = writes.try_recv() {
                    match more {
                        Write::Record(i, record) if bytes < UNWRITTEN_BYTES_MAX => {
                            index = i;
                            bytes += record.len();
                            records.push(record);
                        }
                        other => {
                            next = Some(other);
                            break;
                        }
                    }
                }
                disk.append(&records).map(|()| (index, bytes))
            }
        };
        let failed = result.is_err();
        done(result.map(|(index, bytes)| (index, bytes, disk.is_long())));
        if failed {
            return; // what is on the disk now is not known
        }
        if next.is_none() {
            next = writes.recv().ok();
        }
    }
}

impl<M: Machine> Shared<M> {
    fn state(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn when(&self, f: impl Fn(&State<M>) -> bool) -> Result<(), UpdateError> {
        let done = || {
            let state = self.state();
            if state.over {
                return Some(Err(UpdateError::Out));
            }
            f(&state).then_some(Ok(()))
        };
        look(&self.changed, done).await
    }

    fn on_written(&self, done: Result<(Place, usize, bool), DiskError>) {
        let mut state = self.state();
        match done {
            Ok(((copy, index), bytes, long)) => {
                state.unwritten_bytes = state.unwritten_bytes.saturating_sub(bytes);
                if copy == state.copy {
                    state.on_disk.insert(self.me.name.to_string(), index);
                }
                if long {
                    self.checkpoint(&mut state);
                }
            }
            Err(error) => state.failed = Some(error),
        }
        drop(state);
        self.changed.notify_waiters();
    }

    fn checkpoint(&self, state: &mut State<M>) {
        let image = state.image();
        state.unwritten_bytes += image.len();
        let write = Write::Checkpoint((state.copy, state.book.index), image);
        // A thread that is gone has said why.
        let _ = self.writes.send(write);
    }

    fn log(&self, state: &mut State<M>, record: &Record) {
        let bytes = encode(record);
        state.unwritten_bytes += bytes.len();
        let _ = self
            .writes
            .send(Write::Record((state.copy, state.book.index), bytes));
    }
}

/// From the roll call into the group, and back when nobody is left that may go on.
async fn attend<M: Machine>(
    shared: &Shared<M>,
    inputs: Inputs,
    name: &str,
) -> Result<(), DurableError> {
    loop {
        let decision = shared.roll.when(|roll| roll.decision(&shared.me)).await?;
        let founds = match decision {
            Decision::SayAgain => {
                // What its disk says, and no more.
                shared
                    .when(|s| s.unwritten_bytes == 0 || s.failed.is_some())
                    .await?;
                let summary = {
                    let mut state = shared.state();
                    if let Some(error) = state.failed.take() {
                        return Err(error.into());
                    }
                    state.summary()
                };
                shared.roll.update(&encode(&Call::Here(summary))).await?;
                continue;
            }
            Decision::Found(era) => {
                {
                    let mut state = shared.state();
                    state.book = state.book.begin(era, &shared.me.name);
                    state.full = true;
                    state.renew();
                    // Whoever was there is gone, and this member too: it comes as a new one.
                    let view = GroupView {
                        id: 0,
                        members: Vec::new(),
                        joined: Vec::new(),
                        departed: std::mem::take(&mut state.members),
                    };
                    state.machine.view(&view);
                    shared.checkpoint(&mut state);
                }
                true
            }
            Decision::Join => {
                shared.roll.update(&encode(&Call::Joins)).await?;
                false
            }
        };
        let (group, events) = Group::join_by(&inputs, name).await?;
        let result = {
            let events = pin!(follow(shared, &group, events, founds));
            let speaks = pin!(speak(shared, &group));
            let announces = pin!(announce(shared));
            let fails = pin!(fail(shared));
            let both = pin!(first(speaks, announces));
            let three = pin!(first(both, fails));
            first(events, three).await
        };
        shared.state().group = None;
        result?;
    }
}

/// Waits until the disk fails: this member goes at once, for the others' updates wait for its word.
async fn fail<M: Machine>(shared: &Shared<M>) -> Result<(), DurableError> {
    shared.when(|s| s.failed.is_some()).await?;
    let error = shared.state().failed.take();
    error.map_or(Ok(()), |error| Err(error.into()))
}

/// Takes what the group delivers. Ends when this member has to go back to the roll call.
async fn follow<M: Machine>(
    shared: &Shared<M>,
    group: &Group,
    mut events: Events,
    founds: bool,
) -> Result<(), DurableError> {
    let mut leaving = false;
    while let Some(event) = events.next().await {
        shared
            .when(|s| s.failed.is_some() || s.unwritten_bytes <= UNWRITTEN_BYTES_MAX)
            .await?;
        let mut leave = false;
        {
            let mut state = shared.state();
            if let Some(error) = state.failed.take() {
                return Err(error.into());
            }
            match event {
                Event::Left { .. } => break,
                _ if leaving => {}
                // Whoever founds has the state, and nobody else may: another founder's group has ended, or is about to.
                Event::Init => {
                    leave = !founds;
                    state.group = founds.then(|| group.clone());
                }
                Event::State(_) if founds || state.group.is_some() => leave = true,
                Event::State(image) => {
                    state.begin_with(&image)?;
                    state.full = false;
                    state.renew();
                    state.group = Some(group.clone());
                    shared.checkpoint(&mut state);
                }
                Event::View(view) if state.group.is_some() => {
                    let names = |m: &&String| view.members.iter().any(|v| *v.name == ***m);
                    let record = Record::View(view.clone());
                    let before = state.book.clone();
                    for gone in &view.departed {
                        state.on_disk.remove(&*gone.name);
                    }
                    state.take(&shared.me.name, &record);
                    // Nobody that was let in is left: what goes on is for those who were to say.
                    leave = !state.book.roster.iter().any(|m| names(&m));
                    if leave {
                        state.book = before;
                    } else {
                        shared.log(&mut state, &record);
                    }
                }
                Event::Message(m) if state.group.is_some() => match m.order() {
                    Some(Order::Total(_)) => {
                        let record = Record::Said(m.from().clone(), m.body().clone());
                        let answer = state.take(&shared.me.name, &record);
                        shared.log(&mut state, &record);
                        let index = state.book.index;
                        if *m.from() == shared.me
                            && let Some((number, answer)) = answer
                            && let Some(done) = state.waiting.remove(&number)
                        {
                            let _ = done.send((index, answer));
                        }
                    }
                    // Its own disk it knows best.
                    Some(Order::Fifo) if *m.from() != shared.me => {
                        if let Ok(index) = postcard::from_bytes(m.body()) {
                            state.on_disk.insert(m.from().name.to_string(), index);
                        }
                    }
                    _ => {}
                },
                Event::StateWanted(wanted) if state.runs() => wanted.give(vec![state.image()]),
                Event::View(_) | Event::Message(_) | Event::StateWanted(_) => {}
            }
            if leave {
                state.group = None;
                state.waiting.clear();
            }
        }
        shared.changed.notify_waiters();
        if leave {
            leaving = true;
            // Refused, it is out already, and is told so.
            let _ = group.leave().await;
        }
    }
    if leaving {
        Ok(())
    } else {
        Err(UpdateError::Out.into())
    }
}

/// Says what is on this member's disk, and asks to be let in.
async fn speak<M: Machine>(shared: &Shared<M>, group: &Group) -> Result<(), DurableError> {
    let me = &*shared.me.name;
    let (mut said, mut asked, mut admitted) = (0, false, false);
    loop {
        let may_ask = |s: &State<M>| !s.full && s.group.is_some() && s.on_disk.contains_key(me);
        let told = |s: &State<M>| s.book.joining.get(me).is_some_and(|at| s.all_have(*at));
        let mine = |s: &State<M>| {
            s.on_disk
                .get(me)
                .copied()
                .filter(|_| s.group.is_some())
                .unwrap_or(0)
        };
        shared
            .when(|s| mine(s) > said || (may_ask(s) && (!asked || (!admitted && told(s)))))
            .await?;
        let (index, ask, admit) = {
            let state = shared.state();
            let may = may_ask(&state);
            (
                mine(&state),
                may && !asked,
                may && asked && !admitted && told(&state),
            )
        };
        // A member that is out is told so, by its events.
        if index > said {
            said = index;
            let _ = group.fbcast(encode(&index)).await;
        }
        let order = Order::Total(ThreadId::default());
        if ask {
            asked = true;
            let _ = group.send(Multicast::new(order, encode(&Said::Ask))).await;
        } else if admit {
            admitted = true;
            let _ = group
                .send(Multicast::new(order, encode(&Said::Admit)))
                .await;
        }
    }
}

/// Says in the roll call that this member runs, when its disk says so too; and again, if the roll call has forgotten it.
async fn announce<M: Machine>(shared: &Shared<M>) -> Result<(), DurableError> {
    loop {
        let me = &shared.me;
        let sure = |s: &State<M>| s.runs() && s.on_disk.get(&*me.name) == Some(&s.book.index);
        shared.when(sure).await?;
        let forgot = |roll: &Roll| (!roll.running.contains(me)).then_some(());
        shared.roll.when(forgot).await?;
        let summary = shared.state().summary();
        shared.roll.update(&encode(&Call::Runs(summary))).await?;
    }
}

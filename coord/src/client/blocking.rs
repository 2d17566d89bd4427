//! The client for programs without an asynchronous runtime: the same operations, each returning
//! when it is done.
//!
//! ```no_run
//! # fn main() -> Result<(), unbroken_coord::client::ClientError> {
//! use unbroken_coord::client::ConnectOptions;
//! use unbroken_coord::client::blocking::Client;
//! use unbroken_coord::wire::{Acl, AddWatchMode, CreateMode};
//!
//! let client = Client::connect(ConnectOptions::new(["10.0.0.1:2181"]))?;
//! client.create("/hello", "world", CreateMode::Persistent, Acl::open())?;
//! for notice in client.watch("/hello", AddWatchMode::Persistent)? {
//!     println!("{:?}", notice?);
//! }
//! # Ok(())
//! # }
//! ```

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::{
    ClientError, ConnectOptions, Identity, NewNode, Notice, Reconfig, SessionEvent, SessionState,
    Standing, WatchEvent,
};
use crate::wire::{
    Acl, AddWatchMode, CreateMode, Id, MultiOp, MultiResult, ReadOp, ReadResult, Stat, WatcherKind,
};

/// How long the last handle's drop waits for the session to be closed.
const GOODBYE_MAX: Duration = Duration::from_millis(500);

/// The thread that a blocking client's session lives on.
#[derive(Clone, Debug)]
struct Runtime {
    handle: Handle,
    _stop: Arc<Stop>,
}

/// Ends the thread when it is dropped.
#[derive(Debug)]
struct Stop {
    sign: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Stop {
    fn drop(&mut self) {
        drop(self.sign.take());
        // So that a program which ends now has closed its session. Err: the thread has panicked,
        // and has said so.
        let _: Option<Result<(), _>> = self.thread.take().map(JoinHandle::join);
    }
}

impl Runtime {
    /// With a client on it.
    fn start(options: ConnectOptions) -> (Self, super::Client) {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("the system gives a program an event queue");
        let handle = runtime.handle().clone();
        let client = {
            let _inside = handle.enter();
            super::Client::start(options)
        };
        let mut state = client.state();
        let (sign, stopped) = oneshot::channel::<()>();
        let run = move || {
            runtime.block_on(async {
                // Err, by being dropped, is the sign to end.
                let _: Result<(), _> = stopped.await;
                // The state's end is the session's task's end: it says goodbye first.
                let goodbye = async { while state.changed().await.is_ok() {} };
                let _: Result<(), _> = timeout(GOODBYE_MAX, goodbye).await;
            });
        };
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the driver of those who have none"
        )]
        let thread = std::thread::spawn(run);
        let stop = Stop {
            sign: Some(sign),
            thread: Some(thread),
        };
        let runtime = Self {
            handle,
            _stop: Arc::new(stop),
        };
        (runtime, client)
    }

    /// Waits here for what the runtime's thread does. Works inside another runtime as well, whose
    /// thread it blocks.
    fn wait<F: Future>(&self, future: F) -> F::Output {
        let _inside = self.handle.enter();
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut cx = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            match future.as_mut().poll(&mut cx) {
                Poll::Ready(output) => return output,
                // A wake-up in between makes this return at once.
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A handle to a session, as [`super::Client`]; cheap to clone, and to be used from any thread.
/// When the last clone is dropped the session is closed, and when the last watch or lease that was
/// made from it is dropped, too, its thread ends: that drop waits up to half a second for it.
#[derive(Clone, Debug)]
pub struct Client {
    // Before the runtime: so the session is closed while it still runs.
    client: super::Client,
    runtime: Runtime,
}

/// A one-shot watch, as [`super::WatchFuture`].
#[derive(Debug)]
#[must_use = "a watch that is dropped tells nobody"]
pub struct Watch {
    future: super::WatchFuture,
    runtime: Runtime,
}

impl Watch {
    /// Waits until the watch fires.
    ///
    /// # Errors
    /// [`ClientError::SessionExpired`] or [`ClientError::Closed`] where it can no longer fire.
    pub fn wait(self) -> Result<WatchEvent, ClientError> {
        self.runtime.wait(self.future)
    }

    /// As [`Self::wait`], for a time; the watch itself where it did not fire.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_for(mut self, limit: Duration) -> Result<Result<WatchEvent, ClientError>, Self> {
        let waited = self
            .runtime
            .wait(async { timeout(limit, &mut self.future).await });
        waited.map_err(|_| self)
    }
}

/// A persistent watch, as [`super::WatchStream`]: an iterator whose `next` waits.
#[derive(Debug)]
#[must_use = "a watch that is dropped tells nobody"]
pub struct WatchIter {
    stream: super::WatchStream,
    runtime: Runtime,
}

impl WatchIter {
    /// The next notice if there is one already; see [`super::WatchStream::try_next`].
    pub fn try_next(&mut self) -> Option<Result<Notice, ClientError>> {
        self.stream.try_next()
    }

    /// The next notice if it comes within a time. [`ClientError::Timeout`] where it does not; the
    /// watch goes on.
    pub fn next_for(&mut self, limit: Duration) -> Option<Result<Notice, ClientError>> {
        let Self { stream, runtime } = self;
        runtime
            .wait(async { timeout(limit, stream.next()).await })
            .unwrap_or(Some(Err(ClientError::Timeout)))
    }
}

impl Iterator for WatchIter {
    type Item = Result<Notice, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        let Self { stream, runtime } = self;
        runtime.wait(stream.next())
    }
}

/// What happens to a session, as [`super::SessionEvents`]: an iterator whose `next` waits.
#[derive(Debug)]
pub struct EventIter {
    events: super::SessionEvents,
    runtime: Runtime,
}

impl EventIter {
    /// The next event if there is one already.
    pub fn try_next(&mut self) -> Option<SessionEvent> {
        self.events.try_next()
    }
}

impl Iterator for EventIter {
    type Item = SessionEvent;

    fn next(&mut self) -> Option<Self::Item> {
        let Self { events, runtime } = self;
        runtime.wait(events.next())
    }
}

/// Until when the session certainly lives, as [`super::Lease`].
#[derive(Clone, Debug)]
pub struct Lease {
    lease: super::Lease,
    runtime: Runtime,
}

impl Lease {
    /// See [`super::Lease::session_id`].
    #[must_use]
    pub fn session_id(&self) -> i64 {
        self.lease.session_id()
    }

    /// See [`super::Lease::standing`].
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.lease.standing()
    }

    /// See [`super::Lease::is_certain`].
    #[must_use]
    pub fn is_certain(&self) -> bool {
        self.lease.is_certain()
    }

    /// See [`super::Lease::until`].
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        self.lease.until()
    }

    /// Waits until the session is no longer certain to live; see [`super::Lease::uncertain`].
    pub fn uncertain(&self) -> Standing {
        self.runtime.wait(self.lease.uncertain())
    }

    /// Waits until it certainly lives again, or has ended; see [`super::Lease::certain`].
    pub fn certain(&self) -> Standing {
        self.runtime.wait(self.lease.certain())
    }

    /// Waits until it is known to have ended.
    pub fn gone(&self) {
        self.runtime.wait(self.lease.gone());
    }
}

impl Client {
    /// Begins to connect, and returns at once; see [`super::Client::start`].
    ///
    /// # Panics
    /// Without a host.
    pub fn start(options: ConnectOptions) -> Self {
        let (runtime, client) = Runtime::start(options);
        Self { client, runtime }
    }

    /// Connects, and returns when the session is open.
    ///
    /// # Errors
    /// As [`super::Client::connect`].
    ///
    /// # Panics
    /// Without a host.
    pub fn connect(options: ConnectOptions) -> Result<Self, ClientError> {
        let client = Self::start(options);
        client.wait(client.client.connected())?;
        Ok(client)
    }

    /// The asynchronous client of the same session.
    #[must_use]
    pub fn as_async(&self) -> &super::Client {
        &self.client
    }

    /// The same session with another deadline for each request.
    #[must_use]
    pub fn with_request_timeout(&self, timeout: Option<Duration>) -> Self {
        Self {
            client: self.client.with_request_timeout(timeout),
            runtime: self.runtime.clone(),
        }
    }

    /// How the session is now.
    #[must_use]
    pub fn state(&self) -> SessionState {
        *self.client.state().borrow()
    }

    /// The session, where a server holds it now.
    #[must_use]
    pub fn session_id(&self) -> Option<i64> {
        self.client.session_id()
    }

    /// See [`super::Client::events`].
    ///
    /// # Errors
    /// As there.
    pub fn events(&self) -> Result<EventIter, ClientError> {
        Ok(EventIter {
            events: self.wait(self.client.events())?,
            runtime: self.runtime.clone(),
        })
    }

    /// See [`super::Client::lease`].
    ///
    /// # Errors
    /// As there.
    pub fn lease(&self) -> Result<Lease, ClientError> {
        Ok(Lease {
            lease: self.wait(self.client.lease())?,
            runtime: self.runtime.clone(),
        })
    }

    /// See [`super::Client::exists_and_watch`].
    ///
    /// # Errors
    /// As there.
    pub fn exists_and_watch(&self, path: &str) -> Result<(Option<Stat>, Watch), ClientError> {
        let (stat, future) = self.wait(self.client.exists_and_watch(path))?;
        Ok((stat, self.watching(future)))
    }

    /// See [`super::Client::get_and_watch`].
    ///
    /// # Errors
    /// As there.
    pub fn get_and_watch(&self, path: &str) -> Result<(Bytes, Stat, Watch), ClientError> {
        let (data, stat, future) = self.wait(self.client.get_and_watch(path))?;
        Ok((data, stat, self.watching(future)))
    }

    /// See [`super::Client::children_and_watch`].
    ///
    /// # Errors
    /// As there.
    pub fn children_and_watch(
        &self,
        path: &str,
    ) -> Result<(Vec<String>, Stat, Watch), ClientError> {
        let (children, stat, future) = self.wait(self.client.children_and_watch(path))?;
        Ok((children, stat, self.watching(future)))
    }

    /// See [`super::Client::config_and_watch`].
    ///
    /// # Errors
    /// As there.
    pub fn config_and_watch(&self) -> Result<(Bytes, Stat, Watch), ClientError> {
        let (data, stat, future) = self.wait(self.client.config_and_watch())?;
        Ok((data, stat, self.watching(future)))
    }

    /// See [`super::Client::watch`].
    ///
    /// # Errors
    /// As there.
    pub fn watch(&self, path: &str, mode: AddWatchMode) -> Result<WatchIter, ClientError> {
        Ok(WatchIter {
            stream: self.wait(self.client.watch(path, mode))?,
            runtime: self.runtime.clone(),
        })
    }

    fn watching(&self, future: super::WatchFuture) -> Watch {
        Watch {
            future,
            runtime: self.runtime.clone(),
        }
    }

    fn wait<F: Future>(&self, future: F) -> F::Output {
        self.runtime.wait(future)
    }
}

/// Operations whose blocking form differs in nothing but waiting.
macro_rules! operations {
    ($($name:ident($($arg:ident: $type:ty),*) -> $output:ty;)+) => {
        impl Client {
            $(
                #[doc = concat!("See [`super::Client::", stringify!($name), "`].")]
                ///
                /// # Errors
                /// As there.
                pub fn $name(&self, $($arg: $type),*) -> Result<$output, ClientError> {
                    self.wait(self.client.$name($($arg),*))
                }
            )+
        }
    };
}

operations! {
    authenticate(identity: Identity) -> ();
    create(path: &str, data: impl Into<Bytes>, mode: CreateMode, acl: Vec<Acl>) -> String;
    create_node(path: &str, node: NewNode) -> (String, Stat);
    delete(path: &str, version: i32) -> ();
    exists(path: &str) -> Option<Stat>;
    get(path: &str) -> (Bytes, Stat);
    get_or_null(path: &str) -> (Option<Bytes>, Stat);
    sync_and_get(path: &str) -> (Bytes, Stat);
    set(path: &str, data: impl Into<Bytes>, version: i32) -> Stat;
    set_or_null(path: &str, data: Option<Bytes>, version: i32) -> Stat;
    children(path: &str) -> Vec<String>;
    children2(path: &str) -> (Vec<String>, Stat);
    all_children_number(path: &str) -> u32;
    ephemerals(prefix: &str) -> Vec<String>;
    sync(path: &str) -> ();
    check(path: &str, version: i32) -> ();
    multi(ops: Vec<MultiOp>) -> Vec<MultiResult>;
    multi_read(ops: Vec<ReadOp>) -> Vec<ReadResult>;
    acl(path: &str) -> (Vec<Acl>, Stat);
    set_acl(path: &str, acl: Vec<Acl>, version: i32) -> Stat;
    who_am_i() -> Vec<Id>;
    remove_watches(path: &str, kind: WatcherKind) -> ();
    check_watches(path: &str, kind: WatcherKind) -> bool;
    config() -> (Bytes, Stat);
    reconfig(change: &Reconfig, version: i64) -> (Bytes, Stat);
    close() -> ();
}

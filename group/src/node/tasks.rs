//! Futures that run side by side inside one, for programs that bring any runtime or none.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use tokio::sync::Notify;

type Task<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// The futures. Each runs when it is woken; a new one runs before whatever is taken after it was put in.
pub(crate) struct Tasks<'a> {
    running: BTreeMap<u64, (Task<'a>, Arc<TaskWaker>)>,
    next: u64,
    woken: Arc<Woken>,
}

/// Which tasks want to run, in order, and who runs them.
#[derive(Default)]
struct Woken(Mutex<(VecDeque<u64>, Option<Waker>)>);

struct TaskWaker {
    task: u64,
    queued: AtomicBool,
    woken: Arc<Woken>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut woken = self.woken.0.lock().unwrap_or_else(PoisonError::into_inner);
        woken.0.push_back(self.task);
        let runner = woken.1.clone();
        drop(woken);
        if let Some(runner) = runner {
            runner.wake();
        }
    }
}

impl<'a> Tasks<'a> {
    pub(crate) fn new() -> Self {
        Self {
            running: BTreeMap::new(),
            next: 0,
            woken: Arc::default(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.running.len()
    }

    /// Adds one. It runs for the first time at the next [`Tasks::poll`].
    pub(crate) fn push(&mut self, task: impl Future<Output = ()> + Send + 'a) {
        let number = self.next;
        self.next += 1;
        let waker = Arc::new(TaskWaker {
            task: number,
            queued: AtomicBool::new(false),
            woken: Arc::clone(&self.woken),
        });
        Arc::clone(&waker).wake();
        self.running.insert(number, (Box::pin(task), waker));
    }

    /// Runs those that were woken, in the order in which they were. Ready when there is none left.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut woken = self.woken.0.lock().unwrap_or_else(PoisonError::into_inner);
        woken.1 = Some(cx.waker().clone());
        // One that is woken while it runs has woken the runner too, and runs the next time.
        let due = std::mem::take(&mut woken.0);
        drop(woken);
        for number in due {
            let Some((task, waker)) = self.running.get_mut(&number) else {
                continue;
            };
            // Before it runs, so that no wake is missed.
            waker.queued.store(false, Ordering::Release);
            let waker = Waker::from(Arc::clone(waker));
            if task
                .as_mut()
                .poll(&mut Context::from_waker(&waker))
                .is_ready()
            {
                self.running.remove(&number);
            }
        }
        if self.running.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

/// The first of two that ends.
pub(crate) async fn first<T>(
    mut a: Pin<&mut impl Future<Output = T>>,
    mut b: Pin<&mut impl Future<Output = T>>,
) -> T {
    std::future::poll_fn(|cx| match a.as_mut().poll(cx) {
        Poll::Ready(t) => Poll::Ready(t),
        Poll::Pending => b.as_mut().poll(cx),
    })
    .await
}

/// Looks, and looks again whenever there is news, until there is something.
pub(crate) async fn look<T>(news: &Notify, f: impl Fn() -> Option<T>) -> T {
    loop {
        // Before the look, so that nothing is missed.
        let news = news.notified();
        let mut news = std::pin::pin!(news);
        news.as_mut().enable();
        if let Some(found) = f() {
            return found;
        }
        news.await;
    }
}

/// Runs both until both have ended.
pub(crate) async fn both(
    first: impl Future<Output = ()> + Send,
    second: impl Future<Output = ()> + Send,
) {
    let mut tasks = Tasks::new();
    tasks.push(first);
    tasks.push(second);
    std::future::poll_fn(|cx| tasks.poll(cx)).await;
}

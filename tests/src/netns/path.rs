//! A long and lossy way to a host. Most kernels of small machines lack netem; so the frames between the host's port and
//! the switch pass through two threads of this process, one for each direction.
//!
//! ```text
//!   c ──── port c │ thread │ c-near ──── c-far ── br0 (switch)
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::frames::Port;

/// Frames that are on their way in one direction; more are lost, as by a router.
const QUEUE_FRAMES: usize = 4096;

/// Room for one frame of an MTU of 9000.
const FRAME: usize = 9216;

/// What a way does to frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathOptions {
    /// In each direction: a round trip takes twice as long.
    pub delay: Duration,
    /// So many of a million frames are lost, in each direction.
    pub loss_ppm: u32,
    /// Which are.
    pub seed: u64,
}

/// A way that [`super::Lab::lengthen`] made. Dropped, it cuts the host off.
#[derive(Debug)]
pub struct Path {
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    loss_ppm: AtomicU32,
    carried: AtomicU64,
    lost: AtomicU64,
}

impl Path {
    pub(super) fn open(
        host: &Arc<Port>,
        switch: &Arc<Port>,
        options: PathOptions,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            loss_ppm: AtomicU32::new(options.loss_ppm),
            carried: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        });
        let mut path = Self {
            stop: Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?),
            threads: Vec::new(),
            shared,
        };
        for (seed, from, to) in [(options.seed, host, switch), (!options.seed, switch, host)] {
            let mut direction = Direction {
                from: Arc::clone(from),
                to: Arc::clone(to),
                delay: options.delay,
                random: seed,
                under_way: VecDeque::new(),
                shared: Arc::clone(&path.shared),
            };
            let stop = Arc::clone(&path.stop);
            let thread = std::thread::Builder::new().name("path".to_owned());
            // An interface that is gone ends the way.
            let run = move || drop(direction.run(&stop));
            path.threads.push(thread.spawn(run)?);
        }
        Ok(path)
    }

    /// From now on, so many of a million frames are lost.
    pub fn set_loss(&self, ppm: u32) {
        self.shared.loss_ppm.store(ppm, Ordering::Relaxed);
    }

    /// Frames that were carried, and that were lost, in both directions.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (count(&self.shared.carried), count(&self.shared.lost))
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        let told = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        told.expect("an eventfd takes a number");
        for thread in self.threads.drain(..) {
            // It has told what it had to say.
            let _ = thread.join();
        }
    }
}

struct Direction {
    from: Arc<Port>,
    to: Arc<Port>,
    delay: Duration,
    random: u64,
    /// With the moment when each arrives; the delay is the same for all, so they stay in order.
    under_way: VecDeque<(Instant, Vec<u8>)>,
    shared: Arc<Shared>,
}

impl Direction {
    fn run(&mut self, stop: &OwnedFd) -> io::Result<()> {
        let mut buffer = vec![0; FRAME];
        loop {
            let left = self.under_way.front();
            let left = left.map(|(due, _)| due.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec::try_from(left).expect("a short delay"));
            let mut poll = [
                PollFd::new(&*self.from, PollFlags::IN),
                PollFd::new(stop, PollFlags::IN),
            ];
            match rustix::event::poll(&mut poll, left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            if !poll[1].revents().is_empty() {
                return Ok(());
            }
            let now = Instant::now();
            while let Some(frame) = self.from.receive(&mut buffer)? {
                let frame = frame.to_vec();
                self.enter(now, frame);
            }
            while let Some((_, frame)) = self.under_way.pop_front_if(|(due, _)| *due <= now) {
                self.to.send(&frame)?;
            }
        }
    }

    fn enter(&mut self, now: Instant, frame: Vec<u8>) {
        let lost =
            self.draw() % 1_000_000 < u64::from(self.shared.loss_ppm.load(Ordering::Relaxed));
        if lost || self.under_way.len() >= QUEUE_FRAMES {
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.shared.carried.fetch_add(1, Ordering::Relaxed);
        self.under_way.push_back((now + self.delay, frame));
    }

    /// `SplitMix64`.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

//! Reading a channel.

use std::collections::VecDeque;

use bytes::Bytes;

use super::entry::Entry;
use super::{Channel, ChannelError, Position};
use crate::client::ClientError;
use crate::recipes::znodes::{all, join, op_check, op_set};
use crate::wire::{CreateMode, ErrorCode, validate_path};

/// Entries that are read ahead at most.
const READ_AHEAD_MAX: u64 = 16;

/// An event as it was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Where it is.
    pub position: Position,
    /// What it says.
    pub data: Bytes,
}

/// Where to begin to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With the first event that is kept.
    Earliest,
    /// With the next one that is published.
    Latest,
    /// Here: with a position at which another reading ended, say.
    At(Position),
}

/// Reads a channel in order.
#[derive(Debug)]
pub struct Subscriber {
    channel: Channel,
    /// The first event that was not given out.
    next: Position,
    /// Events from `next` on.
    ready: VecDeque<Event>,
    /// The first entry whose events are not in `ready`.
    fetch: u64,
    /// How many entries to ask for at once.
    ahead: u64,
    /// Its name, where it is registered.
    name: Option<String>,
}

impl Channel {
    /// Reads from here on.
    ///
    /// # Errors
    /// [`ChannelError::Client`].
    pub async fn subscribe(&self, start: Start) -> Result<Subscriber, ChannelError> {
        let next = self.position(start).await?;
        Ok(self.subscriber(next, None))
    }

    /// Reads on where the subscriber of this name committed last; where there is none it is
    /// registered, and begins at `start`. Registered subscribers hold [`Self::truncate_read`]
    /// back. A name is for one reader at a time.
    ///
    /// # Errors
    /// [`ChannelError::Truncated`] where the position that `start` gives is truncated;
    /// [`ChannelError::Client`], also for a name that cannot be a znode's.
    pub async fn subscribe_as(&self, name: &str, start: Start) -> Result<Subscriber, ChannelError> {
        let path = join(&self.subscribers(), name);
        validate_path(&path).map_err(ClientError::from)?;
        let nodes = &self.nodes;
        loop {
            if let Some((data, _)) = nodes.get_newest(&path).await? {
                let text = std::str::from_utf8(&data).ok();
                let next = text.and_then(|text| text.parse().ok());
                let next = next.ok_or_else(|| self.foreign(&path))?;
                return Ok(self.subscriber(next, Some(name.to_owned())));
            }
            let (floor, version) = self.floor().await?;
            let next = self.position(start).await?;
            if next.entry < floor {
                return Err(self.truncated(next, floor));
            }
            // Whoever truncates by the registered ones must see this one, or must have done it
            // before: it changes what the other checks, and checks what the other changes.
            let ops = vec![
                op_check(&self.floor_path(), version),
                op_set(&self.subscribers(), "", -1),
                nodes.op_create(&path, next.to_string(), CreateMode::Persistent),
            ];
            match nodes.repeat(|| nodes.client.multi(ops.clone())).await {
                // The next round reads what is there.
                Ok(_) => {}
                Err(ClientError::Multi {
                    code: ErrorCode::NodeExists | ErrorCode::BadVersion,
                    ..
                }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Forgets a registered subscriber, so that it holds nothing back any more.
    ///
    /// # Errors
    /// [`ChannelError::Client`].
    pub async fn unsubscribe(&self, name: &str) -> Result<(), ChannelError> {
        let path = join(&self.subscribers(), name);
        Ok(self.nodes.delete(&path).await?)
    }

    async fn position(&self, start: Start) -> Result<Position, ChannelError> {
        match start {
            Start::Earliest => self.begin().await,
            Start::Latest => self.end().await,
            Start::At(position) => Ok(position),
        }
    }

    fn subscriber(&self, next: Position, name: Option<String>) -> Subscriber {
        Subscriber {
            channel: self.clone(),
            next,
            ready: VecDeque::new(),
            fetch: next.entry,
            ahead: 1,
            name,
        }
    }

    fn truncated(&self, asked: Position, floor: u64) -> ChannelError {
        ChannelError::Truncated {
            path: self.path.to_string(),
            asked,
            first: Position {
                entry: floor,
                index: 0,
            },
        }
    }
}

impl Subscriber {
    /// The position of the event that [`Self::next`] gives next: where to go on later.
    pub const fn position(&self) -> Position {
        self.next
    }

    /// Waits for the next event.
    ///
    /// May be dropped and called again: nothing is lost.
    ///
    /// # Errors
    /// [`ChannelError::Truncated`], [`ChannelError::Gap`]; after an error it stays where it is.
    pub async fn next(&mut self) -> Result<Event, ChannelError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.next = Position {
                    entry: event.position.entry,
                    index: event.position.index + 1,
                };
                return Ok(event);
            }
            // All of an entry was given out: the next one begins.
            if self.next.entry < self.fetch {
                self.next = Position {
                    entry: self.fetch,
                    index: 0,
                };
            }
            if !self.fetch().await? {
                self.wait().await?;
            }
        }
    }

    /// Says that all events before [`Self::position`] are done with, if this is registered: it
    /// goes on there when it subscribes again, and they may be truncated.
    ///
    /// # Errors
    /// [`ChannelError::Client`]; [`ErrorCode::NoNode`] where somebody has unsubscribed the name.
    pub async fn commit(&self) -> Result<(), ChannelError> {
        let Some(name) = &self.name else {
            return Ok(());
        };
        let nodes = &self.channel.nodes;
        let path = join(&self.channel.subscribers(), name);
        let next = self.next.to_string();
        nodes
            .repeat(|| nodes.client.set(&path, next.clone(), -1))
            .await?;
        Ok(())
    }

    /// Reads what there is of the next entries. False if there is none.
    async fn fetch(&mut self) -> Result<bool, ChannelError> {
        let paths: Vec<String> = (self.fetch..self.fetch + self.ahead)
            .map(|entry| self.channel.entry(entry))
            .collect();
        let mut reads = Vec::new();
        for path in &paths {
            reads.push(self.channel.nodes.get(path));
        }
        let mut found = 0;
        // What comes after a missing one is none of our business yet.
        for (read, path) in all(reads).await.into_iter().zip(&paths) {
            let Some((data, _)) = read? else { break };
            let entry = Entry::decode(data).ok_or_else(|| self.channel.foreign(path))?;
            self.take(entry);
            found += 1;
        }
        self.ahead = if found == self.ahead {
            (self.ahead * 2).min(READ_AHEAD_MAX)
        } else {
            1
        };
        Ok(found > 0)
    }

    fn take(&mut self, entry: Entry) {
        let number = self.fetch;
        // Only of the first one is a part done with already.
        let first = if self.next.entry == number {
            self.next.index
        } else {
            0
        };
        for (index, data) in (0..).zip(entry.events) {
            if index >= first {
                let position = Position {
                    entry: number,
                    index,
                };
                self.ready.push_back(Event { position, data });
            }
        }
        self.fetch += 1;
    }

    /// Waits for the next entry, which was not there.
    async fn wait(&self) -> Result<(), ChannelError> {
        let (channel, nodes) = (&self.channel, &self.channel.nodes);
        let path = channel.entry(self.fetch);
        let look = || nodes.client.exists_and_watch(&path);
        let (found, created) = nodes.repeat(look).await?;
        if found.is_some() {
            return Ok(());
        }
        // It is to come, or was truncated, or somebody has deleted it. All on one session: what
        // is read later is no older.
        let sequence = self.fetch % channel.segment_entries;
        let used = channel.used(self.fetch / channel.segment_entries).await?;
        let was_there = used.is_some_and(|used| used > sequence);
        if was_there && nodes.get(&path).await?.is_some() {
            return Ok(());
        }
        let (floor, _) = channel.floor().await?;
        if self.fetch < floor {
            return Err(channel.truncated(self.next, floor));
        }
        if was_there {
            return Err(ChannelError::Gap { path });
        }
        match created.await {
            Ok(_) => Ok(()),
            Err(ClientError::SessionExpired) => Ok(nodes.session().await?),
            Err(error) => Err(error.into()),
        }
    }
}

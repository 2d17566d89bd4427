//! Appending to a channel.

use bytes::Bytes;
use tracing::debug;

use super::entry::{EVENT_BYTES_MAX, Entry, Id, batches};
use super::{Channel, ChannelError, Position};
use crate::client::ClientError;
use crate::recipes::common::unknown;
use crate::recipes::znodes::{join, op_set};
use crate::wire::{CreateMode, ErrorCode, MultiResult};

/// Appends to a channel, one batch at a time.
#[derive(Debug)]
pub struct Publisher {
    channel: Channel,
    id: Id,
    /// How often this has appended, which is the version of its znode.
    appends: u64,
    /// Where it appends.
    segment: u64,
    /// An append was begun and not seen to its end.
    interrupted: bool,
}

/// What became of an append.
enum Appended {
    /// It is there.
    At(u64),
    /// Its segment was full.
    Void,
    /// Its segment is gone.
    NoSegment,
    /// The publisher's znode went with its session, before anything was sent.
    Unregistered,
}

impl Channel {
    /// A new publisher.
    ///
    /// # Errors
    /// [`ChannelError::Client`].
    pub async fn publisher(&self) -> Result<Publisher, ChannelError> {
        let mut publisher = Publisher {
            channel: self.clone(),
            id: Id::default(),
            appends: 0,
            segment: self.newest_segment().await?,
            interrupted: false,
        };
        publisher.register().await?;
        Ok(publisher)
    }
}

impl Publisher {
    /// Appends an event; gives its position.
    ///
    /// # Errors
    /// [`ChannelError::TooLarge`], [`ChannelError::Client`]. After the latter the outcome is
    /// unknown; also where this is dropped before it ends. Either way it can publish again.
    pub async fn publish(&mut self, event: impl Into<Bytes>) -> Result<Position, ChannelError> {
        let positions = self.publish_all([event]).await?;
        Ok(*positions.last().expect("one event has one position"))
    }

    /// Appends events in their order, as many as fit to an entry; gives their positions.
    ///
    /// # Errors
    /// As [`Self::publish`]; the first ones may be published then and the others not.
    pub async fn publish_all(
        &mut self,
        events: impl IntoIterator<Item = impl Into<Bytes>>,
    ) -> Result<Vec<Position>, ChannelError> {
        let events: Vec<Bytes> = events.into_iter().map(Into::into).collect();
        let too_large = |event: &&Bytes| event.len() > EVENT_BYTES_MAX;
        if let Some(event) = events.iter().find(too_large) {
            return Err(ChannelError::TooLarge { bytes: event.len() });
        }
        let mut positions = Vec::with_capacity(events.len());
        for batch in batches(events) {
            let count = u32::try_from(batch.len()).expect("a batch is bounded");
            let entry = self.append(batch).await?;
            positions.extend((0..count).map(|index| Position { entry, index }));
        }
        Ok(positions)
    }

    async fn append(&mut self, events: Vec<Bytes>) -> Result<u64, ChannelError> {
        loop {
            if self.interrupted {
                // Whether that was done this would mistake for a repetition of its own.
                self.channel.nodes.delete(&self.path()).await?;
                self.register().await?;
            }
            self.interrupted = true;
            let appended = self.try_append(&events).await?;
            self.interrupted = false;
            match appended {
                Appended::At(entry) => return Ok(entry),
                Appended::Void => self.next_segment().await?,
                Appended::NoSegment => self.segment = self.channel.newest_segment().await?,
                Appended::Unregistered => self.register().await?,
            }
        }
    }

    async fn try_append(&mut self, events: &[Bytes]) -> Result<Appended, ChannelError> {
        let nodes = &self.channel.nodes;
        let segment = self.channel.segment(self.segment);
        let entry = Entry {
            publisher: self.id,
            append: self.appends,
            events: events.to_vec(),
        };
        let version = i32::try_from(self.appends).map_err(|_| ClientError::Protocol)?;
        let ops = vec![
            op_set(&self.path(), (self.appends + 1).to_string(), version),
            nodes.op_create(
                &join(&segment, "e-"),
                entry.encode(),
                CreateMode::PersistentSequential,
            ),
        ];
        // Whether an attempt was made whose outcome nobody knows.
        let mut doubt = false;
        let sequence = loop {
            match nodes.client.multi(ops.clone()).await {
                Ok(results) => match &results[..] {
                    [
                        _,
                        MultiResult::Created { path } | MultiResult::Created2 { path, .. },
                    ] => {
                        break sequence(path).ok_or(ClientError::Protocol)?;
                    }
                    _ => return Err(ClientError::Protocol.into()),
                },
                Err(ClientError::Multi { index: 0, code }) => match code {
                    ErrorCode::BadVersion if doubt => {
                        break self.find(&segment, &entry).await?;
                    }
                    ErrorCode::NoNode if doubt => {
                        // Its session has expired, and nobody knows what became of the append.
                        return Err(ClientError::SessionExpired.into());
                    }
                    ErrorCode::NoNode => return Ok(Appended::Unregistered),
                    code => return Err(ClientError::Zk(code).into()),
                },
                Err(ClientError::Multi {
                    index: 1,
                    code: ErrorCode::NoNode,
                }) => return Ok(Appended::NoSegment),
                Err(ClientError::SessionExpired) => {
                    doubt = true;
                    nodes.session().await?;
                }
                Err(error) if unknown(error) => {
                    doubt = true;
                    if error != ClientError::ConnectionLoss {
                        tokio::task::yield_now().await;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        };
        self.appends += 1;
        if sequence < self.channel.segment_entries {
            return Ok(Appended::At(
                self.segment * self.channel.segment_entries + sequence,
            ));
        }
        // Nobody reads it, and it goes with its segment in any case.
        let void = format!("{segment}/e-{sequence:010}");
        if let Err(error) = nodes.delete(&void).await {
            debug!(void, %error, "void entry left behind");
        }
        Ok(Appended::Void)
    }

    /// The sequence number that an append got whose answer was lost.
    async fn find(&self, segment: &str, entry: &Entry) -> Result<u64, ChannelError> {
        let nodes = &self.channel.nodes;
        let names = nodes.children(segment).await?;
        for name in names.iter().rev() {
            let Some((data, _)) = nodes.get(&join(segment, name)).await? else {
                continue;
            };
            let found = Entry::decode(data);
            let same =
                |found: &Entry| (found.publisher, found.append) == (entry.publisher, entry.append);
            if found.as_ref().is_some_and(same) {
                return Ok(sequence(name).ok_or(ClientError::Protocol)?);
            }
        }
        let first = self.channel.begin().await?;
        Err(ChannelError::Truncated {
            path: self.channel.path.to_string(),
            asked: Position {
                entry: self.segment * self.channel.segment_entries,
                index: 0,
            },
            first,
        })
    }

    async fn next_segment(&mut self) -> Result<(), ChannelError> {
        let next = self.segment + 1;
        let nodes = &self.channel.nodes;
        nodes
            .create(&self.channel.segment(next), &Bytes::new())
            .await?;
        // Others may be further on.
        self.segment = self.channel.newest_segment().await?.max(next);
        Ok(())
    }

    /// Becomes a new publisher, which has never appended.
    async fn register(&mut self) -> Result<(), ChannelError> {
        getrandom::fill(&mut self.id).expect("the system has randomness");
        self.appends = 0;
        let (nodes, path) = (&self.channel.nodes, self.path());
        let create = || {
            nodes
                .client
                .create(&path, "0", CreateMode::Ephemeral, nodes.acl.clone())
        };
        match nodes.repeat(create).await {
            // Its own, of an attempt whose answer was lost.
            Ok(_) | Err(ClientError::Zk(ErrorCode::NodeExists)) => {
                self.interrupted = false;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn path(&self) -> String {
        let id = u128::from_be_bytes(self.id);
        format!("{}/publishers/{id:032x}", self.channel.path)
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // If there is no runtime any more, it goes with the session.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (nodes, path) = (self.channel.nodes.clone(), self.path());
            runtime.spawn(async move {
                let _: Result<(), ClientError> = nodes.delete(&path).await;
            });
        }
    }
}

/// The number at the end of a sequential znode's name.
fn sequence(name: &str) -> Option<u64> {
    name.rsplit_once("e-")?.1.parse().ok()
}

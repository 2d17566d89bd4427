//! Taking away what nobody needs any more.

use super::{Channel, ChannelError, Position};
use crate::client::ClientError;
use crate::recipes::znodes::{all, join, op_check, op_set, present};
use crate::wire::ErrorCode;

/// Deletions that are under way at once.
const DELETIONS_MAX: usize = 64;

impl Channel {
    /// Takes away all entries before that of `position`, whoever has read them or not. Gives the
    /// first position that is kept, which is further on where more was truncated before, and
    /// never beyond the end.
    ///
    /// # Errors
    /// [`ChannelError::Client`], [`ChannelError::Foreign`]. What is left to be deleted then, the
    /// next truncation deletes.
    pub async fn truncate_before(&self, position: Position) -> Result<Position, ChannelError> {
        loop {
            let end = self.end().await?;
            let (floor, version) = self.floor().await?;
            let wanted = position.entry.min(end.entry);
            if floor >= wanted {
                return self.sweep(floor).await;
            }
            let path = self.floor_path();
            let text = wanted.to_string();
            let nodes = &self.nodes;
            let set = nodes.repeat(|| nodes.client.set(&path, text.clone(), version));
            match set.await {
                Ok(_) => return self.sweep(wanted).await,
                // Another's, or its own of which the answer was lost.
                Err(ClientError::Zk(ErrorCode::BadVersion)) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes away all entries that every registered subscriber has read and committed; nothing
    /// where none is registered. Gives the first position that is kept.
    ///
    /// # Errors
    /// As [`Self::truncate_before`].
    pub async fn truncate_read(&self) -> Result<Position, ChannelError> {
        let nodes = &self.nodes;
        let directory = self.subscribers();
        loop {
            nodes.repeat(|| nodes.client.sync(&self.path)).await?;
            let (floor, version) = self.floor().await?;
            let list = nodes.repeat(|| nodes.client.children2(&directory)).await;
            let Some((names, stat)) = present(list)? else {
                return Err(self.foreign(&directory));
            };
            let paths: Vec<String> = names.iter().map(|name| join(&directory, name)).collect();
            let mut reads = Vec::new();
            for path in &paths {
                reads.push(nodes.get(path));
            }
            let mut wanted: Option<u64> = None;
            for (read, path) in all(reads).await.into_iter().zip(&paths) {
                // One that has gone meanwhile holds nothing back.
                let Some((data, _)) = read? else { continue };
                let text = std::str::from_utf8(&data).ok();
                let position: Option<Position> = text.and_then(|text| text.parse().ok());
                let entry = position.ok_or_else(|| self.foreign(path))?.entry;
                wanted = Some(wanted.map_or(entry, |wanted| wanted.min(entry)));
            }
            let end = self.end().await?;
            let wanted = wanted.unwrap_or(floor).min(end.entry);
            if wanted <= floor {
                return self.sweep(floor).await;
            }
            // Nobody has registered since they were listed.
            let ops = vec![
                op_check(&directory, stat.version),
                op_set(&self.floor_path(), wanted.to_string(), version),
            ];
            match nodes.repeat(|| nodes.client.multi(ops.clone())).await {
                Ok(_) => return self.sweep(wanted).await,
                Err(ClientError::Multi {
                    code: ErrorCode::BadVersion,
                    ..
                }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Deletes whatever is before the floor. Segments that have a successor get no more entries
    /// that are read; the newest stays, with its counter.
    async fn sweep(&self, floor: u64) -> Result<Position, ChannelError> {
        let segments = self.segments().await?;
        for (index, segment) in segments.iter().enumerate() {
            let newest = index + 1 == segments.len();
            let begin = segment * self.segment_entries;
            if begin >= floor {
                break;
            }
            let whole = begin + self.segment_entries <= floor && !newest;
            self.sweep_segment(*segment, whole, floor - begin).await?;
        }
        Ok(Position {
            entry: floor,
            index: 0,
        })
    }

    /// Deletes the entries of a segment whose sequence number is below `below`, or all of it.
    async fn sweep_segment(
        &self,
        segment: u64,
        whole: bool,
        below: u64,
    ) -> Result<(), ChannelError> {
        let nodes = &self.nodes;
        let path = self.segment(segment);
        loop {
            let doomed = |name: &String| {
                let sequence = name.strip_prefix("e-").and_then(|text| text.parse().ok());
                whole || sequence.is_some_and(|sequence: u64| sequence < below)
            };
            let names = nodes.children(&path).await?;
            let paths: Vec<String> = names
                .iter()
                .filter(|name| doomed(name))
                .map(|name| join(&path, name))
                .collect();
            for some in paths.chunks(DELETIONS_MAX) {
                let mut deletions = Vec::new();
                for path in some {
                    deletions.push(nodes.delete(path));
                }
                for deleted in all(deletions).await {
                    deleted?;
                }
            }
            if !whole {
                return Ok(());
            }
            match nodes.delete(&path).await {
                // A publisher that was late has left a void entry.
                Err(ClientError::Zk(ErrorCode::NotEmpty)) => {}
                outcome => return Ok(outcome?),
            }
        }
    }
}

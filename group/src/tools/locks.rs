//! Locks by name, held by members: first come, first served; a departed member holds none.

use super::{Machine, Replicated, UpdateError};
use crate::process::GroupView;
use crate::view::MemberId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Who holds and who waits for each lock, the same at every member.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Locks(BTreeMap<String, VecDeque<MemberId>>);

#[derive(Serialize, Deserialize)]
enum Update {
    Acquire(String),
    Release(String),
}

impl Locks {
    /// Who holds a lock.
    pub fn holder(&self, name: &str) -> Option<&MemberId> {
        self.0.get(name)?.front()
    }

    /// The holder, and who waits, in order.
    pub fn queue(&self, name: &str) -> impl Iterator<Item = &MemberId> {
        self.0.get(name).into_iter().flatten()
    }

    fn forget(&mut self, name: &str, member: &MemberId) {
        if let Some(queue) = self.0.get_mut(name) {
            queue.retain(|m| m != member);
            if queue.is_empty() {
                self.0.remove(name);
            }
        }
    }
}

impl Machine for Locks {
    fn apply(&mut self, from: &MemberId, update: &Bytes) -> Bytes {
        match postcard::from_bytes(update) {
            Ok(Update::Acquire(name)) => {
                let queue = self.0.entry(name).or_default();
                if !queue.contains(from) {
                    queue.push_back(from.clone());
                }
            }
            Ok(Update::Release(name)) => self.forget(&name, from),
            Err(_) => {}
        }
        Bytes::new()
    }

    fn view(&mut self, view: &GroupView) {
        let names: Vec<String> = self.0.keys().cloned().collect();
        for member in &view.departed {
            for name in &names {
                self.forget(name, member);
            }
        }
    }

    fn snapshot(&self) -> Vec<Bytes> {
        let bytes = postcard::to_stdvec(&self.0).expect("names can be serialised");
        vec![Bytes::from(bytes)]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        postcard::from_bytes(bytes).ok().map(Self)
    }
}

impl Replicated<Locks> {
    async fn ask(&self, update: &Update) -> Result<(), UpdateError> {
        let update = postcard::to_stdvec(update).expect("names can be serialised");
        self.update(&update).await.map(|_| ())
    }

    /// Asks for a lock, and waits until this member holds it. One member asks for a lock once at a time.
    ///
    /// # Errors
    /// [`UpdateError`]; [`UpdateError::Out`] too when this member is made to leave while it waits.
    pub async fn acquire(&self, name: &str) -> Result<(), UpdateError> {
        self.ask(&Update::Acquire(name.to_owned())).await?;
        let me = self.group().me().clone();
        self.until(|locks| locks.holder(name) == Some(&me)).await
    }

    /// Gives a lock back, or gives up waiting for it.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn release(&self, name: &str) -> Result<(), UpdateError> {
        self.ask(&Update::Release(name.to_owned())).await
    }
}

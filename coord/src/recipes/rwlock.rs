//! A lock for many readers or one writer, where reads get it unless a write waits.
//!
//! Readers and writers stand in one line, in the order in which they came. A reader is let in when no
//! writer came before it: beside other readers at once, behind a writer that holds the lock *or
//! waits* when that one is through. So reads run together, and cannot starve a write. A writer is
//! let in when nobody came before it.
//!
//! A reader watches the last writer before it, a writer the contender just before it: when a writer
//! leaves, the readers behind it are woken, and nobody else.
//!
//! # Layout
//!
//! ```text
//! /path/_c_<uuid>-__READ__0000000042       ephemeral
//! /path/_c_<uuid>-__WRIT__0000000043       ephemeral
//! ```
//!
//! This is Curator's `InterProcessReadWriteLock`. kazoo's `ReadLock` and `WriteLock` take part when
//! they are told of these names (`extra_lock_patterns=["__WRIT__"]` and `["__READ__", "__WRIT__"]`);
//! theirs are understood here. There is no upgrade and no downgrade: a reader that asks for the write
//! lock waits for itself.
//!
//! # Guarantees
//!
//! Those of the [lock](super::lock): a writer is alone, and the fencing token of each is larger than
//! that of everyone it had to wait for.
//!
//! ```no_run
//! # use unbroken_coord::client::Client;
//! # use unbroken_coord::recipes::RecipeError;
//! # async fn example(client: &Client) -> Result<(), RecipeError> {
//! use unbroken_coord::recipes::rwlock::RwLock;
//!
//! let lock = RwLock::new(client, "/tables/users");
//! let reading = lock.read().await?;
//! reading.release().await?;
//! let writing = lock.write().await?;
//! writing.release().await?;
//! # Ok(())
//! # }
//! ```

use bytes::Bytes;

use super::common::Place;
use super::line::Marks;
use super::lock::{Contender, contenders};
use super::ticket::stand_in_line;
use super::{Hold, RecipeError};
use crate::client::Client;
use crate::wire::Acl;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

const READ: &str = "__READ__";
const WRITE: &str = "__WRIT__";

/// What Curator and kazoo put before the counter.
const MARKS: Marks<Kind> = &[
    (READ, Kind::Read),
    (WRITE, Kind::Write),
    ("__rlock__", Kind::Read),
    ("__lock__", Kind::Write),
];

impl Kind {
    const fn suffix(self) -> &'static str {
        match self {
            Self::Read => READ,
            Self::Write => WRITE,
        }
    }

    /// Whether one of the kind `earlier` that came before is in the way.
    const fn waits_for(self, earlier: Self) -> bool {
        matches!((self, earlier), (Self::Write, _) | (_, Self::Write))
    }
}

/// A read/write lock at a path. See the [module](self).
#[derive(Clone, Debug)]
pub struct RwLock {
    place: Place,
    label: Bytes,
}

impl RwLock {
    /// The lock at this path. Nothing is sent yet.
    pub fn new(client: &Client, path: &str) -> Self {
        Self {
            place: Place::new(client, path),
            label: Bytes::new(),
        }
    }

    /// What [`Self::contenders`] shows of this one.
    #[must_use]
    pub fn label(self, label: impl Into<Bytes>) -> Self {
        Self {
            label: label.into(),
            ..self
        }
    }

    /// The access control list of what is created; everybody may do everything without.
    #[must_use]
    pub fn acl(mut self, acl: Vec<Acl>) -> Self {
        self.place.acl = acl;
        self
    }

    /// Waits until no writer is before us. May be dropped at any time.
    ///
    /// # Errors
    /// As [`Lock::acquire`](super::lock::Lock::acquire).
    pub async fn read(&self) -> Result<Hold, RecipeError> {
        let held = self.stand(Kind::Read, true).await?;
        Ok(held.expect("who waits gets it"))
    }

    /// Waits until nobody is before us. May be dropped at any time.
    ///
    /// # Errors
    /// As [`Lock::acquire`](super::lock::Lock::acquire).
    pub async fn write(&self) -> Result<Hold, RecipeError> {
        let held = self.stand(Kind::Write, true).await?;
        Ok(held.expect("who waits gets it"))
    }

    /// Takes the lock for reading unless a writer holds it or waits for it.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn try_read(&self) -> Result<Option<Hold>, RecipeError> {
        self.stand(Kind::Read, false).await
    }

    /// Takes the lock for writing if nobody has it.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn try_write(&self) -> Result<Option<Hold>, RecipeError> {
        self.stand(Kind::Write, false).await
    }

    /// Those who hold the lock and those who wait, in their order.
    ///
    /// # Errors
    /// [`RecipeError::Client`].
    pub async fn contenders(&self) -> Result<Vec<Contender>, RecipeError> {
        contenders(&self.place, MARKS).await
    }

    async fn stand(&self, kind: Kind, wait: bool) -> Result<Option<Hold>, RecipeError> {
        let blocks = |earlier| kind.waits_for(earlier);
        stand_in_line(&self.place, kind.suffix(), &self.label, MARKS, blocks, wait).await
    }
}

#[cfg(test)]
mod tests {
    use super::super::line::{Position, parse, position};
    use super::*;

    /// Every line of five: whoever may be inside together is all readers, or one writer; and a
    /// reader is inside exactly when no writer came before it.
    #[test]
    fn readers_together_or_one_writer() {
        for kinds in 0..1_u32 << 5 {
            let kind = |i: usize| match kinds >> i & 1 {
                0 => Kind::Read,
                _ => Kind::Write,
            };
            let line: Vec<String> = (0..5)
                .map(|i| format!("<{i}>-{}{i:010}", kind(i).suffix()))
                .collect();
            let inside: Vec<usize> = (0..5)
                .filter(|i| {
                    let blocks = |earlier| kind(*i).waits_for(earlier);
                    position(&line, &format!("<{i}>"), MARKS, blocks) == Position::Free
                })
                .collect();
            let writers = inside.iter().filter(|i| kind(**i) == Kind::Write).count();
            assert!(writers == 0 || inside.len() == 1, "{line:?} {inside:?}");
            assert!(inside.contains(&0), "the first one always gets it");
            for i in 0..5 {
                let write_before = (0..i).any(|j| kind(j) == Kind::Write);
                if kind(i) == Kind::Read {
                    assert_eq!(inside.contains(&i), !write_before, "{line:?}");
                }
            }
        }
    }

    #[test]
    fn kazoos_names_are_of_the_right_kind() {
        let kind = |name| parse(name, MARKS).map(|(kind, _)| kind);
        assert_eq!(kind("ab__rlock__0000000001"), Some(Kind::Read));
        assert_eq!(kind("ab__lock__0000000001"), Some(Kind::Write));
        assert_eq!(kind("_c_ab-__READ__0000000001"), Some(Kind::Read));
        assert_eq!(kind("_c_ab-__WRIT__0000000001"), Some(Kind::Write));
    }
}

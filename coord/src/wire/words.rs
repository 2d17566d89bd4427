//! Four-letter words: what may come in place of a handshake.

/// A command that is the first four bytes of a connection; the answer is text, then close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FourLetterWord {
    /// Are you there? `imok`.
    Ruok,
    /// The server's figures.
    Srvr,
    /// The server's figures and its clients.
    Stat,
    /// Figures as `key<tab>value` lines.
    Mntr,
    /// `ro` or `rw`.
    Isro,
    /// The configuration.
    Conf,
    /// The connections.
    Cons,
    /// A summary of the watches.
    Wchs,
}

impl FourLetterWord {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Ruok,
        Self::Srvr,
        Self::Stat,
        Self::Mntr,
        Self::Isro,
        Self::Conf,
        Self::Cons,
        Self::Wchs,
    ];

    /// The word.
    pub const fn word(self) -> &'static [u8; 4] {
        match self {
            Self::Ruok => b"ruok",
            Self::Srvr => b"srvr",
            Self::Stat => b"stat",
            Self::Mntr => b"mntr",
            Self::Isro => b"isro",
            Self::Conf => b"conf",
            Self::Cons => b"cons",
            Self::Wchs => b"wchs",
        }
    }

    /// The word that a connection's first four bytes are. Read as a frame's length, each is far
    /// above any limit, so that the two cannot be confused.
    pub fn detect(first: [u8; 4]) -> Option<Self> {
        Self::ALL.into_iter().find(|word| *word.word() == first)
    }
}

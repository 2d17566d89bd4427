//! Four-letter words: what may come in place of a handshake.

macro_rules! words {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal;)+) => {
        /// A command that is the first four bytes of a connection; the answer is text, then close.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum FourLetterWord {
            $($(#[doc = $doc])+ $name,)+
        }

        impl FourLetterWord {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The word.
            pub const fn word(self) -> &'static [u8; 4] {
                match self {
                    $(Self::$name => $word,)+
                }
            }
        }
    };
}

words! {
    /// Are you there? `imok`.
    Ruok = b"ruok";
    /// The server's figures.
    Srvr = b"srvr";
    /// The server's figures and its clients.
    Stat = b"stat";
    /// Figures as `key<tab>value` lines.
    Mntr = b"mntr";
    /// `ro` or `rw`.
    Isro = b"isro";
    /// The configuration.
    Conf = b"conf";
    /// The connections.
    Cons = b"cons";
    /// A summary of the watches.
    Wchs = b"wchs";
    /// The watches, by session.
    Wchc = b"wchc";
    /// The watches, by path.
    Wchp = b"wchp";
    /// Sessions and their ephemeral znodes.
    Dump = b"dump";
    /// What the server runs on; its version first.
    Envi = b"envi";
    /// Bytes used in the data directory.
    Dirs = b"dirs";
    /// Count anew what is counted for each connection.
    Crst = b"crst";
    /// Count anew what is counted for the server.
    Srst = b"srst";
}

impl FourLetterWord {
    /// The word that a connection's first four bytes are. Read as a frame's length, each is far
    /// above any limit, so that the two cannot be confused.
    pub fn detect(first: [u8; 4]) -> Option<Self> {
        Self::ALL.iter().copied().find(|word| *word.word() == first)
    }
}

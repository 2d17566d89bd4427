//! The verdict: did the copies answer alike?

use std::fmt::Write as _;

use serde::Serialize;

use super::board::{Board, End, Transcript};
use super::script::Conn;
use crate::determinism::Harmless;

/// Bytes of a hexdump's line.
const ROW: usize = 16;
/// Lines shown before and after the one that differs.
const ROWS_AROUND: usize = 2;
/// How much is shown of what the client had sent.
const SENT_SHOWN: usize = 160;

/// Where a copy answered otherwise than the first one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Difference {
    /// The connection's name.
    pub(super) connection: String,
    /// The copy that differs from the first, counted from 1.
    pub(super) copy: usize,
    /// Offset in the server's output of the first byte that differs.
    pub(super) offset: u64,
    #[serde(flatten)]
    pub(super) kind: Kind,
    /// How much the client had sent by then.
    pub(super) client_sent_bytes: u64,
    /// The end of it, escaped.
    pub(super) client_sent: String,
}

/// What differs. Byte strings are escaped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "differs", rename_all = "kebab-case")]
pub(super) enum Kind {
    /// A byte, with what follows it on both sides.
    Output {
        first: String,
        other: String,
        #[serde(skip)]
        dumps: [String; 2],
    },
    /// One said all that the other did, and more.
    Length {
        first_bytes: u64,
        other_bytes: u64,
        /// What only one of them said.
        more: String,
    },
    /// The same bytes, but another end.
    End { first: String, other: String },
}

/// Compares `conn` of every copy with the first one's.
pub(super) fn connection(
    board: &Board,
    conn: Conn,
    name: &str,
    harmless: &Harmless,
) -> (Vec<Difference>, usize) {
    let first = board.lock(0);
    let none = Transcript::default();
    let reference = first.conns.get(&conn).unwrap_or(&none);
    let mut masked = reference.output.clone();
    let ignored = harmless.mask_all(&mut masked);
    let differences = (1..board.copies()).filter_map(|copy| {
        let answers = board.lock(copy);
        let other = answers.conns.get(&conn).unwrap_or(&none);
        let (offset, kind) = compare(reference, &masked, other, harmless)?;
        let sent = reference.sent_before(offset).max(other.sent_before(offset));
        Some(Difference {
            connection: name.to_owned(),
            copy: copy + 1,
            offset,
            kind,
            client_sent_bytes: sent,
            client_sent: escape(&reference.sent_tail(sent, SENT_SHOWN)),
        })
    });
    (differences.collect(), ignored)
}

fn compare(
    first: &Transcript,
    masked: &[u8],
    other: &Transcript,
    harmless: &Harmless,
) -> Option<(u64, Kind)> {
    let mut other_masked = other.output.clone();
    harmless.mask_all(&mut other_masked);
    let mut pairs = masked.iter().zip(&other_masked);
    if let Some(at) = pairs.position(|(a, b)| a != b) {
        let side = |t: &Transcript| escape(&t.output[at..t.output.len().min(at + ROW * 2)]);
        let kind = Kind::Output {
            first: side(first),
            other: side(other),
            dumps: [dump(&first.output, at), dump(&other.output, at)],
        };
        return Some((at as u64, kind));
    }
    // How far a server had come when its client broke off is chance.
    if first.end == End::ByClient && other.end == End::ByClient {
        return None;
    }
    if first.total != other.total {
        let common = first.output.len().min(other.output.len());
        let longer = if first.total > other.total {
            first
        } else {
            other
        };
        let rest = longer.output.get(common..).unwrap_or_default();
        let kind = Kind::Length {
            first_bytes: first.total,
            other_bytes: other.total,
            more: escape(&rest[..rest.len().min(ROW * 4)]),
        };
        return Some((first.total.min(other.total), kind));
    }
    (first.end != other.end).then(|| {
        let kind = Kind::End {
            first: first.end.describe().to_owned(),
            other: other.end.describe().to_owned(),
        };
        (first.total, kind)
    })
}

fn escape(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// The lines around the byte at `at`; the one that holds it is marked.
fn dump(bytes: &[u8], at: usize) -> String {
    let row = at / ROW;
    let rows = row.saturating_sub(ROWS_AROUND)..=row + ROWS_AROUND;
    let mut text = String::new();
    for row in rows {
        let Some(line) = bytes.get(row * ROW..).filter(|l| !l.is_empty()) else {
            break;
        };
        let line = &line[..line.len().min(ROW)];
        let mark = if row == at / ROW { '>' } else { ' ' };
        let _ = write!(text, "  {mark} {:08x} ", row * ROW);
        for (i, byte) in line.iter().enumerate() {
            let here = row * ROW + i == at;
            let _ = write!(text, "{}{byte:02x}", if here { '>' } else { ' ' });
        }
        let printable = |b: &u8| match *b {
            b' '..=b'~' => char::from(*b),
            _ => '.',
        };
        let characters: String = line.iter().map(printable).collect();
        let _ = writeln!(text, "{}  |{characters}|", "   ".repeat(ROW - line.len()));
    }
    text
}

impl Difference {
    /// For people.
    pub(super) fn describe(&self) -> String {
        let mut text = format!(
            "connection {:?}, offset {} of the answer: copy {} differs from copy 1\n  the client had sent {} bytes",
            self.connection, self.offset, self.copy, self.client_sent_bytes
        );
        if self.client_sent.is_empty() {
            text.push('\n');
        } else {
            let _ = writeln!(text, ", at last:\n    {}", self.client_sent);
        }
        match &self.kind {
            Kind::Output { dumps, .. } => {
                let _ = write!(
                    text,
                    "  copy 1:\n{}  copy {}:\n{}",
                    dumps[0], self.copy, dumps[1]
                );
            }
            Kind::Length {
                first_bytes,
                other_bytes,
                more,
            } => {
                let longer = if first_bytes > other_bytes {
                    1
                } else {
                    self.copy
                };
                let _ = writeln!(
                    text,
                    "  copy 1 answered {first_bytes} bytes, copy {} {other_bytes}; copy {longer} alone said\n    {more}",
                    self.copy
                );
            }
            Kind::End { first, other } => {
                let _ = writeln!(
                    text,
                    "  the same {} bytes, but copy 1's connection was {first}, and copy {}'s was {other}",
                    self.offset, self.copy
                );
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use bytes::Bytes;

    use super::*;

    /// A board of two copies that answered these to the same question, and were closed.
    fn board(answers: [&[u8]; 2]) -> Board {
        let board = Board::new(2, 1 << 20);
        for (copy, answer) in answers.into_iter().enumerate() {
            board.received(copy, 0, b"hello\n", Instant::now());
            board.sent(copy, 0, &Bytes::from_static(b"what time is it?"));
            board.received(copy, 0, answer, Instant::now());
            board.ended(copy, 0, End::Closed, Instant::now());
        }
        board
    }

    fn verdict(board: &Board, patterns: &[&str]) -> Vec<Difference> {
        connection(board, 0, "a", &Harmless::new(patterns).unwrap()).0
    }

    #[test]
    fn finds_the_first_byte_that_differs_and_what_was_asked() {
        let board = board([b"time 12:00 and more", b"time 12:01 and more"]);
        let found = verdict(&board, &[]);
        let [one] = &found[..] else {
            panic!("{found:?}")
        };
        assert_eq!((one.copy, one.offset), (2, 6 + 9));
        assert_eq!(one.client_sent, "what time is it?");
        let text = one.describe();
        assert!(
            text.contains(
                "> 00000000  68 65 6c 6c 6f 0a 74 69 6d 65 20 31 32 3a 30>30  |hello.time 12:00|"
            ),
            "{text}"
        );
        assert!(text.contains("3a 30>31  |hello.time 12:01|"), "{text}");
        // What came before the question has nothing to do with it.
        assert_eq!(board.lock(0).conns[&0].sent_before(5), 0);
    }

    #[test]
    fn declared_harmless_it_must_still_be_of_one_length() {
        let same = board([b"time 12:00\n", b"time 12:01\n"]);
        assert_eq!(verdict(&same, &["^time .*"]), []);
        let longer = board([b"time 9:00\n", b"time 10:00\n"]);
        assert_eq!(verdict(&longer, &["^time .*"]).len(), 1);
        let elsewhere = board([b"time 9:00\n", b"tine 9:00\n"]);
        assert_eq!(verdict(&elsewhere, &["^time .*"]).len(), 1);
    }

    #[test]
    fn lengths_and_ends_count() {
        let shorter = board([b"all of it", b"all"]);
        assert!(matches!(
            &verdict(&shorter, &[])[..],
            [Difference { offset: 9, kind: Kind::Length { first_bytes: 15, other_bytes: 9, more }, .. }]
                if more == " of it"
        ));
        let ended = board([b"x", b"x"]);
        ended.lock(1).conns.get_mut(&0).unwrap().end = End::Reset;
        assert!(matches!(
            verdict(&ended, &[])[..],
            [Difference {
                kind: Kind::End { .. },
                ..
            }]
        ));
        let broken_off = board([b"all of it", b"all"]);
        for copy in 0..2 {
            broken_off.lock(copy).conns.get_mut(&0).unwrap().end = End::ByClient;
        }
        assert_eq!(verdict(&broken_off, &[]), []);
    }
}

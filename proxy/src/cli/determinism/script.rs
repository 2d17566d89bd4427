//! What copies of a server are given, step by step, and the text format for it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use humantime_serde::re::humantime;

/// A connection: its place in [`Input::names`].
pub(super) type Conn = usize;

/// One step; every copy is given the same ones in the same order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Open(Conn),
    Send(Conn, Bytes),
    /// Go on when the server has answered so far.
    Await(Conn, Until),
    Pause(Duration),
    /// The client has no more to say (FIN), and still listens.
    Close(Conn),
    /// The client breaks off (RST).
    Reset(Conn),
}

/// What an answer is recognised by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Until {
    /// Something came since the last step that sent, and then nothing for a while; or the end.
    Answer,
    /// This text came since the last step that sent.
    Text(Vec<u8>),
    /// So many bytes came since the last step that sent.
    Bytes(u64),
    /// So many bytes came in all, or nothing more does: what a captured client had seen.
    Seen(u64),
}

/// Everything that is given to each copy.
#[derive(Debug, Default)]
pub(super) struct Input {
    /// Each step with the line that it stands in, 0 if it stands in none.
    pub(super) steps: Vec<(usize, Step)>,
    /// What each connection is called.
    pub(super) names: Vec<String>,
    /// What could not be used, for people.
    pub(super) notes: Vec<String>,
}

/// The format in short, for `--help`.
pub(super) const FORMAT: &str = r#"A script is a text file, one step a line; # begins a comment:
  open A             connect; A is any name
  send A "TEXT"...   send; escapes: \r \n \t \0 \\ \" \xNN
  send-file A FILE   send a file's bytes (its path from the script's folder)
  wait A             until an answer has come, and then nothing for --quiet
  wait A "TEXT"      until TEXT came since the last send
  wait A N           until N bytes came since the last send
  pause 100ms        do nothing for so long
  close A            send the client's end of the stream (FIN), and read on
  reset A            break the connection off (RST)"#;

/// Reads a script.
///
/// # Errors
/// A line makes no sense; the message names it.
pub(super) fn read(path: &Path) -> anyhow::Result<Input> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("reading the script {}", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    parse(&text, folder).with_context(|| format!("the script {}", path.display()))
}

fn parse(text: &str, folder: &Path) -> anyhow::Result<Input> {
    let mut input = Input::default();
    let mut conns = Conns::default();
    for (line, text) in (1..).zip(text.lines()) {
        let step = parse_line(text, folder, &mut conns).with_context(|| format!("line {line}"))?;
        input.steps.extend(step.map(|step| (line, step)));
    }
    ensure!(!conns.names.is_empty(), "it opens no connection");
    input.names = conns.names;
    Ok(input)
}

/// The connections named so far, and which may still be sent to.
#[derive(Default)]
struct Conns {
    names: Vec<String>,
    open: BTreeMap<String, (Conn, bool)>,
}

impl Conns {
    fn open(&mut self, name: &str) -> anyhow::Result<Conn> {
        ensure!(
            !self.open.contains_key(name),
            "connection {name:?} was opened before: a new one needs a new name"
        );
        let conn = self.names.len();
        self.names.push(name.to_owned());
        self.open.insert(name.to_owned(), (conn, true));
        Ok(conn)
    }

    fn find(&self, name: &str) -> anyhow::Result<Conn> {
        let found = self.open.get(name);
        Ok(found
            .with_context(|| format!("connection {name:?} was not opened"))?
            .0)
    }

    /// A connection that the client has not closed; `last` closes it.
    fn writable(&mut self, name: &str, last: bool) -> anyhow::Result<Conn> {
        let conn = self.find(name)?;
        let (_, open) = self.open.get_mut(name).expect("it was found");
        ensure!(*open, "connection {name:?} was closed before");
        *open = !last;
        Ok(conn)
    }
}

fn parse_line(text: &str, folder: &Path, conns: &mut Conns) -> anyhow::Result<Option<Step>> {
    let words = words(text)?;
    let Some((Word::Plain(verb), arguments)) = words.split_first() else {
        ensure!(words.is_empty(), "a line begins with what is to be done");
        return Ok(None);
    };
    let step = match (verb.as_str(), arguments) {
        ("open", [Word::Plain(name)]) => Step::Open(conns.open(name)?),
        ("send", [Word::Plain(name), texts @ ..]) if !texts.is_empty() => {
            let conn = conns.writable(name, false)?;
            let mut bytes = Vec::new();
            for text in texts {
                let Word::Quoted(text) = text else {
                    bail!("what is sent stands in double quotes");
                };
                bytes.extend_from_slice(text);
            }
            ensure!(!bytes.is_empty(), "there is nothing to send");
            Step::Send(conn, bytes.into())
        }
        ("send-file", [Word::Plain(name), file]) => {
            let conn = conns.writable(name, false)?;
            let path = folder.join(match file {
                Word::Plain(path) => path.clone(),
                Word::Quoted(path) => String::from_utf8(path.clone())?,
            });
            let bytes =
                std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            ensure!(!bytes.is_empty(), "{} is empty", path.display());
            Step::Send(conn, bytes.into())
        }
        ("wait", [Word::Plain(name)]) => Step::Await(conns.find(name)?, Until::Answer),
        ("wait", [Word::Plain(name), Word::Quoted(text)]) => {
            ensure!(!text.is_empty(), "there is nothing to wait for");
            Step::Await(conns.find(name)?, Until::Text(text.clone()))
        }
        ("wait", [Word::Plain(name), Word::Plain(count)]) => {
            let count = count
                .parse()
                .with_context(|| format!("{count:?} is no number of bytes"))?;
            Step::Await(conns.find(name)?, Until::Bytes(count))
        }
        ("pause", [Word::Plain(time)]) => Step::Pause(
            humantime::parse_duration(time)
                .with_context(|| format!("{time:?} is no duration such as 100ms"))?,
        ),
        ("close", [Word::Plain(name)]) => Step::Close(conns.writable(name, true)?),
        ("reset", [Word::Plain(name)]) => Step::Reset(conns.find(name)?),
        _ => bail!(
            "{:?} is no step; see unbroken determinism --help",
            text.trim()
        ),
    };
    Ok(Some(step))
}

#[derive(Debug, PartialEq, Eq)]
enum Word {
    Plain(String),
    Quoted(Vec<u8>),
}

fn words(line: &str) -> anyhow::Result<Vec<Word>> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while !rest.is_empty() && !rest.starts_with('#') {
        if let Some(quoted) = rest.strip_prefix('"') {
            let (bytes, after) = unquote(quoted)?;
            words.push(Word::Quoted(bytes));
            rest = after.trim_start();
        } else {
            let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
            words.push(Word::Plain(rest[..end].to_owned()));
            rest = rest[end..].trim_start();
        }
    }
    Ok(words)
}

/// The bytes up to the closing quote, and what follows it.
fn unquote(text: &str) -> anyhow::Result<(Vec<u8>, &str)> {
    let mut bytes = Vec::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Ok((bytes, &text[at + 1..])),
            '\\' => match chars.next().map(|(_, c)| c) {
                Some('r') => bytes.push(b'\r'),
                Some('n') => bytes.push(b'\n'),
                Some('t') => bytes.push(b'\t'),
                Some('0') => bytes.push(0),
                Some('\\') => bytes.push(b'\\'),
                Some('"') => bytes.push(b'"'),
                Some('x') => {
                    let hex: String = chars.by_ref().take(2).map(|(_, c)| c).collect();
                    let byte = u8::from_str_radix(&hex, 16);
                    bytes.push(byte.with_context(|| format!("\\x{hex} is no byte"))?);
                }
                other => bail!(
                    "the escape \\{} is not known",
                    other.map_or(String::new(), String::from)
                ),
            },
            other => bytes.extend_from_slice(other.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bail!("a text without its closing quote")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(text: &str) -> Vec<Step> {
        let input = parse(text, Path::new(".")).unwrap();
        input.steps.into_iter().map(|(_, step)| step).collect()
    }

    fn error(text: &str) -> String {
        format!("{:#}", parse(text, Path::new(".")).unwrap_err())
    }

    #[test]
    fn reads_every_step() {
        let text = r##"
            # A comment, and an empty line.

            open a
            send a "GET / \x00\"#\\\r\n" "more"   # and this
            wait a
            wait a "\n\n"
            wait a 12
            pause 1s 
            close a
            open b
            reset b"##;
        let sent = Bytes::from_static(b"GET / \0\"#\\\r\nmore");
        assert_eq!(
            steps(text),
            [
                Step::Open(0),
                Step::Send(0, sent),
                Step::Await(0, Until::Answer),
                Step::Await(0, Until::Text(b"\n\n".to_vec())),
                Step::Await(0, Until::Bytes(12)),
                Step::Pause(Duration::from_secs(1)),
                Step::Close(0),
                Step::Open(1),
                Step::Reset(1),
            ]
        );
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        for (text, expected) in [
            ("", "it opens no connection"),
            (
                "open a\nsend b \"x\"",
                "line 2: connection \"b\" was not opened",
            ),
            (
                "open a\nopen a",
                "line 2: connection \"a\" was opened before",
            ),
            (
                "open a\nclose a\nsend a \"x\"",
                "line 3: connection \"a\" was closed before",
            ),
            (
                "open a\nsend a x",
                "line 2: what is sent stands in double quotes",
            ),
            (
                "open a\nsend a \"x",
                "line 2: a text without its closing quote",
            ),
            (
                "open a\nsend a \"\\q\"",
                "line 2: the escape \\q is not known",
            ),
            ("open a\nsend a \"\\xg0\"", "line 2: \\xg0 is no byte"),
            (
                "open a\nwait a many",
                "line 2: \"many\" is no number of bytes",
            ),
            ("open a\npause long", "line 2: \"long\" is no duration"),
            ("opn a", "line 1: \"opn a\" is no step"),
            ("open a\nsend-file a ./missing", "line 2: reading"),
        ] {
            assert!(
                error(text).starts_with(expected),
                "{text:?}: {}",
                error(text)
            );
        }
    }
}

//! Access control lists and identities as `zkCli.sh` writes them: `scheme:id:perms`, perms of `cdrwa`.

use std::io::{self, Write};

use serde_json::json;
use unbroken_coord::client::{Client, Identity};
use unbroken_coord::wire::{Acl, Id, perms};

use super::at;

const PERMS: [(char, i32); 5] = [
    ('c', perms::CREATE),
    ('d', perms::DELETE),
    ('r', perms::READ),
    ('w', perms::WRITE),
    ('a', perms::ADMIN),
];

/// An entry of the command line. The id may hold colons: `digest:joe:hash:cdrwa`.
pub(super) fn parse(text: &str) -> Result<Acl, String> {
    let expected = "expected SCHEME:ID:PERMS, as in world:anyone:r or digest:joe:HASH:cdrwa";
    let (scheme, rest) = text.split_once(':').ok_or(expected)?;
    let (id, letters) = rest.rsplit_once(':').ok_or(expected)?;
    let mut sum = 0;
    for letter in letters.chars() {
        let known = PERMS.iter().find(|(known, _)| *known == letter);
        let (_, bit) =
            known.ok_or_else(|| format!("permission {letter:?}: expected some of cdrwa"))?;
        sum |= bit;
    }
    if scheme.is_empty() || sum == 0 {
        return Err(expected.to_owned());
    }
    Ok(Acl {
        perms: sum,
        id: Id {
            scheme: scheme.to_owned(),
            id: id.to_owned(),
        },
    })
}

/// An identity of the command line: `digest:joe:secret`.
pub(super) fn parse_identity(text: &str) -> Result<Identity, String> {
    let (scheme, auth) = text
        .split_once(':')
        .ok_or("expected SCHEME:AUTH, as in digest:USER:PASSWORD")?;
    Ok(Identity {
        scheme: scheme.to_owned(),
        auth: auth.to_owned().into(),
    })
}

fn write_entry(entry: &Acl, out: &mut impl Write) -> io::Result<()> {
    let letters = PERMS.iter().filter(|(_, bit)| entry.perms & bit != 0);
    let letters: String = letters.map(|(letter, _)| letter).collect();
    writeln!(out, "{}:{}:{letters}", entry.id.scheme, entry.id.id)
}

/// `zk acl`: shows the list, or sets it.
pub(super) async fn acl(
    client: &Client,
    path: &str,
    entries: &[Acl],
    version: i32,
    json: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    if !entries.is_empty() {
        let set = client.set_acl(path, entries.to_vec(), version).await;
        set.map_err(at(path))?;
        return Ok(());
    }
    client.sync(path).await.map_err(at(path))?;
    let (entries, stat) = client.acl(path).await.map_err(at(path))?;
    if json {
        writeln!(
            out,
            "{}",
            json!({ "path": path, "acl": entries, "aversion": stat.aversion })
        )?;
        return Ok(());
    }
    for entry in &entries {
        write_entry(entry, out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_they_are_written() {
        for text in [
            "world:anyone:r",
            "digest:joe:h4sh=:cdrwa",
            "ip:10.0.0.0/8:rw",
            "auth::cdrwa",
        ] {
            let mut written = Vec::new();
            write_entry(&parse(text).unwrap(), &mut written).unwrap();
            assert_eq!(String::from_utf8(written).unwrap(), format!("{text}\n"));
        }
        for wrong in [
            "",
            "world",
            "world:anyone",
            "world:anyone:",
            "world:anyone:x",
            ":a:r",
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(
            parse_identity("digest:joe:a:b").unwrap(),
            Identity::digest("joe", "a:b")
        );
    }
}

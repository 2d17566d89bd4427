//! Who the servers are: part of the replicated state, changed by log entries alone.
//!
//! A server is known by a *raft id* that is given out in the log and never again, so that a server
//! which lost its disk comes back as another one and can break no promise that it has forgotten.
//! Its *name* is what people and configuration files call it; its *number* is what `ZooKeeper`'s
//! tools call it (`server.N`). Name and number may be used again, the id may not.
//!
//! # Why a change is safe
//!
//! - **One voter at a time.** A majority of the voters before a change and a majority of those
//!   after it always have a server in common, so no two leaders can be elected past each other, and
//!   no entry is lost between the two (Raft thesis §4.1). [`Members::reconfigure`] refuses more, and
//!   the leader puts no change into the log before the one before it is applied
//!   ([`crate::quorum`] says how that holds through crashes).
//! - **Learners first.** A new server would count for the majority from its first moment and hold
//!   nothing: three servers and an empty fourth cannot lose one. So it is a learner, is sent
//!   everything and counts for nothing, until the leader sees that it has caught up and promotes it
//!   with an entry of its own.
//! - **If the leader dies** before a change is committed, the change is made whole or not at all, as
//!   any write; the server that asked repeats it to the next leader, and its number keeps it from
//!   being done twice. If it dies between the addition and the promotion, the next leader finds the
//!   [`Standing::Joining`] in its state and promotes in its place. A leader that is itself to go hands over
//!   first and leaves the change to its successor.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::wire::ErrorCode;

/// Servers at most, observers included.
pub const MEMBERS_MAX: usize = 64;

/// Characters of a name, an address or a host at most.
const TEXT_MAX: usize = 255;

/// How a server takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// It votes, and its disk counts for the majority.
    Voter,
    /// It is sent the log, and votes when it has caught up.
    Joining,
    /// It is sent the log, serves clients, and never votes.
    Observer,
}

/// One server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// What its configuration calls it.
    pub name: String,
    /// What `ZooKeeper`'s tools call it.
    pub number: u64,
    /// `host:port` for the other servers; empty until it is known.
    pub peer: String,
    /// `ZooKeeper` servers have a second port for elections. It is kept for who reads it back.
    pub election_port: u16,
    /// `host:port` for clients; empty until it is known.
    pub client: String,
    /// How it takes part.
    pub standing: Standing,
}

/// A server that a client wants in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joining {
    /// Name or number.
    pub key: String,
    /// `host:port` for the other servers.
    pub peer: String,
    /// See [`Member::election_port`].
    pub election_port: u16,
    /// `host:port` for clients, or empty.
    pub client: String,
    /// Whether it is to vote.
    pub votes: bool,
}

/// What a client wants changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconfig {
    /// Servers to add, or to change.
    pub joining: Vec<Joining>,
    /// Names or numbers of those to remove. Unknown ones are passed over.
    pub leaving: Vec<String>,
    /// Whether everybody who is not joining is leaving.
    pub replace: bool,
    /// The version that must be the current one; -1 for any.
    pub version: i64,
}

impl Reconfig {
    /// Reads what the operation `reconfig` carries: `joining` and `leaving`, or the list of all
    /// `members` (then the other two are not looked at), each with commas between. A server is written as
    /// `server.N=host:port:port[:role][;[address:]port]`, where `N` may be a name, too.
    ///
    /// # Errors
    /// `BadArguments` if it is not of that form, or asks for nothing.
    pub fn parse(
        joining: Option<&str>,
        leaving: Option<&str>,
        members: Option<&str>,
        version: i64,
    ) -> Result<Self, ErrorCode> {
        fn items(text: Option<&str>) -> impl Iterator<Item = &str> {
            let items = text.unwrap_or_default().split([',', '\n']);
            items.map(str::trim).filter(|item| !item.is_empty())
        }
        let all = items(members).filter(|item| !item.starts_with("version="));
        let all: Vec<Joining> = all.map(Joining::parse).collect::<Result<_, _>>()?;
        let joining: Vec<Joining> = items(joining)
            .map(Joining::parse)
            .collect::<Result<_, _>>()?;
        let leaving: Vec<String> = items(leaving).map(str::to_owned).collect();
        let replace = !all.is_empty();
        let changes = !joining.is_empty() || !leaving.is_empty();
        if !(replace || changes) || leaving.len().max(joining.len()).max(all.len()) > MEMBERS_MAX {
            return Err(ErrorCode::BadArguments);
        }
        if leaving.iter().any(|key| !is_name(key)) {
            return Err(ErrorCode::BadArguments);
        }
        Ok(Self {
            joining: if replace { all } else { joining },
            leaving: if replace { Vec::new() } else { leaving },
            replace,
            version,
        })
    }
}

impl Joining {
    fn parse(text: &str) -> Result<Self, ErrorCode> {
        Self::read(text).ok_or(ErrorCode::BadArguments)
    }

    fn read(text: &str) -> Option<Self> {
        let (key, value) = text.strip_prefix("server.")?.split_once('=')?;
        let (servers, client) = match value.split_once(';') {
            Some((servers, client)) => (servers, Some(client)),
            None => (value, None),
        };
        let (host, ports) = split_host(servers)?;
        let mut ports = ports.split(':');
        let port: u16 = ports.next()?.parse().ok()?;
        let election_port: u16 = ports.next()?.parse().ok()?;
        let votes = match ports.next() {
            None | Some("participant") => true,
            Some("observer") => false,
            Some(_) => return None,
        };
        let client = match client {
            None => String::new(),
            Some(client) => match split_host(client) {
                Some((host, port)) => address(host, port.parse().ok()?)?,
                None => address("0.0.0.0", client.parse().ok()?)?,
            },
        };
        let sound = ports.next().is_none() && is_name(key);
        sound.then_some(Self {
            key: key.to_owned(),
            peer: address(host, port)?,
            election_port,
            client,
            votes,
        })
    }
}

/// `host:rest` into both; an IPv6 host stands in brackets, which are kept.
fn split_host(text: &str) -> Option<(&str, &str)> {
    if text.starts_with('[') {
        let end = text.find(']')?;
        return Some((&text[..=end], text[end + 1..].strip_prefix(':')?));
    }
    text.split_once(':')
}

fn address(host: &str, port: u16) -> Option<String> {
    let inner = host.trim_start_matches('[').trim_end_matches(']');
    let bracketed = host.len() == inner.len() + 2;
    let sound = !inner.is_empty()
        && inner.len() <= TEXT_MAX
        && inner.chars().all(|c| {
            c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') || (bracketed && c == ':')
        })
        && (bracketed || host.len() == inner.len());
    (sound && port != 0).then(|| format!("{host}:{port}"))
}

/// Whether `text` is `host:port`, as a server's address for its peers must be.
#[must_use]
pub fn is_address(text: &str) -> bool {
    split_host(text)
        .and_then(|(host, port)| address(host, port.parse().ok()?))
        .is_some()
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= TEXT_MAX
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

/// The servers, by their raft ids.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Members {
    /// zxid of the last change, 0 at first.
    version: u64,
    /// The id that comes next. Invariant: above every id ever given out.
    next_id: u64,
    by_id: BTreeMap<u64, Member>,
}

impl Members {
    /// Those who begin a cluster, all of them voters. Their addresses are not known yet: each
    /// announces its own.
    #[must_use]
    pub fn founded(servers: &BTreeMap<u64, String>) -> Self {
        let member = |(id, name): (&u64, &String)| {
            let member = Member {
                name: name.clone(),
                number: *id,
                peer: String::new(),
                election_port: 0,
                client: String::new(),
                standing: Standing::Voter,
            };
            (*id, member)
        };
        Self {
            version: 0,
            next_id: servers.last_key_value().map_or(0, |(id, _)| *id) + 1,
            by_id: servers.iter().map(member).collect(),
        }
    }

    /// zxid of the last change, 0 at first.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The server with this raft id.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<&Member> {
        self.by_id.get(&id)
    }

    /// Every server with its raft id, in the order of these.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Member)> {
        self.by_id.iter().map(|(id, member)| (*id, member))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there are none, which is so only before the beginning.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Raft ids of the voters.
    pub fn voters(&self) -> impl Iterator<Item = u64> {
        self.iter()
            .filter(|(_, member)| member.standing == Standing::Voter)
            .map(|(id, _)| id)
    }

    /// Raft ids of those that are sent the log and do not vote.
    pub fn learners(&self) -> impl Iterator<Item = u64> {
        self.iter()
            .filter(|(_, member)| member.standing != Standing::Voter)
            .map(|(id, _)| id)
    }

    /// The server that has this name, or else this number.
    #[must_use]
    pub fn find(&self, key: &str) -> Option<u64> {
        let by_name = self.iter().find(|(_, member)| member.name == key);
        let number: Option<u64> = key.parse().ok();
        by_name
            .or_else(|| self.iter().find(|(_, m)| Some(m.number) == number))
            .map(|(id, _)| id)
    }

    /// Whether this id was given out once and is no longer a server's.
    #[must_use]
    pub fn was_removed(&self, id: u64) -> bool {
        id < self.next_id && !self.by_id.contains_key(&id)
    }

    /// Whether this id has not been given out, as far as is known here.
    #[must_use]
    pub fn is_unknown(&self, id: u64) -> bool {
        id >= self.next_id
    }

    /// The server that is to vote as soon as it has caught up.
    #[must_use]
    pub fn joining(&self) -> Option<u64> {
        self.iter()
            .find(|(_, member)| member.standing == Standing::Joining)
            .map(|(id, _)| id)
    }

    /// What they are after `change`.
    ///
    /// # Errors
    /// `BadVersion`; `ReconfigInProgress` while a server is joining, unless the change only takes
    /// that one out; `BadArguments` for what would cost a voter too many at once, leave none, give
    /// two servers one address, or make them too many.
    pub fn reconfigured(&self, change: &Reconfig, zxid: u64) -> Result<Self, ErrorCode> {
        if change.version != -1 && u64::try_from(change.version) != Ok(self.version) {
            return Err(ErrorCode::BadVersion);
        }
        let mut next = self.clone();
        let stay = |id: u64| {
            change
                .joining
                .iter()
                .any(|new| self.find(&new.key) == Some(id))
        };
        for id in self.by_id.keys() {
            let leaves = change.leaving.iter().any(|key| self.find(key) == Some(*id));
            if leaves || (change.replace && !stay(*id)) {
                next.by_id.remove(id);
            }
        }
        for new in &change.joining {
            next.put(new);
        }
        let lost = self
            .voters()
            .filter(|id| !next.voters().any(|other| other == *id))
            .count();
        let joining = next
            .iter()
            .filter(|(_, m)| m.standing == Standing::Joining)
            .count();
        if lost > 1 || joining > 1 || next.voters().next().is_none() || next.len() > MEMBERS_MAX {
            let busy = self
                .joining()
                .is_some_and(|id| next.by_id.contains_key(&id));
            return Err(if busy && joining > 1 {
                ErrorCode::ReconfigInProgress
            } else {
                ErrorCode::BadArguments
            });
        }
        if let Some(id) = self.joining()
            && next.joining() == Some(id)
            && lost > 0
        {
            return Err(ErrorCode::ReconfigInProgress);
        }
        let mut addresses: Vec<&str> = next.iter().map(|(_, member)| &*member.peer).collect();
        addresses.retain(|address| !address.is_empty());
        addresses.sort_unstable();
        let known = addresses.len();
        addresses.dedup();
        if addresses.len() != known {
            return Err(ErrorCode::BadArguments);
        }
        next.version = zxid;
        Ok(next)
    }

    fn put(&mut self, new: &Joining) {
        let (standing, known) = (
            if new.votes {
                Standing::Joining
            } else {
                Standing::Observer
            },
            self.find(&new.key),
        );
        if let Some(member) = known.and_then(|id| self.by_id.get_mut(&id)) {
            member.peer.clone_from(&new.peer);
            member.election_port = new.election_port;
            member.client.clone_from(&new.client);
            if !(new.votes && member.standing == Standing::Voter) {
                member.standing = standing;
            }
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        // A name's number is its id, or the next one that nobody has.
        let taken = |number: &u64| self.iter().any(|(_, member)| member.number == *number);
        let number = new.key.parse().unwrap_or_else(|_| {
            (id..)
                .find(|number| !taken(number))
                .expect("a few servers do not take all numbers")
        });
        let member = Member {
            name: new.key.clone(),
            number,
            peer: new.peer.clone(),
            election_port: new.election_port,
            client: new.client.clone(),
            standing,
        };
        self.by_id.insert(id, member);
    }

    /// A server that was joining votes from now on. False if it was not joining.
    pub(crate) fn promote(&mut self, id: u64, zxid: u64) -> bool {
        match self.by_id.get_mut(&id) {
            Some(member) if member.standing == Standing::Joining => {
                member.standing = Standing::Voter;
                self.version = zxid;
                true
            }
            _ => false,
        }
    }

    /// A server tells where it is. False if that was known, or there is no such server.
    pub(crate) fn announce(&mut self, id: u64, peer: &str, client: &str, zxid: u64) -> bool {
        let Some(member) = self.by_id.get_mut(&id) else {
            return false;
        };
        if !is_address(peer) || (member.peer == peer && member.client == client) {
            return false;
        }
        if member.peer != peer {
            let port = split_host(peer).and_then(|(_, port)| port.parse().ok());
            member.election_port = port.expect("the address was checked");
        }
        member.peer = peer.to_owned();
        member.client = client.to_owned();
        self.version = zxid;
        true
    }

    /// Only `id` is left, and votes: what is done when the others are gone for ever.
    pub(crate) fn survive(&mut self, id: u64, zxid: u64) -> bool {
        let Some(mut member) = self.by_id.remove(&id) else {
            return false;
        };
        member.standing = Standing::Voter;
        self.by_id = BTreeMap::from([(id, member)]);
        self.version = zxid;
        true
    }

    /// What stands in `/zookeeper/config`. Servers whose address is not known yet are left out.
    ///
    /// Beside `ZooKeeper`'s own lines there is one for each name that is not its server's number
    /// (`name.1=a`), and one for a server that is to vote when it has caught up (`joining.4=true`).
    /// `ZooKeeper`'s clients pass over keys that they do not know.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        let mut members: Vec<&Member> = self.by_id.values().collect();
        members.sort_by_key(|member| member.number);
        for member in &members {
            let Some((host, port)) = split_host(&member.peer) else {
                continue;
            };
            let role = match member.standing {
                Standing::Voter => "participant",
                Standing::Joining | Standing::Observer => "observer",
            };
            let (number, election) = (member.number, member.election_port);
            let _ = write!(text, "server.{number}={host}:{port}:{election}:{role}");
            if !member.client.is_empty() {
                let _ = write!(text, ";{}", member.client);
            }
            text.push('\n');
        }
        for member in &members {
            if member.name != member.number.to_string() {
                let _ = writeln!(text, "name.{}={}", member.number, member.name);
            }
            if member.standing == Standing::Joining {
                let _ = writeln!(text, "joining.{}=true", member.number);
            }
        }
        let _ = write!(text, "version={:x}", self.version);
        text
    }
}

/// A server as a client reads of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// What `ZooKeeper`'s tools call it.
    pub number: u64,
    /// Its name; its number where it has none.
    pub name: String,
    /// `host:port` for the other servers.
    pub peer: String,
    /// `host:port` for clients; empty if that is not told.
    pub client: String,
    /// `participant` or `observer`.
    pub role: String,
    /// Whether it becomes a participant when it has caught up.
    pub joining: bool,
}

/// Reads what stands in `/zookeeper/config`, ours or that of Apache `ZooKeeper`: the version, and
/// the servers. Lines that say neither are passed over.
#[must_use]
pub fn listed(text: &str) -> (u64, Vec<Listed>) {
    let mut version = 0;
    let mut servers: Vec<Listed> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        if key == "version" {
            version = u64::from_str_radix(value, 16).unwrap_or(0);
        }
        let Some((kind, number)) = key.split_once('.') else {
            continue;
        };
        let Ok(number) = number.parse::<u64>() else {
            continue;
        };
        let known = servers.iter_mut().find(|server| server.number == number);
        match (kind, known) {
            ("server", _) => {
                let Ok(server) = Joining::parse(line) else {
                    continue;
                };
                let role = if server.votes {
                    "participant"
                } else {
                    "observer"
                };
                servers.push(Listed {
                    number,
                    name: number.to_string(),
                    peer: server.peer,
                    client: server.client,
                    role: role.to_owned(),
                    joining: false,
                });
            }
            ("name", Some(server)) => server.name = value.to_owned(),
            ("joining", Some(server)) => server.joining = value == "true",
            _ => {}
        }
    }
    (version, servers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Members {
        let names = ["a", "b", "c"].map(str::to_owned);
        let mut members = Members::founded(&(1..).zip(names).collect());
        for id in 1..=3 {
            let host = format!("10.0.0.{id}");
            assert!(members.announce(id, &format!("{host}:2888"), &format!("{host}:2181"), id));
        }
        members
    }

    fn change(joining: &str, leaving: &str) -> Reconfig {
        Reconfig::parse(Some(joining), Some(leaving), None, -1).unwrap()
    }

    #[test]
    fn what_a_client_may_write() {
        let change = change(
            "server.4=h4:1:2:observer;0.0.0.0:3,server.x=[::1]:5:6;7",
            "1",
        );
        assert_eq!(change.joining[0].peer, "h4:1");
        assert_eq!(
            (change.joining[0].election_port, change.joining[0].votes),
            (2, false)
        );
        assert_eq!(change.joining[0].client, "0.0.0.0:3");
        assert_eq!(change.joining[1].peer, "[::1]:5");
        assert_eq!(change.joining[1].client, "0.0.0.0:7");
        assert!(change.joining[1].votes);
        let parse = |joining| Reconfig::parse(Some(joining), None, None, -1);
        for bad in [
            "some thing",
            "",
            "server.1",
            "server.=a:1:2",
            "server.1=a",
            "server.1=a:1",
            "server.1=a:1:x",
            "server.1=a:1:2:king",
            "server.1=a:1:2;",
            "server.1=a:1:2:observer:1",
            "server.1=a b:1:2",
            "server.1=a:0:2",
            "server.1=a:70000:2",
            "server.1=[::1:1:2",
            "server.1=a:1:2|b:1:2",
        ] {
            assert_eq!(parse(bad), Err(ErrorCode::BadArguments), "{bad}");
        }
        assert!(Reconfig::parse(None, None, None, -1).is_err());
    }

    #[test]
    fn what_is_shown() {
        let members = three();
        assert_eq!(
            members.render(),
            "server.1=10.0.0.1:2888:2888:participant;10.0.0.1:2181\n\
             server.2=10.0.0.2:2888:2888:participant;10.0.0.2:2181\n\
             server.3=10.0.0.3:2888:2888:participant;10.0.0.3:2181\n\
             name.1=a\nname.2=b\nname.3=c\nversion=3"
        );
        let (version, servers) = listed(&members.render());
        assert_eq!((version, servers.len()), (3, 3));
        assert_eq!(
            (&*servers[2].name, &*servers[2].client),
            ("c", "10.0.0.3:2181")
        );
        let next = members.reconfigured(&change("server.100=h:1:2:observer;0.0.0.0:5", ""), 27);
        let text = next.unwrap().render();
        assert!(
            text.contains("\nserver.100=h:1:2:observer;0.0.0.0:5\n"),
            "{text}"
        );
        assert!(text.ends_with("version=1b"), "{text}");
        assert!(!text.contains("name.100"), "{text}");
    }

    #[test]
    fn one_voter_at_a_time_and_learners_first() {
        let members = three();
        let refused = |members: &Members, c: &Reconfig| members.reconfigured(c, 9).unwrap_err();
        assert_eq!(
            refused(&members, &change("", "1,2")),
            ErrorCode::BadArguments
        );
        assert_eq!(
            refused(&members, &change("server.4=h:1:1,server.5=i:1:1", "")),
            ErrorCode::BadArguments
        );
        assert_eq!(
            refused(&members, &change("server.4=10.0.0.1:2888:1", "")),
            ErrorCode::BadArguments,
            "two servers at one address"
        );
        let mut stale = change("", "1");
        stale.version = 2;
        assert_eq!(refused(&members, &stale), ErrorCode::BadVersion);
        stale.version = 3;
        assert!(members.reconfigured(&stale, 9).is_ok());

        let mut joined = members
            .reconfigured(&change("server.d=h:1:1", "c"), 9)
            .unwrap();
        assert_eq!(joined.voters().collect::<Vec<_>>(), [1, 2]);
        assert_eq!((joined.joining(), joined.was_removed(3)), (Some(4), true));
        assert_eq!(
            refused(&joined, &change("", "1")),
            ErrorCode::ReconfigInProgress
        );
        assert_eq!(
            refused(&joined, &change("server.e=i:1:1", "")),
            ErrorCode::ReconfigInProgress
        );
        assert!(
            joined.reconfigured(&change("", "d"), 10).is_ok(),
            "one that never comes can go"
        );
        assert!(joined.promote(4, 10) && !joined.promote(4, 11));
        assert_eq!(joined.voters().collect::<Vec<_>>(), [1, 2, 4]);
    }

    #[test]
    fn ids_are_never_given_out_again() {
        let mut members = three();
        for round in 0..3 {
            members = members.reconfigured(&change("", "c"), 10 + round).unwrap();
            let old = 3 + round;
            assert!(members.was_removed(old) && members.find("c").is_none());
            members = members
                .reconfigured(&change("server.c=10.0.0.3:2888:2888", ""), 20 + round)
                .unwrap();
            assert_eq!(members.find("c"), Some(old + 1));
            assert!(members.promote(old + 1, 30));
        }
        let alone = Members::founded(&BTreeMap::from([(1, "a".to_owned())]));
        assert_eq!(
            alone.reconfigured(&change("", "a"), 1),
            Err(ErrorCode::BadArguments)
        );
        let mut survivor = members.clone();
        assert!(survivor.survive(2, 99));
        assert_eq!(survivor.voters().collect::<Vec<_>>(), [2]);
        assert!(survivor.was_removed(1) && survivor.was_removed(6));
    }
}

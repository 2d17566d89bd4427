//! A group's machine on a disk that fills up: nothing is acknowledged that the disk did not take.

#![expect(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::time::timeout;
use unbroken_group::MemberId;
use unbroken_group::node::{Node, NodeConfig};
use unbroken_group::registry::MemoryRegistry;
use unbroken_group::tools::{Durable, DurableError, Machine, UpdateError};
use unbroken_tests::cluster::PATIENCE;
use unbroken_tests::disk::Disk;
use unbroken_tests::netns::userns;

/// The small disk, in bytes.
const DISK_BYTES: u64 = 128 * 1024;
/// One update, in bytes.
const UPDATE_BYTES: usize = 1024;

/// How many updates there were.
#[derive(Default)]
struct Count(u64);

impl Machine for Count {
    fn apply(&mut self, _: &MemberId, _: &Bytes) -> Bytes {
        self.0 += 1;
        Bytes::new()
    }

    fn snapshot(&self) -> Vec<Bytes> {
        vec![Bytes::copy_from_slice(&self.0.to_le_bytes())]
    }

    fn restore(bytes: &Bytes) -> Option<Self> {
        Some(Self(u64::from_le_bytes(bytes[..].try_into().ok()?)))
    }
}

/// Gone when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let name = format!("unbroken-durable-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A group of one, which no other's disk can save.
async fn open(
    disk: &Path,
) -> (
    Node,
    Durable<Count>,
    tokio::task::JoinHandle<Result<(), DurableError>>,
) {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address: SocketAddr = free.local_addr().unwrap();
    drop(free);
    let members = BTreeMap::from([("r1".to_owned(), address)]);
    let node = Node::start(
        NodeConfig::new("r1", members, [7; 32]),
        MemoryRegistry::default(),
    )
    .unwrap();
    let founders = BTreeSet::from(["r1".to_owned()]);
    let (count, work) = Durable::open(&node, "count", disk, &founders)
        .await
        .unwrap();
    (node, count, tokio::spawn(work))
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Updates until the disk is full, and what is found on a larger one then.
async fn fill(disk: &Path, larger: &Path) {
    let (node, count, work) = open(disk).await;
    let mut acknowledged = 0;
    let refused = loop {
        match count.update(&[7; UPDATE_BYTES]).await {
            Ok(_) => acknowledged += 1,
            Err(error) => break error,
        }
        assert!(acknowledged * UPDATE_BYTES as u64 <= DISK_BYTES);
    };
    assert!(matches!(refused, UpdateError::Out), "{refused:?}");
    let ended = work.await.unwrap();
    assert!(matches!(ended, Err(DurableError::Disk(_))), "{ended:?}");
    assert!(acknowledged > 0);
    drop((count, node));

    // On a larger one it goes on with all that was acknowledged.
    copy(disk, larger);
    let (_node, count, _work) = open(larger).await;
    count.update(b"one more").await.unwrap();
    let all = count.read(|count| count.0).unwrap();
    assert!(all > acknowledged, "{all} of {acknowledged} and one");
}

#[test]
fn nothing_is_acknowledged_that_a_full_disk_did_not_take() {
    userns::privileged(
        "nothing_is_acknowledged_that_a_full_disk_did_not_take",
        || {
            let folder = Folder::new();
            let small = Disk::new(&folder.0, DISK_BYTES).unwrap();
            let disk = small.path();
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let larger = folder.0.join("larger");
            let filled = fill(&disk, &larger);
            let done = runtime.block_on(async { timeout(PATIENCE, filled).await });
            done.expect("nobody waits for a disk that failed");
        },
    );
}

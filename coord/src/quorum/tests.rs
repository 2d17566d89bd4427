//! Three engines, and a network that can be cut.

use super::raft::RaftQuorum;
use super::{Consensus as _, QuorumConfig, QuorumOutput, Recovered, Role};

/// Executes what all of them want, messages included unless the network is cut. The barriers that were passed.
fn settle(servers: &mut [RaftQuorum], cut: bool) -> Vec<u64> {
    let mut passed = Vec::new();
    loop {
        let mut messages = Vec::new();
        let mut idle = true;
        for server in servers.iter_mut() {
            while let Some(output) = server.poll() {
                idle = false;
                match output {
                    QuorumOutput::Send(message) => messages.push(message),
                    QuorumOutput::Persist { token, .. } => server.persisted(token),
                    QuorumOutput::Barrier { context, .. } => passed.push(context),
                    QuorumOutput::Restore(_) | QuorumOutput::Apply(_) => {}
                }
            }
        }
        if idle {
            return passed;
        }
        for message in messages.into_iter().filter(|_| !cut) {
            let to = usize::try_from(message.to).unwrap();
            servers[to - 1].step(message);
        }
    }
}

/// A leader that does not know that it leads no more must not tell what is committed.
#[test]
fn a_barrier_asks_the_others_whether_it_still_leads() {
    let config = |id| QuorumConfig {
        id,
        founders: [1, 2, 3].into(),
        heartbeat_ticks: 1,
        election_ticks: (10, 20),
        seed: 42,
        incarnation: id,
        uncommitted_bytes_max: 1 << 20,
    };
    let mut servers = [1, 2, 3].map(|id| RaftQuorum::new(&config(id), Recovered::default()));
    servers[0].campaign();
    settle(&mut servers, false);
    assert_eq!(servers[0].role(), Role::Leader);
    servers[0].barrier(7);
    assert!(
        settle(&mut servers, true).is_empty(),
        "nobody else was asked"
    );
    servers[0].tick();
    assert_eq!(settle(&mut servers, false), [7]);
}

//! The kernel's half of the fence, frame by frame: what leaves, until when, and what is left of it.

#![allow(clippy::unwrap_used, reason = "a test says plainly what it expects")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use rustix::thread::{CapabilitySet, CapabilitySets};
use unbroken::config::FenceMode;
use unbroken::wire::{BootTime, Flushed, KernelFenceError, Options, Wire, WireError};
use unbroken_tests::cluster;
use unbroken_tests::netns::{Capture, Host, Lab, LabOptions, userns};

const VIP4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 98, 0, 100));
const VIP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, 0x100));
const SOON: Duration = Duration::from_secs(20);
/// An Ethertype of nobody's, whose frame says that all before it have passed.
const MARK: [u8; 2] = [0x88, 0xb5];

fn open(host: &Host, vip: IpAddr) -> Result<Wire, WireError> {
    let options = Options {
        fence: FenceMode::Kernel,
        ..Options::new("eth0", vip)
    };
    host.enter(|| Wire::open(&options))
}

/// Frames that would say something of `vip`: packets from it, and whatever claims it as a neighbour.
fn frames_of(vip: IpAddr) -> Vec<Vec<u8>> {
    let ethernet = |ethertype: [u8; 2], body: Vec<u8>| {
        let mut frame = vec![0xff; 6];
        frame.extend([0x02, 0x98, 0, 0, 0, 0x11]);
        frame.extend(ethertype);
        frame.extend(body);
        frame.resize(frame.len().max(60), 0);
        frame
    };
    match vip {
        IpAddr::V4(vip) => {
            let mut packet = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0];
            packet.extend(vip.octets());
            packet.extend([10, 98, 0, 10]);
            let arp = |operation: u8| {
                let mut arp = vec![0, 1, 8, 0, 6, 4, 0, operation, 2, 0x98, 0, 0, 0, 0x11];
                arp.extend(vip.octets());
                arp.extend([0; 6]);
                arp.extend(vip.octets());
                ethernet([8, 6], arp)
            };
            vec![ethernet([8, 0], packet), arp(1), arp(2)]
        }
        IpAddr::V6(vip) => {
            let from = |source: Ipv6Addr, next_header: u8, body: &[u8]| {
                let mut packet = vec![0x60, 0, 0, 0, 0, u8::try_from(body.len()).unwrap()];
                packet.extend([next_header, 255]);
                packet.extend(source.octets());
                packet.extend(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets());
                packet.extend(body);
                ethernet([0x86, 0xdd], packet)
            };
            // An advertisement of the VIP by another address.
            let mut advertisement = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
            advertisement.extend(vip.octets());
            let other = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
            vec![from(vip, 6, &[0; 20]), from(other, 58, &advertisement)]
        }
    }
}

/// Which of the frames pass: as the host's kernel says, and as the switch sees.
fn passed(lab: &Lab, capture: &Capture, frames: &[Vec<u8>]) -> usize {
    let host = lab.host("r1");
    let injector = host.injector().unwrap();
    let mut mark = frames[0].clone();
    mark[12..14].copy_from_slice(&MARK);
    let sent = frames.iter().filter(|f| injector.send(f).unwrap()).count();
    assert!(injector.send(&mark).unwrap());
    let mut seen = 0;
    loop {
        let frame = capture.next(SOON).unwrap().expect("the mark comes");
        if frame.host == host.name() && frame.head[12..14] == MARK {
            assert_eq!(seen, sent);
            return seen;
        }
        seen += usize::from(frames.iter().any(|f| frame.head.starts_with(f)));
    }
}

/// Opens the fence until `until` as the node does, by having something to send.
fn renew(wire: &mut Wire, until: BootTime) -> Flushed {
    wire.fence_mut().open_until(until);
    wire.announce();
    wire.flush(&mut Vec::new()).unwrap()
}

#[test]
fn nothing_of_the_vip_leaves_unless_the_fence_is_open() {
    userns::privileged("nothing_of_the_vip_leaves_unless_the_fence_is_open", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let capture = lab.capture().unwrap();
        for (vip, other) in [(VIP4, VIP6), (VIP6, VIP4)] {
            let (frames, others) = (frames_of(vip), frames_of(other));
            assert_eq!(passed(&lab, &capture, &frames), frames.len(), "no node yet");

            let mut wire = open(lab.host("r1"), vip).unwrap();
            assert!(wire.fence().is_in_kernel());
            assert_eq!(passed(&lab, &capture, &frames), 0, "shut at first");
            assert_eq!(passed(&lab, &capture, &others), others.len(), "not ours");

            wire.set_owner(BootTime::now(), true);
            let long = BootTime::now() + Duration::from_secs(3600);
            assert_eq!(renew(&mut wire, long), Flushed::All);
            assert_eq!(passed(&lab, &capture, &frames), frames.len(), "open");
            wire.fence_mut().close();
            assert_eq!(passed(&lab, &capture, &frames), 0, "shut by hand");

            // A lease of an hour, and one that is over soon: the later word counts.
            assert_eq!(renew(&mut wire, long), Flushed::All);
            wire.set_owner(BootTime::now(), false);
            assert_eq!(passed(&lab, &capture, &frames), 0, "given up");

            drop(wire);
            assert_eq!(
                passed(&lab, &capture, &frames),
                frames.len(),
                "no node any more"
            );
        }
    });
}

#[test]
fn the_kernel_shuts_by_itself_at_the_end_of_the_lease() {
    userns::privileged("the_kernel_shuts_by_itself_at_the_end_of_the_lease", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        for vip in [VIP4, VIP6] {
            let mut wire = open(lab.host("r1"), vip).unwrap();
            wire.set_owner(BootTime::now(), true);
            let injector = lab.host("r1").injector().unwrap();
            let frame = &frames_of(vip)[0];
            for lease_ms in [30, 12, 100, 45] {
                let until = BootTime::now() + Duration::from_millis(lease_ms);
                if renew(&mut wire, until) == Flushed::Fenced {
                    continue; // this thread was put to sleep, and the lease is over
                }
                // From here on the process "sleeps": it checks nothing and shuts nothing.
                loop {
                    let before = BootTime::now();
                    let left = injector.send(frame).unwrap();
                    assert!(
                        !left || before < until,
                        "a frame left {:?} after the lease of {lease_ms} ms",
                        before.since(until)
                    );
                    if !left {
                        break;
                    }
                }
                assert!(!injector.send(frame).unwrap(), "shut for good");
            }
            assert!(wire.fence().renewals() > 0);
        }
    });
}

#[test]
fn a_renewal_extends_and_is_seldom() {
    userns::privileged("a_renewal_extends_and_is_seldom", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let mut wire = open(lab.host("r1"), VIP4).unwrap();
        wire.set_owner(BootTime::now(), true);
        let lease = Duration::from_millis(200);
        let begun = BootTime::now();
        // As under load: something is to be sent all the time, and the lease is always fresh.
        let mut last: Option<BootTime> = None;
        // Each lasts for less than a lease, so more come, however slow this machine is.
        while wire.fence().renewals() < 5 {
            let (before, known) = (BootTime::now(), wire.fence().renewals());
            assert!(
                before.since(begun) < cluster::PATIENCE,
                "no renewal comes any more"
            );
            let flushed = renew(&mut wire, before + lease);
            let new = wire.fence().renewals() - known;
            if new == 0 {
                continue;
            }
            if let Some(last) = last {
                let apart = BootTime::now().since(last);
                assert!(apart >= lease / 4, "{apart:?}: half of a lease each");
            }
            // One that took too long is repeated, and may have to be again at the next flush.
            last = (new == 1 && flushed == Flushed::All).then_some(before);
        }
        let counters = wire.counters();
        assert_eq!(counters.send_errors, 0, "{counters:?}");
    });
}

#[test]
fn what_is_missing_is_said() {
    userns::privileged("what_is_missing_is_said", || {
        let lab = Lab::new(LabOptions { replicas: 1 }).unwrap();
        let r1 = lab.host("r1");
        let first = open(r1, VIP6).unwrap();
        let second = open(r1, VIP6).unwrap_err();
        let occupied = |e: &WireError| {
            matches!(e, WireError::NoKernelFence { source, .. }
                if matches!(source, KernelFenceError::Occupied { .. }))
        };
        assert!(occupied(&second), "{second:?}");
        drop(first);
        drop(open(r1, VIP6).unwrap());

        let unprivileged = r1.enter(|| {
            let kept = CapabilitySet::NET_RAW;
            let sets = CapabilitySets {
                effective: kept,
                permitted: kept,
                inheritable: CapabilitySet::empty(),
            };
            rustix::thread::set_capabilities(None, sets).unwrap();
            let options = Options {
                fence: FenceMode::Kernel,
                ..Options::new("eth0", VIP4)
            };
            Wire::open(&options).unwrap_err()
        });
        let WireError::NoKernelFence { source, .. } = &unprivileged else {
            panic!("{unprivileged:?}")
        };
        assert!(
            matches!(source, KernelFenceError::NotPermitted),
            "{source:?}"
        );
        assert!(unprivileged.to_string().contains("fence = \"process\""));
    });
}

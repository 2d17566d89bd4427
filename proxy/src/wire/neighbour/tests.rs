use super::*;

const MINE: Mac = [2, 0, 0, 0, 0, 1];
const CLIENT: Mac = [2, 0, 0, 0, 0, 9];
const VIP: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 100);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 10);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, 0x100);
const PEER6: Ipv6Addr = Ipv6Addr::new(0xfd98, 0, 0, 0, 0, 0, 0, 0x10);

fn frame(ethertype: u16, body: &[u8]) -> RawFrame<'_> {
    RawFrame {
        destination: MINE,
        source: CLIENT,
        ethertype,
        body,
        checksum_ok: false,
    }
}

/// The body of a frame that one of our own builders made.
fn body(built: &[u8]) -> Vec<u8> {
    built[HEADROOM..].to_vec()
}

fn answer(meaning: Meaning<'_>) -> Vec<u8> {
    match meaning {
        Meaning::Answer(frame) => frame,
        other => panic!("expected an answer, found {other:?}"),
    }
}

#[test]
fn arp_request_is_answered_with_our_address() {
    let ask = body(&arp_frame(
        ArpOperations::Request,
        PEER,
        Station::at(CLIENT),
        VIP,
        [0; 6],
        BROADCAST,
    ));
    let reply = answer(read(
        &frame(ETHERTYPE_ARP, &ask),
        VIP.into(),
        Station::at(MINE),
    ));
    assert_eq!(reply[10..24], [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 6]);
    let arp = ArpPacket::new(&reply[HEADROOM..]).unwrap();
    assert_eq!(arp.get_operation(), ArpOperations::Reply);
    assert_eq!(
        (arp.get_sender_proto_addr(), arp.get_target_proto_addr()),
        (VIP, PEER)
    );
    assert_eq!(arp.get_sender_hw_addr().octets(), MINE);
}

#[test]
fn arp_claims_are_told_from_our_own_words() {
    let foreign = announcement(VIP.into(), Station::at(CLIENT));
    assert_eq!(foreign.len(), 2, "request form and reply form");
    for built in &foreign {
        let meaning = read(
            &frame(ETHERTYPE_ARP, &built[HEADROOM..]),
            VIP.into(),
            Station::at(MINE),
        );
        assert_eq!(meaning, Meaning::Claim(CLIENT));
    }
    for built in announcement(VIP.into(), Station::at(MINE)) {
        let meaning = read(
            &frame(ETHERTYPE_ARP, &built[HEADROOM..]),
            VIP.into(),
            Station::at(MINE),
        );
        assert_eq!(meaning, Meaning::Nothing);
    }
    // A reply from the client to somebody's request, and a request that asks for another.
    let about = body(&arp_frame(
        ArpOperations::Reply,
        PEER,
        Station::at(CLIENT),
        VIP,
        MINE,
        MINE,
    ));
    assert_eq!(
        read(&frame(ETHERTYPE_ARP, &about), VIP.into(), Station::at(MINE)),
        Meaning::Nothing
    );
    assert_eq!(
        read(
            &frame(ETHERTYPE_ARP, &about[..27]),
            VIP.into(),
            Station::at(MINE)
        ),
        Meaning::Nothing
    );
}

fn echo4(payload: &[u8]) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
    icmp.extend_from_slice(payload);
    let checksum = finish(sum(0, &icmp));
    icmp[2..4].copy_from_slice(&checksum.to_be_bytes());
    let total = u16::try_from(20 + icmp.len()).unwrap();
    let mut p = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, PROTOCOL_ICMP, 0, 0];
    p[2..4].copy_from_slice(&total.to_be_bytes());
    p.extend(PEER.octets());
    p.extend(VIP.octets());
    p.extend(icmp);
    p
}

#[test]
fn echo_comes_back_whole_with_right_checksums() {
    for payload in [&b""[..], b"odd", b"an even number of bytes."] {
        let ask = echo4(payload);
        let reply = answer(read(
            &frame(ETHERTYPE_IPV4, &ask),
            VIP.into(),
            Station::at(MINE),
        ));
        let ip = &reply[HEADROOM..];
        assert_eq!(finish(sum(0, &ip[..20])), 0);
        assert_eq!(finish(sum(0, &ip[20..])), 0);
        assert_eq!(ip[12..16], VIP.octets());
        assert_eq!(ip[16..20], PEER.octets());
        assert_eq!(ip[20], 0);
        assert_eq!(ip[24..], ask[24..]);
    }
}

#[test]
fn echo_is_not_answered_when_damaged_broadcast_or_fragmented() {
    let good = echo4(b"payload");
    let silent = |ask: &[u8]| {
        assert_eq!(
            read(&frame(ETHERTYPE_IPV4, ask), VIP.into(), Station::at(MINE)),
            Meaning::Nothing
        );
    };
    let mut damaged = good.clone();
    damaged[30] ^= 1;
    silent(&damaged);
    let mut fragment = good.clone();
    fragment[6] = 0x20;
    silent(&fragment);
    let mut from_many = good.clone();
    from_many[12..16].fill(255);
    silent(&from_many);
    let many = RawFrame {
        destination: BROADCAST,
        ..frame(ETHERTYPE_IPV4, &good)
    };
    assert_eq!(read(&many, VIP.into(), Station::at(MINE)), Meaning::Nothing);
}

#[test]
fn other_packets_pass_through() {
    let mut unreachable = echo4(&[0; 40]);
    unreachable[20] = 3;
    unreachable[21] = 4;
    let meaning = read(
        &frame(ETHERTYPE_IPV4, &unreachable),
        VIP.into(),
        Station::at(MINE),
    );
    assert_eq!(
        meaning,
        Meaning::Packet(&unreachable),
        "fragmentation needed is the endpoint's"
    );
    let mut tcp = echo4(&[0; 40]);
    tcp[9] = 6;
    tcp.extend([0; 9]);
    let meaning = read(&frame(ETHERTYPE_IPV4, &tcp), VIP.into(), Station::at(MINE));
    assert_eq!(meaning, Meaning::Packet(&tcp[..tcp.len() - 9]));
    tcp[19] = 101;
    assert_eq!(
        read(&frame(ETHERTYPE_IPV4, &tcp), VIP.into(), Station::at(MINE)),
        Meaning::Nothing
    );
}

/// A solicitation for the VIP from `source`, to its solicited-node group.
fn solicit(source: Ipv6Addr, hop_limit: u8) -> Vec<u8> {
    let group: Ipv6Addr = "ff02::1:ff00:100".parse().unwrap();
    let built = icmpv6_frame(
        SOLICITATION,
        source,
        Station::at(CLIENT),
        group,
        BROADCAST,
        hop_limit,
        |b| {
            b.extend([0; 4]);
            b.extend(VIP6.octets());
            if !source.is_unspecified() {
                b.extend([OPTION_SOURCE_LINK, 1]);
                b.extend(CLIENT);
            }
        },
    );
    body(&built)
}

#[test]
fn solicitation_is_answered_to_the_asker() {
    let ask = solicit(PEER6, 255);
    let reply = answer(read(
        &frame(ETHERTYPE_IPV6, &ask),
        VIP6.into(),
        Station::at(MINE),
    ));
    let ip = &reply[HEADROOM..];
    assert_eq!(reply[10..16], CLIENT);
    assert_eq!(ip[8..24], VIP6.octets());
    assert_eq!(ip[24..40], PEER6.octets());
    assert_eq!(
        (ip[7], ip[40], ip[44]),
        (255, ADVERTISEMENT, FLAG_SOLICITED | FLAG_OVERRIDE)
    );
    assert_eq!(link_option(&ip[40..], OPTION_TARGET_LINK), Some(MINE));
    assert_eq!(finish(sum(pseudo(VIP6, PEER6, &ip[40..]), &ip[40..])), 0);
}

#[test]
fn duplicate_address_detection_is_told_before_everyone() {
    let ask = solicit(Ipv6Addr::UNSPECIFIED, 255);
    let reply = answer(read(
        &frame(ETHERTYPE_IPV6, &ask),
        VIP6.into(),
        Station::at(MINE),
    ));
    assert_eq!(reply[10..16], ALL_NODES_MAC);
    assert_eq!(reply[HEADROOM + 44], FLAG_OVERRIDE);
}

#[test]
fn neighbour_messages_that_were_routed_damaged_or_cut_are_ignored() {
    let ignored = |ask: &[u8]| {
        assert_eq!(
            read(&frame(ETHERTYPE_IPV6, ask), VIP6.into(), Station::at(MINE)),
            Meaning::Nothing
        );
    };
    ignored(&solicit(PEER6, 254));
    let mut damaged = solicit(PEER6, 255);
    damaged[70] ^= 1;
    ignored(&damaged);
    let mut endless = solicit(PEER6, 255);
    endless[65] = 0; // an option of no length, checksum notwithstanding
    let meaning = read(
        &RawFrame {
            checksum_ok: true,
            ..frame(ETHERTYPE_IPV6, &endless)
        },
        VIP6.into(),
        Station::at(MINE),
    );
    assert!(
        matches!(meaning, Meaning::Answer(_)),
        "the frame's own source serves instead"
    );
    for cut in 0..40 + 24 {
        ignored(&solicit(PEER6, 255)[..cut]);
    }
}

#[test]
fn advertisements_of_others_are_claims() {
    for (by, expected) in [(CLIENT, Meaning::Claim(CLIENT)), (MINE, Meaning::Nothing)] {
        let built = announcement(VIP6.into(), Station::at(by));
        assert_eq!(built.len(), 1);
        let meaning = read(
            &frame(ETHERTYPE_IPV6, &built[0][HEADROOM..]),
            VIP6.into(),
            Station::at(MINE),
        );
        assert_eq!(meaning, expected);
    }
}

#[test]
fn echo_v6() {
    let built = icmpv6_frame(
        ECHO_REQUEST_V6,
        PEER6,
        Station::at(CLIENT),
        VIP6,
        MINE,
        64,
        |b| {
            b.extend(b"\x12\x34\x00\x01payload");
        },
    );
    let reply = answer(read(
        &frame(ETHERTYPE_IPV6, &built[HEADROOM..]),
        VIP6.into(),
        Station::at(MINE),
    ));
    let ip = &reply[HEADROOM..];
    assert_eq!(
        (ip[40], &ip[44..]),
        (ECHO_REPLY_V6, &b"\x12\x34\x00\x01payload"[..])
    );
    assert_eq!(finish(sum(pseudo(VIP6, PEER6, &ip[40..]), &ip[40..])), 0);
}

fn ms(n: u64) -> BootTime {
    BootTime::from_micros(1_000_000 + n * 1000)
}

/// The times at which announcements are made until `until`, waking exactly when asked.
fn schedule(announcer: &mut Announcer, until: BootTime) -> Vec<u64> {
    let mut made = Vec::new();
    while let Some(at) = announcer.poll_timeout().filter(|at| *at <= until) {
        assert!(
            announcer.handle_timeout(at),
            "asked to be woken for nothing"
        );
        made.push(at.since(ms(0)).as_millis().try_into().unwrap());
    }
    made
}

#[test]
fn announcements_come_in_a_burst_then_periodically() {
    let mut announcer = Announcer::default();
    assert_eq!(announcer.poll_timeout(), None);
    assert!(!announcer.handle_timeout(ms(0)));
    announcer.start(ms(0));
    let made = schedule(&mut announcer, ms(70_000));
    assert_eq!(made, [0, 50, 200, 1000, 2000, 32_000, 62_000]);
    announcer.stop();
    assert_eq!(announcer.poll_timeout(), None);
}

#[test]
fn a_late_wake_up_announces_once() {
    let mut announcer = Announcer::default();
    announcer.start(ms(0));
    assert!(announcer.handle_timeout(ms(300)));
    assert!(!announcer.handle_timeout(ms(300)));
    assert_eq!(announcer.poll_timeout(), Some(ms(1000)));
}

#[test]
fn claims_are_answered_at_a_bounded_rate() {
    let mut announcer = Announcer::default();
    announcer.handle_claim(ms(0));
    assert_eq!(
        announcer.poll_timeout(),
        None,
        "not ours: nothing to defend"
    );
    announcer.start(ms(0));
    let mut made = schedule(&mut announcer, ms(5_000)).len();
    // One claim each millisecond for ten seconds.
    for t in 5_000..15_000 {
        announcer.handle_claim(ms(t));
        made += usize::from(announcer.handle_timeout(ms(t)));
    }
    assert_eq!(made, 5 + 50);
}

#[test]
fn a_home_that_is_no_source_stands_in_the_answers_alone() {
    let home = virtual_mac(VIP.into());
    assert_eq!(home, [0x02, 0x75, 10, 98, 0, 100]);
    let flood = Station { source: MINE, home };
    for built in announcement(VIP.into(), flood) {
        assert_eq!(built[16..22], MINE, "the source of the frame");
        assert_eq!(
            built[HEADROOM + 8..HEADROOM + 14],
            home,
            "who has the address"
        );
        let meaning = read(&frame(ETHERTYPE_ARP, &built[HEADROOM..]), VIP.into(), flood);
        assert_eq!(
            meaning,
            Meaning::Nothing,
            "another replica's is no foreign claim"
        );
    }
    let home = virtual_mac(VIP6.into());
    assert_eq!(home[0] & 3, 2, "locally administered, of one station");
    let flood = Station { source: MINE, home };
    for built in announcement(VIP6.into(), flood) {
        assert_eq!(built[16..22], MINE);
        assert_eq!(built[built.len() - 6..], home);
    }
}

//! The classic BPF program of the packet socket: frames for the VIP and nothing else.
//!
//! IPv4: packets to the VIP, and ARP that has the VIP as sender or target. IPv6: packets to the
//! VIP, and neighbour solicitations and advertisements about it, whomever they are addressed to.
//! The offsets are those of an untagged Ethernet frame; frames tagged for another VLAN are dropped.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::packet::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTOCOL_ICMPV6};

/// One instruction, as in the kernel's `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) code: u16,
    pub(super) jt: u8,
    pub(super) jf: u8,
    pub(super) k: u32,
}

const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
/// `SKF_AD_OFF + SKF_AD_VLAN_TAG`: the tag that the kernel has taken off the frame, 0 if none.
const VLAN_TAG: u32 = 0xffff_f000 + 44;
const WHOLE_FRAME: u32 = 0x0004_0000;

/// A place to jump to; resolved when the program is complete, since BPF jumps are forward offsets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    Next,
    Label(&'static str),
}

struct Assembler {
    code: Vec<(u16, To, To, u32)>,
    labels: Vec<(&'static str, usize)>,
}

impl Assembler {
    fn op(&mut self, code: u16, k: u32) {
        self.code.push((code, To::Next, To::Next, k));
    }

    fn jump_equal(&mut self, k: u32, yes: To, no: To) {
        self.code.push((JUMP_EQUAL, yes, no, k));
    }

    fn label(&mut self, name: &'static str) {
        self.labels.push((name, self.code.len()));
    }

    /// Goes to "accept" if the 16 bytes at `at` are `address`, else to `no`.
    fn match_v6(&mut self, at: u32, address: Ipv6Addr, no: To) {
        let octets = address.octets();
        for (i, word) in (0u32..).zip(octets.chunks_exact(4)) {
            let value = u32::from_be_bytes([word[0], word[1], word[2], word[3]]);
            self.op(LOAD_WORD, at + 4 * i);
            let yes = if i == 3 {
                To::Label("accept")
            } else {
                To::Next
            };
            self.jump_equal(value, yes, no);
        }
    }

    fn finish(self) -> Vec<Instruction> {
        let offset = |from: usize, to: To| match to {
            To::Next => 0,
            To::Label(name) => {
                let (_, at) = self
                    .labels
                    .iter()
                    .find(|l| l.0 == name)
                    .expect("label is placed");
                u8::try_from(at - from - 1).expect("the program is far shorter than a jump's reach")
            }
        };
        (0..)
            .zip(&self.code)
            .map(|(i, &(code, yes, no, k))| Instruction {
                code,
                jt: offset(i, yes),
                jf: offset(i, no),
                k,
            })
            .collect()
    }
}

/// The program for `vip`.
pub(super) fn program(vip: IpAddr) -> Vec<Instruction> {
    let mut asm = Assembler {
        code: Vec::new(),
        labels: Vec::new(),
    };
    let (accept, drop) = (To::Label("accept"), To::Label("drop"));
    asm.op(LOAD_WORD, VLAN_TAG);
    asm.op(AND, 0x0fff); // a priority tag (VLAN 0) is as good as none
    asm.jump_equal(0, To::Next, drop);
    asm.op(LOAD_HALF, 12);
    match vip {
        IpAddr::V4(vip) => ipv4(&mut asm, vip, accept, drop),
        IpAddr::V6(vip) => ipv6(&mut asm, vip, drop),
    }
    asm.label("drop");
    asm.op(RETURN, 0);
    asm.label("accept");
    asm.op(RETURN, WHOLE_FRAME);
    asm.finish()
}

fn ipv4(asm: &mut Assembler, vip: Ipv4Addr, accept: To, drop: To) {
    let vip = u32::from(vip);
    asm.jump_equal(u32::from(ETHERTYPE_IPV4), To::Label("ip"), To::Next);
    asm.jump_equal(u32::from(ETHERTYPE_ARP), To::Next, drop);
    asm.op(LOAD_WORD, 28); // ARP: sender protocol address
    asm.jump_equal(vip, accept, To::Next);
    asm.op(LOAD_WORD, 38); // ARP: target protocol address
    asm.jump_equal(vip, accept, drop);
    asm.label("ip");
    asm.op(LOAD_WORD, 30);
    asm.jump_equal(vip, accept, drop);
}

fn ipv6(asm: &mut Assembler, vip: Ipv6Addr, drop: To) {
    asm.jump_equal(u32::from(ETHERTYPE_IPV6), To::Next, drop);
    asm.match_v6(38, vip, To::Label("neighbour"));
    asm.label("neighbour");
    asm.op(LOAD_BYTE, 20); // next header
    asm.jump_equal(u32::from(PROTOCOL_ICMPV6), To::Next, drop);
    asm.op(LOAD_BYTE, 54); // ICMPv6 type: neighbour solicitation, neighbour advertisement
    asm.jump_equal(135, To::Label("target"), To::Next);
    asm.jump_equal(136, To::Label("target"), drop);
    asm.label("target");
    asm.match_v6(62, vip, drop);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A classic BPF machine, as far as the program above needs one. Loads past the end of the
    /// frame drop it, as in the kernel.
    fn run(program: &[Instruction], vlan: u32, frame: &[u8]) -> bool {
        let (mut a, mut pc) = (0u32, 0usize);
        loop {
            let i = program[pc];
            pc += 1;
            let at = i.k as usize;
            let load = |n: usize| {
                let bytes = frame.get(at..at + n)?;
                Some(bytes.iter().fold(0u32, |v, b| v << 8 | u32::from(*b)))
            };
            match i.code {
                LOAD_WORD if i.k == VLAN_TAG => a = vlan,
                LOAD_WORD | LOAD_HALF | LOAD_BYTE => {
                    let n = match i.code {
                        LOAD_WORD => 4,
                        LOAD_HALF => 2,
                        _ => 1,
                    };
                    match load(n) {
                        Some(v) => a = v,
                        None => return false,
                    }
                }
                AND => a &= i.k,
                JUMP_EQUAL => pc += usize::from(if a == i.k { i.jt } else { i.jf }),
                RETURN => return i.k != 0,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    fn frame(ethertype: u16, body: &[(usize, &[u8])]) -> Vec<u8> {
        let mut f = vec![0u8; 100];
        f[12..14].copy_from_slice(&ethertype.to_be_bytes());
        for (at, bytes) in body {
            f[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        f
    }

    #[test]
    fn ipv4_takes_its_address_and_nothing_else() {
        let p = program("10.98.0.100".parse().unwrap());
        let (vip, other): (&[u8], &[u8]) = (&[10, 98, 0, 100], &[10, 98, 0, 101]);
        for (expected, f) in [
            (true, frame(ETHERTYPE_IPV4, &[(30, vip)])),
            (false, frame(ETHERTYPE_IPV4, &[(30, other)])),
            (false, frame(ETHERTYPE_IPV4, &[(26, vip), (30, other)])),
            (true, frame(ETHERTYPE_ARP, &[(28, vip), (38, other)])),
            (true, frame(ETHERTYPE_ARP, &[(28, other), (38, vip)])),
            (false, frame(ETHERTYPE_ARP, &[(28, other), (38, other)])),
            (false, frame(ETHERTYPE_IPV6, &[(30, vip)])),
            (false, frame(ETHERTYPE_IPV4, &[(30, vip)])[..32].to_vec()),
        ] {
            assert_eq!(run(&p, 0, &f), expected, "{f:?}");
        }
        let mine = frame(ETHERTYPE_IPV4, &[(30, vip)]);
        assert!(run(&p, 0xe000, &mine), "a priority tag changes nothing");
        assert!(!run(&p, 0x0007, &mine), "VLAN 7 is another network");
    }

    #[test]
    fn ipv6_takes_packets_and_neighbour_messages_about_it() {
        let address: Ipv6Addr = "fd98::100".parse().unwrap();
        let near: Ipv6Addr = "fd98::101".parse().unwrap();
        let p = program(address.into());
        let (vip, other) = (address.octets(), near.octets());
        let nd = |kind: u8, target: &[u8]| {
            frame(
                ETHERTYPE_IPV6,
                &[(20, &[58]), (38, &other), (54, &[kind]), (62, target)],
            )
        };
        assert!(run(&p, 0, &frame(ETHERTYPE_IPV6, &[(38, &vip)])));
        assert!(!run(&p, 0, &frame(ETHERTYPE_IPV6, &[(38, &other)])));
        assert!(run(&p, 0, &nd(135, &vip)));
        assert!(run(&p, 0, &nd(136, &vip)));
        assert!(
            !run(&p, 0, &nd(134, &vip)),
            "a router advertisement is not for us"
        );
        assert!(!run(&p, 0, &nd(135, &other)));
        assert!(!run(
            &p,
            0,
            &frame(ETHERTYPE_IPV6, &[(20, &[6]), (54, &[135]), (62, &vip)])
        ));
        assert!(!run(&p, 0, &frame(ETHERTYPE_IPV4, &[(38, &vip)])));
    }
}

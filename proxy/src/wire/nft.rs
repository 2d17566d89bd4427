//! The kernel's half of the fence: nftables rules on the way out of the service's interface that
//! drop every frame of the VIP unless the VIP is in a set, whose only element times out.
//!
//! ```text
//! table netdev unbroken_10.98.0.100 {          owned: gone with its socket, however the node ends
//!     set open { type ipv4_addr; flags timeout }
//!     chain egress { type filter hook egress device "eth0" priority filter; policy accept;
//!         ip saddr 10.98.0.100 ip saddr != @open drop
//!         arp saddr ip 10.98.0.100 arp saddr ip != @open drop
//!     }
//! }
//! ```
//!
//! - The table has an *owner* (Linux 5.12), this socket: no `flush ruleset` of a firewall that is
//!   loaded anew takes it away, and a killed node leaves nothing behind.
//! - The egress hook (Linux 5.16) sees what packet sockets send, as long as they do not set
//!   `PACKET_QDISC_BYPASS`.
//! - Adding an element again does not refresh it. So one transaction empties the set and adds the
//!   element anew; unlike a deletion, emptying is no error when the element has timed out just now.
//! - Netlink answers in the sender's own system call: when [`KernelFence::allow`] returns, the new
//!   timeout holds.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Cmp, DataAttribute, DevHookNumber, ExpressionAttribute,
    Expressions, Hook, Immediate, ListAttribute, Lookup, Meta, MetaKey, NfTablesMessage, Operator,
    Payload, Register, RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute,
    SetElementList, SetElementMessage, SetFlags, SetMessage, TableAttribute, TableFlags,
    TableMessage, Verdict, VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use thiserror::Error;

use super::packet::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, PROTOCOL_ICMPV6};

const CHAIN: &str = "egress";
const SET: &str = "open";
/// `NF_ACCEPT`: what is not of the VIP is none of our business.
const POLICY_ACCEPT: u32 = 1;
/// `NF_DROP`
const DROP: Verdict = Verdict::Other(0);
/// `NFT_PAYLOAD_NETWORK_HEADER`: of an ARP packet, the packet itself.
const NETWORK_HEADER: u32 = 1;
/// `NFT_LOOKUP_F_INV`: the rule goes on if the set does not hold the key.
const NOT_IN_SET: u32 = 1;
/// A name's number in one transaction.
const SET_ID: u32 = 1;
/// `NFNL_SUBSYS_NFTABLES`
const NFTABLES: u16 = 10;
/// ICMPv6 type (RFC 4861 §4.4).
const ADVERTISEMENT: u8 = 136;
/// Acknowledgements without the request's text are short.
const ANSWER_BYTES: usize = 4096;

/// Why the kernel does not take a fence.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KernelFenceError {
    /// CAP_NET_ADMIN is missing.
    #[error("not permitted: run as root or grant CAP_NET_ADMIN")]
    NotPermitted,
    /// nftables, its netdev family or the egress hook is missing.
    #[error(
        "this kernel has no nftables egress hook \
         (Linux 5.16 with NF_TABLES_NETDEV and NETFILTER_EGRESS)"
    )]
    NoEgressHook,
    /// The table is there, and it is not ours.
    #[error(
        "the nftables table \"netdev {table}\" exists already: does another node serve this VIP on this host?"
    )]
    Occupied {
        /// Its name.
        table: String,
    },
    /// Anything else that the kernel refused.
    #[error("the kernel refused {action}")]
    Os {
        /// What was being done.
        action: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// The rules for one VIP on one interface, there as long as this value lives. Shut at first.
#[derive(Debug)]
pub(super) struct KernelFence {
    socket: Socket,
    table: String,
    key: Vec<u8>,
}

impl KernelFence {
    /// Sets the rules up.
    pub(super) fn open(interface: &str, vip: IpAddr) -> Result<Self, KernelFenceError> {
        let table = table_name(vip);
        let connect = || {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_cap_ack(true)?;
            Ok(socket)
        };
        let socket = connect().map_err(unsupported("a netlink socket"))?;
        let key = match vip {
            IpAddr::V4(vip) => vip.octets().to_vec(),
            IpAddr::V6(vip) => vip.octets().to_vec(),
        };
        let fence = Self { socket, table, key };
        fence.check_free()?;
        let create = NLM_F_CREATE | NLM_F_EXCL;
        fence
            .transact(&[(fence.new_table(), create)])
            .map_err(|e| match e.raw_os_error() {
                Some(libc::EPERM | libc::EEXIST) => fence.occupied(),
                _ => unsupported("a table of its own")(e),
            })?;
        // A table without a chain lets everything pass; it is gone with the socket if this fails.
        fence
            .transact(&fence.new_rules(interface, vip))
            .map_err(unsupported("the rules of the fence"))?;
        Ok(fence)
    }

    /// Everything of nftables needs the capability. This is asked for apart, since a table that
    /// belongs to another is refused with the same error.
    fn check_free(&self) -> Result<(), KernelFenceError> {
        let attributes = vec![TableAttribute::Name(self.table.clone())];
        let get = NfTablesMessage::GetTable(TableMessage { attributes });
        match self.ask(&message(get, NLM_F_ACK)) {
            Ok(()) => Err(self.occupied()),
            Err(e) => match e.raw_os_error() {
                Some(libc::ENOENT) => Ok(()),
                Some(libc::EPERM) => Err(KernelFenceError::NotPermitted),
                _ => Err(unsupported("to look for a table")(e)),
            },
        }
    }

    fn occupied(&self) -> KernelFenceError {
        KernelFenceError::Occupied {
            table: self.table.clone(),
        }
    }

    fn new_table(&self) -> NfTablesMessage {
        NfTablesMessage::NewTable(TableMessage {
            attributes: vec![
                TableAttribute::Name(self.table.clone()),
                TableAttribute::Flags(TableFlags::Owner),
            ],
        })
    }

    fn new_rules(&self, interface: &str, vip: IpAddr) -> Vec<(NfTablesMessage, u16)> {
        let set = NfTablesMessage::NewSet(SetMessage {
            attributes: vec![
                SetAttribute::Table(self.table.clone()),
                SetAttribute::Name(SET.to_owned()),
                SetAttribute::Flags(SetFlags::Timeout),
                SetAttribute::KeyType(if vip.is_ipv4() { 7 } else { 8 }), // for `nft list` alone
                SetAttribute::KeyLen(u32::try_from(self.key.len()).expect("an address")),
                SetAttribute::Id(SET_ID),
            ],
        });
        let chain = NfTablesMessage::NewChain(ChainMessage {
            attributes: vec![
                ChainAttribute::Table(self.table.clone()),
                ChainAttribute::Name(CHAIN.to_owned()),
                ChainAttribute::Hook(vec![
                    Hook::Number(DevHookNumber::Egress.into()),
                    Hook::Priority(0),
                    Hook::NetDeviceName(interface.to_owned()),
                ]),
                ChainAttribute::Policy(POLICY_ACCEPT),
                ChainAttribute::Type("filter".to_owned()),
            ],
        });
        let mut messages = vec![(set, NLM_F_CREATE), (chain, NLM_F_CREATE)];
        // Where in a packet the address is, and what single bytes before it must be.
        type Pattern = (u16, u32, &'static [(u32, u8)]);
        let rules: &[Pattern] = match vip {
            IpAddr::V4(_) => &[(ETHERTYPE_IPV4, 12, &[]), (ETHERTYPE_ARP, 14, &[])],
            // An advertisement says whose the address is, whoever sends it (RFC 4861 §4.4).
            IpAddr::V6(_) => &[
                (ETHERTYPE_IPV6, 8, &[]),
                (
                    ETHERTYPE_IPV6,
                    48,
                    &[(6, PROTOCOL_ICMPV6), (40, ADVERTISEMENT)],
                ),
            ],
        };
        for (ethertype, address_at, bytes) in rules {
            let mut expressions = vec![
                Expressions::Meta(vec![
                    Meta::Key(MetaKey::EtherTypeProtocol),
                    Meta::DestinationRegister(Register::Reg1),
                ])
                .into(),
                equals(&ethertype.to_be_bytes()),
            ];
            for (at, byte) in *bytes {
                expressions.extend([load(*at, 1), equals(&[*byte])]);
            }
            expressions.push(load(*address_at, self.key.len()));
            expressions.push(equals(&self.key));
            expressions.push(
                Expressions::Lookup(vec![
                    Lookup::Set(SET.to_owned()),
                    Lookup::SetId(SET_ID),
                    Lookup::SourceRegister(Register::Reg1),
                    Lookup::Flags(NOT_IN_SET),
                ])
                .into(),
            );
            expressions.push(
                Expressions::Immediate(vec![
                    Immediate::DestinationRegister(Register::Verdict),
                    Immediate::Data(DataAttribute::Verdict(vec![VerdictAttribute::Code(DROP)])),
                ])
                .into(),
            );
            let rule = NfTablesMessage::NewRule(RuleMessage {
                attributes: vec![
                    RuleAttribute::Table(self.table.clone()),
                    RuleAttribute::Chain(CHAIN.to_owned()),
                    RuleAttribute::Expressions(expressions),
                ],
            });
            messages.push((rule, NLM_F_CREATE | NLM_F_APPEND));
        }
        messages
    }

    fn elements(&self) -> Vec<SetElementList> {
        vec![
            SetElementList::Table(self.table.clone()),
            SetElementList::Set(SET.to_owned()),
        ]
    }

    /// Empties the set: a deletion that names no element.
    fn empty(&self) -> NfTablesMessage {
        let attributes = self.elements();
        NfTablesMessage::DeleteSetElement(SetElementMessage { attributes })
    }

    /// Lets the VIP out for `time` from now on, or from any moment until this returns; not longer, and
    /// up to two ticks less. At least one tick: less would round to no timeout at all.
    pub(super) fn allow(&mut self, time: Duration) -> io::Result<()> {
        let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let element = ListAttribute::Element(vec![
            SetElementAttribute::Key(DataAttribute::Value(self.key.clone())),
            SetElementAttribute::Timeout(milliseconds),
        ]);
        let mut attributes = self.elements();
        attributes.push(SetElementList::Elements(vec![element]));
        let add = NfTablesMessage::NewSetElement(SetElementMessage { attributes });
        self.transact(&[(self.empty(), 0), (add, NLM_F_CREATE)])
    }

    /// Lets nothing of the VIP out any more.
    pub(super) fn shut(&mut self) -> io::Result<()> {
        self.transact(&[(self.empty(), 0)])
    }

    /// All of the messages or none of them.
    fn transact(&self, messages: &[(NfTablesMessage, u16)]) -> io::Result<()> {
        let mut bytes = control(ControlMessage::BatchBegin);
        for (index, (body, flags)) in messages.iter().enumerate() {
            // One acknowledgement: of the last, when all is done. Errors come in any case.
            let last = if index + 1 == messages.len() {
                NLM_F_ACK
            } else {
                0
            };
            bytes.extend(message(body.clone(), flags | last));
        }
        bytes.extend(control(ControlMessage::BatchEnd));
        self.ask(&bytes)
    }

    /// Sends `bytes` and reads the answer, which is there when the call returns.
    fn ask(&self, bytes: &[u8]) -> io::Result<()> {
        self.socket.send(bytes, 0)?;
        let mut done = false;
        let mut failure = None;
        loop {
            let mut answer = [0; ANSWER_BYTES];
            let n = match self.socket.recv(&mut &mut answer[..], libc::MSG_DONTWAIT) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let mut rest = &answer[..n];
            while let Ok(reply) = NetlinkMessage::<NetfilterMessage>::deserialize(rest) {
                if let NetlinkPayload::Error(error) = &reply.payload {
                    match error.code {
                        None => done = true,
                        Some(_) => {
                            failure.get_or_insert_with(|| error.to_io());
                        }
                    }
                }
                let length = usize::try_from(reply.header.length).unwrap_or(usize::MAX);
                let aligned = length.next_multiple_of(4).min(rest.len());
                if length == 0 {
                    break;
                }
                rest = &rest[aligned..];
            }
        }
        match failure {
            Some(failure) => Err(failure),
            None if done => Ok(()),
            None => Err(io::Error::other("netlink did not answer")),
        }
    }
}

fn unsupported(action: &'static str) -> impl Fn(io::Error) -> KernelFenceError {
    move |source| match source.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT) => {
            KernelFenceError::NoEgressHook
        }
        _ => KernelFenceError::Os { action, source },
    }
}

/// A name that `nft` can read: letters, digits, dots, underscores.
fn table_name(vip: IpAddr) -> String {
    format!("unbroken_{vip}").replace(':', "_")
}

fn load(at: u32, length: usize) -> ListAttribute<ExpressionAttribute> {
    Expressions::Payload(vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(NETWORK_HEADER),
        Payload::Offset(at),
        Payload::Len(u32::try_from(length).expect("an address")),
    ])
    .into()
}

fn equals(bytes: &[u8]) -> ListAttribute<ExpressionAttribute> {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(Operator::Equal),
        Cmp::Data(DataAttribute::Value(bytes.to_vec())),
    ])
    .into()
}

fn message(body: NfTablesMessage, flags: u16) -> Vec<u8> {
    encode(NetfilterProtoFamily::NetDev, 0, body, flags)
}

fn control(body: ControlMessage) -> Vec<u8> {
    encode(NetfilterProtoFamily::Unspec, NFTABLES, body, 0)
}

fn encode(
    family: NetfilterProtoFamily,
    resource: u16,
    body: impl Into<NetfilterMessageInner>,
    flags: u16,
) -> Vec<u8> {
    let header = NetfilterHeader::new(family, 0, resource);
    let mut message = NetlinkMessage::from(NetfilterMessage::new(header, body));
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

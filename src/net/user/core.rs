//! What connections, flows and forwarded ports of one network have in common.

use std::collections::HashSet;
use std::io;
use std::net::Ipv4Addr;
use std::time::Instant;

use smoltcp::wire::Icmpv4DstUnreachable;

use super::config::UserNetConfig;
use super::frame::End;
use super::host::Watch;
use super::icmp;
use super::link::Link;
use super::outbox::Outbox;
use super::policy::{Place, place_of};
use super::resolver::Resolver;
use super::rules::{Protocol, Question};
use super::stack::{Offloads, Port, Stack};
use super::timers::{Timers, Token};

/// Questions to the program that wait at most. More are denied.
const QUESTIONS: usize = 256;

/// The parts that everything uses.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) config: UserNetConfig,
    /// What the guest takes: the configuration's, or less.
    pub(super) mtu: u16,
    pub(super) link: Link,
    pub(super) outbox: Outbox,
    pub(super) stack: Stack,
    pub(super) timers: Timers,
    pub(super) watch: Watch,
    pub(super) resolver: Resolver,
    /// The time of this turn.
    pub(super) now: Instant,
    /// What has to be served again because the outbox was busy.
    pub(super) stalled: HashSet<Token>,
    pub(super) questions: Vec<Question>,
    next_id: u64,
}

impl Core {
    pub(super) fn new(config: UserNetConfig, now: Instant) -> io::Result<Self> {
        Ok(Self {
            mtu: config.mtu,
            config,
            link: Link::default(),
            outbox: Outbox::default(),
            stack: Stack::new(Offloads::default())?,
            timers: Timers::new()?,
            watch: Watch::new()?,
            resolver: Resolver::default(),
            now,
            stalled: HashSet::new(),
            questions: Vec::new(),
            next_id: 0,
        })
    }

    /// A number that no connection or flow of this network has had.
    pub(super) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn parts(&mut self) -> (&mut Stack, Port<'_>) {
        let Self { config, link, outbox, stack, .. } = self;
        (stack, Port { config, link, outbox })
    }

    /// The address of the host's world that a destination stands for.
    pub(super) fn target(&mut self, (address, port): End) -> Option<std::net::SocketAddr> {
        Some(match place_of(&self.config, address, port)? {
            Place::Resolver => match self.config.resolver {
                Some(resolver) => resolver,
                None => self.resolver.server(self.now),
            },
            Place::Loopback => (Ipv4Addr::LOCALHOST, port).into(),
            Place::Outside(address) => (address, port).into(),
        })
    }

    /// Queue a question to the program. False if too many wait.
    pub(super) fn ask(&mut self, id: u64, protocol: Protocol, (address, port): End) -> bool {
        if self.questions.len() >= QUESTIONS {
            return false;
        }
        self.questions.push(Question { id, protocol, address, port });
        true
    }

    pub(super) fn send(&mut self, packet: &[u8]) {
        self.link.send(&self.config, packet, &mut self.outbox);
    }

    pub(super) fn unreachable(&mut self, reason: Icmpv4DstUnreachable, packet: &[u8]) {
        icmp::unreachable(&self.config, &mut self.link, reason, packet, &mut self.outbox);
    }
}

//! A user network: frames of the guest in, frames for the guest out, and one file descriptor to
//! wait for. Only the thread that has the network calls it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4DstUnreachable, IpAddress, IpProtocol,
    Ipv4Packet, UdpPacket,
};

use super::config::{Forward, UserNetConfig};
use super::core::Core;
use super::dhcp::{Dhcp, SERVER_PORT};
use super::forward::Forwards;
use super::frame::Frame;
use super::host::Ready;
use super::link::{GATEWAY_MAC, Link, arp};
use super::rules::Question;
use super::stack::{Offloads, Stack};
use super::tcp::{Key, reset_segment};
use super::tcp_table::TcpTable;
use super::timers::Token;
use super::udp::{Datagram, UdpTable};
use super::{icmp, reassembly::Reassembly};
use crate::error::{Error, ErrorKind, Result};

/// What a fork's network continues from.
#[derive(Clone, Debug)]
pub struct Continued {
    config: UserNetConfig,
    dhcp: Dhcp,
    link: Link,
    /// Each with the sequence number that the guest expects next.
    connections: Vec<(Key, u32)>,
}

/// A network of one guest, or of a few behind a switch.
#[derive(Debug)]
pub struct UserNet {
    core: Core,
    tcp: TcpTable,
    udp: UdpTable,
    dhcp: Dhcp,
    forwards: Forwards,
    reassembly: Reassembly,
    ready: Vec<(Token, Ready)>,
}

impl UserNet {
    /// # Errors
    /// [`ErrorKind::Config`] if the configuration is not valid, [`ErrorKind::Io`] if a port cannot
    /// be listened at or the process has no file descriptor left.
    pub fn new(config: UserNetConfig) -> Result<Self> {
        config.validate("user network")?;
        let core = Core::new(config, Instant::now()).map_err(|e| no_descriptor(&e))?;
        core.watch
            .add_timer(core.timers.as_raw_fd(), Token::Timer)
            .map_err(|e| no_descriptor(&e))?;
        let forwards = Forwards::open(&core)?;
        Ok(Self {
            core,
            tcp: TcpTable::default(),
            udp: UdpTable::default(),
            dhcp: Dhcp::default(),
            forwards,
            reassembly: Reassembly::default(),
            ready: Vec::new(),
        })
    }

    /// The network of a fork. Its guest has the address that it had, and sees its connections
    /// end with resets.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn continuing(from: &Continued) -> Result<Self> {
        let mut net = Self::new(from.config.for_fork())?;
        net.dhcp = from.dhcp.clone();
        net.core.link = from.link.known();
        for (key, sequence) in &from.connections {
            net.core.send(&reset_segment(*key, *sequence));
        }
        net.rouse();
        Ok(net)
    }

    /// What a fork continues from.
    #[must_use]
    pub fn continued(&self) -> Continued {
        Continued {
            config: self.core.config.clone(),
            dhcp: self.dhcp.clone(),
            link: self.core.link.known(),
            connections: self.tcp.open(),
        }
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &UserNetConfig {
        &self.core.config
    }

    /// The forwarded ports, with the addresses of the host that they really have.
    #[must_use]
    pub fn forwards(&self) -> Vec<Forward> {
        self.forwards.list()
    }

    /// How many TCP connections and UDP flows there are.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.tcp.len(), self.udp.len())
    }

    /// Frames that were dropped because the guest did not take them.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.core.outbox.dropped
    }

    /// The driver has begun, and accepts this. If it accepted something else before, what was
    /// connected then is reset.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the kernel has no random bytes.
    pub fn set_offloads(&mut self, offloads: Offloads) -> Result<()> {
        if self.core.stack.offloads() == offloads {
            return Ok(());
        }
        if self.tcp.len() > 0 {
            self.reset();
        }
        self.core.stack = Stack::new(offloads)
            .map_err(|e| Error::os(ErrorKind::Io, "user network: random bytes", &e))?;
        Ok(())
    }

    /// The MTU that the guest uses.
    pub fn set_mtu(&mut self, mtu: u16) {
        self.core.mtu = self.core.config.mtu.min(mtu);
    }

    /// End everything, and stop listening.
    pub fn close(&mut self) {
        self.reset();
        self.forwards = Forwards::default();
    }

    /// Make the descriptor readable: there is something to do although no socket is ready.
    pub fn rouse(&mut self) {
        self.core.timers.rouse();
    }

    /// The time of the frames that follow.
    pub fn set_time(&mut self, now: Instant) {
        self.core.now = now;
    }

    /// The driver has reset its device, or another machine continues: end everything. The peers see
    /// resets; a guest that still has connections sees a reset when it uses them.
    pub fn reset(&mut self) {
        self.tcp.abort(&mut self.core);
        self.udp.clear(&mut self.core);
        self.forwards.clear();
        self.reassembly = Reassembly::default();
        self.core.questions.clear();
        self.core.outbox.clear();
        self.core.link.clear();
        self.core.timers.arm(self.core.now);
    }

    /// A frame of the guest. `is_partial`: the guest leaves the checksum of TCP or UDP to us, which
    /// needs none. Call [`Self::poll`] after the last frame of a batch.
    pub fn input(&mut self, frame: &[u8], is_partial: bool) {
        let Ok(frame) = EthernetFrame::new_checked(frame) else { return };
        let (from, to) = (frame.src_addr(), frame.dst_addr());
        if to != GATEWAY_MAC && !to.is_broadcast() {
            return;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => {
                let Core { config, link, outbox, .. } = &mut self.core;
                arp(link, config, frame.payload(), outbox);
            }
            EthernetProtocol::Ipv4 => self.ipv4(from, frame.payload(), is_partial),
            _ => {}
        }
    }

    fn ipv4(&mut self, mac: EthernetAddress, bytes: &[u8], is_partial: bool) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
        let is_sound = packet.version() == 4 && packet.verify_checksum();
        let bytes = bytes.get(..usize::from(packet.total_len())).unwrap_or_default();
        if !is_sound || packet.hop_limit() == 0 {
            return;
        }
        let from = packet.src_addr();
        if from.is_unspecified() {
            return self.udp(bytes, is_partial);
        }
        if from.is_multicast() || from.is_broadcast() || from.is_loopback() {
            return;
        }
        let Core { config, link, outbox, .. } = &mut self.core;
        link.learn(config, from, mac, outbox);
        if packet.more_frags() || packet.frag_offset() != 0 {
            let whole = self.reassembly.input(bytes, self.core.now);
            if let Some(whole) = whole {
                self.whole(&whole, false);
            }
            return;
        }
        self.whole(bytes, is_partial);
    }

    fn whole(&mut self, bytes: &[u8], is_partial: bool) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
        let to = packet.dst_addr();
        let is_unicast = !to.is_multicast() && !to.is_broadcast();
        match packet.next_header() {
            IpProtocol::Tcp if is_unicast => self.tcp.input(bytes, is_partial, &mut self.core),
            IpProtocol::Udp => self.udp(bytes, is_partial),
            IpProtocol::Icmp => {
                let Core { config, link, outbox, .. } = &mut self.core;
                icmp::process(config, link, bytes, outbox);
            }
            _ if is_unicast => {
                self.core.unreachable(Icmpv4DstUnreachable::ProtoUnreachable, bytes);
            }
            _ => {}
        }
    }

    fn udp(&mut self, bytes: &[u8], is_partial: bool) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
        let Ok(udp) = UdpPacket::new_checked(packet.payload()) else { return };
        let (from, to) = (packet.src_addr(), packet.dst_addr());
        let is_right =
            is_partial || udp.verify_checksum(&IpAddress::from(from), &IpAddress::from(to));
        if packet.next_header() != IpProtocol::Udp || !is_right {
            return;
        }
        if udp.dst_port() == SERVER_PORT && (to.is_broadcast() || to == self.core.config.gateway) {
            let Core { config, mtu, outbox, .. } = &mut self.core;
            return self.dhcp.process((config, *mtu), udp.payload(), outbox);
        }
        if from.is_unspecified() || udp.src_port() == 0 {
            return;
        }
        let datagram = Datagram {
            from: (from, udp.src_port()),
            to: (to, udp.dst_port()),
            payload: udp.payload(),
            packet: bytes,
        };
        if !self.forwards.answer(datagram, &self.core) {
            self.udp.input(datagram, &mut self.core);
        }
    }

    /// Do what there is to do: the descriptor is readable, frames came in, or the guest has taken
    /// frames. It does not wait.
    pub fn poll(&mut self, now: Instant) {
        self.core.now = now;
        if !self.core.outbox.is_busy() {
            for token in std::mem::take(&mut self.core.stalled) {
                self.serve(token, Ready::default());
            }
        }
        let mut ready = std::mem::take(&mut self.ready);
        self.core.watch.ready(&mut ready);
        for (token, what) in ready.drain(..) {
            self.serve(token, what);
        }
        self.ready = ready;
        while let Some(token) = self.core.timers.pop(now) {
            self.serve_timer(token);
        }
        self.tcp.serve(&mut self.core);
        self.core.timers.arm(now);
    }

    fn serve(&mut self, token: Token, ready: Ready) {
        match token {
            Token::Timer => self.core.timers.expired(),
            Token::Tcp(id) => self.tcp.ready(id, ready, &mut self.core),
            Token::Udp(id) => self.udp.receive(id, &mut self.core),
            Token::Forward(id) => self.forwards.ready(id, &mut self.tcp, &mut self.core),
        }
    }

    fn serve_timer(&mut self, token: Token) {
        match token {
            Token::Udp(id) => self.udp.expire(id, &mut self.core),
            token => self.serve(token, Ready::default()),
        }
    }

    /// The next frame for the guest.
    #[must_use]
    pub fn front(&self) -> Option<&Frame> {
        self.core.outbox.front()
    }

    /// The guest has taken that frame. Call [`Self::poll`] after the last one of a batch.
    pub fn pop(&mut self) {
        self.core.outbox.pop();
    }

    /// Whether something waits for room among the frames: then [`Self::poll`] has to be called
    /// after the guest has taken some.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        !self.core.stalled.is_empty()
    }

    /// What the program is to decide. Each has to be answered.
    pub fn take_questions(&mut self) -> Vec<Question> {
        std::mem::take(&mut self.core.questions)
    }

    /// The program's decision. Call [`Self::poll`] afterwards.
    pub fn answer(&mut self, id: u64, is_allowed: bool) {
        self.core.now = Instant::now();
        self.tcp.answer(id, is_allowed, &mut self.core);
        self.udp.answer(id, is_allowed, &mut self.core);
    }
}

impl AsRawFd for UserNet {
    /// Readable when [`Self::poll`] has something to do.
    fn as_raw_fd(&self) -> RawFd {
        self.core.watch.as_raw_fd()
    }
}

fn no_descriptor(error: &io::Error) -> Error {
    Error::os(ErrorKind::Io, "user network", error)
}

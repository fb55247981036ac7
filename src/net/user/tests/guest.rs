//! The guest: smoltcp's stack with a link of its own, and the loop of both.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, IpCidr, Ipv4Packet};

use super::super::{Offloads, UserNet, UserNetConfig};

pub(super) const MAC: EthernetAddress = EthernetAddress([0x02, 0, 0, 0, 0, 1]);
const DEADLINE: Duration = Duration::from_secs(600);

#[derive(Default)]
pub(super) struct Wire {
    pub(super) to_guest: VecDeque<Vec<u8>>,
    pub(super) to_net: VecDeque<Vec<u8>>,
    mtu: usize,
}

pub(super) struct Received(Vec<u8>);
pub(super) struct Sent<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; length];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        let frame = self.to_guest.pop_front()?;
        Some((Received(frame), Sent(&mut self.to_net)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sent<'_>> {
        (self.to_net.len() < 256).then_some(Sent(&mut self.to_net))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu;
        capabilities
    }
}

/// The guest and its network.
pub(super) struct Guest {
    pub(super) net: UserNet,
    pub(super) wire: Wire,
    pub(super) sockets: SocketSet<'static>,
    pub(super) longest: usize,
    interface: Interface,
    start: Instant,
    /// Whether the guest takes frames.
    pub(super) is_listening: bool,
}

impl Guest {
    pub(super) fn new(config: UserNetConfig) -> Self {
        let net = UserNet::new(config).unwrap();
        let mut wire = Wire { mtu: 1514, ..Wire::default() };
        let hardware = Config::new(MAC.into());
        let now = smoltcp::time::Instant::ZERO;
        let mut interface = Interface::new(hardware, &mut wire, now);
        let (guest, gateway) = (net.config().guest, net.config().gateway);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(guest.into(), net.config().prefix)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(gateway).unwrap();
        let sockets = SocketSet::new(Vec::new());
        let (start, longest, is_listening) = (Instant::now(), 0, true);
        Self { net, wire, sockets, longest, interface, start, is_listening }
    }

    /// A guest whose frames may be as long as IP packets.
    pub(super) fn with_offloads(config: UserNetConfig, offloads: Offloads) -> Self {
        let mut this = Self::new(config);
        this.net.set_offloads(offloads).unwrap();
        this
    }

    /// One turn of both sides.
    pub(super) fn turn(&mut self) {
        let micros = i64::try_from(self.start.elapsed().as_micros()).unwrap();
        let now = smoltcp::time::Instant::from_micros(micros);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        while let Some(frame) = self.wire.to_net.pop_front() {
            self.net.input(&frame, false);
        }
        self.net.poll(Instant::now());
        if !self.is_listening {
            return;
        }
        let mut has_taken = false;
        while let Some(frame) = self.net.front() {
            has_taken = true;
            self.longest = self.longest.max(frame.bytes().len());
            let mut bytes = frame.bytes().to_vec();
            complete(&mut bytes, frame.offload);
            self.wire.to_guest.push_back(bytes);
            self.net.pop();
        }
        if has_taken {
            self.net.poll(Instant::now());
        }
    }

    fn rest(&self) {
        let mut poll = libc::pollfd { fd: self.net.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, alive for the call.
        unsafe { libc::poll(&raw mut poll, 1, 1) };
    }

    /// Turn until the condition is true.
    pub(super) fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + DEADLINE;
        let mut idle = 0;
        while !condition(self) {
            assert!(Instant::now() < end, "not in time: {what}");
            self.turn();
            idle = if self.wire.to_guest.is_empty() { idle + 1 } else { 0 };
            if idle > 1 {
                self.rest();
            }
        }
    }

    pub(super) fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(super) fn udp(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(super) fn new_tcp(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 128 * 1024]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    pub(super) fn connect(&mut self, address: Ipv4Addr, port: u16) -> SocketHandle {
        let handle = self.new_tcp();
        let local = 40_000 + u16::try_from(self.sockets.iter().count()).unwrap();
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.interface.context(), (address, port), local).unwrap();
        handle
    }

    /// Connect and wait until it is made.
    pub(super) fn connected(&mut self, address: Ipv4Addr, port: u16) -> SocketHandle {
        let handle = self.connect(address, port);
        self.until("connected", |guest| guest.tcp(handle).state() != tcp::State::SynSent);
        assert_eq!(self.tcp(handle).state(), tcp::State::Established);
        handle
    }

    pub(super) fn bind(&mut self, port: u16) -> SocketHandle {
        let buffer =
            || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 256 * 1024]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    pub(super) fn receive(&mut self, handle: SocketHandle) -> (Vec<u8>, udp::UdpMetadata) {
        self.until("a datagram", |guest| guest.udp(handle).can_recv());
        let (data, from) = self.udp(handle).recv().unwrap();
        (data.to_vec(), from)
    }

    /// The frames that the network answers to this one.
    pub(super) fn answers(&mut self, frame: &[u8]) -> Vec<Vec<u8>> {
        self.net.input(frame, false);
        self.net.poll(Instant::now());
        let mut found = Vec::new();
        while let Some(frame) = self.net.front() {
            found.push(frame.bytes().to_vec());
            self.net.pop();
        }
        found
    }
}

/// What a driver does with a frame whose checksum is left to it.
fn complete(bytes: &mut [u8], offload: super::super::Offload) {
    let Some((start, offset)) = offload.checksum else { return };
    assert_eq!((start, offset), (34, 16));
    let mut frame = EthernetFrame::new_unchecked(bytes);
    assert_eq!(frame.ethertype(), EthernetProtocol::Ipv4);
    let mut packet = Ipv4Packet::new_checked(frame.payload_mut()).unwrap();
    let (from, to) = (packet.src_addr(), packet.dst_addr());
    let mut segment = smoltcp::wire::TcpPacket::new_checked(packet.payload_mut()).unwrap();
    if offload.segment_size > 0 {
        assert_eq!(usize::from(offload.header_length), 34 + usize::from(segment.header_len()));
        assert!(segment.payload_mut().len() > usize::from(offload.segment_size));
    }
    segment.fill_checksum(&from.into(), &to.into());
}

/// The configuration of most tests: the guest may reach this host.
pub(super) fn open() -> UserNetConfig {
    UserNetConfig { host_loopback: true, ..UserNetConfig::default() }
}

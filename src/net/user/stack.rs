//! smoltcp's interface over the link: one IP packet in, TCP segments out. Each connection brings a
//! socket set of its own, so that a packet costs the same however many connections there are.

use std::cell::RefCell;
use std::io;
use std::num::{NonZeroU16, NonZeroUsize};
use std::time::Instant;

use smoltcp::iface::{Config, Context, Interface, PollResult, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::wire::{
    HardwareAddress, IpAddress, IpProtocol, Ipv4Packet, TcpPacket, checksum::pseudo_header,
};

use super::config::UserNetConfig;
use super::frame::{ETHERNET, Frame, IPV4, MAX_IP, Offload};
use super::link::Link;
use super::outbox::Outbox;

/// What the guest accepts in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksum it completes itself (VIRTIO_NET_F_GUEST_CSUM).
    pub checksum: bool,
    /// TCP segments over IPv4 of up to 64 KiB (VIRTIO_NET_F_GUEST_TSO4), which needs `checksum`.
    pub segments: bool,
}

/// Where packets come from and go to during one call.
pub(super) struct Port<'a> {
    pub(super) config: &'a UserNetConfig,
    pub(super) link: &'a mut Link,
    pub(super) outbox: &'a mut Outbox,
}

/// The interface.
pub(super) struct Stack {
    interface: Interface,
    offloads: Offloads,
    start: Instant,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").field("offloads", &self.offloads).finish_non_exhaustive()
    }
}

impl Stack {
    pub(super) fn new(offloads: Offloads) -> io::Result<Self> {
        let mut config = Config::new(HardwareAddress::Ip);
        let mut seed = [0; 8];
        // SAFETY: eight bytes of a local.
        if unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        config.random_seed = u64::from_ne_bytes(seed);
        let mut device = Wire { packet: None, port: None, offloads };
        let now = smoltcp::time::Instant::ZERO;
        let mut interface = Interface::new(config, &mut device, now);
        interface.set_any_ip(true);
        Ok(Self { interface, offloads, start: Instant::now() })
    }

    pub(super) fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn time(&self, now: Instant) -> smoltcp::time::Instant {
        let micros = now.saturating_duration_since(self.start).as_micros();
        smoltcp::time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    pub(super) fn context(&mut self) -> &mut Context {
        self.interface.context()
    }

    /// Give the sockets an IP packet. Without a socket that takes it, a reset is the answer.
    pub(super) fn ingress(
        &mut self,
        now: Instant,
        packet: &[u8],
        sockets: &mut SocketSet<'_>,
        port: Port<'_>,
    ) {
        let (time, offloads) = (self.time(now), self.offloads);
        let mut wire = Wire { packet: Some(packet), port: Some(RefCell::new(port)), offloads };
        self.interface.poll_ingress_single(time, &mut wire, sockets);
    }

    /// Have the sockets send a packet each. False if none has one to send, or the outbox is busy.
    pub(super) fn egress(
        &mut self,
        now: Instant,
        sockets: &mut SocketSet<'_>,
        port: Port<'_>,
    ) -> bool {
        let (time, offloads) = (self.time(now), self.offloads);
        let mut wire = Wire { packet: None, port: Some(RefCell::new(port)), offloads };
        self.interface.poll_egress(time, &mut wire, sockets) == PollResult::SocketStateChanged
    }

    /// When the sockets have something to do.
    pub(super) fn next(&mut self, now: Instant, sockets: &SocketSet<'_>) -> Option<Instant> {
        let time = self.time(now);
        let delay = self.interface.poll_delay(time, sockets)?;
        Some(now + std::time::Duration::from(delay))
    }
}

/// The device that smoltcp sees.
struct Wire<'a> {
    packet: Option<&'a [u8]>,
    port: Option<RefCell<Port<'a>>>,
    offloads: Offloads,
}

struct Receive<'a>(&'a [u8]);

impl RxToken for Receive<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Transmit<'a, 'b> {
    port: Option<&'a RefCell<Port<'b>>>,
    offloads: Offloads,
    segment_size: u16,
}

impl TxToken for Transmit<'_, '_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let Some(mut port) = self.port.and_then(|port| port.try_borrow_mut().ok()) else {
            return f(&mut vec![0; length]);
        };
        let mut frame = port.outbox.frame(ETHERNET + length);
        let packet = frame.bytes_mut().get_mut(ETHERNET..).unwrap_or_default();
        let result = f(packet);
        send(&mut port, frame, self.offloads, self.segment_size);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment_size = meta.segmentation_offload_size.map_or(0, NonZeroU16::get);
    }
}

impl<'b> Device for Wire<'b> {
    type RxToken<'a>
        = Receive<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Transmit<'a, 'b>
    where
        Self: 'a;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Receive<'_>, Transmit<'_, 'b>)> {
        let packet = self.packet.take()?;
        let port = self.port.as_ref();
        Some((Receive(packet), Transmit { port, offloads: self.offloads, segment_size: 0 }))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Transmit<'_, 'b>> {
        let port = self.port.as_ref()?;
        if port.try_borrow().ok()?.outbox.is_busy() {
            return None;
        }
        Some(Transmit { port: Some(port), offloads: self.offloads, segment_size: 0 })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        // The guest's own MTU limits the segments of both sides.
        capabilities.max_transmission_unit = MAX_IP;
        // Checked and written by this module, because it depends on the frame.
        capabilities.checksum.tcp = Checksum::None;
        if self.offloads.checksum && self.offloads.segments {
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(MAX_IP);
        }
        capabilities
    }
}

/// Send a TCP segment, with the Ethernet header and the checksum that it needs.
fn send(port: &mut Port<'_>, mut frame: Frame, offloads: Offloads, segment_size: u16) {
    let Some(packet) = frame.bytes_mut().get_mut(ETHERNET..) else { return };
    let Ok(mut header) = Ipv4Packet::new_checked(packet) else { return };
    let (from, to) = (header.src_addr(), header.dst_addr());
    let Ok(mut segment) = TcpPacket::new_checked(header.payload_mut()) else { return };
    let tcp_header = u16::from(segment.header_len());
    if offloads.checksum {
        let length = u32::try_from(segment.as_ref().len()).unwrap_or_default();
        let (from, to) = (IpAddress::from(from), IpAddress::from(to));
        segment.set_checksum(pseudo_header(&from, &to, IpProtocol::Tcp, length));
        let start = u16::try_from(ETHERNET + IPV4).unwrap_or_default();
        frame.offload = Offload {
            checksum: Some((start, 16)),
            segment_size,
            header_length: if segment_size > 0 { start + tcp_header } else { 0 },
        };
    } else {
        segment.fill_checksum(&from.into(), &to.into());
    }
    let Port { config, link, outbox } = port;
    link.transmit(frame, config, to, outbox);
}

//! What is behind a network device: the trait of backends, and frames as they go through it. The
//! loop's thread calls a backend; nothing here waits.

use std::any::Any;
use std::fmt::Debug;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::error::Result;

/// Where a checksum is missing. Its field contains the sum of the pseudo-header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Where the part of the frame begins that the checksum covers, up to the frame's end.
    pub start: u16,
    /// Where in this part the checksum's two bytes are.
    pub offset: u16,
}

/// A TCP segment that is too long for the link, to be cut into several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Over IPv6 instead of IPv4.
    pub is_v6: bool,
    /// The payload of each segment but the last, not zero.
    pub size: u16,
    /// The length of all headers, from the start of the frame.
    pub header_length: u16,
    /// Whether the congestion window reduced flag is for the first segment only.
    pub has_ecn: bool,
}

/// What a frame leaves to its receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The checksum that is missing. None: the frame is complete.
    pub checksum: Option<Checksum>,
    /// How the frame has to be cut. A frame that has to be cut also lacks its checksum.
    pub segmentation: Option<Segmentation>,
    /// Whether the checksums have been found right, so that the receiver need not compute them.
    pub is_verified: bool,
}

impl Offload {
    /// Nothing is left to do.
    pub const NONE: Self = Self { checksum: None, segmentation: None, is_verified: false };
}

/// A frame, from its Ethernet header on, without the frame check sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The bytes, at most [`Frame::LONGEST`].
    pub bytes: &'a [u8],
    /// What is left to the receiver.
    pub offload: Offload,
}

impl<'a> Frame<'a> {
    /// No frame is longer: an Ethernet header with a VLAN tag, and the longest IP packet.
    pub const LONGEST: usize = 18 + 0xffff;
    /// No frame is shorter: an Ethernet header.
    pub const SHORTEST: usize = 14;

    /// A complete frame.
    #[must_use]
    pub fn complete(bytes: &'a [u8]) -> Self {
        Self { bytes, offload: Offload::NONE }
    }
}

/// What a receiver does itself, so that a sender may leave it to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums of TCP and UDP.
    pub checksum: bool,
    /// To cut long TCP segments over IPv4. Only with `checksum`.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// Also those with the congestion window reduced flag.
    pub ecn: bool,
}

impl Offloads {
    /// Whether a frame with this left to do may be given to the receiver as it is.
    #[must_use]
    pub fn allow(&self, offload: &Offload) -> bool {
        let cuts = offload.segmentation.is_none_or(|cut| {
            self.checksum
                && if cut.is_v6 { self.tso6 } else { self.tso4 }
                && (self.ecn || !cut.has_ecn)
        });
        cuts && (self.checksum || offload.checksum.is_none())
    }
}

/// The file descriptors of a backend; -1 is none. Both may be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Readable when [`NetBackend::receive`] has something to do. Level-triggered.
    pub receive: RawFd,
    /// Writable when [`NetBackend::send`] takes frames again, after it was full.
    pub send: RawFd,
}

/// What forks of a machine continue from.
pub trait FrozenNet: Send + Sync + Debug {
    /// A backend for one of them.
    ///
    /// # Errors
    /// If it cannot be made, for example because the process is out of descriptors.
    fn backend(&self) -> Result<Arc<dyn NetBackend>>;
}

/// What takes a machine's frames, and has frames for it. `send` and `receive` are called on one
/// thread at a time, the loop's, with locks held whose ranks are before `rank::NetBackend`. They
/// neither wait nor enter Python. `into` takes the locks of a virtio queue, so that a lock held
/// around it has the rank `NetBackend`. The other methods are called on any thread.
pub trait NetBackend: Send + Sync + Debug {
    /// What it does itself with frames that it is sent. The device does the rest before.
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    /// What the guest does itself with frames that it is given. A backend may leave this to it, and
    /// may ignore it: the device does what the guest does not.
    fn guest_offloads(&self, _guest: Offloads) {}

    /// The file descriptors to watch, which stay the same.
    fn watched(&self) -> Watched;

    /// Take frames, in order. Returns how many were taken, counting those that the backend drops.
    /// Fewer than given: it is full, and `watched().send` becomes writable when it has room.
    fn send(&self, frames: &[Frame<'_>]) -> usize;

    /// Whether part of what was taken waits for `watched().send` to be writable: `send` is called
    /// then, if need be without a frame.
    fn has_unsent(&self) -> bool {
        false
    }

    /// Give the guest the frames that have come, until there are no more or about `budget` were
    /// given: then `watched().receive` stays readable. `into` returns false if the guest has no
    /// room for a frame. The backend keeps this frame and those after it, or those that it has
    /// taken from the kernel already, and gives them at the next call, which comes when there is
    /// room.
    fn receive(&self, budget: usize, into: &mut dyn FnMut(Frame<'_>) -> bool);

    /// Whether `send` may produce frames for the guest at once: then `receive` is called after it.
    fn answers(&self) -> bool {
        false
    }

    /// Why it takes and gives no more frames. The link is down for the guest then.
    fn failure(&self) -> Option<String> {
        None
    }

    /// Frames that it has dropped, in both directions.
    fn dropped(&self) -> u64 {
        0
    }

    /// The MTU that the guest uses: the one that it was offered and has accepted, or else that of
    /// Ethernet.
    fn guest_mtu(&self, _mtu: u16) {}

    /// The MTU that the guest is to use, if the configuration has none.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// Forget the frames on their way and all connections: the machine was reset to a snapshot, or
    /// the link was down.
    fn reset(&self) {}

    /// What forks of the machine get. None: they are disconnected until they are given a backend.
    fn freeze(&self) -> Option<Arc<dyn FrozenNet>> {
        None
    }

    /// The machine is closed, or the device has another backend now.
    fn close(&self) {}

    /// What it is, such as `tap tap0`, for people.
    fn describe(&self) -> String;

    /// The backend itself, for the binding.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Bare;

    impl NetBackend for Bare {
        fn watched(&self) -> Watched {
            Watched { receive: -1, send: -1 }
        }

        fn send(&self, frames: &[Frame<'_>]) -> usize {
            frames.len()
        }

        fn receive(&self, _budget: usize, _into: &mut dyn FnMut(Frame<'_>) -> bool) {}

        fn freeze(&self) -> Option<Arc<dyn FrozenNet>> {
            Some(Arc::new(Self))
        }

        fn describe(&self) -> String {
            "bare".into()
        }

        fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
            self
        }
    }

    impl FrozenNet for Bare {
        fn backend(&self) -> Result<Arc<dyn NetBackend>> {
            Ok(Arc::new(Self))
        }
    }

    #[test]
    fn a_backend_need_not_do_more_than_pass_frames() {
        let net = Bare.freeze().unwrap().backend().unwrap();
        net.guest_offloads(Offloads::default());
        net.guest_mtu(1500);
        net.reset();
        net.close();
        assert_eq!((net.offloads(), net.mtu(), net.dropped()), (Offloads::default(), None, 0));
        assert_eq!((net.answers(), net.has_unsent(), net.failure()), (false, false, None));
    }

    fn cut(is_v6: bool, has_ecn: bool) -> Offload {
        let segmentation = Some(Segmentation { is_v6, size: 1448, header_length: 66, has_ecn });
        Offload {
            checksum: Some(Checksum { start: 34, offset: 16 }),
            segmentation,
            ..Offload::NONE
        }
    }

    #[test]
    fn a_frame_is_left_to_receivers_that_do_all_it_needs() {
        let (nothing, all) =
            (Offloads::default(), Offloads { checksum: true, tso4: true, tso6: true, ecn: true });
        let checksum = Offload { segmentation: None, ..cut(false, false) };
        assert!(nothing.allow(&Offload::NONE) && !nothing.allow(&checksum));
        assert!(all.allow(&cut(true, true)) && all.allow(&cut(false, false)));
        assert!(Offloads { checksum: true, ..nothing }.allow(&checksum));
        assert!(!Offloads { tso4: true, ..nothing }.allow(&cut(false, false)));
        assert!(!Offloads { tso6: false, ..all }.allow(&cut(true, false)));
        assert!(!Offloads { ecn: false, ..all }.allow(&cut(false, true)));
    }
}

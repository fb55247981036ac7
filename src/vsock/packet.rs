//! The packets of a virtio socket (virtio 1.2, 5.10.6): their header, as driver and device exchange
//! it. Pure data.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The address of the host (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;
/// A stream socket, the only type that is supported.
pub const STREAM: u16 = 1;
/// The size of a header.
pub const HEADER_SIZE: usize = 44;

/// The operations of packets.
pub mod op {
    /// Requests a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts a connection.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends a connection.
    pub const RST: u16 = 3;
    /// Says which directions the sender has ended.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// Says how much the sender can take.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks how much the receiver can take.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A flag of [`op::SHUTDOWN`]: the sender receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// A flag of [`op::SHUTDOWN`]: the sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// The header of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's address.
    pub src_cid: u64,
    /// The receiver's address.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// The number of bytes of data that follow.
    pub len: u32,
    /// The type of socket.
    pub kind: u16,
    /// The operation.
    pub op: u16,
    /// The flags of the operation.
    pub flags: u32,
    /// The size of the sender's buffer for this connection.
    pub buf_alloc: u32,
    /// How many bytes the sender has taken out of that buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Layout {
    src_cid: U64,
    dst_cid: U64,
    src_port: U32,
    dst_port: U32,
    len: U32,
    kind: U16,
    op: U16,
    flags: U32,
    buf_alloc: U32,
    fwd_cnt: U32,
}

impl From<[u8; HEADER_SIZE]> for Header {
    fn from(bytes: [u8; HEADER_SIZE]) -> Self {
        let layout: Layout = zerocopy::transmute!(bytes);
        Self {
            src_cid: layout.src_cid.get(),
            dst_cid: layout.dst_cid.get(),
            src_port: layout.src_port.get(),
            dst_port: layout.dst_port.get(),
            len: layout.len.get(),
            kind: layout.kind.get(),
            op: layout.op.get(),
            flags: layout.flags.get(),
            buf_alloc: layout.buf_alloc.get(),
            fwd_cnt: layout.fwd_cnt.get(),
        }
    }
}

impl From<Header> for [u8; HEADER_SIZE] {
    fn from(header: Header) -> Self {
        let layout = Layout {
            src_cid: header.src_cid.into(),
            dst_cid: header.dst_cid.into(),
            src_port: header.src_port.into(),
            dst_port: header.dst_port.into(),
            len: header.len.into(),
            kind: header.kind.into(),
            op: header.op.into(),
            flags: header.flags.into(),
            buf_alloc: header.buf_alloc.into(),
            fwd_cnt: header.fwd_cnt.into(),
        };
        zerocopy::transmute!(layout)
    }
}

impl Header {
    /// The packet that refuses this one.
    #[must_use]
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_is_the_same_after_both_ways(bytes in prop::collection::vec(any::<u8>(), HEADER_SIZE)) {
            let bytes: [u8; HEADER_SIZE] = bytes.try_into().unwrap();
            prop_assert_eq!(<[u8; HEADER_SIZE]>::from(Header::from(bytes)), bytes);
        }
    }

    #[test]
    fn the_fields_are_where_the_specification_has_them() {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 1025,
            dst_port: 52,
            len: 7,
            kind: STREAM,
            op: op::RW,
            flags: 9,
            buf_alloc: 0x1_0000,
            fwd_cnt: 11,
        };
        let bytes: [u8; HEADER_SIZE] = header.into();
        let at = |place: usize| (place, bytes[place]);
        let found = [0, 8, 16, 20, 24, 28, 30, 32, 38, 40].map(at).map(|(_, byte)| byte);
        assert_eq!(found, [3, 2, 1, 52, 7, 1, 5, 9, 1, 11]);
        let refusal = header.refusal();
        assert_eq!((refusal.src_cid, refusal.dst_port, refusal.op), (HOST_CID, 1025, op::RST));
    }
}

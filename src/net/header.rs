//! The header that virtio and tap devices put before a frame, `struct virtio_net_hdr_v1`: what the
//! frame leaves to its receiver. What it says is checked against the frame. No I/O is here.

use super::backend::{Checksum, Frame, Offload, Segmentation};

/// Its length.
pub const HEADER: usize = 12;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// TCP does not use smaller segments. It bounds how many a frame is cut into.
const SMALLEST_SEGMENT: u16 = 48;
const TCP_HEADER: usize = 20;
/// Where the checksum is in a TCP header, and the length of the header in words of four bytes.
const TCP_CHECKSUM: u16 = 16;
const TCP_LENGTH: usize = 12;

/// The header of a frame in `buffers` buffers.
#[must_use]
pub fn encode(offload: &Offload, buffers: u16) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    if let Some(checksum) = offload.checksum {
        header[0] = NEEDS_CSUM;
        header[6..8].copy_from_slice(&checksum.start.to_le_bytes());
        header[8..10].copy_from_slice(&checksum.offset.to_le_bytes());
    } else if offload.is_verified {
        header[0] = DATA_VALID;
    }
    if let Some(cut) = offload.segmentation {
        let ecn = if cut.has_ecn { GSO_ECN } else { 0 };
        header[1] = if cut.is_v6 { GSO_TCPV6 } else { GSO_TCPV4 } | ecn;
        header[2..4].copy_from_slice(&cut.header_length.to_le_bytes());
        header[4..6].copy_from_slice(&cut.size.to_le_bytes());
    }
    header[10..12].copy_from_slice(&buffers.to_le_bytes());
    header
}

/// The frame behind a header. None if the header is wrong about it, or the frame too short or long.
#[must_use]
pub fn decode<'a>(header: &[u8; HEADER], bytes: &'a [u8]) -> Option<Frame<'a>> {
    let field = |at: usize| {
        header.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u16::from_le_bytes(*bytes))
    };
    let [flags, gso, ..] = *header;
    if !(Frame::SHORTEST..=Frame::LONGEST).contains(&bytes.len()) {
        return None;
    }
    let mut offload = Offload::NONE;
    if flags & NEEDS_CSUM != 0 {
        let (start, offset) = (field(6), field(8));
        let end = usize::from(start) + usize::from(offset) + 2;
        if end > bytes.len() {
            return None;
        }
        offload.checksum = Some(Checksum { start, offset });
    } else {
        offload.is_verified = flags & DATA_VALID != 0;
    }
    if gso != GSO_NONE {
        offload.segmentation = Some(segmentation(gso, field(4), offload.checksum?, bytes)?);
    }
    Some(Frame { bytes, offload })
}

/// The length of the headers is that of the frame itself: the one in the header is a hint.
fn segmentation(gso: u8, size: u16, checksum: Checksum, bytes: &[u8]) -> Option<Segmentation> {
    let is_v6 = match gso & !GSO_ECN {
        GSO_TCPV4 => false,
        GSO_TCPV6 => true,
        _ => return None,
    };
    let start = usize::from(checksum.start);
    let words = usize::from(bytes.get(start + TCP_LENGTH)? >> 4);
    let end = start + words * 4;
    let is_tcp = checksum.offset == TCP_CHECKSUM && words * 4 >= TCP_HEADER;
    if !is_tcp || size < SMALLEST_SEGMENT || end > bytes.len() {
        return None;
    }
    let header_length = u16::try_from(end).ok()?;
    Some(Segmentation { is_v6, size, header_length, has_ecn: gso & GSO_ECN != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment() -> Vec<u8> {
        let mut frame = vec![0; 3000];
        frame[34 + TCP_LENGTH] = 8 << 4;
        frame
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let cut = Segmentation { is_v6: false, size: 1448, header_length: 66, has_ecn: true };
        let checksum = Some(Checksum { start: 34, offset: 16 });
        let offload = Offload { checksum, segmentation: Some(cut), is_verified: false };
        let header = encode(&offload, 3);
        assert_eq!(header[10..], [3, 0]);
        assert_eq!(decode(&header, &segment()).unwrap().offload, offload);
        let verified = Offload { is_verified: true, ..Offload::NONE };
        assert_eq!(decode(&encode(&verified, 1), &segment()).unwrap().offload, verified);
    }

    #[test]
    fn a_header_that_is_wrong_about_its_frame_is_refused() {
        let frame = segment();
        let decoded = |change: &dyn Fn(&mut [u8; HEADER])| {
            let mut header = [1, 1, 0, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
            change(&mut header);
            decode(&header, &frame)
        };
        assert!(decoded(&|_| ()).is_some());
        assert_eq!(decoded(&|header| header[7] = 0xff), None, "a checksum beyond the frame");
        assert_eq!(decoded(&|header| header[1] = 3), None, "UDP is not cut");
        assert_eq!(decoded(&|header| header[0] = 0), None, "a cut without a checksum");
        assert_eq!(decoded(&|header| header[8] = 6), None, "not the checksum of TCP");
        assert_eq!(decoded(&|header| (header[4], header[5]) = (47, 0)), None, "too many segments");
        let none = [0; HEADER];
        assert_eq!(decode(&none, &frame[..13]), None);
        assert_eq!(decode(&none, &[0; Frame::LONGEST + 1]), None);
    }

    proptest! {
        #[test]
        fn no_header_leads_outside_its_frame(
            header: [u8; HEADER],
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            if let Some(frame) = decode(&header, &bytes) {
                if let Some(Checksum { start, offset }) = frame.offload.checksum {
                    prop_assert!(usize::from(start) + usize::from(offset) + 2 <= bytes.len());
                }
                if let Some(cut) = frame.offload.segmentation {
                    prop_assert!(usize::from(cut.header_length) <= bytes.len());
                }
            }
        }
    }
}

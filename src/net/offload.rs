//! What a frame leaves to its receiver, done in software: checksums, and long TCP segments that are
//! cut into several. No I/O is here. The frames are untrusted.

use super::backend::{Checksum, Frame, Offload, Segmentation};

const ETHERNET: usize = 14;
const VLAN: [u16; 2] = [0x8100, 0x88a8];
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const FIN_PUSH: u8 = 0x01 | 0x08;
const WINDOW_REDUCED: u8 = 0x80;

/// The Internet checksum's sum of some bytes, added to another, not folded.
fn sum(bytes: &[u8], from: u64) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    // In the host's byte order, four bytes at a time: the sum comes out in that order.
    let whole: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    let mut last = [0; 4];
    last.iter_mut().zip(rest).for_each(|(to, byte)| *to = *byte);
    from + whole + u64::from(u32::from_ne_bytes(last))
}

/// Sixteen bits of a sum, in the host's byte order.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}

/// A number in network byte order, as `sum` sees it.
fn network(value: u16) -> u64 {
    u64::from(u16::from_ne_bytes(value.to_be_bytes()))
}

fn get(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn put(bytes: &mut [u8], at: usize, value: [u8; 2]) {
    if let Some(field) = bytes.get_mut(at..at + 2) {
        field.copy_from_slice(&value);
    }
}

/// Put a missing checksum into a frame.
pub fn complete(bytes: &mut [u8], checksum: Checksum) {
    let start = usize::from(checksum.start);
    let total = !fold(sum(bytes.get(start..).unwrap_or_default(), 0));
    // Zero means no checksum in UDP; the other zero means the same number.
    let total = if total == 0 { 0xffff } else { total };
    put(bytes, start + usize::from(checksum.offset), total.to_ne_bytes());
}

/// Where the IP header of a frame is, behind at most two VLAN tags.
fn ip_header(bytes: &[u8], is_v6: bool) -> Option<usize> {
    let mut at = ETHERNET;
    for _ in 0..2 {
        if VLAN.contains(&get(bytes, at - 2)?) {
            at += 4;
        }
    }
    (get(bytes, at - 2)? == if is_v6 { IPV6 } else { IPV4 }).then_some(at)
}

/// A long TCP segment that is cut.
#[derive(Debug)]
struct Cut<'a> {
    headers: &'a [u8],
    payload: &'a [u8],
    ip: usize,
    tcp: usize,
    how: Segmentation,
    checksum: Checksum,
}

impl<'a> Cut<'a> {
    fn new(frame: &Frame<'a>, how: Segmentation, checksum: Checksum) -> Option<Self> {
        let (headers, payload) = frame.bytes.split_at_checked(usize::from(how.header_length))?;
        let (ip, tcp) = (ip_header(headers, how.is_v6)?, usize::from(checksum.start));
        let ip_length = if how.is_v6 { 40 } else { 20 };
        (ip + ip_length <= tcp && tcp + 20 <= headers.len()).then_some(Self {
            headers,
            payload,
            ip,
            tcp,
            how,
            checksum,
        })
    }

    /// Write the segment of this number into `into`, which is empty.
    fn write(&self, number: usize, payload: &[u8], is_last: bool, into: &mut Vec<u8>) {
        into.extend_from_slice(self.headers);
        into.extend_from_slice(payload);
        self.write_ip(number, into);
        let (length, whole) = (into.len() - self.tcp, self.headers.len() + self.payload.len());
        let sequence = into.get(self.tcp + 4..).and_then(<[u8]>::first_chunk).copied();
        let sequence = u32::from_be_bytes(sequence.unwrap_or_default());
        let advance = number * usize::from(self.how.size);
        let sequence = sequence.wrapping_add(u32::try_from(advance).unwrap_or(0));
        if let Some(field) = into.get_mut(self.tcp + 4..self.tcp + 8) {
            field.copy_from_slice(&sequence.to_be_bytes());
        }
        if let Some(flags) = into.get_mut(self.tcp + 13) {
            let keep_first = if number == 0 { 0 } else { WINDOW_REDUCED };
            *flags &= !(keep_first | if is_last { 0 } else { FIN_PUSH });
        }
        // The field has the sum of the pseudo-header with the whole length: exchange that.
        let field = self.tcp + usize::from(self.checksum.offset);
        let pseudo = network(get(into, field).unwrap_or(0));
        let [old, new] =
            [whole - self.tcp, length].map(|length| u16::try_from(length).unwrap_or(0));
        let pseudo = fold(pseudo + network(!old) + network(new));
        put(into, field, pseudo.to_ne_bytes());
        complete(into, self.checksum);
    }

    fn write_ip(&self, number: usize, into: &mut [u8]) {
        let length = into.len() - self.ip;
        if self.how.is_v6 {
            let length = u16::try_from(length - 40).unwrap_or(0);
            return put(into, self.ip + 4, length.to_be_bytes());
        }
        put(into, self.ip + 2, u16::try_from(length).unwrap_or(0).to_be_bytes());
        let number = u16::try_from(number).unwrap_or(0);
        let identification = get(into, self.ip + 4).unwrap_or(0).wrapping_add(number);
        put(into, self.ip + 4, identification.to_be_bytes());
        put(into, self.ip + 10, [0; 2]);
        let header = into.get(self.ip..self.tcp).unwrap_or_default();
        let checksum = !fold(sum(header, 0));
        put(into, self.ip + 10, checksum.to_ne_bytes());
    }
}

/// Do what a frame leaves to its receiver, unless `may_pass` says that it is left to the next one.
/// `each` gets the frame, or the frames that it is cut into, in order. False if it cannot be cut.
pub fn finish(
    frame: &Frame<'_>,
    may_pass: impl Fn(&Offload) -> bool,
    scratch: &mut Vec<u8>,
    mut each: impl FnMut(Frame<'_>),
) -> bool {
    let (Some(checksum), false) = (frame.offload.checksum, may_pass(&frame.offload)) else {
        each(*frame);
        return true;
    };
    let Some(how) = frame.offload.segmentation else {
        scratch.clear();
        scratch.extend_from_slice(frame.bytes);
        complete(scratch, checksum);
        each(Frame::complete(scratch));
        return true;
    };
    let Some(cut) = Cut::new(frame, how, checksum) else { return false };
    let size = usize::from(how.size).max(1);
    let count = cut.payload.len().div_ceil(size).max(1);
    for number in 0..count {
        let (start, end) = (number * size, ((number + 1) * size).min(cut.payload.len()));
        scratch.clear();
        let payload = cut.payload.get(start..end).unwrap_or_default();
        cut.write(number, payload, number + 1 == count, scratch);
        each(Frame::complete(scratch));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::header;
    use proptest::prelude::*;

    /// The checksum as RFC 1071 defines it, two bytes at a time.
    fn plain(bytes: &[u8]) -> u16 {
        let mut total = 0u32;
        for pair in bytes.chunks(2) {
            total += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            total = (total & 0xffff) + (total >> 16);
        }
        u16::try_from(total).unwrap()
    }

    /// A TCP segment with its pseudo-header's sum, and the pseudo-header without the length.
    fn segment(is_v6: bool, tags: usize, payload: usize) -> (Vec<u8>, u16, Vec<u8>) {
        let mut frame = vec![2; 12];
        for _ in 0..tags {
            frame.extend([0x81, 0, 0, 7]);
        }
        let data: Vec<u8> = (0..payload).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let addresses: Vec<u8> = if is_v6 { (1..=32).collect() } else { (1..=8).collect() };
        let length = u16::try_from(20 + payload).unwrap();
        if is_v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([6, 64]);
        } else {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((length + 20).to_be_bytes());
            frame.extend([0xff, 0xff, 0x40, 0, 64, 6, 0, 0]);
        }
        frame.extend(&addresses);
        let start = u16::try_from(frame.len()).unwrap();
        let pseudo = [&addresses[..], &[0, 6]].concat();
        let sum = plain(&[&pseudo[..], &length.to_be_bytes()].concat());
        frame.extend([0x12, 0x34, 0, 80, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0x50, 0x99, 1, 0]);
        frame.extend(sum.to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(data);
        (frame, start, pseudo)
    }

    /// Check the headers of a segment that begins at this byte of the payload.
    fn check(bytes: &[u8], (is_v6, tags): (bool, usize), pseudo: &[u8], at: usize, is_last: bool) {
        let (ip, tcp) = (14 + 4 * tags, 14 + 4 * tags + if is_v6 { 40 } else { 20 });
        let length = u16::try_from(bytes.len() - tcp).unwrap();
        let whole = [pseudo, &length.to_be_bytes(), &bytes[tcp..]].concat();
        assert_eq!(plain(&whole), 0xffff, "the checksum of TCP");
        if is_v6 {
            assert_eq!(get(bytes, ip + 4), Some(length));
        } else {
            assert_eq!(plain(&bytes[ip..tcp]), 0xffff, "the checksum of IP");
            assert_eq!(get(bytes, ip + 2), Some(length + 20));
        }
        let sequence = u32::from_be_bytes(bytes[tcp + 4..tcp + 8].try_into().unwrap());
        assert_eq!(sequence, 0xffff_ff00_u32.wrapping_add(u32::try_from(at).unwrap()));
        let flags = 0x10 | if is_last { 9 } else { 0 } | if at == 0 { 0x80 } else { 0 };
        assert_eq!(bytes[tcp + 13], flags, "the flags");
    }

    fn cut(is_v6: bool, tags: usize, payload: usize, size: u16) -> Result<(), TestCaseError> {
        let (bytes, start, pseudo) = segment(is_v6, tags, payload);
        let checksum = Some(Checksum { start, offset: 16 });
        let how = Segmentation { is_v6, size, header_length: start + 20, has_ecn: false };
        let offload = Offload { checksum, segmentation: Some(how), is_verified: false };
        let frame = header::decode(&header::encode(&offload, 1), &bytes).unwrap();
        prop_assert_eq!(frame.offload, offload);
        let (mut data, mut count, headers) = (Vec::new(), 0, usize::from(start) + 20);
        let fine = finish(
            &frame,
            |_| false,
            &mut Vec::new(),
            |part| {
                let at = data.len();
                data.extend_from_slice(&part.bytes[headers..]);
                check(part.bytes, (is_v6, tags), &pseudo, at, data.len() == payload);
                count += 1;
            },
        );
        prop_assert!(fine);
        prop_assert_eq!(count, payload.div_ceil(usize::from(size)).max(1));
        prop_assert_eq!(data, &bytes[headers..]);
        Ok(())
    }

    proptest! {
        #[test]
        fn segments_have_the_payload_and_right_checksums(
            is_v6: bool, tags in 0usize..3, payload in 0usize..9000, size in 48u16..3000,
        ) {
            cut(is_v6, tags, payload, size)?;
        }

        #[test]
        fn no_frame_leads_the_cut_astray(
            bytes in proptest::collection::vec(any::<u8>(), 14..300),
            header: [u8; 12],
        ) {
            if let Some(frame) = header::decode(&header, &bytes) {
                finish(&frame, |_| false, &mut Vec::new(), |part| {
                    assert!(part.bytes.len() <= bytes.len());
                });
            }
        }

        #[test]
        fn a_checksum_makes_the_sum_complete(
            mut bytes in proptest::collection::vec(any::<u8>(), 40..2000),
        ) {
            put(&mut bytes, 26, [0; 2]);
            complete(&mut bytes, Checksum { start: 20, offset: 6 });
            prop_assert_eq!(plain(&bytes[20..]), 0xffff);
            prop_assert_ne!(get(&bytes, 26), Some(0));
        }
    }

    #[test]
    fn a_frame_that_may_pass_is_left_as_it_is() {
        let (bytes, start, _) = segment(false, 0, 100);
        let checksum = Some(Checksum { start, offset: 16 });
        let frame = Frame { bytes: &bytes, offload: Offload { checksum, ..Offload::NONE } };
        let mut seen = None;
        finish(&frame, |_| true, &mut Vec::new(), |part| seen = Some(part.offload));
        assert_eq!(seen, Some(frame.offload));
        finish(&frame, |_| false, &mut Vec::new(), |part| seen = Some(part.offload));
        assert_eq!(seen, Some(Offload::NONE));
    }
}

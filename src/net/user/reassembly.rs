//! Fragments of IPv4 packets of the guest, until all are there. Bounded in number, in bytes and in
//! time.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::wire::{IpProtocol, Ipv4Packet};

use super::frame::{IPV4, MAX_IP, ipv4};

/// Packets that are put together at a time.
const PACKETS: usize = 8;
/// Parts of one packet.
const PARTS: usize = 128;
/// A packet whose fragments do not come within this time is dropped.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: IpProtocol,
    ident: u16,
}

#[derive(Debug)]
struct Partial {
    key: Key,
    began: Instant,
    /// Offset and payload, ordered, without overlaps.
    parts: Vec<(usize, Vec<u8>)>,
    total: Option<usize>,
}

/// The packets that are not complete yet.
#[derive(Debug, Default)]
pub(super) struct Reassembly {
    packets: Vec<Partial>,
}

impl Reassembly {
    /// Add a fragment. Returns the packet that it completes, without IP options.
    pub(super) fn input(&mut self, bytes: &[u8], now: Instant) -> Option<Vec<u8>> {
        let packet = Ipv4Packet::new_checked(bytes).ok()?;
        let key = Key {
            from: packet.src_addr(),
            to: packet.dst_addr(),
            protocol: packet.next_header(),
            ident: packet.ident(),
        };
        self.packets.retain(|partial| now.saturating_duration_since(partial.began) < PATIENCE);
        let found = self.packets.iter().position(|partial| partial.key == key);
        let index = found.unwrap_or_else(|| {
            if self.packets.len() >= PACKETS {
                self.packets.remove(0);
            }
            self.packets.push(Partial { key, began: now, parts: Vec::new(), total: None });
            self.packets.len() - 1
        });
        let offset = usize::from(packet.frag_offset());
        let partial = self.packets.get_mut(index)?;
        if partial.add(offset, packet.payload(), !packet.more_frags()).is_none() {
            // Overlaps and the like come only from an attack (RFC 5722).
            self.packets.remove(index);
            return None;
        }
        let payload = partial.complete()?;
        self.packets.remove(index);
        Some(ipv4(key.from, key.to, key.protocol, &payload))
    }
}

impl Partial {
    fn add(&mut self, offset: usize, payload: &[u8], is_last: bool) -> Option<()> {
        let end = offset + payload.len();
        let is_odd = !is_last && !payload.len().is_multiple_of(8);
        if payload.is_empty() || is_odd || IPV4 + end > MAX_IP || self.parts.len() >= PARTS {
            return None;
        }
        if is_last && self.total.replace(end).is_some_and(|total| total != end) {
            return None;
        }
        let index = self.parts.partition_point(|(start, _)| *start < offset);
        let before = index.checked_sub(1).and_then(|index| self.parts.get(index));
        let is_clear = before.is_none_or(|(start, part)| start + part.len() <= offset)
            && self.parts.get(index).is_none_or(|(start, _)| end <= *start)
            && self.total.is_none_or(|total| end <= total);
        is_clear.then(|| self.parts.insert(index, (offset, payload.to_vec())))
    }

    fn complete(&self) -> Option<Vec<u8>> {
        let total = self.total?;
        let length: usize = self.parts.iter().map(|(_, part)| part.len()).sum();
        // Without overlaps, the sum says whether there are holes.
        (length == total).then(|| self.parts.iter().flat_map(|(_, part)| part).copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::frame::udp;
    use super::*;

    fn fragments(payload: &[u8], ident: u16) -> Vec<Vec<u8>> {
        let from = (Ipv4Addr::new(10, 0, 2, 15), 9);
        udp(from, (Ipv4Addr::new(192, 0, 2, 1), 9), payload, 1500, ident)
    }

    proptest! {
        #[test]
        fn fragments_in_any_order_make_the_packet(
            length in 1473_usize..60_000,
            seed in any::<u64>(),
        ) {
            let payload: Vec<u8> = (0..length).map(|n| n.to_le_bytes()[0]).collect();
            let mut parts = fragments(&payload, 1);
            let mut state = seed | 1;
            for index in (1..parts.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let other = usize::try_from(state >> 33).unwrap() % (index + 1);
                parts.swap(index, other);
            }
            let (last, first) = parts.split_last().unwrap();
            let mut reassembly = Reassembly::default();
            let now = Instant::now();
            for part in first {
                prop_assert!(reassembly.input(part, now).is_none());
            }
            let whole = reassembly.input(last, now).unwrap();
            prop_assert_eq!(&whole[IPV4 + 8..], &payload[..]);
            prop_assert!(reassembly.packets.is_empty());
        }
    }

    #[test]
    fn packets_that_are_never_completed_are_bounded_and_expire() {
        let mut reassembly = Reassembly::default();
        let start = Instant::now();
        for ident in 0..1000 {
            assert!(reassembly.input(&fragments(&[1; 5000], ident)[0], start).is_none());
        }
        assert_eq!(reassembly.packets.len(), PACKETS);
        reassembly.input(&fragments(&[1; 5000], 5000)[0], start + PATIENCE);
        assert_eq!(reassembly.packets.len(), 1);
    }

    #[test]
    fn an_overlap_drops_the_packet() {
        let mut reassembly = Reassembly::default();
        let now = Instant::now();
        let parts = fragments(&[1; 5000], 1);
        reassembly.input(&parts[0], now);
        reassembly.input(&parts[0], now);
        assert!(reassembly.packets.is_empty());
    }
}

//! Which port an address was last seen at. Bounded: a sender that uses up addresses only displaces
//! addresses. Pure data.

use std::collections::{HashMap, VecDeque};

use super::inbox::PortId;

/// An Ethernet address.
pub(super) type Address = [u8; 6];

/// The addresses that a switch remembers; the oldest is forgotten first.
const MOST: usize = 4096;

#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    ports: HashMap<Address, PortId>,
    /// In the order in which they were learned.
    learned: VecDeque<Address>,
}

impl Table {
    /// A frame from this address has come from this port.
    #[inline]
    pub(super) fn learn(&mut self, address: Address, port: PortId) {
        if is_group(address) {
            return;
        }
        if let Some(known) = self.ports.get_mut(&address) {
            *known = port;
            return;
        }
        if self.learned.len() >= MOST
            && let Some(oldest) = self.learned.pop_front()
        {
            self.ports.remove(&oldest);
        }
        self.ports.insert(address, port);
        self.learned.push_back(address);
    }

    /// The port of an address. None for an unknown one and for a group: all ports get the frame.
    #[inline]
    pub(super) fn find(&self, address: Address) -> Option<PortId> {
        if is_group(address) { None } else { self.ports.get(&address).copied() }
    }

    /// A port is gone.
    pub(super) fn forget(&mut self, port: PortId) {
        self.ports.retain(|_, known| *known != port);
        let Self { ports, learned } = self;
        learned.retain(|address| ports.contains_key(address));
    }
}

/// Whether an address is for several stations: broadcast and multicast.
fn is_group(address: Address) -> bool {
    address[0] & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: usize) -> Address {
        let [low, high, ..] = number.to_le_bytes();
        [2, 0, 0, 0, high, low]
    }

    #[test]
    fn an_address_is_where_it_was_last_seen() {
        let mut table = Table::default();
        table.learn(address(1), 1);
        table.learn(address(1), 2);
        table.learn([0xff; 6], 1);
        assert_eq!(table.find(address(1)), Some(2));
        assert_eq!((table.find([0xff; 6]), table.find(address(2))), (None, None));
        table.forget(2);
        assert_eq!(table.find(address(1)), None);
        assert!(table.learned.is_empty());
    }

    #[test]
    fn a_sender_with_many_addresses_does_not_make_it_grow() {
        let mut table = Table::default();
        (0..3 * MOST).for_each(|number| table.learn(address(number), 1));
        assert_eq!((table.ports.len(), table.learned.len()), (MOST, MOST));
        assert_eq!(table.find(address(2 * MOST - 1)), None);
        assert_eq!(table.find(address(2 * MOST)), Some(1));
    }
}

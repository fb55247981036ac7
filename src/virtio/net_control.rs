//! The control queue of a network device (virtio 1.2, 5.1.6.5), and the filter of received frames
//! that it sets. On the loop's thread.

use std::io::Write;

use super::access::QueueAccess;
use super::buffers::{ChainReader, ChainWriter};
use super::net_features::{CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_VQ, guest_offloads};
use crate::bytes::Reader;
use crate::error::Result;
use crate::net::Offloads;

pub(super) const CONTROL: usize = 2;

const OK: u8 = 0;
const ERROR: u8 = 1;
const RX: u8 = 0;
const RX_PROMISCUOUS: u8 = 0;
const RX_ALL_MULTICAST: u8 = 1;
const MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDRESS_SET: u8 = 1;
const GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

/// A longer command is refused.
const MOST: usize = 16 << 10;
/// With more addresses of a kind, all of the kind are received.
const TABLE: usize = 64;
const ADDRESS: usize = 6;

type Mac = [u8; ADDRESS];

/// Which frames the guest receives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    is_promiscuous: bool,
    all_multicast: bool,
    /// Unicast and multicast addresses. None: all.
    unicast: Option<Vec<Mac>>,
    multicast: Option<Vec<Mac>>,
}

impl Default for Filter {
    /// Until the driver says what it wants, it gets everything.
    fn default() -> Self {
        Self {
            is_promiscuous: true,
            all_multicast: false,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
        }
    }
}

impl Filter {
    /// Whether the guest, which has this address, receives a frame.
    pub(super) fn accepts(&self, own: Mac, frame: &[u8]) -> bool {
        if self.is_promiscuous {
            return true;
        }
        let Some(to) = frame.first_chunk::<ADDRESS>() else { return false };
        let listed = |table: &Option<Vec<Mac>>| table.as_ref().is_none_or(|all| all.contains(to));
        if *to == [0xff; ADDRESS] {
            true
        } else if to[0] & 1 != 0 {
            self.all_multicast || listed(&self.multicast)
        } else {
            *to == own || listed(&self.unicast)
        }
    }

    pub(super) fn save(&self, state: &mut Vec<u8>) {
        state.extend([self.is_promiscuous, self.all_multicast].map(u8::from));
        for table in [&self.unicast, &self.multicast] {
            let count = table.as_ref().map_or(u8::MAX, |all| u8::try_from(all.len()).unwrap_or(0));
            state.push(count);
            state.extend(table.iter().flatten().flatten());
        }
    }

    pub(super) fn restore(reader: &mut Reader<'_>) -> Result<Self> {
        let [is_promiscuous, all_multicast] = reader.take()?.map(|flag: u8| flag != 0);
        let mut table = || {
            let [count] = reader.take()?;
            if usize::from(count) > TABLE {
                return Ok(None);
            }
            (0..count).map(|_| reader.take()).collect::<Result<Vec<Mac>>>().map(Some)
        };
        Ok(Self { is_promiscuous, all_multicast, unicast: table()?, multicast: table()? })
    }
}

/// What commands change.
#[derive(Debug)]
pub(super) struct Controlled {
    pub(super) filter: Filter,
    pub(super) mac: Mac,
    /// What the guest does itself; a subset of what it has accepted.
    pub(super) guest: Offloads,
}

/// Execute the commands of the control queue. Returns whether there were any.
pub(super) fn process(access: &QueueAccess<'_>, controlled: &mut Controlled) -> bool {
    let mut any = false;
    while let Some(chain) = access.pop(CONTROL) {
        any = true;
        let mut reader = ChainReader::new(access, &chain);
        let is_short = reader.left() <= MOST as u64;
        let command = reader.read_vec(MOST);
        let done = is_short.then(|| execute(&command, access.features(), controlled)).flatten();
        let answer = if done.is_some() { OK } else { ERROR };
        let mut writer = ChainWriter::new(access, &chain);
        // A driver that leaves no room for the answer gets none.
        let _ = writer.write(&[answer]);
        let written = writer.written();
        access.complete(chain, written);
    }
    any
}

/// The features that a command belongs to. None if there is no such command.
fn required(class: u8, command: u8) -> Option<u64> {
    Some(match (class, command) {
        (RX, _) | (MAC, MAC_TABLE_SET) => CTRL_VQ | CTRL_RX,
        (MAC, MAC_ADDRESS_SET) => CTRL_VQ | CTRL_MAC_ADDR,
        (GUEST_OFFLOADS, _) => CTRL_VQ | CTRL_GUEST_OFFLOADS,
        _ => return None,
    })
}

/// None if there is no such command with these features, or it is malformed.
fn execute(command: &[u8], features: u64, controlled: &mut Controlled) -> Option<()> {
    let ([class, command], data) = command.split_first_chunk()?;
    let required = required(*class, *command)?;
    if features & required != required {
        return None;
    }
    match (*class, *command) {
        (RX, RX_PROMISCUOUS) => controlled.filter.is_promiscuous = *data.first()? != 0,
        (RX, RX_ALL_MULTICAST) => controlled.filter.all_multicast = *data.first()? != 0,
        (MAC, MAC_ADDRESS_SET) => controlled.mac = *data.first_chunk()?,
        (MAC, MAC_TABLE_SET) => {
            let (unicast, rest) = table(data)?;
            let (multicast, _) = table(rest)?;
            controlled.filter.unicast = unicast;
            controlled.filter.multicast = multicast;
        }
        (GUEST_OFFLOADS, GUEST_OFFLOADS_SET) => {
            let wanted = u64::from_le_bytes(*data.first_chunk()?);
            if wanted & !features != 0 {
                return None;
            }
            controlled.guest = guest_offloads(wanted);
        }
        _ => return None,
    }
    Some(())
}

/// A table of addresses, and what follows it.
fn table(data: &[u8]) -> Option<(Option<Vec<Mac>>, &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (addresses, rest) = rest.split_at_checked(count.checked_mul(ADDRESS)?)?;
    let (addresses, _) = addresses.as_chunks();
    Some(((count <= TABLE).then(|| addresses.to_vec()), rest))
}

#[cfg(test)]
mod tests {
    use super::super::net_features::{GUEST_CSUM, OFFERED};
    use super::*;
    use proptest::prelude::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];

    fn controlled() -> Controlled {
        Controlled { filter: Filter::default(), mac: OWN, guest: Offloads::default() }
    }

    fn frame(to: Mac) -> Vec<u8> {
        [&to[..], &[0; 54]].concat()
    }

    #[test]
    fn a_filter_passes_what_the_driver_has_asked_for() {
        let mut all = controlled();
        let [other, group, listed] =
            [[2, 0, 0, 0, 0, 9], [0x33, 0x33, 0, 0, 0, 1], [1, 0, 0x5e, 0, 0, 1]];
        assert!(all.filter.accepts(OWN, &frame(other)), "everything at first");
        execute(&[RX, RX_PROMISCUOUS, 0], OFFERED, &mut all).unwrap();
        let accepts = |all: &Controlled, to| all.filter.accepts(all.mac, &frame(to));
        assert!(accepts(&all, OWN) && accepts(&all, [0xff; 6]));
        assert!(!accepts(&all, other) && !accepts(&all, group));
        let table =
            [&[MAC, MAC_TABLE_SET, 1, 0, 0, 0][..], &other, &[1, 0, 0, 0], &listed].concat();
        execute(&table, OFFERED, &mut all).unwrap();
        assert!(accepts(&all, other) && accepts(&all, listed) && !accepts(&all, group));
        execute(&[RX, RX_ALL_MULTICAST, 1], OFFERED, &mut all).unwrap();
        assert!(accepts(&all, group));
        execute(&[&[MAC, MAC_ADDRESS_SET][..], &group].concat(), OFFERED, &mut all).unwrap();
        assert!(!accepts(&all, OWN));
        assert!(!all.filter.accepts(OWN, &[0; 5]));
    }

    #[test]
    fn more_addresses_than_the_table_has_are_all_addresses() {
        let mut all = controlled();
        execute(&[RX, RX_PROMISCUOUS, 0], OFFERED, &mut all).unwrap();
        let table = [&[MAC, MAC_TABLE_SET, 65, 0, 0, 0][..], &[2; 65 * 6], &[0; 4]].concat();
        execute(&table, OFFERED, &mut all).unwrap();
        assert!(all.filter.accepts(OWN, &frame([6; 6])));
        let mut state = Vec::new();
        all.filter.save(&mut state);
        let mut reader = Reader::new("net", &state);
        assert_eq!(Filter::restore(&mut reader).unwrap(), all.filter);
        assert!(reader.is_empty());
    }

    #[test]
    fn only_offloads_that_were_accepted_can_be_turned_on() {
        let mut all = controlled();
        let command = |bits: u64| [&[GUEST_OFFLOADS, 0][..], &bits.to_le_bytes()].concat();
        assert_eq!(execute(&command(GUEST_CSUM), OFFERED & !GUEST_CSUM, &mut all), None);
        execute(&command(GUEST_CSUM), OFFERED, &mut all).unwrap();
        assert!(all.guest.checksum);
    }

    proptest! {
        #[test]
        fn no_command_breaks_the_filter(
            commands in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..9),
            frame in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut all = controlled();
            for command in commands {
                execute(&command, u64::MAX, &mut all);
                all.filter.accepts(all.mac, &frame);
            }
            let mut state = Vec::new();
            all.filter.save(&mut state);
            prop_assert_eq!(Filter::restore(&mut Reader::new("net", &state)).unwrap(), all.filter);
        }
    }
}

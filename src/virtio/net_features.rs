//! The feature bits of a network device (virtio 1.2, 5.1.3), and what they say about offloads. Pure
//! arithmetic.

use crate::net::Offloads;

pub(super) const CSUM: u64 = 1 << 0;
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub(super) const MTU: u64 = 1 << 3;
pub(super) const MAC: u64 = 1 << 5;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;
pub(super) const GUEST_ECN: u64 = 1 << 9;
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const HOST_ECN: u64 = 1 << 13;
pub(super) const MRG_RXBUF: u64 = 1 << 15;
pub(super) const STATUS: u64 = 1 << 16;
pub(super) const CTRL_VQ: u64 = 1 << 17;
pub(super) const CTRL_RX: u64 = 1 << 18;
pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;

/// What every device offers. What the backend does not do itself, the device does.
pub(super) const OFFERED: u64 = CSUM
    | GUEST_CSUM
    | CTRL_GUEST_OFFLOADS
    | MAC
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | MRG_RXBUF
    | STATUS
    | CTRL_VQ
    | CTRL_RX
    | CTRL_MAC_ADDR;

/// A feature, and those of which it requires one (virtio 1.2, 5.1.3.1).
const REQUIRED: [(u64, u64); 8] = [
    (GUEST_TSO4, GUEST_CSUM),
    (GUEST_TSO6, GUEST_CSUM),
    (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
    (HOST_TSO4, CSUM),
    (HOST_TSO6, CSUM),
    (HOST_ECN, HOST_TSO4 | HOST_TSO6),
    (CTRL_RX, CTRL_VQ),
    (CTRL_MAC_ADDR, CTRL_VQ),
];

/// Whether each of these features has what it requires.
pub(super) fn are_complete(features: u64) -> bool {
    REQUIRED.iter().all(|(one, others)| features & one == 0 || features & others != 0)
}

/// What a guest with these features does itself with frames that it receives.
pub(super) fn guest_offloads(features: u64) -> Offloads {
    let has = |bit| features & (bit | GUEST_CSUM) == bit | GUEST_CSUM;
    Offloads {
        checksum: has(GUEST_CSUM),
        tso4: has(GUEST_TSO4),
        tso6: has(GUEST_TSO6),
        ecn: has(GUEST_ECN),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::VirtioDevice;
    use super::super::mock::{MockDriver, readable, writable};
    use super::super::net::Net;
    use super::*;
    use crate::devices::Device;
    use crate::net::Disconnected;

    #[test]
    fn segmentation_is_left_only_to_guests_that_also_do_checksums() {
        assert_eq!(guest_offloads(GUEST_TSO4 | GUEST_ECN), Offloads::default());
        let some = guest_offloads(GUEST_CSUM | GUEST_TSO6);
        assert_eq!(some, Offloads { checksum: true, tso4: false, tso6: true, ecn: false });
    }

    #[test]
    fn offloads_that_the_driver_has_turned_off_stay_off_in_a_copy() {
        const AT: u64 = MockDriver::BUFFERS;
        let features = CTRL_VQ | CTRL_GUEST_OFFLOADS | GUEST_CSUM | GUEST_TSO4;
        let net = Arc::new(Net::over(Arc::new(Disconnected), [2; 6], None));
        let mut driver = MockDriver::new(Arc::clone(&net) as _, 8).unwrap();
        driver.start(features);
        driver.memory.write(AT, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let command = [readable(AT, 10), writable(AT + 16, 1)];
        assert_eq!(driver.exchange(2, &command), Some(1));
        assert_eq!(driver.memory.load::<u8>(AT + 16).unwrap(), 0);
        let (own, transport) = (net.save().unwrap(), &driver.attached.transport);
        let state = Device::save(&**transport).unwrap();
        Device::restore(&**transport, &state).unwrap();
        assert_eq!(net.save().unwrap(), own);
        driver.start(CTRL_VQ | GUEST_CSUM);
        assert_ne!(net.save().unwrap(), own, "a new driver has what it accepts");
    }
}

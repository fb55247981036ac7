//! The state of a machine other than its memory: records, each a kind, a number and bytes. Pure
//! data, no KVM.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::bytes::{Reader, bad};
use crate::error::Result;

/// What a record holds. The numbers are part of the file format and never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum RecordKind {
    /// The parts of the machine: see [`crate::vm::MachineSpec`].
    Machine = 1,
    /// The host's processor and KVM: see [`super::host::Host`].
    Host = 2,
    /// A device's state: see [`DeviceState`].
    Device = 3,
    /// A range of memory: see the format of a file.
    Range = 4,
    /// What a virtio device is: see [`super::VirtioDeviceState`].
    Virtio = 5,
    /// A list of `kvm_cpuid_entry2`
    Cpuid = 0x10,
    /// `kvm_mp_state`
    MpState = 0x11,
    /// `kvm_regs`
    Regs = 0x12,
    /// `kvm_sregs2`
    Sregs2 = 0x13,
    /// `kvm_sregs`, if KVM does not have `kvm_sregs2`
    Sregs = 0x14,
    /// `kvm_xsave`, 4 KiB or the size that KVM_CAP_XSAVE2 reports
    Xsave = 0x15,
    /// `kvm_xcrs`
    Xcrs = 0x16,
    /// `kvm_debugregs`
    DebugRegs = 0x17,
    /// `kvm_lapic_state`
    Lapic = 0x18,
    /// Index (u32) and value (u64) of each model-specific register
    Msrs = 0x19,
    /// `kvm_vcpu_events`
    Events = 0x1a,
    /// The frequency of the time-stamp counter in kHz, u32
    TscKhz = 0x1b,
    /// `kvm_clock_data`
    Clock = 0x20,
    /// `kvm_pit_state2`
    Pit = 0x21,
    /// `kvm_irqchip`; the number is that of the chip
    Irqchip = 0x22,
    /// One bit for each interrupt line that the host holds high, u32; left out if there is none
    IrqLines = 0x23,
}

impl RecordKind {
    const ALL: [Self; 21] = [
        Self::Machine,
        Self::Host,
        Self::Device,
        Self::Range,
        Self::Virtio,
        Self::Cpuid,
        Self::MpState,
        Self::Regs,
        Self::Sregs2,
        Self::Sregs,
        Self::Xsave,
        Self::Xcrs,
        Self::DebugRegs,
        Self::Lapic,
        Self::Msrs,
        Self::Events,
        Self::TscKhz,
        Self::Clock,
        Self::Pit,
        Self::Irqchip,
        Self::IrqLines,
    ];

    /// The kind of this number.
    #[must_use]
    pub fn of(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == number)
    }

    /// Its name in messages and in Python.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Host => "host",
            Self::Device => "device",
            Self::Range => "range",
            Self::Virtio => "virtio",
            Self::Cpuid => "cpuid",
            Self::MpState => "mp_state",
            Self::Regs => "regs",
            Self::Sregs2 => "sregs2",
            Self::Sregs => "sregs",
            Self::Xsave => "xsave",
            Self::Xcrs => "xcrs",
            Self::DebugRegs => "debugregs",
            Self::Lapic => "lapic",
            Self::Msrs => "msrs",
            Self::Events => "events",
            Self::TscKhz => "tsc_khz",
            Self::Clock => "clock",
            Self::Pit => "pit",
            Self::Irqchip => "irqchip",
            Self::IrqLines => "irq_lines",
        }
    }
}

/// One piece of state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: RecordKind,
    /// The vCPU or chip it belongs to.
    pub number: u16,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// The records of one vCPU, or those of the whole machine.
pub type Records = Vec<Record>;

/// Add a record.
pub(crate) fn put(records: &mut Records, kind: RecordKind, number: u16, bytes: impl Into<Vec<u8>>) {
    records.push(Record { kind, number, bytes: bytes.into() });
}

/// The bytes of one record.
pub(crate) fn get(records: &[Record], kind: RecordKind, number: u16) -> Option<&[u8]> {
    let found = records.iter().find(|r| r.kind == kind && r.number == number);
    found.map(|record| record.bytes.as_slice())
}

/// The bytes of a KVM structure.
pub(crate) fn bytes<T: IntoBytes + Immutable>(value: &T) -> &[u8] {
    value.as_bytes()
}

/// A KVM structure from its bytes.
pub(crate) fn from_bytes<T: FromBytes>(what: &str, bytes: &[u8]) -> Result<T> {
    T::read_from_bytes(bytes)
        .map_err(|_| bad(what, format!("{} bytes instead of {}", bytes.len(), size_of::<T>())))
}

/// The state of a device, with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Whether it is on the MMIO bus, not the PIO bus.
    pub is_mmio: bool,
    /// Its first address.
    pub base: u64,
    /// The number of addresses.
    pub length: u64,
    /// The bytes that it saved.
    pub state: Vec<u8>,
}

impl DeviceState {
    /// Encode it for a record.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![u8::from(self.is_mmio), 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(self.base.to_le_bytes());
        bytes.extend(self.length.to_le_bytes());
        bytes.extend(&self.state);
        bytes
    }

    /// Decode it from a record.
    ///
    /// # Errors
    /// [`ErrorKind::Snapshot`](crate::error::ErrorKind::Snapshot) if the record is too short.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("device", bytes);
        let [is_mmio, ..] = reader.take::<8>()?;
        let (base, length) = (reader.u64()?, reader.u64()?);
        Ok(Self { is_mmio: is_mmio != 0, base, length, state: reader.rest().to_vec() })
    }

    /// Its place, for messages.
    #[must_use]
    pub fn place(&self) -> String {
        format!("{} {:#x}", if self.is_mmio { "mmio" } else { "pio" }, self.base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use kvm_bindings::kvm_regs;
    use proptest::prelude::*;

    #[test]
    fn a_structure_comes_back_from_its_bytes_and_from_no_others() {
        let regs = kvm_regs { rip: 7, r15: 9, ..Default::default() };
        assert_eq!(from_bytes::<kvm_regs>("regs", bytes(&regs)).unwrap(), regs);
        let error = from_bytes::<kvm_regs>("regs", &[0; 3]).unwrap_err();
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Snapshot, "regs"));
    }

    #[test]
    fn every_kind_has_its_number_and_name() {
        let mut names = Vec::new();
        for kind in RecordKind::ALL {
            assert_eq!(RecordKind::of(kind as u16), Some(kind));
            names.push(kind.name());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), RecordKind::ALL.len());
        assert_eq!(RecordKind::of(0), None);
    }

    proptest! {
        #[test]
        fn devices_come_back(is_mmio in any::<bool>(), base in any::<u64>(), length in any::<u64>(),
                             state in prop::collection::vec(any::<u8>(), 0..40)) {
            let device = DeviceState { is_mmio, base, length, state };
            prop_assert_eq!(DeviceState::decode(&device.encode()).unwrap(), device);
        }

        #[test]
        fn no_bytes_make_a_device_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = DeviceState::decode(&bytes);
        }
    }
}

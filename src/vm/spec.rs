//! The specification of a machine: the parts that must exist before its state can be set. Pure
//! data.

use crate::bytes::{Reader, bad};
use crate::config::{ExitPort, PcParts, Platform};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;

/// The parts of a machine besides its memory and its devices in Python.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineSpec {
    /// The number of vCPUs. Their ids start at 0.
    pub vcpus: u16,
    /// An in-kernel PIC, I/O APIC and LAPICs.
    pub irqchip: bool,
    /// An in-kernel PIT.
    pub pit: bool,
    /// Whether pyvmm executes instructions that KVM's emulator refuses.
    pub fixups: bool,
    /// The port that ends the run when it is written.
    pub exit_port: Option<u16>,
    /// The parts of a PC that it has.
    pub parts: PcParts,
}

impl MachineSpec {
    pub(crate) fn platform(&self) -> Platform {
        let exit_port = ExitPort(self.exit_port);
        // None gives way: the snapshot has its state.
        let yielding = PcParts::default();
        Platform { irqchip: self.irqchip, exit_port, parts: self.parts, yielding }
    }

    /// Its bytes in a record: vCPUs, irqchip, PIT, whether it has an exit port, fix-ups, the port.
    /// These are 8 bytes; the 4 of the parts follow if there are any.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let [low, high] = self.vcpus.to_le_bytes();
        let [port_low, port_high] = self.exit_port.unwrap_or(0).to_le_bytes();
        let flags = [self.irqchip, self.pit, self.exit_port.is_some(), self.fixups].map(u8::from);
        let fixed = [low, high, flags[0], flags[1], flags[2], flags[3], port_low, port_high];
        let parts = Some(self.parts.bits().to_le_bytes()).filter(|bits| *bits != [0; 4]);
        fixed.into_iter().chain(parts.into_iter().flatten()).collect()
    }

    /// From the bytes of a record.
    ///
    /// # Errors
    /// [`ErrorKind::Snapshot`] if they do not describe such a machine.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("machine", bytes);
        let vcpus = reader.u16()?;
        let [irqchip, pit, has_port, fixups] = reader.take()?;
        let port = reader.u16()?;
        let parts = if reader.is_empty() { 0 } else { reader.u32()? };
        reader.end()?;
        let unknown = || bad("machine", "this version of pyvmm has no such machine");
        let is_known = [irqchip, pit, has_port, fixups].iter().all(|flag| *flag < 2);
        if !is_known || vcpus == 0 || u64::from(vcpus) > layout::MAX_VCPUS || pit > irqchip {
            return Err(unknown());
        }
        let parts = PcParts::from_bits(parts).ok_or_else(unknown)?;
        let exit_port = (has_port == 1).then_some(port);
        let [irqchip, pit, fixups] = [irqchip, pit, fixups].map(|flag| flag == 1);
        Ok(Self { vcpus, irqchip, pit, fixups, exit_port, parts })
    }

    /// # Errors
    /// [`ErrorKind::State`] if the specifications differ; the error names the difference.
    pub(crate) fn check_same(&self, other: &Self) -> Result<()> {
        let differ = |what: &str, ours: String, theirs: String| {
            let detail = format!("this machine has {what} {ours}, the snapshot {theirs}");
            Err(Error::new(ErrorKind::State, "reset", detail))
        };
        if self.vcpus != other.vcpus {
            return differ("vcpus", self.vcpus.to_string(), other.vcpus.to_string());
        }
        let chips = |spec: &Self| format!("{} and {}", spec.irqchip, spec.pit);
        if chips(self) != chips(other) {
            return differ("irqchip and pit", chips(self), chips(other));
        }
        if self.exit_port != other.exit_port {
            let port = |spec: &Self| format!("{:x?}", spec.exit_port);
            return differ("exit_port", port(self), port(other));
        }
        if self.parts != other.parts {
            return differ("the parts of a PC", self.parts.names(), other.parts.names());
        }
        if self.fixups != other.fixups {
            return differ("fixups", self.fixups.to_string(), other.fixups.to_string());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PcPart;
    use proptest::prelude::*;

    fn small() -> MachineSpec {
        let (exit_port, parts) = (None, PcParts::default());
        MachineSpec { vcpus: 1, irqchip: false, pit: false, fixups: false, exit_port, parts }
    }

    #[test]
    fn a_spec_comes_back() {
        for (irqchip, pit) in [(false, false), (true, false), (true, true)] {
            for exit_port in [None, Some(0), Some(0xf4)] {
                for parts in [PcParts::default(), PcParts::default().with(PcPart::Pvpanic)] {
                    let spec =
                        MachineSpec { vcpus: 2, irqchip, pit, fixups: pit, exit_port, parts };
                    assert_eq!(MachineSpec::decode(&spec.encode()).unwrap(), spec);
                }
            }
        }
    }

    #[test]
    fn another_spec_is_named() {
        let spec = small();
        let error = spec.check_same(&MachineSpec { vcpus: 2, ..spec }).unwrap_err();
        assert!(error.detail.contains("vcpus 1, the snapshot 2"), "{error}");
        let other = MachineSpec { parts: PcParts::default().with(PcPart::Acpi), ..spec };
        let error = spec.check_same(&other).unwrap_err();
        assert!(error.detail.contains("parts of a PC none, the snapshot acpi"), "{error}");
    }

    #[test]
    fn a_machine_without_parts_is_encoded_as_before_there_were_parts() {
        let mut bytes = small().encode();
        assert_eq!(bytes, [1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend([0, 0, 0, 0x80]);
        assert!(MachineSpec::decode(&bytes).is_err(), "a part of a later version");
        bytes.truncate(10);
        assert!(MachineSpec::decode(&bytes).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_spec_panic(bytes in prop::collection::vec(any::<u8>(), 0..16)) {
            if let Ok(spec) = MachineSpec::decode(&bytes) {
                prop_assert!((1..=4096).contains(&spec.vcpus));
            }
        }
    }
}

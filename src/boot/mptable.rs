//! The MP table (Intel's MultiProcessor Specification 1.4), which describes processors and
//! interrupts to Linux without ACPI: one LAPIC for each vCPU, one I/O APIC, an ISA bus with its
//! lines.

use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

const FLOATING_POINTER_SIZE: u8 = 16;
const HEADER_SIZE: usize = 44;
const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const IOAPIC_ENABLED: u8 = 1;
/// All pins of the I/O APIC: virtio devices have some of those that no PC has.
const ISA_LINES: u8 = 24;
const ALL_LAPICS: u8 = 0xff;
/// The I/O APIC has the id after them, which must not be that of all LAPICs. A kernel learns of
/// further vCPUs from ACPI.
const MAX_PROCESSORS: u8 = 254;

// Interrupt types of entries 3 and 4.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;

/// Write the table where the kernel looks for it.
pub(super) fn write(memory: &GuestMemory, vcpus: u64) -> Result<()> {
    let vcpus = u8::try_from(vcpus).unwrap_or(u8::MAX).min(MAX_PROCESSORS);
    let bytes = table(vcpus)?;
    let room = layout::HIGH_MEMORY - layout::MP_TABLE;
    if bytes.len() as u64 > room {
        return Err(Error::new(
            ErrorKind::Config,
            "cpu.vcpus",
            "the MP table does not fit below them",
        ));
    }
    memory.write(layout::MP_TABLE, &bytes)
}

fn table(vcpus: u8) -> Result<Vec<u8>> {
    let address = |at: u64| {
        u32::try_from(at).map_err(|_| Error::new(ErrorKind::Boot, "MP table", "too high"))
    };
    let config_at = address(layout::MP_TABLE + u64::from(FLOATING_POINTER_SIZE))?;
    let entries = entries(vcpus);
    let body: Vec<u8> = entries.concat();
    let mut floating = Vec::from(*b"_MP_");
    floating.extend_from_slice(&config_at.to_le_bytes());
    floating.extend_from_slice(&[FLOATING_POINTER_SIZE / 16, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut floating, 10);

    let length = u16::try_from(HEADER_SIZE + body.len()).map_err(|_| {
        Error::new(ErrorKind::Config, "cpu.vcpus", "more than an MP table can hold")
    })?;
    let mut config = Vec::from(*b"PCMP");
    config.extend_from_slice(&length.to_le_bytes());
    config.extend_from_slice(&[SPEC_1_4, 0]);
    config.extend_from_slice(b"PYVMM   MICROVM     ");
    config.extend_from_slice(&[0; 6]); // no OEM table
    let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
    config.extend_from_slice(&count.to_le_bytes());
    config.extend_from_slice(&layout::LAPIC.to_le_bytes());
    config.extend_from_slice(&[0; 4]); // no extended table
    config.extend_from_slice(&body);
    set_checksum(&mut config, 7);
    Ok([floating, config].concat())
}

fn entries(vcpus: u8) -> Vec<Vec<u8>> {
    let ioapic = vcpus; // the first id not used by a LAPIC
    let mut entries: Vec<Vec<u8>> = (0..vcpus).map(processor).collect();
    entries.push([&[1, 0][..], b"ISA   "].concat());
    entries.push(
        [&[2, ioapic, APIC_VERSION, IOAPIC_ENABLED][..], &layout::IOAPIC.to_le_bytes()].concat(),
    );
    entries.extend((0..ISA_LINES).map(|line| vec![3, INT, 0, 0, 0, line, ioapic, line]));
    entries.push(vec![4, EXTINT, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![4, NMI, 0, 0, 0, 0, ALL_LAPICS, 1]);
    entries
}

fn processor(id: u8) -> Vec<u8> {
    let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
    let signature: u32 = 0x600; // family 6; Linux asks CPUID itself
    let features: u32 = 0x201; // FPU and APIC
    let mut entry = vec![0, id, APIC_VERSION, flags];
    entry.extend_from_slice(&signature.to_le_bytes());
    entry.extend_from_slice(&features.to_le_bytes());
    entry.extend_from_slice(&[0; 8]);
    entry
}

/// The bytes of a table with its checksum add up to zero.
fn set_checksum(table: &mut [u8], at: usize) {
    let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = table.get_mut(at) {
        *byte = sum.wrapping_neg();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    #[test]
    fn both_parts_add_up_to_zero_and_the_length_is_right() {
        for vcpus in [1, 2, 254] {
            let bytes = table(vcpus).unwrap();
            let (floating, config) = bytes.split_at(16);
            assert_eq!((sum(floating), sum(config)), (0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([config[4], config[5]])), config.len());
            assert_eq!(config.len(), 44 + 20 * usize::from(vcpus) + 8 * 28);
        }
    }

    #[test]
    fn only_the_first_processor_boots() {
        let entries = entries(3);
        assert_eq!(entries[..3].iter().map(|e| e[3]).collect::<Vec<_>>(), [3, 1, 1]);
    }
}

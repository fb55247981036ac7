//! ACPI's tables (ACPI specification, chapter 5): RSDP, RSDT, XSDT, FADT, FACS, MADT and DSDT,
//! where a kernel looks for them. `dsdt.rs` has the devices that the last one lists.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;

use super::dsdt::{self, OEM_ID, OEM_REVISION, OEM_TABLE_ID, empty_table};
use crate::config::{Boot, PcPart, VmmConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;
use crate::virtio::Place;

/// The RSDP is this long, and the next table starts at the next multiple of 64.
const RSDP_SIZE: u8 = 36;
const ALIGNMENT: usize = 64;

/// FADT, IA-PC boot architecture: there are devices that no table lists, and a keyboard controller.
const LEGACY_DEVICES: u16 = 1 << 0;
const KEYBOARD_CONTROLLER: u16 = 1 << 1;
/// What a write of the reset register writes: a hard reset.
const RESET_VALUE: u8 = 6;
/// The cell of the clock that holds the century.
const CENTURY: u8 = 0x32;

/// MADT: the machine also has a PIC.
const PCAT_COMPATIBLE: u32 = 1;
/// The ids of an xAPIC are below this one; others have an x2APIC.
const X2APIC_ONLY: u64 = 255;
const ENABLED: u32 = 1;
/// Flags of an interrupt: as its bus has it, and active high by level.
const AS_THE_BUS: u16 = 0;
const LEVEL_HIGH: u16 = 0b1101;

/// The address of the RSDP of a machine that has ACPI and no firmware, which would bring its own
/// tables.
pub(super) fn rsdp(config: &VmmConfig) -> Option<u64> {
    let is_written = !matches!(config.boot, Boot::Firmware(_));
    let has_acpi = config.platform().parts.has(PcPart::Acpi);
    (has_acpi && is_written).then_some(layout::ACPI_TABLES)
}

/// Write the tables if the machine has them.
///
/// # Errors
/// If there are more vCPUs than they have room for.
pub(super) fn write(config: &VmmConfig, memory: &GuestMemory, places: &[Place]) -> Result<()> {
    if rsdp(config).is_none() {
        return Ok(());
    }
    let tables = tables(config, places)?;
    if tables.len() as u64 > layout::ACPI_END - layout::ACPI_TABLES {
        let detail = "ACPI's tables do not have room for so many";
        return Err(Error::new(ErrorKind::Config, "cpu.vcpus", detail));
    }
    memory.write(layout::ACPI_FACS, &aml(&FACS::new()))?;
    memory.write(layout::ACPI_TABLES, &tables)
}

/// All tables, the RSDP first.
fn tables(config: &VmmConfig, places: &[Place]) -> Result<Vec<u8>> {
    let mut all = Tables(vec![0; ALIGNMENT]);
    let dsdt = all.add(dsdt::table(config, places).as_slice())?;
    let mut listed = vec![all.add(&fadt(dsdt, config.has_irqchip()))?];
    if config.has_irqchip() {
        listed.push(all.add(madt(config.cpu.vcpus).as_slice())?);
    }
    let (mut rsdt, mut xsdt) = (empty_table(*b"RSDT", 1), empty_table(*b"XSDT", 1));
    for address in listed {
        rsdt.append_slice(&address.to_le_bytes());
        xsdt.append_slice(&u64::from(address).to_le_bytes());
    }
    let (rsdt, xsdt) = (all.add(rsdt.as_slice())?, all.add(xsdt.as_slice())?);
    all.0.splice(..usize::from(RSDP_SIZE), root(rsdt, xsdt));
    Ok(all.0)
}

/// Tables one after another.
struct Tables(Vec<u8>);

impl Tables {
    /// Add a table, and return its address.
    fn add(&mut self, table: &[u8]) -> Result<u32> {
        let at = layout::ACPI_TABLES + self.0.len() as u64;
        self.0.extend_from_slice(table);
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
        u32::try_from(at).map_err(|_| Error::new(ErrorKind::Boot, "ACPI", "the tables are too big"))
    }
}

fn aml(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The RSDP: of its two checksums, the first is for the 20 bytes that the first version has.
fn root(rsdt: u32, xsdt: u32) -> Vec<u8> {
    let mut bytes = Vec::from(*b"RSD PTR \0");
    bytes.extend_from_slice(&OEM_ID);
    bytes.push(2);
    bytes.extend_from_slice(&rsdt.to_le_bytes());
    set_checksum(&mut bytes, 8);
    bytes.extend_from_slice(&u32::from(RSDP_SIZE).to_le_bytes());
    bytes.extend_from_slice(&u64::from(xsdt).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    set_checksum(&mut bytes, 32);
    bytes
}

/// The bytes of a table with its checksum add up to zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = sum.wrapping_neg();
    }
}

/// The FADT. Each address is there in its old and its new field: some kernels read only one.
fn fadt(dsdt: u32, has_irqchip: bool) -> Vec<u8> {
    let port = |offset: u16| u32::from(layout::PM_BASE + offset);
    let register = |offset: u16, bits| {
        let address = u64::from(port(offset));
        GAS::new(AddressSpace::SystemIo, bits, 0, AccessSize::Undefined, address)
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.firmware_ctrl = u32::try_from(layout::ACPI_FACS).unwrap_or_default().into();
    fadt.sci_int = if has_irqchip { layout::SCI_IRQ.into() } else { 0.into() };
    (fadt.pm1a_evt_blk, fadt.x_pm1a_evt_blk) = (port(0).into(), register(0, 32));
    (fadt.pm1a_cnt_blk, fadt.x_pm1a_cnt_blk) = (port(4).into(), register(4, 16));
    (fadt.pm_tmr_blk, fadt.x_pm_tmr_blk) = (port(8).into(), register(8, 32));
    (fadt.pm1_evt_len, fadt.pm1_cnt_len, fadt.pm_tmr_len) = (4, 2, 4);
    // Beyond the limits of C2 and C3: there are none.
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (0xfff.into(), 0xfff.into());
    fadt.century = CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | KEYBOARD_CONTROLLER).into();
    let reset = u64::from(layout::RESET_CONTROL);
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, reset);
    fadt.reset_value = RESET_VALUE;
    aml(&fadt.finalize())
}

/// The MADT: a local APIC for each vCPU, the I/O APIC, and the lines that are not as on an ISA bus.
fn madt(vcpus: u64) -> Sdt {
    let mut madt = empty_table(*b"APIC", 4);
    madt.append_slice(&layout::LAPIC.to_le_bytes());
    madt.append_slice(&PCAT_COMPATIBLE.to_le_bytes());
    (0..vcpus).for_each(|id| madt.append_slice(&processor(id)));
    let address = layout::IOAPIC.to_le_bytes();
    madt.append_slice(&[&[1, 12, 0, 0][..], &address, &[0; 4]].concat());
    // KVM's PIT has the line of the same number, unlike that of most PCs.
    for (line, flags) in [(0, AS_THE_BUS), (layout::SCI_IRQ, LEVEL_HIGH)] {
        let (source, target) = (line.to_le_bytes(), u32::from(line).to_le_bytes());
        madt.append_slice(&[&[2, 10, 0][..], &source[..1], &target, &flags.to_le_bytes()].concat());
    }
    // The second line of every local APIC is the NMI.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}

/// The local APIC of a vCPU, which is its id in the DSDT as well.
fn processor(id: u64) -> Vec<u8> {
    match u8::try_from(id) {
        Ok(small) if id < X2APIC_ONLY => {
            [&[0, 8, small, small][..], &ENABLED.to_le_bytes()].concat()
        }
        _ => {
            let id = u32::try_from(id).unwrap_or(u32::MAX).to_le_bytes();
            [&[9, 16, 0, 0][..], &id, &ENABLED.to_le_bytes(), &id].concat()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PlatformConfig;

    fn config(vcpus: u64, irqchip: bool) -> VmmConfig {
        let platform = PlatformConfig { acpi: Some(true), ..PlatformConfig::default() };
        let mut config = VmmConfig { platform, irqchip: Some(irqchip), ..VmmConfig::default() };
        config.cpu.vcpus = vcpus;
        config
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// The table at an address, which is whole.
    fn at(all: &[u8], address: u64) -> &[u8] {
        let table = &all[usize::try_from(address - layout::ACPI_TABLES).unwrap()..];
        let table = &table[..usize::try_from(number(&table[4..8])).unwrap()];
        assert_eq!(sum(table), 0, "{:?}", String::from_utf8_lossy(&table[..4]));
        table
    }

    #[test]
    fn the_root_names_the_same_tables_in_both_lists() {
        let all = tables(&config(2, true), &[]).unwrap();
        assert!(all.starts_with(b"RSD PTR "));
        assert_eq!((sum(&all[..20]), sum(&all[..36]), all[15]), (0, 0, 2));
        let (rsdt, xsdt) = (at(&all, number(&all[16..20])), at(&all, number(&all[24..32])));
        let old: Vec<_> = rsdt[36..].chunks(4).map(number).collect();
        let new: Vec<_> = xsdt[36..].chunks(8).map(number).collect();
        assert_eq!(old, new);
        let names: Vec<_> = new.iter().map(|address| &at(&all, *address)[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC"]);
    }

    #[test]
    fn the_fadt_names_the_registers_and_the_dsdt() {
        let all = tables(&config(1, true), &[]).unwrap();
        let xsdt = at(&all, number(&all[24..32]));
        let fadt = at(&all, number(&xsdt[36..44]));
        assert_eq!(at(&all, number(&fadt[40..44]))[..4], *b"DSDT");
        assert_eq!(number(&fadt[36..40]), layout::ACPI_FACS);
        assert_eq!((number(&fadt[56..60]), number(&fadt[64..68])), (0x600, 0x604));
        assert_eq!((number(&fadt[76..80]), number(&fadt[46..48])), (0x608, 9));
        assert_eq!((number(&fadt[120..128]), fadt[128]), (0xcf9, 6), "the reset register");
        assert_eq!(fadt[112..116], [0x75, 5, 0, 0], "the flags");
    }

    #[test]
    fn each_vcpu_has_its_local_apic() {
        for (vcpus, length) in [(1, 8), (254, 254 * 8), (300, 255 * 8 + 45 * 16)] {
            let madt = madt(vcpus);
            assert_eq!(madt.as_slice().len(), 44 + length + 12 + 2 * 10 + 6);
        }
        assert_eq!(processor(254), [0, 8, 254, 254, 1, 0, 0, 0]);
        assert_eq!(processor(255), [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0]);
    }

    #[test]
    fn a_machine_has_tables_if_it_has_acpi_and_there_is_room() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        write(&VmmConfig::default(), &memory, &[]).unwrap();
        let start = |memory: &GuestMemory| memory.load::<u64>(layout::ACPI_TABLES).unwrap();
        assert_eq!(start(&memory), 0);
        write(&config(layout::MAX_VCPUS, true), &memory, &[]).unwrap();
        assert_eq!(start(&memory).to_le_bytes(), *b"RSD PTR ");
        assert_eq!(rsdp(&config(1, true)), Some(layout::ACPI_TABLES));
        write(&config(1024, true), &memory, &[]).unwrap();
        assert_eq!(write(&config(9000, true), &memory, &[]).unwrap_err().at, "cpu.vcpus");
    }
}

//! The DSDT: the devices of a machine, in ACPI's machine language. Pure data.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use crate::config::{PcPart, VmmConfig};
use crate::layout;
use crate::virtio::Place;

/// Who made the tables.
pub(super) const OEM_ID: [u8; 6] = *b"PYVMM ";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"PYVMM   ";
pub(super) const OEM_REVISION: u32 = 1;
const HEADER_SIZE: u32 = 36;

/// The sleep type of S5 in the PM1a control register.
const S5: u8 = 0;
/// Beyond this number, there is no room to list the processors. A kernel finds them in the MADT.
const MAX_LISTED: u64 = 1024;
/// Present, enabled, shown and working.
const PRESENT: u8 = 0xf;

/// A table without contents.
pub(super) fn empty_table(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, HEADER_SIZE, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

/// The table.
pub(super) fn table(config: &VmmConfig, places: &[Place]) -> Sdt {
    let platform = config.platform();
    let has_irqchip = platform.irqchip;
    let has_serial = |number| {
        let others = [PcPart::Com2, PcPart::Com3, PcPart::Com4];
        let other = usize::from(number).checked_sub(2).and_then(|at| others.get(at));
        other.is_none_or(|part| platform.parts.has(*part))
    };
    let mut devices = Vec::new();
    if config.cpu.vcpus <= MAX_LISTED {
        (0..config.cpu.vcpus).for_each(|id| devices.extend(processor(id)));
    }
    let ports: Vec<_> = (1..).zip(layout::SERIAL_PORTS).filter(|(n, _)| has_serial(*n)).collect();
    for (number, (base, line)) in &ports {
        let is_shared = ports.iter().filter(|(_, (_, other))| other == line).count() > 1;
        let line = has_irqchip.then_some((*line, is_shared));
        devices.extend(serial_port(*number, *base, line));
    }
    devices.extend(clock(has_irqchip));
    devices.extend(keyboard_controller(has_irqchip));
    if platform.parts.has(PcPart::Pvpanic) {
        devices.extend(paravirtual("PEVT", "QEMU0001", (layout::PVPANIC, 1)));
    }
    if platform.parts.has(PcPart::FwCfg) {
        devices.extend(paravirtual("FWCF", "QEMU0002", (layout::FW_CFG, 12)));
    }
    for (number, place) in (0..=u8::MAX).zip(places) {
        devices.extend(virtio_mmio(number, place));
    }
    let mut table = empty_table(*b"DSDT", 2);
    table.append_slice(&Scope::raw(Path::new("\\_SB_"), devices));
    table.append_slice(&bytes(&Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&S5, &S5, &S5, &S5]),
    )));
    table
}

/// A virtio device on the MMIO transport.
fn virtio_mmio(number: u8, place: &Place) -> Vec<u8> {
    let (Ok(base), Some(line)) = (u32::try_from(place.base), place.line) else {
        return Vec::new(); // without an interrupt, a driver cannot use it
    };
    let size = u32::try_from(layout::VIRTIO_SIZE).unwrap_or(u32::MAX);
    let memory = Memory32Fixed::new(true, base, size);
    let interrupt = Interrupt::new(true, true, false, false, line);
    let resources = ResourceTemplate::new(vec![&memory, &interrupt]);
    bytes(&Device::new(
        Path::new(&format!("VR{number:02X}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            &Name::new(Path::new("_CCA"), &1u8),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    ))
}

fn bytes(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// An interrupt line, and whether several devices use it.
type Line = (u32, bool);

/// A device of a PC, by its Plug and Play id, with its ports and its line of an ISA bus.
fn device(name: &str, id: &str, unit: u8, ports: &[(u16, u8)], line: Option<Line>) -> Vec<u8> {
    let ports: Vec<_> = ports.iter().map(|(base, n)| IO::new(*base, *base, 1, *n)).collect();
    let line = line.map(|(line, shared)| Interrupt::new(true, true, false, shared, line));
    let ports = ports.iter().map(|port| port as &dyn Aml);
    let resources =
        ResourceTemplate::new(ports.chain(line.iter().map(|line| line as &dyn Aml)).collect());
    bytes(&Device::new(
        Path::new(name),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new(id)),
            &Name::new(Path::new("_UID"), &unit),
            &Name::new(Path::new("_STA"), &PRESENT),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    ))
}

fn serial_port(number: u8, base: u16, line: Option<Line>) -> Vec<u8> {
    device(&format!("COM{number}"), "PNP0501", number, &[(base, 8)], line)
}

fn clock(has_irqchip: bool) -> Vec<u8> {
    device(
        "RTC_",
        "PNP0B00",
        0,
        &[(layout::RTC, 2)],
        has_irqchip.then_some((layout::RTC_IRQ, false)),
    )
}

fn keyboard_controller(has_irqchip: bool) -> Vec<u8> {
    let ports = [(layout::I8042, 1), (layout::I8042 + 4, 1)];
    device("KBD_", "PNP0303", 0, &ports, has_irqchip.then_some((layout::KEYBOARD_IRQ, false)))
}

/// A device of QEMU's, with its ports.
fn paravirtual(name: &str, id: &'static str, (base, count): (u16, u8)) -> Vec<u8> {
    let port = IO::new(base, base, 1, count);
    bytes(&Device::new(
        Path::new(name),
        vec![
            &Name::new(Path::new("_HID"), &id),
            &Name::new(Path::new("_STA"), &PRESENT),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&port])),
        ],
    ))
}

/// A processor, with the id that the MADT gives its local APIC.
fn processor(id: u64) -> Vec<u8> {
    let unit = u32::try_from(id).unwrap_or(u32::MAX);
    bytes(&Device::new(
        Path::new(&format!("C{:03X}", unit & 0xfff)),
        vec![&Name::new(Path::new("_HID"), &"ACPI0007"), &Name::new(Path::new("_UID"), &unit)],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PlatformConfig;

    fn has(bytes: &[u8], part: &[u8]) -> bool {
        bytes.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn it_lists_what_the_machine_has() {
        let mut config = VmmConfig { irqchip: Some(true), ..VmmConfig::default() };
        config.cpu.vcpus = 2;
        let without = table(&config, &[]);
        for name in [&b"C000"[..], b"C001", b"COM1", b"RTC_", b"KBD_", b"_S5_"] {
            assert!(has(without.as_slice(), name), "{name:?}");
        }
        assert!(!has(without.as_slice(), b"C002"));
        config.cpu.vcpus = MAX_LISTED + 1;
        assert!(!has(table(&config, &[]).as_slice(), b"C000"));
        config.cpu.vcpus = 2;
        assert!(!has(without.as_slice(), b"QEMU0001"));
        config.platform = PlatformConfig { pvpanic: Some(true), ..PlatformConfig::default() };
        assert!(has(table(&config, &[]).as_slice(), b"QEMU0001"));
    }

    #[test]
    fn a_virtio_device_has_its_memory_and_its_line() {
        let device = virtio_mmio(3, &Place { base: 0xd000_0000, line: Some(5) });
        assert!(has(&device, b"VR03") && has(&device, b"LNRO0005"));
        assert!(has(&device, &[0x86, 9, 0, 1, 0, 0, 0, 0xd0, 0, 0x10, 0, 0]));
        assert!(has(&device, &[0x89, 6, 0, 3, 1, 5, 0, 0, 0]));
    }
}

//! Every guest-physical address and port that pyvmm chooses, in one place.

/// A page of guest memory.
pub const PAGE: u64 = 4096;

/// Conventional memory ends here. Above are the EBDA and the ROMs of a PC.
pub const EBDA_START: u64 = 0x9_fc00;
/// Where a processor starts: the last 16 bytes of the firmware.
pub const RESET_VECTOR: u64 = MMIO_GAP_END - 16;
/// No table of pyvmm's is above, in the first MiB. A linker puts a file's headers there if its code
/// begins at 1 MiB.
pub const LOW_TABLES_END: u64 = 0xf_f000;
/// The first MiB ends here.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Between 3 and 4 GiB there are devices instead of RAM.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// RAM continues here.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

/// The tables that pyvmm writes to guest memory before a start are between here and the EBDA.
pub const SYSTEM_AREA: u64 = 0x8_0000;
/// That whole range: start and end.
pub const TABLES: (u64, u64) = (SYSTEM_AREA, EBDA_START);
/// The global descriptor table.
pub const GDT: u64 = SYSTEM_AREA;
/// The TSS of 64-bit ring 3, with an I/O bitmap that allows every port.
pub const TSS: u64 = 0x8_1000;
/// The limit of the TSS: 104 bytes, an 8 KiB bitmap and a final byte of ones.
pub const TSS_LIMIT: u32 = 0x2068;
/// The top page table.
pub const PML4: u64 = 0x8_4000;
/// Its only page of pointers.
pub const PDPT: u64 = 0x8_5000;
/// Four page directories: 4 GiB in pages of 2 MiB.
pub const PAGE_DIRECTORIES: u64 = 0x8_6000;
/// An ELF program has no directories here, but the next four items. This one is the stack for the
/// processor's exception frames; it grows down from the next page.
pub const EXCEPTION_STACK: u64 = 0x8_6000;
/// The interrupt descriptors and the code of their handlers.
pub const EXCEPTION_PAGE: u64 = 0x8_7000;
/// The program's symbols.
pub const SYMBOLS: u64 = EXCEPTION_PAGE + 0x800;
/// The program's page tables below the first two levels, up to the EBDA.
pub const PROGRAM_TABLES: u64 = 0x8_8000;
/// The stack that a kernel starts with begins here and ends at its boot parameters.
pub const KERNEL_STACK: u64 = 0x8_e000;
/// Linux's boot parameters, or what another protocol tells a kernel: up to the EBDA.
pub const ZERO_PAGE: u64 = 0x9_0000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x9_1000;
/// The size of Linux's buffer for it, with the closing zero.
pub const CMDLINE_SIZE: usize = 2048;
/// The maximum number of a kernel's modules.
pub const MAX_MODULES: usize = 256;
/// The MP table is at the start of the EBDA, where Linux looks for it.
pub const MP_TABLE: u64 = EBDA_START;

/// ACPI's firmware control structure, in a page of its own.
pub const ACPI_FACS: u64 = 0xe_0000;
/// ACPI's tables, the RSDP first: in the range that kernels search for it.
pub const ACPI_TABLES: u64 = 0xe_1000;
/// The tables end here at the latest.
pub const ACPI_END: u64 = HIGH_MEMORY;

/// The I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LAPIC: u32 = 0xfee0_0000;
/// One page for KVM's identity map, which Intel's real mode needs. Below the last 16 MiB under 4
/// GiB, where a PC has its firmware.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages for KVM's TSS, right after it.
pub const KVM_TSS: usize = 0xfeff_d000;
/// Bytes of both.
pub const KVM_OWN_SIZE: u64 = 4 * PAGE;

/// COM1.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt line.
pub const COM1_IRQ: u32 = 4;
/// The serial ports of a PC, COM1 first, and their interrupt lines.
pub const SERIAL_PORTS: [(u16, u32); 4] = [(COM1, COM1_IRQ), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
/// ACPI's system control interrupt.
pub const SCI_IRQ: u16 = 9;
/// The other serial ports, with their interrupt lines.
pub const COM2: (u16, u32) = SERIAL_PORTS[1];
/// COM3, which shares COM1's line.
pub const COM3: (u16, u32) = SERIAL_PORTS[2];
/// COM4, which shares COM2's line.
pub const COM4: (u16, u32) = SERIAL_PORTS[3];
/// The ports of one of them.
pub const COM_PORTS: u64 = 8;
/// The port that takes the messages of firmware.
pub const DEBUG_PORT: u16 = 0x402;
/// fw_cfg's selector, with its data and DMA ports.
pub const FW_CFG: u16 = 0x510;
/// The number of its ports.
pub const FW_CFG_PORTS: u64 = 12;
/// The first register of the VGA adapter.
pub const VGA: u16 = 0x3c0;
/// The number of its ports.
pub const VGA_PORTS: u64 = 32;
/// The address and data ports of PCI's configuration.
pub const PCI: u16 = 0xcf8;
/// The number of its ports.
pub const PCI_PORTS: u64 = 8;
/// The HPET.
pub const HPET: u64 = 0xfed0_0000;
/// The size of its registers.
pub const HPET_SIZE: u64 = 0x400;
/// The registers of virtio devices, each a page: below the I/O APIC.
pub const VIRTIO: u64 = 0xfeb0_0000;
/// The last address for them.
pub const VIRTIO_LAST: u64 = 0xfebf_ffff;
/// The size of one device's registers.
pub const VIRTIO_SIZE: u64 = PAGE;
/// The interrupt lines that they get, in this order: first those that a PC's PICs have, too.
pub const VIRTIO_LINES: [u32; 16] = [5, 10, 11, 6, 7, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
/// The exit port, as of QEMU's isa-debug-exit.
pub const EXIT_PORT: u16 = 0xf4;
/// The number of its ports.
pub const EXIT_PORTS: u64 = 4;
/// The real-time clock's index port; its data port follows.
pub const RTC: u16 = 0x70;
/// The real-time clock's interrupt line.
pub const RTC_IRQ: u32 = 8;
/// The i8042's data port; its command port is four above.
pub const I8042: u16 = 0x60;
/// The interrupt line of its keyboard.
pub const KEYBOARD_IRQ: u32 = 1;
/// The port that reports a panic, as of QEMU's pvpanic.
pub const PVPANIC: u16 = 0x505;
/// The reset control register of PCs with PCI.
pub const RESET_CONTROL: u16 = 0xcf9;
/// System control port A, with the fast reset.
pub const SYSTEM_CONTROL: u16 = 0x92;
/// ACPI's PM1a event block; the PM1a control block is 4 ports above, the PM timer 8.
pub const PM_BASE: u16 = 0x600;
/// The ports of these three.
pub const PM_PORTS: u64 = 12;
/// The interrupt lines of the built-in devices, and their names.
pub const DEVICE_LINES: [(u32, &str); 3] =
    [(KEYBOARD_IRQ, "i8042"), (COM1_IRQ, "COM1"), (RTC_IRQ, "RTC")];
/// The ports of the built-in devices, as start and count, and their names. If there is an interrupt
/// controller, KVM's speaker port is between the ports of the i8042.
#[must_use]
pub fn device_ports(irqchip: bool) -> &'static [((u64, u64), &'static str)] {
    const COM1_PORTS: ((u64, u64), &str) = ((COM1 as u64, 8), "COM1");
    const RTC_PORTS: ((u64, u64), &str) = ((RTC as u64, 2), "RTC");
    const START: u64 = I8042 as u64;
    if irqchip {
        &[COM1_PORTS, RTC_PORTS, ((START, 1), "i8042"), ((START + 2, 3), "i8042")]
    } else {
        &[COM1_PORTS, RTC_PORTS, ((START, 5), "i8042")]
    }
}

/// The ports that KVM answers itself if there is an interrupt controller.
pub const KERNEL_PORTS: [((u64, u64), &str); 5] = [
    ((0x20, 2), "the PIC of KVM"),
    ((0x40, 4), "the PIT of KVM"),
    ((0x61, 1), "the speaker port of KVM"),
    ((0xa0, 2), "the second PIC of KVM"),
    ((0x4d0, 2), "the PIC's trigger modes of KVM"),
];

/// Guest-physical addresses that KVM uses itself: start, length, and purpose.
pub fn kernel_addresses(irqchip: bool) -> impl Iterator<Item = ((u64, u64), &'static str)> {
    let page = |at: u32, what| ((u64::from(at), PAGE), what);
    let chips = [page(IOAPIC, "the I/O APIC"), page(LAPIC, "the local APICs")];
    let own = ((KVM_IDENTITY_MAP, KVM_OWN_SIZE), "pages that KVM reserves");
    chips.into_iter().filter(move |_| irqchip).chain([own])
}

/// The maximum number of vCPUs: as many as any KVM has, and as the fields of CPUID can tell.
pub const MAX_VCPUS: u64 = 4096;
/// The maximum number of vCPUs whose LAPICs can be in xAPIC mode: id 255 means all of them there.
pub const MAX_XAPIC_VCPUS: u64 = 255;

/// The ranges of RAM for a size: one, or two around the gap.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= MMIO_GAP_START {
        return vec![(0, size)];
    }
    vec![(0, MMIO_GAP_START), (MMIO_GAP_END, size - MMIO_GAP_START)]
}

/// Whether an address is in RAM.
#[must_use]
pub fn in_memory(size: u64, address: u64) -> bool {
    ram_ranges(size).iter().any(|(start, length)| address >= *start && address - start < *length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_gap() {
        assert_eq!(ram_ranges(1 << 20), [(0, 1 << 20)]);
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn an_address_in_the_gap_is_not_memory() {
        assert!(in_memory(5 << 30, 0xbfff_ffff));
        assert!(!in_memory(5 << 30, 0xc000_0000));
        assert!(in_memory(5 << 30, 0x1_0000_0000));
        assert!(!in_memory(5 << 30, 6 << 30));
        assert!(!in_memory(1 << 20, 1 << 20));
    }
}

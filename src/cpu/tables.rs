//! The tables in guest memory for a start in protected or 64-bit mode: GDT, page tables, TSS. Those
//! of an ELF program are in `paging.rs` and `exceptions.rs`.

use super::paging::PRESENT;
use super::{exceptions, gdt};
use crate::cpu::CpuMode;
use crate::error::Result;
use crate::layout;
use crate::memory::GuestMemory;
use crate::x86::{PTE_LARGE, PTE_USER, PTE_WRITABLE};

const ENTRIES: u64 = 512;
const GIB: u64 = 1 << 30;

/// Write the tables that the mode needs. `one_gib_pages`: whether the vCPU supports 1 GiB pages,
/// for memory above 4 GiB.
///
/// # Errors
/// If guest memory is too small to hold the tables.
pub fn write(memory: &GuestMemory, mode: CpuMode, one_gib_pages: impl Fn() -> bool) -> Result<()> {
    if matches!(mode, CpuMode::Real16 | CpuMode::Reset) {
        return Ok(());
    }
    write_u64s(memory, layout::GDT, gdt::gdt(mode))?;
    if mode.is_32_bit() {
        return Ok(());
    }
    if mode == CpuMode::Program64 {
        exceptions::write(memory)?; // its page tables were written when it was loaded
    } else {
        write_page_tables(memory, mode, one_gib_pages())?;
    }
    if matches!(mode, CpuMode::User64 | CpuMode::Program64) {
        // All zeros except the bitmap's offset, at 102, and the byte of ones that ends the bitmap.
        memory.write(layout::TSS + 102, &104u16.to_le_bytes())?;
        memory.write(layout::TSS + u64::from(layout::TSS_LIMIT), &[0xff])?;
    }
    Ok(())
}

/// Identity mapping: 4 GiB in pages of 2 MiB, and the memory above in pages of 1 GiB. Without
/// those, it is mapped in pages of 2 MiB as far as there is room for their directories: to 25 GiB,
/// or to 8 GiB for a kernel.
fn write_page_tables(memory: &GuestMemory, mode: CpuMode, one_gib_pages: bool) -> Result<()> {
    let flags = PRESENT | PTE_WRITABLE | if mode == CpuMode::User64 { PTE_USER } else { 0 };
    memory.write(layout::PML4, &(layout::PDPT | flags).to_le_bytes())?;
    let directory = |n: u64| layout::PAGE_DIRECTORIES + n * 0x1000;
    write_u64s(memory, layout::PDPT, (0..4).map(|n| directory(n) | flags))?;
    write_u64s(
        memory,
        layout::PAGE_DIRECTORIES,
        (0..4 * ENTRIES).map(|n| n << 21 | flags | PTE_LARGE),
    )?;
    // A kernel's stack and parameters are where the last directories would be.
    let room = if mode == CpuMode::Kernel64 { layout::KERNEL_STACK } else { layout::EBDA_START };
    for gib in 4..end_of_memory(memory).div_ceil(GIB).min(ENTRIES) {
        let entry = if one_gib_pages {
            (gib * GIB) | flags | PTE_LARGE
        } else {
            let Some(at) = high_directory(gib, room) else { break };
            write_u64s(
                memory,
                at,
                (gib * ENTRIES..(gib + 1) * ENTRIES).map(|n| n << 21 | flags | PTE_LARGE),
            )?;
            at | flags
        };
        memory.write(layout::PDPT + gib * 8, &entry.to_le_bytes())?;
    }
    Ok(())
}

fn end_of_memory(memory: &GuestMemory) -> u64 {
    memory.ranges().iter().map(|(start, size)| start + size).max().unwrap_or(0)
}

/// The address of the directory for a GiB above 4, if there is room for one below `room`.
fn high_directory(gib: u64, room: u64) -> Option<u64> {
    let at = layout::PAGE_DIRECTORIES + gib * 0x1000;
    (at + 0x1000 <= room).then_some(at)
}

fn write_u64s(memory: &GuestMemory, at: u64, values: impl IntoIterator<Item = u64>) -> Result<()> {
    let bytes: Vec<u8> = values.into_iter().flat_map(u64::to_le_bytes).collect();
    if bytes.is_empty() { Ok(()) } else { memory.write(at, &bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u64_at(memory: &GuestMemory, at: u64) -> u64 {
        let mut bytes = [0; 8];
        memory.read(at, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn the_map_is_the_identity_in_2_mib_pages() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        write(&memory, CpuMode::Long64, || true).unwrap();
        assert_eq!(u64_at(&memory, layout::PML4), layout::PDPT | 0x63);
        assert_eq!(u64_at(&memory, layout::PDPT + 24), (layout::PAGE_DIRECTORIES + 0x3000) | 0x63);
        assert_eq!(u64_at(&memory, layout::PAGE_DIRECTORIES + 8 * 2047), 0xffe0_00e3);
        assert_eq!(u64_at(&memory, layout::PDPT + 32), 0);
    }

    #[test]
    fn memory_above_4_gib_is_mapped_in_1_gib_pages() {
        let memory = GuestMemory::new(4 << 30).unwrap();
        write(&memory, CpuMode::User64, || true).unwrap();
        assert_eq!(u64_at(&memory, layout::PDPT + 32), 4 << 30 | 0xe7);
        assert_eq!(u64_at(&memory, layout::PDPT + 40), 0);
    }

    #[test]
    fn without_1_gib_pages_the_directories_go_on() {
        let memory = GuestMemory::new(4 << 30).unwrap();
        write(&memory, CpuMode::Long64, || false).unwrap();
        let directory = layout::PAGE_DIRECTORIES + 0x4000;
        assert_eq!(u64_at(&memory, layout::PDPT + 32), directory | 0x63);
        assert_eq!(u64_at(&memory, directory + 8), 4 << 30 | 2 << 20 | 0xe3);
        let last = high_directory(24, layout::EBDA_START);
        assert_eq!(last.map(|at| at < layout::EBDA_START), Some(true));
        assert_eq!(high_directory(26, layout::EBDA_START), None);
        assert_eq!(high_directory(8, layout::KERNEL_STACK), None);
    }

    #[test]
    fn ring_3_may_use_every_port() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        write(&memory, CpuMode::User64, || false).unwrap();
        let mut tss = vec![0; layout::TSS_LIMIT as usize + 1];
        memory.read(layout::TSS, &mut tss).unwrap();
        assert_eq!(tss[102], 104);
        assert!(tss[104..0x2068].iter().all(|b| *b == 0));
        assert_eq!(tss[0x2068], 0xff);
    }
}

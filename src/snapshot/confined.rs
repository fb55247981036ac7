//! Which guests cannot leave ring 3 unnoticed: after a run of theirs, a reset sets less.
//! docs/snapshots.md has the argument. On the thread that resets, with all vCPUs stopped.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::msrs;
use super::snapshot::Snapshot;
use super::state::{RecordKind, from_bytes, get};
use super::vcpu::special_of;
use crate::cpu::gdt::{GDT_LIMIT, gdt};
use crate::cpu::{CpuMode, exceptions};
use crate::debug::Paging;
use crate::layout;
use crate::memory::part;
use crate::memory::ranges::{ByteRange, overlap};
use crate::vcpu::Vcpu;
use crate::x86::{
    CR0_PE, CR0_PG, CR4_FSGSBASE, CR4_OSXSAVE, CR4_PAE, CR4_PKE, CR4_SMAP, EFER_LMA, EFER_LME,
    EFER_NXE, PTE_ADDRESS, PTE_LARGE, PTE_PRESENT, PTE_USER, VM,
};

/// The features of CR4 with which ring 3 changes nothing but its registers and memory: bits 0 to
/// 11, FSGSBASE, OSXSAVE, SMEP, SMAP and PKE. Others, such as shadow stacks, were not examined.
const CR4_EXAMINED: u64 = 0xfff | CR4_FSGSBASE | CR4_OSXSAVE | 1 << 20 | CR4_SMAP | CR4_PKE;
/// More page tables than there is room for.
const MAX_TABLES: usize = 32;

/// Whether the only vCPU of a machine has been in ring 3 ever since it was set to a snapshot's
/// state. `changed` are the pages that the reset has changed.
pub(crate) fn has_stayed(snapshot: &Snapshot, vcpu: &Vcpu, changed: &[ByteRange]) -> bool {
    vcpu.comes_from(snapshot.cache.state)
        && !exceptions::is_here(vcpu.left_at())
        && !changed.iter().any(|range| overlap(*range, layout::TABLES))
        && *snapshot.cache.is_confined.get_or_init(|| is_confined(snapshot).unwrap_or(false))
}

/// Whether a guest that continues from here cannot leave ring 3 but by an exception, whose code
/// halts. `None` if a part of the state is missing.
fn is_confined(snapshot: &Snapshot) -> Option<bool> {
    let spec = &snapshot.spec;
    let [records] = snapshot.vcpus.as_slice() else { return Some(false) };
    let sregs = special_of(records, 0)?;
    let regs: kvm_regs = from_bytes("regs", get(records, RecordKind::Regs, 0)?).ok()?;
    let registers = msrs::entries(get(records, RecordKind::Msrs, 0)?).ok()?;
    let read = |at| word(snapshot, at);
    Some(
        !spec.irqchip
            && !spec.fixups
            && is_ring_3(&regs, &sregs)
            && msrs::are_quiet(&registers)
            && has_own_tables(&sregs, read),
    )
}

/// The word at an address of a snapshot's memory.
fn word(snapshot: &Snapshot, at: u64) -> Option<u64> {
    let range = snapshot.ranges.iter().find(|range| {
        at.checked_sub(range.start).is_some_and(|offset| offset + 8 <= range.image.size())
    })?;
    let (offset, mut bytes) = (at - range.start, [0; 8]);
    part(range.image.mapping().ok()?, (offset, offset + 8)).ok()?.copy_to(&mut bytes);
    Some(u64::from_le_bytes(bytes))
}

fn is_ring_3(regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
    let is_of_ring_3 =
        |segment: &kvm_segment| segment.dpl == 3 && segment.s == 1 && segment.present == 1;
    is_of_ring_3(&sregs.cs)
        && is_of_ring_3(&sregs.ss)
        && sregs.cs.selector & 3 == 3
        && regs.rflags & VM == 0
        && sregs.cr0 & CR0_PE != 0
        && sregs.cr0 & CR0_PG != 0
        && sregs.cr4 & CR4_PAE != 0
        && sregs.cr4 & !CR4_EXAMINED == 0
        // Long mode, and no SYSCALL.
        && sregs.efer & !EFER_NXE == EFER_LME | EFER_LMA
}

/// Whether the descriptors are those of an ELF program, without call gates, and ring 3 reaches
/// neither them nor the page tables.
fn has_own_tables(sregs: &kvm_sregs, read: impl Fn(u64) -> Option<u64>) -> bool {
    let kvm_sregs { gdt: global, idt, ldt, .. } = sregs;
    let paging = Paging::of(sregs);
    let is_at_itself = |at| paging.translate(at, |at, _| read(at)) == Some(at);
    let descriptors = gdt(CpuMode::Program64);
    let has_descriptors =
        || (0..).zip(&descriptors).all(|(n, own)| read(layout::GDT + 8 * n) == Some(*own));
    let local = match ldt.present == 0 || ldt.unusable != 0 {
        true => (0, 0),
        false => (ldt.base, ldt.base.saturating_add(u64::from(ldt.limit) + 1)),
    };
    let mut walk = Walk { read: &read, local, left: MAX_TABLES };
    (global.base, global.limit) == (layout::GDT, GDT_LIMIT)
        && (idt.base, idt.limit) == (layout::EXCEPTION_PAGE, exceptions::IDT_LIMIT)
        && is_at_itself(layout::GDT)
        && is_at_itself(layout::EXCEPTION_PAGE)
        && has_descriptors()
        && exceptions::are_intact(&read)
        && walk.keeps_tables(sregs.cr3 & PTE_ADDRESS, 3, 0, true)
}

struct Walk<'a, R> {
    read: &'a R,
    /// The linear addresses of local descriptors.
    local: ByteRange,
    /// How many more tables to look at.
    left: usize,
}

impl<R: Fn(u64) -> Option<u64>> Walk<'_, R> {
    /// Whether this page table and those below it are among the machine's own tables, ring 3
    /// reaches none of those, and nothing is mapped where local descriptors would be.
    fn keeps_tables(&mut self, table: u64, level: u32, linear: u64, is_user: bool) -> bool {
        if self.left == 0 || !overlap((table, table + 1), layout::TABLES) {
            return false;
        }
        self.left -= 1;
        let size = 1u64 << (12 + 9 * level);
        (0..512).all(|index| {
            let Some(entry) = (self.read)(table + 8 * index) else { return false };
            if entry & PTE_PRESENT == 0 {
                return true;
            }
            let (is_user, linear) = (is_user && entry & PTE_USER != 0, linear + index * size);
            let is_page = level == 0 || entry & PTE_LARGE != 0;
            if !is_page {
                return self.keeps_tables(entry & PTE_ADDRESS, level - 1, linear, is_user);
            }
            let start = entry & PTE_ADDRESS & !(size - 1);
            level < 3
                && !(is_user && overlap((start, start + size), layout::TABLES))
                && !overlap((linear, linear + size), self.local)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::paging::{self, Mapping, SYSTEM};
    use crate::cpu::{regs, tables};
    use crate::memory::GuestMemory;
    use crate::x86::{CR4_CET, CR4_VMXE};

    const ENTRY: u64 = 0x20_0000;

    fn sregs() -> kvm_sregs {
        let mut sregs = kvm_sregs::default();
        regs::set_start_sregs(&mut sregs, CpuMode::Program64, ENTRY);
        sregs
    }

    fn memory(more: &[Mapping]) -> GuestMemory {
        let memory = GuestMemory::new(8 << 20).unwrap();
        let page =
            |start| Mapping { start, end: start + 0x1000, user: true, write: true, execute: true };
        let mut all = vec![page(ENTRY), page(0x60_0000)];
        all.extend(SYSTEM.iter().filter(|own| more.iter().all(|other| other.start != own.start)));
        all.extend(more);
        paging::write(&memory, &all).unwrap();
        tables::write(&memory, CpuMode::Program64, || false).unwrap();
        memory
    }

    fn keeps(memory: &GuestMemory, sregs: &kvm_sregs) -> bool {
        has_own_tables(sregs, |at| memory.load::<u64>(at).ok())
    }

    #[test]
    fn a_program_keeps_its_tables_as_long_as_ring_3_does_not_reach_them() {
        assert!(keeps(&memory(&[]), &sregs()));
        for own in SYSTEM {
            assert!(!keeps(&memory(&[Mapping { user: true, ..own }]), &sregs()), "{own:?}");
        }
        let memory = memory(&[]);
        let entry = layout::PROGRAM_TABLES + layout::PAGE;
        let alias = |to: u64| {
            let at =
                (0..512).map(|n| entry + 8 * n).find(|at| memory.load::<u64>(*at).unwrap() == 0);
            memory.store(at.unwrap(), to | PTE_PRESENT | PTE_USER).unwrap();
            let keeps = keeps(&memory, &sregs());
            memory.store(at.unwrap(), 0u64).unwrap();
            keeps
        };
        assert!(alias(0x50_0000));
        for at in [layout::GDT, layout::PML4, layout::EXCEPTION_PAGE, layout::EBDA_START - 0x1c00] {
            assert!(!alias(at), "{at:#x} under another address");
        }
    }

    #[test]
    fn changed_descriptors_and_tables_elsewhere_do_not_count_as_its_own() {
        let memory = memory(&[]);
        for at in [layout::GDT + 0x28, layout::EXCEPTION_PAGE + 0x30, layout::PML4 + 8] {
            let was = memory.load::<u64>(at).unwrap();
            memory.store(at, was ^ 0x40_0001).unwrap();
            assert!(!keeps(&memory, &sregs()), "{at:#x}");
            memory.store(at, was).unwrap();
        }
        assert!(keeps(&memory, &sregs()));
        let changes: [fn(&mut kvm_sregs); 6] = [
            |sregs| sregs.cr3 = 0x30_0000,
            |sregs| sregs.gdt.base += 8,
            |sregs| sregs.gdt.limit = 0xffff,
            |sregs| sregs.idt.limit += 16,
            |sregs| (sregs.ldt.present, sregs.ldt.base, sregs.ldt.limit) = (1, ENTRY, 7),
            |sregs| (sregs.ldt.present, sregs.ldt.limit) = (1, u32::MAX),
        ];
        for (n, change) in changes.iter().enumerate() {
            let mut sregs = sregs();
            change(&mut sregs);
            assert!(!keeps(&memory, &sregs), "{n}");
        }
        let local = kvm_segment { present: 1, limit: 0xffff, ..Default::default() };
        assert!(keeps(&memory, &kvm_sregs { ldt: local, ..sregs() }), "nothing is mapped there");
    }

    #[test]
    fn only_ring_3_of_long_mode_without_system_calls_counts() {
        let user = kvm_regs { rflags: 2, ..Default::default() };
        assert!(is_ring_3(&user, &sregs()));
        assert!(!is_ring_3(&kvm_regs { rflags: 2 | VM, ..user }, &sregs()));
        let changes: [fn(&mut kvm_sregs); 9] = [
            |sregs| sregs.cs.dpl = 0,
            |sregs| sregs.ss.dpl = 0,
            |sregs| sregs.cs.selector &= !3,
            |sregs| sregs.efer |= 1,
            |sregs| sregs.efer &= !EFER_LMA,
            |sregs| sregs.cr0 &= !CR0_PG,
            |sregs| sregs.cr4 &= !CR4_PAE,
            |sregs| sregs.cr4 |= CR4_CET,
            |sregs| sregs.cr4 |= CR4_VMXE,
        ];
        for (n, change) in changes.iter().enumerate() {
            let mut sregs = sregs();
            change(&mut sregs);
            assert!(!is_ring_3(&user, &sregs), "{n}");
        }
    }
}

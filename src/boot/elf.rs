//! An ELF kernel: checked first, then loaded at its physical addresses, or relocated if it is
//! position-independent.

use super::program_headers::{ET_DYN, Executable, LoadAt, Low, PF_X, PT_LOAD, Segment};
use super::relocations::{Relocations, check_static};
use crate::error::Result;
use crate::layout;
use crate::memory::GuestMemory;

/// A position-independent file is loaded at a multiple of this, and of its segments' alignment.
const MIN_ALIGN: u64 = layout::HIGH_MEMORY;
const MAX_ALIGN: u64 = 1 << 30;

/// A kernel that has been checked.
#[derive(Debug)]
pub(super) struct ElfKernel<'a> {
    pub(super) executable: Executable<'a>,
    /// By address; there is at least one.
    pub(super) segments: Vec<Segment>,
    /// By how much it is moved from the addresses it was linked for.
    bias: u64,
    /// The physical address of its entry.
    pub(super) entry: u64,
}

impl<'a> ElfKernel<'a> {
    /// Check everything about a file that can be refused.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Boot`] if it cannot be loaded.
    pub(super) fn new(executable: Executable<'a>, memory: &GuestMemory, low: Low) -> Result<Self> {
        // Some kernels name an interpreter at a fixed address, and need none.
        if executable.kind == ET_DYN {
            check_static(executable)?;
        }
        let (by, bias) = place(executable)?;
        let segments = executable.segments(memory, by, low)?;
        if segments.is_empty() {
            return Err(executable.bad("the ELF file has no segments to load"));
        }
        let entry = entry(executable, &segments, bias)?;
        if executable.kind == ET_DYN {
            Relocations::new(executable, &segments, bias)?;
        }
        Ok(Self { executable, segments, bias, entry })
    }

    /// The physical address of something that the file names, such as another entry, by its
    /// physical address.
    pub(super) fn moved(&self, address: u64) -> u64 {
        address.wrapping_add(self.bias)
    }

    /// Whether one of its segments has this address.
    pub(super) fn has(&self, address: u64) -> bool {
        self.segments.iter().any(|segment| (segment.start..segment.end).contains(&address))
    }

    /// Where its last segment ends.
    pub(super) fn end(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.end)
    }

    /// Write it to memory, which is zeroed where the file has no bytes.
    ///
    /// # Errors
    /// None that `new` has not returned.
    pub(super) fn write(&self, memory: &GuestMemory) -> Result<()> {
        for segment in &self.segments {
            let bytes = self.executable.bytes_of(segment);
            if !bytes.is_empty() {
                memory.write(segment.start, bytes)?;
            }
        }
        if self.executable.kind != ET_DYN {
            return Ok(());
        }
        Relocations::new(self.executable, &self.segments, self.bias)?.apply(memory)
    }
}

/// Which addresses the segments go to, and the bias of a position-independent file.
fn place(executable: Executable<'_>) -> Result<(LoadAt, u64)> {
    let (mut lowest, mut align, mut has_phys) = (u64::MAX, MIN_ALIGN, false);
    for header in executable.headers()? {
        let header = header?;
        if header.kind == PT_LOAD && header.in_memory > 0 {
            lowest = lowest.min(header.virt);
            has_phys |= header.phys != 0;
            if header.align.is_power_of_two() {
                align = align.max(header.align);
            }
        }
    }
    if executable.kind != ET_DYN {
        // Some linkers leave the physical addresses out.
        let is_virtual = !has_phys && lowest != 0;
        return Ok((if is_virtual { LoadAt::Virtual } else { LoadAt::Physical }, 0));
    }
    if align > MAX_ALIGN {
        return Err(executable.bad(format!("a segment is aligned to {align:#x}, more than 1 GiB")));
    }
    // One that was linked for an address that it can have stays there.
    if (layout::HIGH_MEMORY..layout::MMIO_GAP_START).contains(&lowest) {
        return Ok((LoadAt::Moved(0), 0));
    }
    let bias = align.wrapping_sub(lowest & !(align - 1));
    Ok((LoadAt::Moved(bias), bias))
}

/// The physical address of the entry: some files have a virtual one in their header, others a
/// physical one.
fn entry(executable: Executable<'_>, segments: &[Segment], bias: u64) -> Result<u64> {
    let entry = executable.entry;
    let by_virt = |segment: &Segment| {
        let offset = entry.checked_sub(segment.virt)?;
        (offset < segment.end - segment.start).then(|| segment.start + offset)
    };
    let by_phys = |segment: &Segment| {
        let entry = entry.wrapping_add(bias);
        (segment.start..segment.end).contains(&entry).then_some(entry)
    };
    let is_code = |segment: &&Segment| segment.flags & PF_X != 0;
    // A file whose linker sets no flags has no code by them.
    let all = !segments.iter().any(|segment| is_code(&segment));
    let code = || segments.iter().filter(|segment| all || is_code(segment));
    let found = code().find_map(by_virt).or_else(|| code().find_map(by_phys));
    found.ok_or_else(|| {
        executable
            .bad(format!("the entry {entry:#x} is in none of its executable segments"))
            .hint("name the entry in the linker script, or with -e")
    })
}

#[cfg(test)]
mod tests {
    use super::super::program_headers::tests::{elf, elf32};
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(4 << 20).unwrap()
    }

    fn load(image: &[u8], memory: &GuestMemory) -> Result<(u64, u64)> {
        let executable = Executable::new(image, "boot.kernel")?;
        let kernel = ElfKernel::new(executable, memory, Low::BesideTables)?;
        kernel.write(memory)?;
        Ok((kernel.entry, kernel.end()))
    }

    #[test]
    fn a_segment_is_loaded_at_its_physical_address() {
        for image in [elf(0x10_0000, b"code"), elf32(0x10_0000, b"code"), elf(0x8000, b"code")] {
            let memory = memory();
            let (entry, end) = load(&image, &memory).unwrap();
            let mut data = [0; 4];
            memory.read(entry, &mut data).unwrap();
            assert_eq!((end - entry, &data), (4, b"code"));
        }
    }

    #[test]
    fn an_entry_is_translated_where_it_is_virtual() {
        let high = 0xffff_ffff_8010_0000u64;
        let at = |image: &mut [u8], at: usize, value: u64| {
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        let mut image = elf(0x10_0000, b"code");
        at(&mut image, 80, high);
        assert_eq!(load(&image, &memory()).unwrap().0, 0x10_0000, "a physical entry stays");
        at(&mut image, 24, high + 2);
        assert_eq!(load(&image, &memory()).unwrap().0, 0x10_0002, "a virtual one is translated");
        at(&mut image, 24, 0x10_0004);
        assert!(load(&image, &memory()).unwrap_err().detail.contains("in none of its executable"));
        // Without physical addresses, the virtual ones count.
        let mut image = elf(0x10_0000, b"code");
        at(&mut image, 88, 0);
        assert_eq!(load(&image, &memory()).unwrap().0, 0x10_0000);
    }

    #[test]
    fn a_position_independent_file_is_moved_above_1_mib_by_its_alignment() {
        let mut image = elf(0x40, b"code");
        image[16] = 3;
        assert_eq!(load(&image, &memory()).unwrap(), (0x10_0040, 0x10_0044));
        image[112..120].copy_from_slice(&0x20_0000u64.to_le_bytes());
        assert_eq!(load(&image, &memory()).unwrap().0, 0x20_0040);
        image[112..120].copy_from_slice(&(2u64 << 30).to_le_bytes());
        assert!(load(&image, &memory()).unwrap_err().detail.contains("aligned"));
        let mut image = elf(0x30_0000, b"code");
        image[16] = 3;
        assert_eq!(load(&image, &memory()).unwrap().0, 0x30_0000);
    }

    #[test]
    fn a_kernel_loaded_while_the_log_is_on_is_in_it() {
        let memory = memory();
        memory.log_dirty(true).unwrap();
        load(&elf(0x10_1000, b"code"), &memory).unwrap();
        assert_eq!(memory.take_dirty().unwrap()[0].ranges(), [(0x10_1000, 0x1000)]);
    }

    /// An ELF whose segments, each with address and size, are the same bytes of the file.
    fn with_segments(segments: &[(u64, u64)]) -> Vec<u8> {
        let header = 64 + 56 * segments.len();
        let mut image = elf(0x10_0000, &[]);
        image[56..58].copy_from_slice(&u16::try_from(segments.len()).unwrap().to_le_bytes());
        image.truncate(64);
        for (address, size) in segments {
            let mut segment = [0; 56];
            segment[0] = 1;
            segment[8..16].copy_from_slice(&(header as u64).to_le_bytes());
            segment[24..32].copy_from_slice(&address.to_le_bytes());
            segment[32..40].copy_from_slice(&size.to_le_bytes());
            segment[40..48].copy_from_slice(&size.to_le_bytes());
            image.extend(segment);
        }
        let most = segments.iter().map(|(_, size)| *size).max().unwrap_or(0);
        image.resize(header + usize::try_from(most).unwrap(), 0x90);
        image
    }

    #[test]
    fn segments_that_overlap_are_refused_and_those_that_touch_are_not() {
        let touching = [(0x10_1000, 0x1000), (0x10_0000, 0x1000), (0x10_1000, 0)];
        assert_eq!(load(&with_segments(&touching), &memory()).unwrap().1, 0x10_2000);
        for overlapping in [
            vec![(0x10_0000, 0x1001), (0x10_1000, 0x1000)],
            vec![(0x10_0000, 0x4000), (0x10_1000, 0x10)],
            vec![(0x10_0000, 0x20_0000); 60_000],
        ] {
            let error = load(&with_segments(&overlapping), &memory()).unwrap_err();
            assert!(error.detail.contains("overlap"), "{error}");
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        for image in [elf(0x10_0000, b"code"), elf32(0x10_0000, b"code")] {
            for length in 4..image.len() {
                let error = load(&image[..length], &memory()).unwrap_err();
                assert_eq!(error.kind, ErrorKind::Boot, "{length}");
            }
        }
    }

    #[test]
    fn a_segment_outside_memory_or_over_the_tables_is_refused_and_nothing_is_written() {
        let memory = memory();
        memory.log_dirty(true).unwrap();
        for (address, reason) in [
            (0x8_0000, "overlap the tables"),
            (0x7_fffe, "overlap the tables"),
            (0xe_ffff, "overlap the tables"),
            (5 << 20, "not entirely in guest memory"),
            (u64::MAX, "not entirely in guest memory"),
        ] {
            let error = load(&elf(address, b"code"), &memory).unwrap_err();
            assert!(error.detail.contains(reason), "{error}");
        }
        assert_eq!(memory.take_dirty().unwrap()[0].ranges(), []);
    }

    proptest! {
        #[test]
        fn a_mutated_file_never_panics_and_is_loaded_whole_or_not_at_all(
            is_64 in any::<bool>(),
            is_pie in any::<bool>(),
            changes in prop::collection::vec((0usize..0x7c, any::<u8>()), 0..8),
        ) {
            let mut image =
                if is_64 { elf(0x10_0000, &[0x90; 64]) } else { elf32(0x10_0000, &[0x90; 64]) };
            image[16] = if is_pie { 3 } else { 2 };
            for (at, value) in changes {
                image[at] = value;
            }
            let memory = memory();
            memory.log_dirty(true).unwrap();
            if load(&image, &memory).is_err() {
                prop_assert_eq!(memory.take_dirty().unwrap()[0].ranges(), []);
            }
        }
    }
}

//! Loads an ELF kernel at its physical addresses. linux-loader copies the segments.

use std::io::Cursor;

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::program_headers::{Executable, LoadAt};
use crate::error::Result;
use crate::layout;
use crate::memory::GuestMemory;

/// Load the segments of an ELF64 vmlinux. Returns the entry and the end of the loaded range.
pub(super) fn load(image: &[u8], memory: &GuestMemory) -> Result<(u64, u64)> {
    let executable = Executable::new(image, "boot.kernel")?;
    let segments = executable.segments(memory, LoadAt::Physical)?;
    let ranges: Vec<_> = segments.iter().map(|segment| (segment.start, segment.end)).collect();
    let Some((_, end)) = ranges.last().copied() else {
        return Err(executable.bad("the ELF file has no segments to load"));
    };
    let loaded = memory
        .write_with(&ranges, |mmap| Elf::load(mmap, None, &mut Cursor::new(image), None))
        .map_err(|e| executable.bad(e.to_string()))?;
    let GuestAddress(entry) = loaded.kernel_load;
    if !layout::in_memory(memory.size(), entry) {
        return Err(executable.bad(format!("the entry {entry:#x} is outside guest memory")));
    }
    Ok((entry, end))
}

#[cfg(test)]
mod tests {
    use super::super::program_headers::tests::elf;
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(4 << 20).unwrap()
    }

    #[test]
    fn a_segment_is_loaded_at_its_physical_address() {
        let memory = memory();
        let (entry, end) = load(&elf(0x10_0000, b"code"), &memory).unwrap();
        let mut data = [0; 4];
        memory.read(entry, &mut data).unwrap();
        assert_eq!((entry, end, &data), (0x10_0000, 0x10_0004, b"code"));
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
        let image = elf(0x10_0000, b"code");
        for length in 4..image.len() {
            assert_eq!(
                load(&image[..length], &memory()).unwrap_err().kind,
                ErrorKind::Boot,
                "{length}"
            );
        }
    }

    #[test]
    fn a_segment_outside_memory_is_refused_with_the_reason() {
        for address in [0x1000, 5 << 20, u64::MAX] {
            assert!(load(&elf(address, b"code"), &memory()).is_err());
        }
    }

    proptest! {
        #[test]
        fn a_mutated_file_never_panics(changes in prop::collection::vec((0usize..0x7c, any::<u8>()), 1..8)) {
            let mut image = elf(0x10_0000, b"code");
            for (at, value) in changes {
                image[at] = value;
            }
            let _ = load(&image, &memory());
        }
    }
}

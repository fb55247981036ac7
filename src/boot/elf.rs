//! Checks an ELF kernel's headers before linux-loader copies its segments. Hostile files are
//! refused here.

use std::io::Cursor;

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

pub(super) const MAGIC: &[u8] = b"\x7fELF";
const PT_LOAD: u32 = 1;
const ET_EXEC_X86_64: (u16, u16) = (2, 62);

/// Load the segments of an ELF64 vmlinux. Returns the entry and the end of the loaded range.
pub(super) fn load(image: &[u8], memory: &GuestMemory) -> Result<(u64, u64)> {
    let segments = check(image, memory)?;
    let Some((_, end)) = segments.last().copied() else {
        return Err(bad("the ELF file has no segments to load"));
    };
    let loaded = memory
        .write_with(&segments, |mmap| Elf::load(mmap, None, &mut Cursor::new(image), None))
        .map_err(|e| bad(e.to_string()))?;
    let GuestAddress(entry) = loaded.kernel_load;
    if !layout::in_memory(memory.size(), entry) {
        return Err(bad(format!("the entry {entry:#x} is outside guest memory")));
    }
    Ok((entry, end))
}

/// Start and end of each segment, by address, if every segment lies in the file and in memory,
/// above the first MiB, and none over another.
fn check(image: &[u8], memory: &GuestMemory) -> Result<Vec<(u64, u64)>> {
    if image.get(4) != Some(&2) || image.get(5) != Some(&1) {
        return Err(bad("not a 64-bit little-endian ELF file"));
    }
    let (Some(kind), Some(machine)) = (u16_at(image, 16), u16_at(image, 18)) else {
        return Err(bad("the ELF header is truncated"));
    };
    if (kind, machine) != ET_EXEC_X86_64 {
        return Err(bad(format!("not an x86-64 executable (type {kind}, machine {machine})")));
    }
    let (Some(offset), Some(size), Some(count)) =
        (u64_at(image, 32), u16_at(image, 54), u16_at(image, 56))
    else {
        return Err(bad("the ELF header is truncated"));
    };
    let (mut segments, mut left) = (Vec::new(), memory.size());
    for n in 0..u64::from(count) {
        let at = offset.checked_add(n * u64::from(size)).and_then(|at| usize::try_from(at).ok());
        let header = at.and_then(|at| image.get(at..at.checked_add(56)?));
        let header =
            header.ok_or_else(|| bad(format!("program header {n} is outside the file")))?;
        if u32_at(header, 0) == Some(PT_LOAD) {
            let (start, end) = check_segment(n, header, image, memory)?;
            // Segments that do not overlap are together no larger than memory. If they are larger,
            // refuse them without sorting.
            left = left.checked_sub(end - start).ok_or_else(|| {
                bad(format!("segments 0 to {n} overlap: together they are larger than memory"))
            })?;
            segments.push((start, end, n));
        }
    }
    check_overlap(&mut segments)?;
    Ok(segments.into_iter().map(|(start, end, _)| (start, end)).collect())
}

/// Sort segments (start, end, number) by address, and refuse overlaps. Each byte is loaded at most
/// once, so the size of memory bounds the work, whatever the headers say.
fn check_overlap(segments: &mut Vec<(u64, u64, u64)>) -> Result<()> {
    segments.retain(|(start, end, _)| start < end);
    segments.sort_unstable();
    for pair in segments.windows(2) {
        let [(_, end, first), (start, _, second)] = pair else { continue };
        if start < end {
            return Err(bad(format!("segments {first} and {second} overlap at {start:#x}")));
        }
    }
    Ok(())
}

fn check_segment(n: u64, header: &[u8], image: &[u8], memory: &GuestMemory) -> Result<(u64, u64)> {
    let field = |at| u64_at(header, at).ok_or_else(|| bad("a program header is truncated"));
    let (offset, address, in_file, in_memory) = (field(8)?, field(24)?, field(32)?, field(40)?);
    let file_end = offset.checked_add(in_file);
    if file_end.is_none_or(|end| end > image.len() as u64) {
        return Err(bad(format!(
            "segment {n} is truncated: it extends beyond the end of the file"
        )));
    }
    if in_memory < in_file {
        return Err(bad(format!("segment {n} is larger in the file than in memory")));
    }
    if in_memory > 0 && address < layout::HIGH_MEMORY {
        return Err(bad(format!("segment {n} at {address:#x} is below 1 MiB")));
    }
    memory.check(address, in_memory.max(1)).map_err(|e| {
        bad(format!("segment {n}: {}", e.detail))
            .hint("give the machine more memory (memory.size_mib)")
    })?;
    Ok((address, address + in_memory))
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn bad(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Boot, "boot.kernel", detail)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A valid ELF with one segment of `code` at `address`.
    pub(in crate::boot) fn elf(address: u64, code: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x78];
        image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        image[16..20].copy_from_slice(&[2, 0, 62, 0]);
        image[24..32].copy_from_slice(&address.to_le_bytes());
        image[32] = 64;
        image[54] = 56;
        image[56] = 1;
        image[64] = 1;
        image[72] = 0x78;
        image[88..96].copy_from_slice(&address.to_le_bytes());
        let length = (code.len() as u64).to_le_bytes();
        image[96..104].copy_from_slice(&length);
        image[104..112].copy_from_slice(&length);
        image.extend_from_slice(code);
        image
    }

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

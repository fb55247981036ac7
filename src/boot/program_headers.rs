//! Checks the headers of an ELF file, before anything is loaded. Hostile files are refused here.

use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

pub(super) const MAGIC: &[u8] = b"\x7fELF";
pub(super) const PT_LOAD: u32 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
/// Bytes of a program header.
const HEADER: usize = 56;

/// Which of its two addresses a segment is loaded at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LoadAt {
    Virtual,
    Physical,
}

/// An x86-64 executable, and the key of the configuration that names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Executable<'a> {
    pub(super) image: &'a [u8],
    at: &'static str,
}

/// A segment to load: in the file, in memory, and above the first MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Its program header's number.
    pub(super) number: u64,
    pub(super) flags: u32,
    pub(super) start: u64,
    pub(super) end: u64,
    /// The offset of its bytes in the file.
    pub(super) offset: u64,
    /// How many bytes the file has. The rest is zeros.
    pub(super) in_file: u64,
}

impl<'a> Executable<'a> {
    /// # Errors
    /// [`ErrorKind::Boot`] unless it is a 64-bit x86 executable for a fixed address.
    pub(super) fn new(image: &'a [u8], at: &'static str) -> Result<Self> {
        let executable = Self { image, at };
        if !image.starts_with(MAGIC) || image.get(4) != Some(&2) || image.get(5) != Some(&1) {
            return Err(executable.bad("not a 64-bit little-endian ELF file"));
        }
        match (u16_at(image, 16), u16_at(image, 18)) {
            (Some(ET_EXEC), Some(EM_X86_64)) => Ok(executable),
            (Some(ET_DYN), Some(EM_X86_64)) => Err(executable
                .bad("a shared object or position-independent executable")
                .hint("link it with -static -no-pie")),
            (Some(kind), Some(machine)) => Err(executable
                .bad(format!("not an x86-64 executable (type {kind}, machine {machine})"))),
            _ => Err(executable.bad("the ELF header is truncated")),
        }
    }

    /// The number, the type and the bytes of each program header.
    pub(super) fn headers(self) -> Result<impl Iterator<Item = Result<(u64, u32, &'a [u8])>>> {
        let image = self.image;
        let (Some(offset), Some(size), Some(count)) =
            (u64_at(image, 32), u16_at(image, 54), u16_at(image, 56))
        else {
            return Err(self.bad("the ELF header is truncated"));
        };
        Ok((0..u64::from(count)).map(move |n| {
            let at =
                offset.checked_add(n * u64::from(size)).and_then(|at| usize::try_from(at).ok());
            let header = at.and_then(|at| image.get(at..at.checked_add(HEADER)?));
            let kind = header.and_then(|header| u32_at(header, 0));
            match (header, kind) {
                (Some(header), Some(kind)) => Ok((n, kind, header)),
                _ => Err(self.bad(format!("program header {n} is outside the file"))),
            }
        }))
    }

    /// The segments to load, by address. No two overlap, so the size of memory bounds the work of
    /// loading them, whatever the headers say.
    pub(super) fn segments(self, memory: &GuestMemory, by: LoadAt) -> Result<Vec<Segment>> {
        let (mut segments, mut left) = (Vec::new(), memory.size());
        for header in self.headers()? {
            let (n, kind, header) = header?;
            if kind != PT_LOAD {
                continue;
            }
            let segment = self.segment(n, header, memory, by)?;
            // Segments that do not overlap are together no larger than memory. If they are
            // larger, refuse them without sorting.
            left = left.checked_sub(segment.end - segment.start).ok_or_else(|| {
                let together = "together they are larger than memory";
                self.bad(format!("segments 0 to {n} overlap: {together}"))
            })?;
            segments.push(segment);
        }
        segments.retain(|segment| segment.start < segment.end);
        segments.sort_unstable_by_key(|segment| (segment.start, segment.end, segment.number));
        for pair in segments.windows(2) {
            let [before, after] = pair else { continue };
            if after.start < before.end {
                let (first, second, at) = (before.number, after.number, after.start);
                return Err(self.bad(format!("segments {first} and {second} overlap at {at:#x}")));
            }
        }
        Ok(segments)
    }

    fn segment(self, n: u64, header: &[u8], memory: &GuestMemory, by: LoadAt) -> Result<Segment> {
        let truncated = || self.bad("a program header is truncated");
        let field = |at| u64_at(header, at).ok_or_else(truncated);
        let flags = u32_at(header, 4).ok_or_else(truncated)?;
        let start = field(if by == LoadAt::Virtual { 16 } else { 24 })?;
        let (offset, in_file, in_memory) = (field(8)?, field(32)?, field(40)?);
        if offset.checked_add(in_file).is_none_or(|end| end > self.image.len() as u64) {
            let beyond = "is truncated: it extends beyond the end of the file";
            return Err(self.bad(format!("segment {n} {beyond}")));
        }
        if in_memory < in_file {
            return Err(self.bad(format!("segment {n} is larger in the file than in memory")));
        }
        if in_memory > 0 && start < layout::HIGH_MEMORY {
            return Err(self.bad(format!("segment {n} at {start:#x} is below 1 MiB")));
        }
        memory.check(start, in_memory.max(1)).map_err(|e| {
            self.bad(format!("segment {n}: {}", e.detail))
                .hint("give the machine more memory (memory.size_mib)")
        })?;
        Ok(Segment { number: n, flags, start, end: start + in_memory, offset, in_file })
    }

    pub(super) fn bad(self, detail: impl Into<String>) -> Error {
        Error::new(ErrorKind::Boot, self.at, detail)
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

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
        image[68] = 5;
        image[72] = 0x78;
        image[80..88].copy_from_slice(&address.to_le_bytes());
        image[88..96].copy_from_slice(&address.to_le_bytes());
        let length = (code.len() as u64).to_le_bytes();
        image[96..104].copy_from_slice(&length);
        image[104..112].copy_from_slice(&length);
        image.extend_from_slice(code);
        image
    }

    #[test]
    fn a_segment_is_loaded_at_either_address() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let mut image = elf(0x10_0000, b"code");
        image[80..88].copy_from_slice(&0x20_0000u64.to_le_bytes());
        let executable = Executable::new(&image, "boot.path").unwrap();
        for (by, start) in [(LoadAt::Virtual, 0x20_0000), (LoadAt::Physical, 0x10_0000)] {
            let segment = executable.segments(&memory, by).unwrap().remove(0);
            assert_eq!((segment.start, segment.end, segment.flags), (start, start + 4, 5));
            assert_eq!((segment.number, segment.offset, segment.in_file), (0, 0x78, 4));
        }
        assert_eq!(executable.headers().unwrap().next().unwrap().unwrap().1, PT_LOAD);
    }

    #[test]
    fn a_position_independent_executable_is_refused_with_what_to_do() {
        let mut image = elf(0x10_0000, b"code");
        image[16] = 3;
        let error = Executable::new(&image, "boot.path").unwrap_err();
        assert!(error.to_string().contains("-no-pie"), "{error}");
    }
}

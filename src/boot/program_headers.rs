//! Checks the headers of an ELF file, before anything is loaded. Hostile files are refused here.

use super::fields::{u16_at, u32_at, u64_at};
use super::identify::{self, ELF_MAGIC};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

pub(super) const PT_LOAD: u32 = 1;
pub(super) const PF_X: u32 = 1;
pub(super) const ET_EXEC: u16 = 2;
pub(super) const ET_DYN: u16 = 3;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;

/// Which of its two addresses a segment is loaded at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LoadAt {
    Virtual,
    Physical,
    /// The virtual address and this much more.
    Moved(u64),
}

/// Which part of the first MiB a segment may be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Low {
    Nothing,
    /// What the tables that pyvmm writes and the screen leave.
    BesideTables,
}

/// An x86 executable, and the key of the configuration that names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Executable<'a> {
    pub(super) image: &'a [u8],
    pub(super) is_64: bool,
    /// A 32-bit file for x86-64: of the x32 ABI, or converted from a 64-bit one.
    pub(super) is_x32: bool,
    /// `ET_EXEC` or `ET_DYN`.
    pub(super) kind: u16,
    pub(super) entry: u64,
    at: &'static str,
}

/// A program header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) number: u64,
    pub(super) kind: u32,
    pub(super) flags: u32,
    pub(super) offset: u64,
    pub(super) virt: u64,
    pub(super) phys: u64,
    pub(super) in_file: u64,
    pub(super) in_memory: u64,
    pub(super) align: u64,
}

/// A segment to load: in the file and in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Its program header's number.
    pub(super) number: u64,
    pub(super) flags: u32,
    pub(super) start: u64,
    pub(super) end: u64,
    /// Its virtual address in the file.
    pub(super) virt: u64,
    /// The offset of its bytes in the file.
    pub(super) offset: u64,
    /// How many bytes the file has. The rest is zeros.
    pub(super) in_file: u64,
}

impl<'a> Executable<'a> {
    /// A 64-bit executable for a fixed address.
    ///
    /// # Errors
    /// [`ErrorKind::Boot`] if it is something else.
    pub(super) fn fixed_64(image: &'a [u8], at: &'static str) -> Result<Self> {
        let executable = Self::new(image, at)?;
        if !executable.is_64 {
            return Err(executable.bad("a 32-bit ELF file, not a 64-bit one"));
        }
        if executable.kind == ET_DYN {
            return Err(executable
                .bad("a shared object or position-independent executable")
                .hint("link it with -static -no-pie"));
        }
        Ok(executable)
    }

    /// A 32-bit or 64-bit executable, which may be position-independent.
    ///
    /// # Errors
    /// [`ErrorKind::Boot`] if it is something else; the error says what it is.
    pub(super) fn new(image: &'a [u8], at: &'static str) -> Result<Self> {
        let refuse = |detail: &str| Err(Error::new(ErrorKind::Boot, at, detail));
        if !image.starts_with(ELF_MAGIC) {
            return Err(identify::refused(image, at));
        }
        let is_64 = match (image.get(4), image.get(5)) {
            (Some(1), Some(1)) => false,
            (Some(2), Some(1)) => true,
            (Some(1 | 2), Some(2)) => return Err(identify::refused(image, at)),
            (Some(_), Some(_)) => {
                return refuse("an ELF file of an unknown class or byte order");
            }
            _ => return refuse("the ELF header is truncated"),
        };
        let entry = if is_64 { u64_at(image, 24) } else { u32_at(image, 24).map(u64::from) };
        let size = if is_64 { 64 } else { 52 };
        let (Some(kind), Some(machine), Some(entry), true) =
            (u16_at(image, 16), u16_at(image, 18), entry, image.len() >= size)
        else {
            return refuse("the ELF header is truncated");
        };
        // Tools convert a 64-bit multiboot kernel to a 32-bit file that keeps its machine.
        if !matches!((is_64, machine), (_, EM_X86_64) | (false, EM_386))
            || !matches!(kind, ET_EXEC | ET_DYN)
        {
            return Err(identify::refused(image, at));
        }
        let is_x32 = !is_64 && machine == EM_X86_64;
        Ok(Self { image, is_64, is_x32, kind, entry, at })
    }

    /// Its program headers.
    pub(super) fn headers(self) -> Result<impl Iterator<Item = Result<Header>> + 'a> {
        let image = self.image;
        let (offset, least) = if self.is_64 {
            (u64_at(image, 32), 56)
        } else {
            (u32_at(image, 28).map(u64::from), 32)
        };
        let sizes = if self.is_64 { 54 } else { 42 };
        let (Some(offset), Some(size), Some(count)) =
            (offset, u16_at(image, sizes), u16_at(image, sizes + 2))
        else {
            return Err(self.bad("the ELF header is truncated"));
        };
        if count > 0 && size < least {
            return Err(self.bad(format!("e_phentsize is {size}, less than {least}")));
        }
        Ok((0..u64::from(count)).map(move |n| {
            let at =
                offset.checked_add(n * u64::from(size)).and_then(|at| usize::try_from(at).ok());
            let bytes = at.and_then(|at| image.get(at..at.checked_add(usize::from(least))?));
            let header = bytes.and_then(|bytes| header(n, bytes, self.is_64));
            header.ok_or_else(|| self.bad(format!("program header {n} is outside the file")))
        }))
    }

    /// The segments to load, by address. No two overlap, so the size of memory bounds the work of
    /// loading them, whatever the headers say.
    pub(super) fn segments(
        self,
        memory: &GuestMemory,
        by: LoadAt,
        low: Low,
    ) -> Result<Vec<Segment>> {
        let (mut segments, mut left) = (Vec::new(), memory.size());
        for header in self.headers()? {
            let header = header?;
            if header.kind != PT_LOAD {
                continue;
            }
            let segment = self.segment(&header, memory, by, low)?;
            // Segments that do not overlap are together no larger than memory. If they are
            // larger, refuse them without sorting.
            left = left.checked_sub(segment.end - segment.start).ok_or_else(|| {
                let together = "together they are larger than memory";
                self.bad(format!("segments 0 to {} overlap: {together}", header.number))
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

    fn segment(
        self,
        header: &Header,
        memory: &GuestMemory,
        by: LoadAt,
        low: Low,
    ) -> Result<Segment> {
        let Header { number: n, flags, offset, in_file, in_memory, virt, .. } = *header;
        let start = match by {
            LoadAt::Virtual => virt,
            LoadAt::Physical => header.phys,
            LoadAt::Moved(bias) => virt.wrapping_add(bias),
        };
        if offset.checked_add(in_file).is_none_or(|end| end > self.image.len() as u64) {
            let beyond = "is truncated: it extends beyond the end of the file";
            return Err(self.bad(format!("segment {n} {beyond}")));
        }
        if in_memory < in_file {
            return Err(self.bad(format!("segment {n} is larger in the file than in memory")));
        }
        if in_memory > 0 {
            check_low(start, in_memory, low).map_err(|detail| {
                self.bad(format!("segment {n} at {start:#x} {detail}"))
                    .hint("link the file at 1 MiB or above")
            })?;
        }
        memory.check(start, in_memory.max(1)).map_err(|e| {
            let error = self.bad(format!("segment {n} at {start:#x}: {}", e.detail));
            if start >= 1 << 47 {
                error.hint("give its segments physical addresses (AT in the linker script)")
            } else {
                error.hint("give the machine more memory (memory.size_mib)")
            }
        })?;
        Ok(Segment { number: n, flags, start, end: start + in_memory, virt, offset, in_file })
    }

    /// The bytes that a segment has in the file.
    pub(super) fn bytes_of(self, segment: &Segment) -> &'a [u8] {
        let range = usize::try_from(segment.offset).ok().zip(usize::try_from(segment.in_file).ok());
        let bytes = range.and_then(|(at, length)| self.image.get(at..at.checked_add(length)?));
        bytes.unwrap_or(&[])
    }

    pub(super) fn bad(self, detail: impl Into<String>) -> Error {
        Error::new(ErrorKind::Boot, self.at, detail)
    }
}

/// Whether a range of the first MiB is free; the error says what is there.
pub(super) fn check_low(start: u64, size: u64, low: Low) -> std::result::Result<(), String> {
    let (tables, tables_end) = (layout::SYSTEM_AREA, layout::LOW_TABLES_END);
    match low {
        _ if start >= layout::HIGH_MEMORY => Ok(()),
        Low::Nothing => Err("is below 1 MiB".into()),
        Low::BesideTables if start.saturating_add(size) <= tables => Ok(()),
        Low::BesideTables if start >= tables_end => Ok(()),
        Low::BesideTables => Err(format!(
            "has {size:#x} bytes, which overlap the tables that pyvmm writes and the screen, from \
             {tables:#x} to {tables_end:#x}"
        )),
    }
}

fn header(number: u64, bytes: &[u8], is_64: bool) -> Option<Header> {
    let kind = u32_at(bytes, 0)?;
    if is_64 {
        let field = |at| u64_at(bytes, at);
        return Some(Header {
            number,
            kind,
            flags: u32_at(bytes, 4)?,
            offset: field(8)?,
            virt: field(16)?,
            phys: field(24)?,
            in_file: field(32)?,
            in_memory: field(40)?,
            align: field(48)?,
        });
    }
    let field = |at| u32_at(bytes, at).map(u64::from);
    Some(Header {
        number,
        kind,
        flags: u32_at(bytes, 24)?,
        offset: field(4)?,
        virt: field(8)?,
        phys: field(12)?,
        in_file: field(16)?,
        in_memory: field(20)?,
        align: field(28)?,
    })
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

    /// The same as a 32-bit file. Its segment begins at 0x54 in the file.
    pub(in crate::boot) fn elf32(address: u32, code: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x54];
        image[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
        image[16..20].copy_from_slice(&[2, 0, 3, 0]);
        image[24..28].copy_from_slice(&address.to_le_bytes());
        image[28] = 52;
        image[42] = 32;
        image[44] = 1;
        let length = u32::try_from(code.len()).unwrap();
        let header = [1, 0x54, address, address, length, length, 5, 4];
        for (n, field) in header.iter().enumerate() {
            image[52 + 4 * n..56 + 4 * n].copy_from_slice(&field.to_le_bytes());
        }
        image.extend_from_slice(code);
        image
    }

    #[test]
    fn a_segment_is_loaded_at_either_address_or_moved() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let mut image = elf(0x10_0000, b"code");
        image[80..88].copy_from_slice(&0x20_0000u64.to_le_bytes());
        let executable = Executable::fixed_64(&image, "boot.path").unwrap();
        for (by, start) in [
            (LoadAt::Virtual, 0x20_0000),
            (LoadAt::Physical, 0x10_0000),
            (LoadAt::Moved(0x1000), 0x20_1000),
        ] {
            let segment = executable.segments(&memory, by, Low::Nothing).unwrap().remove(0);
            assert_eq!((segment.start, segment.end, segment.flags), (start, start + 4, 5));
            assert_eq!((segment.number, segment.offset, segment.in_file), (0, 0x78, 4));
            assert_eq!(executable.bytes_of(&segment), b"code");
        }
        assert_eq!(executable.headers().unwrap().next().unwrap().unwrap().kind, PT_LOAD);
    }

    #[test]
    fn both_classes_have_the_same_headers() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let (image_64, image_32) = (elf(0x10_0000, b"code"), elf32(0x10_0000, b"code"));
        for image in [&image_64, &image_32] {
            let executable = Executable::new(image, "boot.kernel").unwrap();
            assert_eq!((executable.entry, executable.kind), (0x10_0000, ET_EXEC));
            let segments = executable.segments(&memory, LoadAt::Physical, Low::Nothing).unwrap();
            assert_eq!((segments[0].start, segments[0].flags), (0x10_0000, 5));
            assert_eq!(executable.bytes_of(&segments[0]), b"code");
        }
        let error = Executable::fixed_64(&image_32, "boot.path").unwrap_err();
        assert!(error.detail.contains("32-bit"), "{error}");
    }

    #[test]
    fn low_memory_is_allowed_up_to_the_tables() {
        let at = |start, size, low| check_low(start, size, low).is_ok();
        assert!(at(0x1000, 0x7_f000, Low::BesideTables));
        assert!(!at(0x1000, 0x7_f001, Low::BesideTables));
        assert!(!at(0x9_fc00, 1, Low::BesideTables) && !at(0xe_ffff, 1, Low::BesideTables));
        assert!(at(0xf_f000, 0x1000, Low::BesideTables) && !at(0xf_f000, 1, Low::Nothing));
        assert!(!at(0x1000, 1, Low::Nothing) && at(0x10_0000, 1, Low::Nothing));
        assert!(!at(0x1000, u64::MAX, Low::BesideTables));
    }

    #[test]
    fn a_position_independent_executable_is_refused_with_what_to_do() {
        let mut image = elf(0x10_0000, b"code");
        image[16] = 3;
        let error = Executable::fixed_64(&image, "boot.path").unwrap_err();
        assert!(error.to_string().contains("-no-pie"), "{error}");
    }
}

//! The notes of an ELF file: the PVH entry, and whether it is Linux or a program for Linux.

use memchr::memmem;

use super::fields::{u32_at, u64_at};
use super::program_headers::Executable;
use crate::error::Result;

const PT_NOTE: u32 = 4;
/// Notes of Xen's public interface (elfnote.h): the 32-bit entry of PVH, and the system's name.
const PHYS32_ENTRY: u32 = 18;
const GUEST_OS: u32 = 6;
/// A program's ABI, in a note of GNU.
const ABI_TAG: u32 = 1;

/// A note.
struct Note<'a> {
    name: &'a [u8],
    kind: u32,
    bytes: &'a [u8],
}

/// What the notes of a file say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Notes {
    /// The physical address of the PVH entry.
    pub(super) pvh_entry: Option<u64>,
    pub(super) is_linux: bool,
    /// A program that was linked for an operating system.
    pub(super) is_program: bool,
}

/// Read the notes. Damaged ones are skipped.
///
/// # Errors
/// If the program headers are damaged.
pub(super) fn read(executable: Executable<'_>) -> Result<Notes> {
    let mut found = Notes::default();
    // Headers may overlap: all of them together are read as far as the file is long.
    let mut left = executable.image.len();
    for header in executable.headers()? {
        let header = header?;
        if header.kind != PT_NOTE {
            continue;
        }
        let range = usize::try_from(header.offset).ok().zip(usize::try_from(header.in_file).ok());
        let bytes = range.and_then(|(at, size)| executable.image.get(at..at.checked_add(size)?));
        let align = if header.align == 8 { 8 } else { 4 };
        let mut rest = bytes.unwrap_or(&[]);
        left = match left.checked_sub(rest.len()) {
            Some(left) => left,
            None => break,
        };
        while let Some((note, after)) = split(rest, align) {
            found.add(&note);
            rest = after;
        }
    }
    found.is_linux |= has_banner(executable.image);
    Ok(found)
}

impl Notes {
    fn add(&mut self, note: &Note<'_>) {
        match (note.name, note.kind) {
            (b"Xen", PHYS32_ENTRY) => {
                let entry = u64_at(note.bytes, 0).or(u32_at(note.bytes, 0).map(u64::from));
                self.pvh_entry = self.pvh_entry.or(entry);
            }
            (b"Xen", GUEST_OS) => {
                self.is_linux |= note.bytes.starts_with(b"linux");
            }
            (b"Linux", _) => self.is_linux = true,
            (b"GNU", ABI_TAG) => self.is_program = true,
            _ => {}
        }
    }
}

/// The first note, and what follows it.
fn split(bytes: &[u8], align: usize) -> Option<(Note<'_>, &[u8])> {
    let size = |at| usize::try_from(u32_at(bytes, at)?).ok();
    let (name_size, size, kind) = (size(0)?, size(4)?, u32_at(bytes, 8)?);
    let name = bytes.get(12..12usize.checked_add(name_size)?)?;
    let at = 12usize.checked_add(name_size)?.checked_next_multiple_of(align)?;
    let end = at.checked_add(size)?;
    let note =
        Note { name: name.strip_suffix(b"\0").unwrap_or(name), kind, bytes: bytes.get(at..end)? };
    Some((note, bytes.get(end.checked_next_multiple_of(align)?..).unwrap_or(&[])))
}

/// Whether a kernel has Linux's banner. Linux has notes of its own since 4.15.
fn has_banner(image: &[u8]) -> bool {
    let banner = b"Linux version ";
    memmem::find_iter(image, banner)
        .any(|at| image.get(at + banner.len()).is_some_and(u8::is_ascii_digit))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::program_headers::tests::{elf, elf32};
    use super::*;
    use proptest::prelude::*;

    /// A note.
    pub(in crate::boot) fn note(name: &[u8], kind: u32, bytes: &[u8]) -> Vec<u8> {
        let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_le_bytes();
        let mut note = [size(name), size(bytes), kind.to_le_bytes()].concat();
        for part in [name, bytes] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    /// An ELF whose first segment, of this type, is the notes.
    fn with_notes(notes: &[u8], is_64: bool) -> Vec<u8> {
        let mut image = if is_64 { elf(0x10_0000, notes) } else { elf32(0x10_0000, notes) };
        image[if is_64 { 64 } else { 52 }] = 4;
        image
    }

    fn notes(image: &[u8]) -> Notes {
        read(Executable::new(image, "boot.kernel").unwrap()).unwrap()
    }

    #[test]
    fn the_pvh_entry_is_found_in_both_classes_behind_other_notes() {
        let entry = 0x10_0020u64.to_le_bytes();
        for (size, is_64) in [(8, true), (4, true), (4, false)] {
            let all = [note(b"GNU\0", 3, &[1; 20]), note(b"Xen\0", 18, &entry[..size])].concat();
            let found = notes(&with_notes(&all, is_64));
            assert_eq!(found, Notes { pvh_entry: Some(0x10_0020), ..Notes::default() });
        }
    }

    #[test]
    fn linux_is_told_by_a_note_or_by_its_banner() {
        for bytes in [
            note(b"Linux\0", 0x101, &[0]),
            note(b"Xen\0", 6, b"linux\0"),
            b"Linux version 4.9.0 (gcc)".to_vec(),
        ] {
            assert!(notes(&with_notes(&bytes, true)).is_linux, "{bytes:?}");
        }
        for bytes in [note(b"Xen\0", 6, b"FreeBSD\0"), b"Linux version %s".to_vec()] {
            assert!(!notes(&with_notes(&bytes, true)).is_linux, "{bytes:?}");
        }
        assert!(notes(&with_notes(&note(b"GNU\0", 1, &[0; 16]), true)).is_program);
    }

    #[test]
    fn headers_that_overlap_are_read_once() {
        let count = 60_000u16;
        let mut image = elf(0x10_0000, &[0; 1 << 20]);
        let mut header = image[64..120].to_vec();
        header[0] = 4;
        header[8..16].copy_from_slice(&(64 + 56 * u64::from(count)).to_le_bytes());
        image.truncate(64);
        image[56..58].copy_from_slice(&count.to_le_bytes());
        image.extend((0..count).flat_map(|_| header.clone()));
        image.resize(image.len() + (1 << 20), 0);
        assert_eq!(notes(&image), Notes::default());
    }

    proptest! {
        #[test]
        fn no_notes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), align in 0u8..9) {
            let mut image = with_notes(&bytes, true);
            image[112] = align;
            let _ = notes(&image);
        }
    }
}

//! The relocations of a position-independent executable. Those that add the load bias are applied
//! here, as a loader of unikernels does; every other one is refused.
//!
//! A 32-bit entry says only where to add. It becomes `R_386_NONE` in the loaded file once it is
//! applied, so that a kernel that relocates itself does not add the bias twice. A 64-bit entry has
//! the sum's other part, so that it may be applied again.

use super::fields::{u32_at, u64_at};
use super::program_headers::{Executable, Segment};
use crate::error::Result;
use crate::memory::GuestMemory;

const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;

// Tags of the dynamic section.
const DT_NEEDED: u64 = 1;
const DT_PLTRELSZ: u64 = 2;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_SONAME: u64 = 14;
const DT_REL: u64 = 17;
const DT_RELSZ: u64 = 18;
const DT_PLTREL: u64 = 20;
const DT_JMPREL: u64 = 23;
const DT_RELRSZ: u64 = 35;
const DT_RELR: u64 = 36;

/// `R_X86_64_NONE` and `R_386_NONE`.
const NONE: u64 = 0;
/// `R_X86_64_RELATIVE` and `R_386_RELATIVE`.
const RELATIVE: u64 = 8;

/// The tables of relocations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Relocations<'a> {
    executable: Executable<'a>,
    /// By address.
    segments: &'a [Segment],
    bias: u64,
    /// Entries with and without addends, those of the linkage table, and the packed ones: address
    /// and size.
    rela: (u64, u64),
    rel: (u64, u64),
    linkage: (u64, u64),
    packed: (u64, u64),
    linkage_kind: u64,
}

/// A place to relocate.
struct Place {
    /// Its address in memory.
    at: u64,
    /// What the bias is added to; none means what is there.
    addend: Option<u64>,
    /// The address of the entry's type.
    entry: Option<u64>,
}

/// Check that a file needs no dynamic linker.
///
/// # Errors
/// If it has an interpreter, needs a library, or is one.
pub(super) fn check_static(executable: Executable<'_>) -> Result<()> {
    for header in executable.headers()? {
        if header?.kind == PT_INTERP {
            return Err(executable
                .bad("a dynamically linked program, which needs an operating system")
                .hint("link a kernel with -static, or with -static-pie"));
        }
    }
    for (tag, _) in dynamic(executable)? {
        if matches!(tag, DT_NEEDED | DT_SONAME) {
            return Err(executable
                .bad("a shared library, or a program that needs one")
                .hint("link a kernel with -static, or with -static-pie"));
        }
    }
    Ok(())
}

/// The tags and values of the dynamic section.
fn dynamic(executable: Executable<'_>) -> Result<Vec<(u64, u64)>> {
    let word = if executable.is_64 { 8 } else { 4 };
    for header in executable.headers()? {
        let header = header?;
        if header.kind != PT_DYNAMIC {
            continue;
        }
        let range = usize::try_from(header.offset).ok().zip(usize::try_from(header.in_file).ok());
        let bytes = range.and_then(|(at, size)| executable.image.get(at..at.checked_add(size)?));
        let Some(bytes) = bytes else {
            return Err(executable.bad("the dynamic section is outside the file"));
        };
        let entries = bytes
            .chunks_exact(2 * word)
            .filter_map(|entry| Some((word_at(entry, 0, word)?, word_at(entry, word, word)?)));
        return Ok(entries.take_while(|(tag, _)| *tag != 0).collect());
    }
    Ok(Vec::new())
}

fn word_at(bytes: &[u8], at: usize, word: usize) -> Option<u64> {
    if word == 8 { u64_at(bytes, at) } else { u32_at(bytes, at).map(u64::from) }
}

impl<'a> Relocations<'a> {
    /// The relocations of a file whose segments are moved by `bias`. All are checked.
    ///
    /// # Errors
    /// If one is of another kind than relative, or a table or a place is outside the segments.
    pub(super) fn new(
        executable: Executable<'a>,
        segments: &'a [Segment],
        bias: u64,
    ) -> Result<Self> {
        let none = (0, 0);
        let (rela, rel, linkage, packed) = (none, none, none, none);
        let mut found =
            Self { executable, segments, bias, rela, rel, linkage, packed, linkage_kind: 0 };
        for (tag, value) in dynamic(executable)? {
            match tag {
                DT_RELA => found.rela.0 = value,
                DT_RELASZ => found.rela.1 = value,
                DT_REL => found.rel.0 = value,
                DT_RELSZ => found.rel.1 = value,
                DT_JMPREL => found.linkage.0 = value,
                DT_PLTRELSZ => found.linkage.1 = value,
                DT_PLTREL => found.linkage_kind = value,
                DT_RELR => found.packed.0 = value,
                DT_RELRSZ => found.packed.1 = value,
                _ => {}
            }
        }
        let room: u64 = segments.iter().map(|segment| segment.end - segment.start).sum();
        let mut left = room / found.word() as u64 + 1;
        found.each(&mut |place| {
            // No word needs two relocations, so the size of memory bounds the work.
            left = left.checked_sub(1).ok_or_else(|| {
                executable.bad("there are more relocations than words in its segments")
            })?;
            found.check_place(&place)
        })?;
        Ok(found)
    }

    fn word(&self) -> usize {
        if self.executable.is_64 { 8 } else { 4 }
    }

    /// Apply them to the loaded segments.
    ///
    /// # Errors
    /// None that `new` has not returned.
    pub(super) fn apply(&self, memory: &GuestMemory) -> Result<()> {
        self.each(&mut |place| {
            let mut bytes = [0; 8];
            let word = bytes.get_mut(..self.word()).unwrap_or(&mut []);
            memory.read(place.at, word)?;
            let value = place.addend.unwrap_or(u64::from_le_bytes(bytes));
            let sum = value.wrapping_add(self.bias).to_le_bytes();
            memory.write(place.at, sum.get(..self.word()).unwrap_or(&sum))?;
            match place.entry {
                Some(at) => memory.write(at, &0u32.to_le_bytes()),
                None => Ok(()),
            }
        })
    }

    fn each(&self, f: &mut dyn FnMut(Place) -> Result<()>) -> Result<()> {
        self.table("DT_RELA", self.rela, true, f)?;
        self.table("DT_REL", self.rel, false, f)?;
        // An old linker counts these in the other table too.
        let all = if self.linkage_kind == DT_RELA { self.rela } else { self.rel };
        let is_counted = self.linkage.0 >= all.0 && self.linkage.0 - all.0 < all.1;
        if !is_counted {
            self.table("DT_JMPREL", self.linkage, self.linkage_kind == DT_RELA, f)?;
        }
        self.packed(f)
    }

    fn table(
        &self,
        name: &str,
        (start, size): (u64, u64),
        has_addend: bool,
        f: &mut dyn FnMut(Place) -> Result<()>,
    ) -> Result<()> {
        let word = self.word();
        let entry_size = if has_addend { 3 * word } else { 2 * word };
        let bytes = self.bytes(name, start, size)?;
        for (entry, number) in bytes.chunks_exact(entry_size).zip(0u64..) {
            let field = |n: usize| word_at(entry, n * word, word).unwrap_or(0);
            let info = field(1);
            let kind = if self.executable.is_64 { info & 0xffff_ffff } else { info & 0xff };
            if kind == NONE {
                continue;
            }
            if kind != RELATIVE {
                let detail = format!("{name}[{number}] is a relocation of type {kind}");
                return Err(self.executable.bad(format!("{detail}, not a relative one")).hint(
                    "link it with -static-pie, with hidden symbols and no thread-local variables",
                ));
            }
            let info_at = start + number * entry_size as u64 + word as u64;
            f(Place {
                at: field(0).wrapping_add(self.bias),
                addend: has_addend.then(|| field(2)),
                entry: (!has_addend).then(|| info_at.wrapping_add(self.bias)),
            })?;
        }
        Ok(())
    }

    /// Packed entries: an address, then bitmaps for the words that follow it.
    fn packed(&self, f: &mut dyn FnMut(Place) -> Result<()>) -> Result<()> {
        let word = self.word();
        let (mut next, bits) = (self.bias, word as u64 * 8 - 1);
        let place = |at| Place { at, addend: None, entry: None };
        for entry in self.bytes("DT_RELR", self.packed.0, self.packed.1)?.chunks_exact(word) {
            let entry = word_at(entry, 0, word).unwrap_or(0);
            if entry & 1 == 0 {
                let at = entry.wrapping_add(self.bias);
                f(place(at))?;
                next = at.wrapping_add(word as u64);
                continue;
            }
            for bit in (0..bits).filter(|bit| entry >> (bit + 1) & 1 == 1) {
                f(place(next.wrapping_add(bit * word as u64)))?;
            }
            next = next.wrapping_add(bits * word as u64);
        }
        Ok(())
    }

    /// The bytes in the file of a table at a virtual address.
    fn bytes(&self, name: &str, start: u64, size: u64) -> Result<&'a [u8]> {
        if size == 0 {
            return Ok(&[]);
        }
        let inside = |segment: &&Segment| start >= segment.virt;
        let found = self.segments.iter().filter(inside).find_map(|segment| {
            let at = usize::try_from(start - segment.virt).ok()?;
            let size = usize::try_from(size).ok()?;
            self.executable.bytes_of(segment).get(at..at.checked_add(size)?)
        });
        found.ok_or_else(|| {
            let detail = format!("{name}: {size} bytes at {start:#x} are in no segment");
            self.executable.bad(detail)
        })
    }

    fn check_place(&self, place: &Place) -> Result<()> {
        let word = self.word() as u64;
        let after = self.segments.partition_point(|segment| segment.start <= place.at);
        let segment = after.checked_sub(1).and_then(|before| self.segments.get(before));
        if segment.is_some_and(|s| place.at < s.end && s.end - place.at >= word) {
            return Ok(());
        }
        let at = place.at.wrapping_sub(self.bias);
        Err(self.executable.bad(format!("the relocation of {at:#x} is in no segment")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::program_headers::tests::{elf, elf32};
    use super::super::program_headers::{LoadAt, Low};
    use super::*;
    use proptest::prelude::*;

    const BIAS: u64 = 0x10_0000;

    /// A position-independent file: one segment of 0x200 bytes at 0, whose dynamic section is at
    /// 0x100 and whose table is at 0x180.
    fn pie(is_64: bool, tags: &[(u64, u64)], table: &[u64]) -> Vec<u8> {
        let word = if is_64 { 8 } else { 4 };
        let mut code = vec![0; 0x200];
        let mut put = |at: usize, value: u64| {
            code[at..at + word].copy_from_slice(&value.to_le_bytes()[..word]);
        };
        for (n, (tag, value)) in tags.iter().enumerate() {
            put(0x100 + 2 * n * word, *tag);
            put(0x100 + (2 * n + 1) * word, *value);
        }
        for (n, value) in table.iter().enumerate() {
            put(0x180 + n * word, *value);
        }
        put(0x10, 0x40);
        put(0x18, 0x50);
        let mut image = if is_64 { elf(0, &code) } else { elf32(0, &code) };
        image[16] = 3;
        let (start, size) = if is_64 { (64, 56) } else { (52, 32) };
        let mut second = image[start..start + size].to_vec();
        second[0] = 2;
        let moved = u8::try_from(size).unwrap();
        let offset = if is_64 { 8 } else { 4 };
        image[start + offset] += moved;
        let at = 0x100 + u64::try_from(start + 2 * size).unwrap();
        second[offset..offset + 4].copy_from_slice(&u32::try_from(at).unwrap().to_le_bytes());
        let in_file = if is_64 { 32 } else { 16 };
        second[in_file..in_file + 4].copy_from_slice(&0x80u32.to_le_bytes());
        image.splice(start + size..start + size, second);
        image[if is_64 { 56 } else { 44 }] = 2;
        image
    }

    fn words(image: &[u8], wanted: &[u64]) -> Result<Vec<u64>> {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let executable = Executable::new(image, "boot.kernel")?;
        let segments = executable.segments(&memory, LoadAt::Moved(BIAS), Low::Nothing)?;
        let relocations = Relocations::new(executable, &segments, BIAS)?;
        segments.iter().for_each(|s| memory.write(s.start, executable.bytes_of(s)).unwrap());
        relocations.apply(&memory)?;
        let word = relocations.word();
        Ok(wanted
            .iter()
            .map(|at| {
                let mut bytes = [0; 8];
                memory.read(BIAS + at, &mut bytes[..word]).unwrap();
                u64::from_le_bytes(bytes)
            })
            .collect())
    }

    #[test]
    fn an_entry_with_an_addend_writes_the_sum() {
        let tags = [(DT_RELA, 0x180), (DT_RELASZ, 48)];
        let image = pie(true, &tags, &[0x10, 8, 0x44, 0x18, 0, 0x99]);
        assert_eq!(words(&image, &[0x10, 0x18, 0x188]).unwrap(), [BIAS + 0x44, 0x50, 8]);
    }

    #[test]
    fn an_entry_without_one_adds_the_bias_once() {
        let tags = [(DT_REL, 0x180), (DT_RELSZ, 16)];
        let image = pie(false, &tags, &[0x10, 8, 0x18, 8]);
        let expected = [BIAS + 0x40, BIAS + 0x50, 0, 0];
        assert_eq!(words(&image, &[0x10, 0x18, 0x184, 0x18c]).unwrap(), expected);
    }

    #[test]
    fn packed_entries_are_an_address_and_a_bitmap() {
        let tags = [(DT_RELR, 0x180), (DT_RELRSZ, 16)];
        let image = pie(true, &tags, &[0x10, 0b11]);
        assert_eq!(words(&image, &[0x10, 0x18, 0x20]).unwrap(), [BIAS + 0x40, BIAS + 0x50, 0]);
    }

    #[test]
    fn what_cannot_be_relocated_is_refused_with_the_reason() {
        for (tags, table, reason) in [
            (
                vec![(DT_RELA, 0x180), (DT_RELASZ, 24)],
                [0x10, 37, 0],
                "DT_RELA[0] is a relocation of type 37",
            ),
            (vec![(DT_RELA, 0x180), (DT_RELASZ, 24)], [0x1fc, 8, 0], "0x1fc is in no segment"),
            (vec![(DT_RELA, 0x1f0), (DT_RELASZ, 24)], [0; 3], "DT_RELA: 24 bytes at 0x1f0"),
            (vec![(DT_RELR, 0x180), (DT_RELRSZ, u64::MAX)], [0; 3], "DT_RELR: "),
            (vec![(DT_RELR, 0x180), (DT_RELRSZ, 16)], [0x1f8, 3, 0], "is in no segment"),
        ] {
            let error = words(&pie(true, &tags, &table), &[]).unwrap_err();
            assert!(error.detail.contains(reason), "{error}");
        }
        let check = |image: &[u8]| check_static(Executable::new(image, "boot.kernel").unwrap());
        check(&pie(true, &[], &[])).unwrap();
        for tag in [DT_NEEDED, DT_SONAME] {
            assert!(check(&pie(true, &[(tag, 1)], &[])).unwrap_err().detail.contains("library"));
        }
        let mut image = pie(true, &[], &[]);
        image[120] = 3;
        assert!(check(&image).unwrap_err().detail.contains("dynamically linked"));
    }

    proptest! {
        #[test]
        fn no_tables_panic(
            is_64 in any::<bool>(),
            tags in prop::collection::vec((0u64..40, 0u64..0x300), 0..7),
            table in prop::collection::vec(prop_oneof![any::<u64>(), 0u64..0x210], 0..8),
        ) {
            let _ = words(&pie(is_64, &tags, &table), &[]);
        }
    }
}

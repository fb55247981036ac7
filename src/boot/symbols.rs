//! Reads the symbols of an ELF file. A file whose symbols are damaged has none.

use super::fields::{u16_at, u32_at, u64_at};
use crate::debug::Symbol;

const SHT_SYMTAB: u32 = 2;
const ENTRY: usize = 24;
const STT_OBJECT: u8 = 1;
const STT_FUNC: u8 = 2;
const SHN_UNDEF: u16 = 0;
/// More symbols than are kept.
const MAX: usize = 1 << 16;
/// Bytes of a name that are kept.
const MAX_NAME: usize = 256;

/// The functions, objects and labels that have a name and an address.
pub(super) fn symbols(image: &[u8]) -> Vec<Symbol> {
    read(image).unwrap_or_default()
}

fn read(image: &[u8]) -> Option<Vec<Symbol>> {
    let (offset, size, count) = (u64_at(image, 40)?, u16_at(image, 58)?, u16_at(image, 60)?);
    let header = |n: u64| {
        let at = offset.checked_add(n.checked_mul(u64::from(size))?)?;
        let at = usize::try_from(at).ok()?;
        image.get(at..at.checked_add(64)?)
    };
    let mut headers = (0..u64::from(count)).map_while(header);
    let table = headers.find(|header| u32_at(header, 4) == Some(SHT_SYMTAB))?;
    let names = bytes_of(image, header(u64::from(u32_at(table, 40)?))?)?;
    let entries = bytes_of(image, table)?.chunks_exact(ENTRY);
    Some(entries.filter_map(|entry| symbol(entry, names)).take(MAX).collect())
}

fn bytes_of<'a>(image: &'a [u8], header: &[u8]) -> Option<&'a [u8]> {
    let start = usize::try_from(u64_at(header, 24)?).ok()?;
    let size = usize::try_from(u64_at(header, 32)?).ok()?;
    image.get(start..start.checked_add(size)?)
}

fn symbol(entry: &[u8], names: &[u8]) -> Option<Symbol> {
    let kind = entry.get(4)? & 0xf;
    let (section, address) = (u16_at(entry, 6)?, u64_at(entry, 8)?);
    let name = names.get(usize::try_from(u32_at(entry, 0)?).ok()?..)?;
    // Names may overlap, so that a small file could have many large ones.
    let name = name.get(..MAX_NAME).unwrap_or(name).split(|byte| *byte == 0).next()?;
    // Labels of assembly have no type.
    let is_kept = matches!(kind, 0 | STT_OBJECT | STT_FUNC) && section != SHN_UNDEF;
    let size = u32::try_from(u64_at(entry, 16)?).unwrap_or(u32::MAX);
    (is_kept && !name.is_empty()).then(|| Symbol { address, size, name: name.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file of a header, two sections' headers, two symbols and their names.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 64];
        image[40..48].copy_from_slice(&64u64.to_le_bytes());
        image[58] = 64;
        image[60] = 2;
        let (symbols, names) = (192u64, 240u64);
        let mut section = |kind: u8, link: u8, at: u64, size: u64| {
            let mut header = [0; 64];
            (header[4], header[40]) = (kind, link);
            header[24..32].copy_from_slice(&at.to_le_bytes());
            header[32..40].copy_from_slice(&size.to_le_bytes());
            image.extend(header);
        };
        section(2, 1, symbols, 48);
        section(3, 0, names, 12);
        for (name, kind, address, size) in [(1u8, 2u8, 0x1000u64, 8u64), (7, 4, 0x2000, 0)] {
            let mut entry = [0; 24];
            (entry[0], entry[4], entry[6]) = (name, kind, 1);
            entry[8..16].copy_from_slice(&address.to_le_bytes());
            entry[16..24].copy_from_slice(&size.to_le_bytes());
            image.extend(entry);
        }
        image.extend(b"\0parse\0file\0");
        image
    }

    #[test]
    fn functions_are_kept_and_names_of_files_are_not() {
        let parse = Symbol { address: 0x1000, size: 8, name: b"parse".to_vec() };
        assert_eq!(symbols(&image()), [parse]);
    }

    proptest! {
        #[test]
        fn a_mutated_file_never_panics(changes in prop::collection::vec((0usize..252, any::<u8>()), 1..8)) {
            let mut image = image();
            for (at, value) in changes {
                image[at] = value;
            }
            let _ = symbols(&image);
        }
    }
}

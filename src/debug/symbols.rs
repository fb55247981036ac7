//! A program's symbols: a table in guest memory, out of the guest's reach, so that snapshots and
//! forks have it too. A read does not trust it.

use std::collections::BTreeMap;

/// What says that there is a table.
const MAGIC: u64 = u64::from_le_bytes(*b"pyvmmsym");
/// Bytes of an entry: address, size, and offset of the name.
const ENTRY: u64 = 16;
/// How far a label without a size reaches, unless the next symbol comes earlier.
const LABEL_REACH: u64 = 4096;
/// More bytes than a name that is shown.
const MAX_NAME: u64 = 512;

/// A function or an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Symbol {
    /// Its first address.
    pub address: u64,
    /// Bytes; 0 if that is not known.
    pub size: u32,
    /// Its name.
    pub name: Vec<u8>,
}

/// The bytes of a table: entries by address, then the names, each with a zero. With the offset of
/// the names.
#[must_use]
pub fn encode(mut symbols: Vec<Symbol>) -> (Vec<u8>, u64) {
    symbols.sort_unstable();
    let (mut entries, mut names) = (Vec::new(), Vec::new());
    for Symbol { address, size, name } in symbols {
        let Ok(offset) = u32::try_from(names.len()) else { break };
        entries.extend(address.to_le_bytes());
        entries.extend(size.to_le_bytes());
        entries.extend(offset.to_le_bytes());
        names.extend(name);
        names.push(0);
    }
    let offset = entries.len() as u64;
    entries.extend(names);
    (entries, offset)
}

/// What is written in a fixed place: where a table of this size is.
#[must_use]
pub fn place(table: u64, names: u64, size: u64) -> [u64; 4] {
    [MAGIC, table, table.saturating_add(names), table.saturating_add(size)]
}

/// A table, by the function that reads 8 bytes of guest memory.
pub struct Symbols<'a> {
    read: &'a dyn Fn(u64) -> Option<u64>,
    entries: u64,
    names: u64,
    end: u64,
}

impl<'a> Symbols<'a> {
    /// The table that this place names; `None` if there is none.
    #[must_use]
    pub fn at(place: u64, read: &'a dyn Fn(u64) -> Option<u64>) -> Option<Self> {
        let word = |n: u64| read(place.checked_add(8 * n)?);
        let is_there = word(0)? == MAGIC;
        let (entries, names, end) = (word(1)?, word(2)?, word(3)?);
        let is_valid = is_there && entries <= names && names <= end;
        is_valid.then_some(Self { read, entries, names, end })
    }

    fn count(&self) -> u64 {
        (self.names - self.entries) / ENTRY
    }

    /// Address, size and offset of the name.
    fn entry(&self, n: u64) -> Option<(u64, u64, u64)> {
        let at = self.entries + n * ENTRY;
        let (address, rest) = ((self.read)(at)?, (self.read)(at.checked_add(8)?)?);
        Some((address, rest & 0xffff_ffff, rest >> 32))
    }

    /// The name of the symbol that an address is in, and the offset in it.
    #[must_use]
    pub fn find(&self, address: u64) -> Option<(String, u64)> {
        let (mut low, mut high) = (0, self.count());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(middle)?.0 <= address { low = middle + 1 } else { high = middle }
        }
        let (start, size, name) = self.entry(low.checked_sub(1)?)?;
        let offset = address.checked_sub(start)?;
        let size = if size == 0 { LABEL_REACH } else { size };
        (offset < size).then(|| self.name(name).map(|name| (name, offset)))?
    }

    /// Every symbol's address by its name.
    #[must_use]
    pub fn all(&self) -> BTreeMap<String, u64> {
        let entries = (0..self.count()).map_while(|n| self.entry(n));
        entries.filter_map(|(address, _, name)| Some((self.name(name)?, address))).collect()
    }

    fn name(&self, offset: u64) -> Option<String> {
        let start = self.names.checked_add(offset)?;
        let mut name = Vec::new();
        for at in start..self.end.min(start.checked_add(MAX_NAME)?) {
            let [byte, ..] = (self.read)(at)?.to_le_bytes();
            if byte == 0 {
                break;
            }
            name.push(byte);
        }
        Some(String::from_utf8_lossy(&name).into_owned())
    }
}

impl std::fmt::Debug for Symbols<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Symbols").field("count", &self.count()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Memory with a place at 0 and a table behind it.
    fn memory(symbols: &[(u64, u32, &str)]) -> Vec<u8> {
        let symbols = symbols.iter().map(|(address, size, name)| Symbol {
            address: *address,
            size: *size,
            name: name.as_bytes().to_vec(),
        });
        let (table, names) = encode(symbols.collect());
        let mut bytes: Vec<u8> =
            place(32, names, table.len() as u64).into_iter().flat_map(u64::to_le_bytes).collect();
        bytes.extend(table);
        bytes.extend([0; 8]);
        bytes
    }

    fn reader(bytes: &[u8]) -> impl Fn(u64) -> Option<u64> {
        |at| {
            let at = usize::try_from(at).ok()?;
            Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
        }
    }

    #[test]
    fn an_address_has_the_symbol_that_it_is_in() {
        let bytes = memory(&[(0x200, 0, "label"), (0x100, 16, "parse"), (0x110, 4, "done")]);
        let read = reader(&bytes);
        let symbols = Symbols::at(0, &read).unwrap();
        let find = |at| symbols.find(at).map(|(name, offset)| format!("{name}+{offset:#x}"));
        assert_eq!(find(0xff), None);
        assert_eq!(find(0x10f).as_deref(), Some("parse+0xf"));
        assert_eq!(find(0x110).as_deref(), Some("done+0x0"));
        assert_eq!(find(0x114), None, "a gap");
        assert_eq!(find(0x300).as_deref(), Some("label+0x100"));
        assert_eq!(find(0x8000_0000_0000), None, "far from every label");
        assert_eq!(symbols.all().into_iter().next(), Some(("done".into(), 0x110)));
        assert_eq!(format!("{symbols:?}"), "Symbols { count: 3, .. }");
    }

    #[test]
    fn memory_without_a_table_has_none() {
        assert!(Symbols::at(0, &|_| Some(0)).is_none());
        assert!(Symbols::at(0, &|_| None).is_none());
        assert!(Symbols::at(u64::MAX, &|_| Some(MAGIC)).is_none());
    }

    proptest! {
        #[test]
        fn no_table_makes_a_search_panic(
            words in prop::collection::vec(any::<u64>(), 3), address in any::<u64>(),
            rest in prop::collection::vec(any::<u8>(), 0..256),
        ) {
            let mut bytes = MAGIC.to_le_bytes().to_vec();
            bytes.extend(words.iter().flat_map(|word| (word % 400).to_le_bytes()));
            bytes.extend(rest);
            let read = reader(&bytes);
            if let Some(symbols) = Symbols::at(0, &read) {
                let _ = (symbols.find(address), symbols.all());
            }
        }
    }
}

//! Multiboot 1 (the Multiboot Specification 0.6.96): finds the header, and tells the kernel its
//! command line, modules, and memory.

use super::area::Area;
use super::fields::u32_at;
use super::memory_map::{RAM, Range};
use super::modules::Placed;
use super::program_headers::{Low, check_low};
use crate::cpu::{Arguments, CpuMode, Start};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

const AT: &str = "boot.kernel";
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header is in the first bytes of the file.
const SEARCHED: usize = 8192;
const HEADER_MAGIC_2: u32 = 0xe852_50d6;
const SEARCHED_2: usize = 32 << 10;
/// What EAX says at the entry.
const LOADER_MAGIC: u64 = 0x2bad_b002;

// Flags of the header. The lower half must be understood.
const WANTS_VIDEO: u32 = 1 << 2;
const KNOWN: u32 = 0b111;
const MUST_KNOW: u32 = 0xffff;
const HAS_ADDRESSES: u32 = 1 << 16;

// Flags of the information.
const INFO_MEMORY: u32 = 1;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MAP: u32 = 1 << 6;
const INFO_LOADER: u32 = 1 << 9;
const INFO_FRAMEBUFFER: u32 = 1 << 12;

/// The text screen: the framebuffer's address, bytes a line, columns, lines, and 16 bits a
/// character of EGA text, each at its offset in the information.
const SCREEN: [(usize, u64); 5] = [(88, 0xb_8000), (96, 160), (100, 80), (104, 25), (108, 0x210)];
/// The information's size, up to the framebuffer's type.
const INFO_SIZE: usize = 116;

/// Whether a file has a header of multiboot 2, which is another protocol.
pub(super) fn has_version_2(image: &[u8]) -> bool {
    let searched = image.get(..SEARCHED_2).unwrap_or(image);
    (0..searched.len()).step_by(8).any(|offset| {
        let field = |n: usize| u32_at(searched, offset + 4 * n).unwrap_or(0);
        let sum = (0..4).fold(0u32, |sum, n| sum.wrapping_add(field(n)));
        field(0) == HEADER_MAGIC_2 && sum == 0
    })
}

/// A multiboot header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Its offset in the file.
    offset: usize,
    flags: u32,
}

/// A part of the file that its header gives an address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addressed<'a> {
    pub(super) load: u64,
    bytes: &'a [u8],
    /// Where the zeros behind it end.
    pub(super) end: u64,
    pub(super) entry: u64,
}

/// The header of a file, if it has one.
pub(super) fn find(image: &[u8]) -> Option<Header> {
    let searched = image.get(..SEARCHED).unwrap_or(image);
    (0..searched.len()).step_by(4).find_map(|offset| {
        let field = |n: usize| u32_at(searched, offset + 4 * n);
        let (magic, flags, checksum) = (field(0)?, field(1)?, field(2)?);
        let sum = magic.wrapping_add(flags).wrapping_add(checksum);
        (magic == HEADER_MAGIC && sum == 0).then_some(Header { offset, flags })
    })
}

impl Header {
    /// Whether it says itself where the file is loaded.
    pub(super) fn has_addresses(self) -> bool {
        self.flags & HAS_ADDRESSES != 0
    }

    /// # Errors
    /// If it demands what no loader knows.
    pub(super) fn check(self) -> Result<()> {
        let unknown = self.flags & MUST_KNOW & !KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let bits: Vec<String> =
            (0..16).filter(|bit| unknown >> bit & 1 == 1).map(|bit| bit.to_string()).collect();
        let bits = bits.join(", ");
        Err(bad(format!("its multiboot header demands the unknown features of flag bits {bits}")))
    }

    /// What the header's own addresses say; `None` if it has none, and the ELF header counts.
    ///
    /// # Errors
    /// If they do not fit the file or memory.
    pub(super) fn addressed<'a>(
        self,
        image: &'a [u8],
        memory: &GuestMemory,
    ) -> Result<Option<Addressed<'a>>> {
        if !self.has_addresses() {
            return Ok(None);
        }
        let field = |n: usize| u32_at(image, self.offset + 12 + 4 * n).map(u64::from);
        let (Some(header), Some(load), Some(load_end), Some(bss_end), Some(entry)) =
            (field(0), field(1), field(2), field(3), field(4))
        else {
            return Err(bad("its multiboot header is truncated in its addresses"));
        };
        let start = header.checked_sub(load).and_then(|n| (self.offset as u64).checked_sub(n));
        let Some(start) = start else {
            let detail = format!("load_addr {load:#x} does not fit header_addr {header:#x}");
            return Err(bad(format!("{detail}, which is at {:#x} in the file", self.offset)));
        };
        let most = image.len() as u64 - start;
        let size = match load_end {
            0 => most,
            _ => load_end
                .checked_sub(load)
                .filter(|size| *size <= most)
                .ok_or_else(|| bad(format!("load_end_addr {load_end:#x} is outside the file")))?,
        };
        let end = if bss_end == 0 { load + size } else { bss_end };
        if end < load + size {
            return Err(bad(format!("bss_end_addr {bss_end:#x} is below the end of its data")));
        }
        let range = usize::try_from(start).ok().zip(usize::try_from(size).ok());
        let bytes = range.and_then(|(at, size)| image.get(at..at.checked_add(size)?));
        let found = Addressed { load, bytes: bytes.unwrap_or(&[]), end, entry };
        found.check(memory)?;
        Ok(Some(found))
    }

    /// Add the information to the area; returns the start at the entry.
    ///
    /// # Errors
    /// If there is no room.
    pub(super) fn add_info(
        self,
        area: &mut Area,
        entry: u64,
        cmdline: &str,
        modules: &[Placed],
        map: &[Range],
    ) -> Result<Start> {
        let mut info = Info([0; INFO_SIZE]);
        let above = map.iter().find(|r| r.kind == RAM && r.start == layout::HIGH_MEMORY);
        let map = map_bytes(map);
        let mut flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MAP | INFO_LOADER;
        info.put(4, layout::EBDA_START >> 10);
        info.put(8, above.map_or(0, |range| range.size >> 10));
        info.put(16, area.add_text(cmdline)?);
        info.put(20, modules.len() as u64);
        info.put(24, add_modules(area, modules)?);
        info.put(44, map.len() as u64);
        info.put(48, area.add(&map)?);
        info.put(64, area.add_text("pyvmm")?);
        if self.flags & WANTS_VIDEO != 0 {
            // The mode that it names is a recommendation; this is the one that there is.
            flags |= INFO_FRAMEBUFFER;
            SCREEN.into_iter().for_each(|(at, value)| info.put(at, value));
        }
        info.put(0, u64::from(flags));
        let rbx = area.add(&info.0)?;
        let arguments = Arguments { rax: LOADER_MAGIC, rbx, ..Arguments::default() };
        let stack = Some(layout::ZERO_PAGE);
        Ok(Start { stack, arguments, ..Start::new(CpuMode::Loader32, entry) })
    }
}

/// The information, whose fields have 4 bytes each.
struct Info([u8; INFO_SIZE]);

impl Info {
    fn put(&mut self, at: usize, value: u64) {
        let [a, b, c, d, ..] = value.to_le_bytes();
        if let Some(field) = self.0.get_mut(at..at + 4) {
            field.copy_from_slice(&[a, b, c, d]);
        }
    }
}

impl Addressed<'_> {
    fn check(&self, memory: &GuestMemory) -> Result<()> {
        let Self { load, end, entry, .. } = *self;
        if !(load..end).contains(&entry) {
            return Err(bad(format!("entry_addr {entry:#x} is outside what it loads")));
        }
        check_low(load, end - load, Low::BesideTables)
            .map_err(|detail| bad(format!("load_addr {load:#x} {detail}")))?;
        memory.check(load, end - load).map_err(|e| {
            bad(format!("load_addr {load:#x}: {}", e.detail))
                .hint("give the machine more memory (memory.size_mib)")
        })
    }

    /// Write it to memory.
    ///
    /// # Errors
    /// None that [`Header::addressed`] has not returned.
    pub(super) fn write(&self, memory: &GuestMemory) -> Result<()> {
        if self.bytes.is_empty() { Ok(()) } else { memory.write(self.load, self.bytes) }
    }
}

fn add_modules(area: &mut Area, modules: &[Placed]) -> Result<u64> {
    let mut list = Vec::new();
    for module in modules {
        let line = area.add_text(&module.cmdline)?;
        for field in [module.start, module.end(), line, 0] {
            list.extend(u32::try_from(field).unwrap_or(u32::MAX).to_le_bytes());
        }
    }
    area.add(&list)
}

/// The map's entries, each after its size, which does not count itself.
fn map_bytes(map: &[Range]) -> Vec<u8> {
    let entry = |range: &Range| {
        let mut entry = 20u32.to_le_bytes().to_vec();
        entry.extend(range.start.to_le_bytes());
        entry.extend(range.size.to_le_bytes());
        entry.extend(range.kind.to_le_bytes());
        entry
    };
    map.iter().flat_map(entry).collect()
}

fn bad(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Boot, AT, detail)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::memory_map::memory_map;
    use super::super::modules::{self, tests::module};
    use super::*;
    use proptest::prelude::*;

    /// A header with these flags, and these addresses.
    pub(in crate::boot) fn header(flags: u32, addresses: &[u32]) -> Vec<u8> {
        let checksum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
        let fields = [&[HEADER_MAGIC, flags, checksum][..], addresses].concat();
        fields.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    fn memory() -> GuestMemory {
        GuestMemory::new(4 << 20).unwrap()
    }

    #[test]
    fn a_header_is_found_where_the_specification_allows_it() {
        let at = |offset: usize| [vec![0x90; offset], header(3, &[])].concat();
        for offset in [0, 4, 8180] {
            assert_eq!(find(&at(offset)), Some(Header { offset, flags: 3 }));
        }
        for offset in [2, 8184, 8192] {
            assert_eq!(find(&at(offset)), None, "{offset}");
        }
        let mut wrong = at(0);
        wrong[8] ^= 1;
        assert_eq!(find(&wrong), None);
        assert!(!has_version_2(&at(0)));
        let sum = 0u32.wrapping_sub(HEADER_MAGIC_2 + 24);
        let second: Vec<u8> =
            [HEADER_MAGIC_2, 0, 24, sum].into_iter().flat_map(u32::to_le_bytes).collect();
        assert!(has_version_2(&second));
    }

    #[test]
    fn a_demand_that_is_not_known_is_refused_with_its_bits() {
        let check = |flags| find(&header(flags, &[])).unwrap().check();
        check(0xffff_0007).unwrap();
        assert!(check(0x28).unwrap_err().detail.contains("flag bits 3, 5"));
    }

    /// A file of 4 bytes, a header, and 8 bytes, with these addresses.
    fn addressed(addresses: [u32; 5]) -> Result<(u64, u64, u64, usize)> {
        let image = [vec![1; 4], header(HAS_ADDRESSES, &addresses), vec![2; 8]].concat();
        let found = find(&image).unwrap().addressed(&image, &memory())?.unwrap();
        Ok((found.load, found.end, found.entry, found.bytes.len()))
    }

    #[test]
    fn the_headers_addresses_say_what_is_loaded_where() {
        let (load, entry) = (0x10_0000, 0x10_0020);
        for (addresses, expected) in [
            ([load + 4, load, 0, 0, entry], (0x10_0000, 0x10_002c, 44)),
            ([load + 4, load, load + 40, load + 4096, entry], (0x10_0000, 0x10_1000, 40)),
            ([load, load, 0, 0, entry], (0x10_0000, 0x10_0028, 40)),
        ] {
            let (load, end, at, size) = addressed(addresses).unwrap();
            assert_eq!(((load, end, size), at), (expected, u64::from(entry)));
        }
        for (addresses, reason) in [
            ([load - 4, load, 0, 0, entry], "does not fit header_addr"),
            ([load + 8, load, 0, 0, entry], "does not fit header_addr"),
            ([load + 4, load, load + 45, 0, entry], "load_end_addr"),
            ([load + 4, load, load - 1, 0, entry], "load_end_addr"),
            ([load + 4, load, 0, load + 10, entry], "bss_end_addr"),
            ([load + 4, load, 0, 0, load + 44], "entry_addr"),
            ([load + 4, load, 0, u32::MAX, entry], "not entirely in guest memory"),
            ([0x8_0004, 0x8_0000, 0, 0, 0x8_0000], "overlap the tables"),
        ] {
            let error = addressed(addresses).unwrap_err();
            assert!(error.detail.contains(reason), "{error}");
        }
        let cut = [header(HAS_ADDRESSES, &[])].concat();
        assert!(find(&cut).unwrap().addressed(&cut, &memory()).is_err());
        let plain = header(0, &[]);
        assert!(find(&plain).unwrap().addressed(&plain, &memory()).unwrap().is_none());
    }

    #[test]
    fn the_information_leads_to_everything() {
        let memory = memory();
        let mut placed = [module(b"first", "a b"), module(b"second", "")];
        modules::place(&mut placed, 0x10_0000, &memory).unwrap();
        let (mut area, map) = (Area::default(), memory_map(4 << 20, false));
        let header = Header { offset: 0, flags: WANTS_VIDEO };
        let start = header.add_info(&mut area, 0x10_0020, "quiet", &placed, &map).unwrap();
        area.write(&memory).unwrap();
        assert_eq!((start.mode, start.entry), (CpuMode::Loader32, 0x10_0020));
        assert_eq!(start.arguments.rax, 0x2bad_b002);
        let u32_at = |at: u32| memory.load::<u32>(u64::from(at)).unwrap();
        let text = |at: u32, size| {
            let mut bytes = vec![0; size];
            memory.read(u64::from(at), &mut bytes).unwrap();
            bytes
        };
        let info = u32::try_from(start.arguments.rbx).unwrap();
        assert_eq!([0, 4, 8].map(|at| u32_at(info + at)), [0x124d, 639, 3072]);
        assert_eq!(text(u32_at(info + 16), 6), b"quiet\0");
        assert_eq!(u32_at(info + 20), 2);
        let list = u32_at(info + 24);
        assert_eq!([0, 4].map(|at| u32_at(list + at)), [0x10_0000, 0x10_0005]);
        assert_eq!(text(u32_at(list + 8), 4), b"a b\0");
        assert_eq!([16, 20].map(|at| u32_at(list + at)), [0x10_1000, 0x10_1006]);
        let (length, map_at) = (u32_at(info + 44), u32_at(info + 48));
        assert_eq!((length, u32_at(map_at), u32_at(map_at + 4)), (72, 20, 0));
        assert_eq!(
            (u32_at(map_at + 52), u32_at(map_at + 60), u32_at(map_at + 68)),
            (1 << 20, 3 << 20, 1)
        );
        assert_eq!(text(u32_at(info + 64), 6), b"pyvmm\0");
        assert_eq!((u32_at(info + 88), u32_at(info + 108)), (0xb_8000, 0x210));
    }

    proptest! {
        #[test]
        fn no_header_panics(
            flags in any::<u32>(),
            addresses in prop::collection::vec(
                prop_oneof![any::<u32>(), 0x10_0000u32..0x10_0100, 0u32..100], 5),
            cut in 12usize..60,
        ) {
            let mut image = [header(flags | HAS_ADDRESSES, &addresses), vec![1; 40]].concat();
            image.truncate(cut);
            let found = find(&image).unwrap();
            let _ = found.check();
            if let Ok(Some(addressed)) = found.addressed(&image, &memory()) {
                addressed.write(&memory()).unwrap();
            }
        }
    }
}

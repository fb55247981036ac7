//! Loads an ELF program for 64-bit ring 3: its segments at their virtual addresses with their
//! permissions, a stack at the top of memory, its symbols below the stack, and page tables in which
//! there is nothing else.

use super::files::Files;
use super::program_headers::{Executable, LoadAt, Low, Segment};
use super::symbols;
use crate::config::ElfBoot;
use crate::cpu::paging::{self, Mapping};
use crate::debug::symbols::{encode, place};
use crate::error::{Error, Result};
use crate::layout::{self, PAGE};
use crate::memory::GuestMemory;

const AT: &str = "boot.path";
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const PT_TLS: u32 = 7;
const PF_X: u32 = 1;
const PF_W: u32 = 2;
const PF_R: u32 = 4;

/// Load the program; returns its entry.
pub(super) fn load(boot: &ElfBoot, memory: &GuestMemory, files: &Files<'_>) -> Result<u64> {
    let image = files.read(&boot.path, AT, files.most)?;
    let executable = Executable::fixed_64(&image, AT)?;
    check_is_static(executable)?;
    let segments = executable.segments(memory, LoadAt::Virtual, Low::Nothing)?;
    let mut mappings = pages_of(executable, &segments)?;
    let entry = entry(executable, &mappings)?;
    let stack = boot.stack(memory.size());
    let table = symbol_table(&image);
    let symbols =
        (stack.start - PAGE).checked_sub((table.bytes.len() as u64).next_multiple_of(PAGE));
    let lowest = mappings.last().map_or(layout::HIGH_MEMORY, |last| last.end) + PAGE;
    let Some(symbols) = symbols.filter(|symbols| *symbols >= lowest) else {
        let stack_kib = boot.stack_kib;
        let detail =
            format!("no room above the program for {stack_kib} KiB of stack and its symbols");
        return Err(executable.bad(detail).hint("give the machine more memory (memory.size_mib)"));
    };
    for segment in &segments {
        let bytes = executable.bytes_of(segment);
        // The rest is zeros, as new memory is.
        if !bytes.is_empty() {
            memory.write(segment.start, bytes)?;
        }
    }
    memory.write(symbols, &table.bytes)?;
    for (n, word) in (0..).zip(place(symbols, table.names, table.size)) {
        memory.write(layout::SYMBOLS + 8 * n, &word.to_le_bytes())?;
    }
    mappings.push(stack);
    mappings.extend(paging::SYSTEM);
    paging::write(memory, &mappings)?;
    Ok(entry)
}

impl ElfBoot {
    /// The pages of the stack, at the top of the first range of memory.
    pub(crate) fn stack(&self, memory_size: u64) -> Mapping {
        let end = memory_size.min(layout::MMIO_GAP_START);
        let start = end.saturating_sub(self.stack_kib.saturating_mul(1024)) & !(PAGE - 1);
        // A page at the least stays for the guard below.
        Mapping { start: start.max(PAGE), end, user: true, write: true, execute: false }
    }
}

fn check_is_static(executable: Executable<'_>) -> Result<()> {
    for header in executable.headers()? {
        let refused: Error = match header?.kind {
            PT_INTERP | PT_DYNAMIC => executable
                .bad("a dynamically linked executable")
                .hint("link it with -static -no-pie"),
            PT_TLS => executable
                .bad("it has thread-local variables")
                .hint("there are no threads: make them plain variables"),
            _ => continue,
        };
        return Err(refused);
    }
    Ok(())
}

/// The pages of the segments, by address.
fn pages_of(executable: Executable<'_>, segments: &[Segment]) -> Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::with_capacity(segments.len());
    // Segments without any permission are not mapped.
    for segment in segments.iter().filter(|segment| segment.flags & (PF_R | PF_W | PF_X) != 0) {
        let (write, execute) = (segment.flags & PF_W != 0, segment.flags & PF_X != 0);
        let end = segment.end.next_multiple_of(PAGE);
        let page = Mapping { start: segment.start & !(PAGE - 1), end, user: true, write, execute };
        match mappings.last_mut() {
            Some(last) if page.start < last.end => {
                if (last.write, last.execute) != (write, execute) {
                    let (n, at) = (segment.number, page.start);
                    let detail = format!("segment {n} shares the page {at:#x} with another one");
                    return Err(executable
                        .bad(format!("{detail}, which has other permissions"))
                        .hint("link it with -z separate-code, or align its segments to pages"));
                }
                last.end = page.end;
            }
            _ => mappings.push(page),
        }
    }
    if mappings.is_empty() {
        return Err(executable.bad("the ELF file has no segments to load"));
    }
    Ok(mappings)
}

fn entry(executable: Executable<'_>, mappings: &[Mapping]) -> Result<u64> {
    let entry = executable.entry;
    let is_code = |page: &Mapping| page.execute && (page.start..page.end).contains(&entry);
    if mappings.iter().any(is_code) {
        return Ok(entry);
    }
    Err(executable
        .bad(format!("the entry {entry:#x} is in no executable segment"))
        .hint("define a function _start, or name another one with -e"))
}

struct SymbolTable {
    /// Padded, so that the last name can be read in words.
    bytes: Vec<u8>,
    names: u64,
    size: u64,
}

fn symbol_table(image: &[u8]) -> SymbolTable {
    let (mut bytes, names) = encode(symbols::symbols(image));
    let size = bytes.len() as u64;
    bytes.extend([0; 8]);
    SymbolTable { bytes, names, size }
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

    fn load(image: &[u8], stack_kib: u64, memory: &GuestMemory) -> Result<u64> {
        let path =
            std::env::temp_dir().join(format!("pyvmm-elf-{:?}", std::thread::current().id()));
        std::fs::write(&path, image).unwrap();
        let files = Files { most: memory.size(), interrupted: &|| Ok(()) };
        let loaded = super::load(&ElfBoot { path: path.clone(), stack_kib }, memory, &files);
        std::fs::remove_file(path).unwrap();
        loaded
    }

    fn detail(image: &[u8], stack_kib: u64) -> String {
        let error = load(image, stack_kib, &memory()).unwrap_err();
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Boot, AT));
        error.detail
    }

    #[test]
    fn a_program_is_at_its_address() {
        let memory = memory();
        assert_eq!(load(&elf(0x20_0010, b"code"), 64, &memory).unwrap(), 0x20_0010);
        let mut code = [0; 4];
        memory.read(0x20_0010, &mut code).unwrap();
        assert_eq!(&code, b"code");
        assert_ne!(memory.load::<u64>(layout::SYMBOLS).unwrap(), 0);
    }

    #[test]
    fn what_cannot_be_a_program_is_refused_with_the_reason() {
        let image = elf(0x20_0000, b"code");
        let with = |at: usize, value: u8| {
            let mut image = image.clone();
            image[at] = value;
            image
        };
        assert!(detail(&with(64, 2), 64).contains("dynamically linked"));
        assert!(detail(&with(64, 3), 64).contains("dynamically linked"));
        assert!(detail(&with(64, 7), 64).contains("thread-local"));
        assert!(detail(&with(64, 0), 64).contains("no segments"));
        assert!(detail(&with(68, 0), 64).contains("no segments"), "no permissions");
        assert!(detail(&with(68, 4), 64).contains("the entry 0x200000"), "not executable");
        assert!(detail(&image, 2048).contains("no room"));
        assert!(detail(&image, u64::MAX).contains("no room"));
        assert!(detail(&elf(0x3f_f000, b"code"), 4).contains("no room"));
        assert!(detail(&elf(0x1000, b"code"), 4).contains("below 1 MiB"));
        assert!(detail(&elf(1 << 40, b"code"), 4).contains("not entirely in guest memory"));
    }

    #[test]
    fn segments_that_share_a_page_have_the_same_permissions() {
        for (flags, is_refused) in [(5, false), (7, true), (4, true)] {
            let mut image = elf(0x20_0000, b"code");
            image[56] = 2;
            let mut second = image[64..120].to_vec();
            second[4] = flags;
            second[16..24].copy_from_slice(&0x20_0800u64.to_le_bytes());
            image.splice(120..120, second);
            image[72] = 0x78 + 56;
            image[128] = 0x78 + 56;
            let result = load(&image, 64, &memory());
            assert_eq!(result.is_err(), is_refused, "{result:?}");
        }
    }

    #[test]
    fn a_stack_is_at_the_top_of_the_first_range() {
        let boot = ElfBoot { stack_kib: 5, ..ElfBoot::default() };
        let stack = boot.stack(4 << 20);
        assert_eq!((stack.start, stack.end), ((4 << 20) - 2 * PAGE, 4 << 20));
        assert_eq!(boot.stack(8 << 30).end, layout::MMIO_GAP_START);
    }

    proptest! {
        #[test]
        fn a_mutated_file_never_panics(changes in prop::collection::vec((0usize..0x7c, any::<u8>()), 1..8)) {
            let mut image = elf(0x20_0000, b"code");
            for (at, value) in changes {
                image[at] = value;
            }
            let _ = load(&image, 64, &memory());
        }
    }
}

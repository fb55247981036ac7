//! What the PVH entry gets (Xen's public interface, arch-x86/hvm/start_info.h): the command
//! line, the modules, the memory map and ACPI's RSDP.

use super::area::Area;
use super::memory_map::Range;
use super::modules::Placed;
use crate::cpu::{Arguments, CpuMode, Start};
use crate::error::Result;
use crate::layout;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// Add the structures to the area; returns the start at the entry.
pub(super) fn add(
    area: &mut Area,
    entry: u64,
    cmdline: &str,
    modules: &[Placed],
    map: &[Range],
    rsdp: Option<u64>,
) -> Result<Start> {
    let cmdline = area.add_text(cmdline)?;
    let mut list = Vec::new();
    for module in modules {
        let line = area.add_text(&module.cmdline)?;
        for field in [module.start, module.bytes.len() as u64, line, 0] {
            list.extend(field.to_le_bytes());
        }
    }
    let list = area.add(&list)?;
    let map_bytes: Vec<u8> = map
        .iter()
        .flat_map(|range| [range.start, range.size, u64::from(range.kind)])
        .flat_map(u64::to_le_bytes)
        .collect();
    let map_at = area.add(&map_bytes)?;
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let mut info = Vec::new();
    for field in [MAGIC, VERSION, 0, count(modules.len())] {
        info.extend(field.to_le_bytes());
    }
    for field in [list, cmdline, rsdp.unwrap_or(0), map_at, u64::from(count(map.len()))] {
        info.extend(field.to_le_bytes());
    }
    let arguments = Arguments { rbx: area.add(&info)?, ..Arguments::default() };
    let stack = Some(layout::ZERO_PAGE);
    Ok(Start { stack, arguments, ..Start::new(CpuMode::Loader32, entry) })
}

#[cfg(test)]
mod tests {
    use super::super::memory_map::memory_map;
    use super::super::modules::{self, tests::module};
    use super::*;
    use crate::memory::GuestMemory;

    #[test]
    fn the_start_info_leads_to_everything() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let mut placed = [module(b"first", "a b"), module(b"second", "")];
        modules::place(&mut placed, 0x10_0000, &memory).unwrap();
        let mut area = Area::default();
        let map = memory_map(4 << 20, false);
        let start = add(&mut area, 0x10_0020, "quiet", &placed, &map, Some(0xe_0000)).unwrap();
        area.write(&memory).unwrap();
        assert_eq!((start.mode, start.entry), (CpuMode::Loader32, 0x10_0020));
        let u32_at = |at| memory.load::<u32>(at).unwrap();
        let u64_at = |at| memory.load::<u64>(at).unwrap();
        let text = |at: u64, size| {
            let mut bytes = vec![0; size];
            memory.read(at, &mut bytes).unwrap();
            bytes
        };
        let info = start.arguments.rbx;
        assert_eq!([0, 4, 8, 12].map(|at| u32_at(info + at)), [MAGIC, 1, 0, 2]);
        assert_eq!(text(u64_at(info + 24), 6), b"quiet\0");
        assert_eq!((u64_at(info + 32), u32_at(info + 48)), (0xe_0000, 3));
        let list = u64_at(info + 16);
        assert_eq!((u64_at(list), u64_at(list + 8)), (0x10_0000, 5));
        assert_eq!(text(u64_at(list + 16), 4), b"a b\0");
        assert_eq!((u64_at(list + 32), u64_at(list + 40)), (0x10_1000, 6));
        let map_at = u64_at(info + 40);
        assert_eq!((u64_at(map_at), u64_at(map_at + 8), u32_at(map_at + 16)), (0, 0x9_fc00, 1));
        assert_eq!((u64_at(map_at + 48), u64_at(map_at + 56)), (1 << 20, 3 << 20));
    }
}

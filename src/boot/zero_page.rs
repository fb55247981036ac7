//! The zero page of Linux's boot protocol, with the command line and the memory map. Other kernels
//! that are started at their ELF entry find it too.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::memory_map::memory_map;
use crate::cpu::{Arguments, CpuMode, Start};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

pub(super) const BOOT_FLAG: u16 = 0xaa55;
pub(super) const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const MIN_ALIGNMENT: u32 = 0x100_0000;

/// The setup header for a kernel whose file has none.
pub(super) fn elf_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        kernel_alignment: MIN_ALIGNMENT,
        ..Default::default()
    }
}

/// Write it. `initrd` is the address and size of the RAM disk, zeros for none; `rsdp` is ACPI's
/// root pointer.
///
/// # Errors
/// If the kernel's header says that it does not take so long a command line, or memory is too
/// small.
pub(super) fn write(
    memory: &GuestMemory,
    header: setup_header,
    cmdline: &str,
    initrd: (u32, u32),
    rsdp: Option<u64>,
) -> Result<()> {
    let mut params = boot_params { hdr: header, ..Default::default() };
    (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = initrd;
    let most = match params.hdr.cmdline_size {
        0 => layout::CMDLINE_SIZE - 1,
        most => usize::try_from(most).unwrap_or(usize::MAX),
    };
    if cmdline.len() > most {
        let detail = format!("{} bytes; this kernel accepts at most {most}", cmdline.len());
        return Err(Error::new(ErrorKind::Config, "boot.cmdline", detail));
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE).map_err(|_| no_room())?;
    params.hdr.cmdline_size = u32::try_from(cmdline.len()).map_err(|_| no_room())?;
    params.acpi_rsdp_addr = rsdp.unwrap_or_default();
    fill_e820(memory, rsdp.is_some(), &mut params)?;
    memory.write(layout::CMDLINE, &[cmdline.as_bytes(), &[0]].concat())?;
    memory.write(layout::ZERO_PAGE, params.as_slice())
}

/// The start of a kernel that takes the zero page.
pub(super) fn start(mode: CpuMode, entry: u64) -> Start {
    let arguments = Arguments { rsi: layout::ZERO_PAGE, ..Arguments::default() };
    Start { stack: Some(layout::ZERO_PAGE), arguments, ..Start::new(mode, entry) }
}

fn fill_e820(memory: &GuestMemory, has_acpi: bool, params: &mut boot_params) -> Result<()> {
    let map = memory_map(memory.size(), has_acpi);
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind };
    }
    params.e820_entries = u8::try_from(map.len()).map_err(|_| no_room())?;
    Ok(())
}

fn no_room() -> Error {
    Error::new(ErrorKind::Boot, "boot.kernel", "its boot parameters do not fit")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_finds_its_command_line_and_its_ram_disk() {
        let memory = GuestMemory::new(4 << 20).unwrap();
        write(&memory, elf_header(), "quiet", (0x20_0000, 5), None).unwrap();
        let at = |offset| memory.load::<u32>(layout::ZERO_PAGE + offset).unwrap();
        assert_eq!((at(0x218), at(0x21c)), (0x20_0000, 5));
        assert_eq!(u64::from(at(0x228)), layout::CMDLINE);
        assert_eq!(memory.load::<u8>(layout::ZERO_PAGE + 0x1e8).unwrap(), 3);
        assert_eq!(memory.load::<u32>(layout::CMDLINE).unwrap(), u32::from_le_bytes(*b"quie"));
        let start = start(CpuMode::Kernel32, 0x10_0000);
        assert_eq!(
            (start.arguments.rsi, start.stack),
            (layout::ZERO_PAGE, Some(layout::ZERO_PAGE))
        );
    }

    #[test]
    fn a_command_line_longer_than_the_kernel_takes_is_refused() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let header = setup_header { cmdline_size: 255, ..elf_header() };
        write(&memory, header, &"a".repeat(255), (0, 0), None).unwrap();
        let error = write(&memory, header, &"a".repeat(256), (0, 0), None).unwrap_err();
        assert_eq!(error.at, "boot.cmdline");
    }
}

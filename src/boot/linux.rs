//! Loads Linux for its 64-bit boot protocol (the kernel's Documentation/arch/x86/boot.rst): an ELF
//! vmlinux or a bzImage, the initial RAM disk, the command line, and the zero page that describes
//! them.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::files::Files;
use super::program_headers::{MAGIC, u16_at, u32_at};
use super::{elf, initrd};
use crate::config::{LinuxBoot, LinuxProtocol};
use crate::cpu::{Arguments, CpuMode, Start};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const HEADER_OFFSET: usize = 0x1f1;
const LOADER_UNDEFINED: u8 = 0xff;
const MIN_ALIGNMENT: u32 = 0x100_0000;
/// The limit for the RAM disk of a vmlinux, which has no header to say it. All x86-64 kernels allow
/// this.
const INITRD_CEILING: u64 = 0x7fff_ffff;
/// From this version on, a bzImage says whether it has a 64-bit entry.
const VERSION_2_12: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
/// The offset of the 64-bit entry from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

/// A kernel in memory.
struct Kernel {
    entry: u64,
    end: u64,
    initrd_ceiling: u64,
    header: setup_header,
}

/// Load kernel, RAM disk and command line; returns how it starts.
pub(super) fn load(config: &LinuxBoot, memory: &GuestMemory, files: &Files<'_>) -> Result<Start> {
    if let LinuxProtocol::Bits32 | LinuxProtocol::Pvh = config.protocol {
        let detail = "this protocol is not supported yet";
        return Err(Error::new(ErrorKind::Boot, "boot.protocol", detail));
    }
    let image = files.read(&config.kernel, "boot.kernel", files.most)?;
    let kernel = load_kernel(&image, config, memory)?;
    let mut params = boot_params { hdr: kernel.header, ..Default::default() };
    if let Some(path) = &config.initrd {
        let (address, size) = initrd::load(path, memory, files, kernel.end, kernel.initrd_ceiling)?;
        params.hdr.ramdisk_image = address;
        params.hdr.ramdisk_size = size;
    }
    write_cmdline(config, memory, &mut params)?;
    fill_e820(memory, &mut params)?;
    memory.write(layout::ZERO_PAGE, params.as_slice())?;
    let arguments = Arguments { rsi: layout::ZERO_PAGE, ..Arguments::default() };
    let stack = Some(layout::ZERO_PAGE);
    Ok(Start { stack, arguments, ..Start::new(CpuMode::Kernel64, kernel.entry) })
}

fn load_kernel(image: &[u8], config: &LinuxBoot, memory: &GuestMemory) -> Result<Kernel> {
    if image.starts_with(MAGIC) {
        let (entry, end) = elf::load(image, memory)?;
        let header = setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            kernel_alignment: MIN_ALIGNMENT,
            ..Default::default()
        };
        return Ok(Kernel { entry, end, initrd_ceiling: INITRD_CEILING, header });
    }
    if u32_at(image, 0x202) == Some(HEADER_MAGIC) {
        return load_bzimage(image, config, memory);
    }
    let what =
        if image.is_empty() { "the file is empty" } else { "neither an ELF vmlinux nor a bzImage" };
    Err(bad(what))
}

fn load_bzimage(image: &[u8], config: &LinuxBoot, memory: &GuestMemory) -> Result<Kernel> {
    let mut header = read_header(image)?;
    let sectors = if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
    let body = image.get((sectors + 1) * 512..).filter(|body| !body.is_empty());
    let body = body.ok_or_else(|| bad("the bzImage is truncated in its setup code"))?;
    let preferred = header.pref_address;
    let address =
        config.load_address.unwrap_or(if preferred == 0 { layout::HIGH_MEMORY } else { preferred });
    // The kernel decompresses itself in place, within init_size of its load address.
    let needed = u64::from(header.init_size).max(body.len() as u64);
    memory.check(address, needed).map_err(|e| {
        bad(format!("the kernel: {}", e.detail))
            .hint("give the machine more memory (memory.size_mib)")
    })?;
    if address < layout::HIGH_MEMORY {
        return Err(bad(format!("the bzImage's preferred address {address:#x} is below 1 MiB")));
    }
    memory.write(address, body)?;
    header.code32_start = u32::try_from(address)
        .map_err(|_| bad("the bzImage's preferred address is above 4 GiB"))?;
    let initrd_ceiling = match header.initrd_addr_max {
        0 => INITRD_CEILING,
        most => u64::from(most),
    };
    Ok(Kernel { entry: address + ENTRY_64, end: address + needed, initrd_ceiling, header })
}

fn read_header(image: &[u8]) -> Result<setup_header> {
    let mut header = setup_header::default();
    // The header ends at the target of the jump at 0x200. Later fields of the struct are newer than
    // the kernel.
    let end = HEADER_OFFSET.max(0x202 + usize::from(image.get(0x201).copied().unwrap_or(0)));
    let length = (end - HEADER_OFFSET).min(size_of::<setup_header>());
    let bytes = image.get(HEADER_OFFSET..HEADER_OFFSET + length);
    let target = header.as_mut_slice().get_mut(..length);
    match (bytes, target) {
        (Some(bytes), Some(target)) => target.copy_from_slice(bytes),
        _ => return Err(bad("the bzImage is truncated in its header")),
    }
    if u16_at(image, 0x1fe) != Some(BOOT_FLAG) || header.loadflags & LOADED_HIGH == 0 {
        return Err(bad("not a bzImage: its boot flag or its load flag is wrong"));
    }
    if header.version < VERSION_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(bad("the bzImage has no 64-bit entry; build the kernel with CONFIG_64BIT"));
    }
    Ok(header)
}

fn write_cmdline(config: &LinuxBoot, memory: &GuestMemory, params: &mut boot_params) -> Result<()> {
    let most = match params.hdr.cmdline_size {
        0 => layout::CMDLINE_SIZE - 1,
        most => usize::try_from(most).unwrap_or(usize::MAX),
    };
    if config.cmdline.len() > most {
        let detail = format!("{} bytes; this kernel accepts at most {most}", config.cmdline.len());
        return Err(Error::new(ErrorKind::Config, "boot.cmdline", detail));
    }
    let mut line = config.cmdline.clone().into_bytes();
    line.push(0);
    memory.write(layout::CMDLINE, &line)?;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE).map_err(|_| bad("no room"))?;
    params.hdr.cmdline_size = u32::try_from(config.cmdline.len()).map_err(|_| bad("no room"))?;
    Ok(())
}

/// RAM below the EBDA, the EBDA and ROMs as reserved, and RAM from 1 MiB on, without the gap.
fn fill_e820(memory: &GuestMemory, params: &mut boot_params) -> Result<()> {
    let mut map = vec![
        (0, layout::EBDA_START, E820_RAM),
        (layout::EBDA_START, layout::HIGH_MEMORY - layout::EBDA_START, E820_RESERVED),
    ];
    for (start, size) in layout::ram_ranges(memory.size()) {
        let from = start.max(layout::HIGH_MEMORY);
        if start + size > from {
            map.push((from, start + size - from, E820_RAM));
        }
    }
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: *kind };
    }
    params.e820_entries = u8::try_from(map.len()).map_err(|_| bad("too many memory ranges"))?;
    Ok(())
}

fn bad(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Boot, "boot.kernel", detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::program_headers::tests::elf;
    use proptest::prelude::*;

    /// A bzImage of one setup sector whose kernel is `body`.
    fn bzimage(body: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&BOOT_FLAG.to_le_bytes());
        image[0x200..0x202].copy_from_slice(&[0xeb, 0x66]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x211] = 1;
        image[0x236] = 1;
        image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x20_0000u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x1000u32.to_le_bytes());
        image.extend_from_slice(body);
        image
    }

    fn memory() -> GuestMemory {
        GuestMemory::new(8 << 20).unwrap()
    }

    fn config(cmdline: &str) -> LinuxBoot {
        LinuxBoot { cmdline: cmdline.into(), ..LinuxBoot::default() }
    }

    #[test]
    fn a_bzimage_is_loaded_where_it_prefers() {
        let memory = memory();
        let kernel = load_kernel(&bzimage(b"kernel"), &config(""), &memory).unwrap();
        let mut body = [0; 6];
        memory.read(0x20_0000, &mut body).unwrap();
        assert_eq!((kernel.entry, kernel.end, &body), (0x20_0200, 0x20_1000, b"kernel"));
    }

    #[test]
    fn a_bzimage_without_a_64_bit_entry_is_refused() {
        let mut image = bzimage(b"kernel");
        image[0x236] = 0;
        let error = load_kernel(&image, &config(""), &memory()).err().unwrap();
        assert!(error.detail.contains("64-bit"), "{error}");
    }

    #[test]
    fn a_command_line_longer_than_the_kernel_takes_is_refused() {
        let memory = memory();
        let config = config(&"a".repeat(256));
        let kernel = load_kernel(&bzimage(b"kernel"), &config, &memory).unwrap();
        let mut params = boot_params { hdr: kernel.header, ..Default::default() };
        let error = write_cmdline(&config, &memory, &mut params).unwrap_err();
        assert_eq!(error.at, "boot.cmdline");
    }

    #[test]
    fn the_memory_map_leaves_out_the_gap() {
        let memory = GuestMemory::new(4 << 30).unwrap();
        let mut params = boot_params::default();
        fill_e820(&memory, &mut params).unwrap();
        let map: Vec<(u64, u64)> =
            params.e820_table.iter().take(4).map(|e| (e.addr, e.size)).collect();
        assert_eq!(params.e820_entries, 4);
        assert_eq!(map[2..], [(1 << 20, (3 << 30) - (1 << 20)), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        for image in [&b""[..], b"hello", &[0; 4096]] {
            assert_eq!(
                load_kernel(image, &config(""), &memory()).err().unwrap().kind,
                ErrorKind::Boot
            );
        }
    }

    proptest! {
        #[test]
        fn a_mutated_kernel_never_panics(
            which in any::<bool>(),
            cut in 0usize..1100,
            changes in prop::collection::vec((0usize..1030, any::<u8>()), 0..8),
        ) {
            let mut image = if which { elf(0x10_0000, &[0x90; 1000]) } else { bzimage(&[0x90; 100]) };
            for (at, value) in changes {
                if let Some(byte) = image.get_mut(at) {
                    *byte = value;
                }
            }
            image.truncate(image.len().min(cut.max(4)));
            let _ = load_kernel(&image, &config(""), &memory());
        }

        #[test]
        fn random_bytes_never_panic(image in prop::collection::vec(any::<u8>(), 0..2048)) {
            let _ = load_kernel(&image, &config(""), &memory());
        }
    }
}

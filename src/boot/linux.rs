//! Loads Linux for its boot protocol (the kernel's Documentation/arch/x86/boot.rst): an ELF vmlinux
//! or a bzImage, and the initial RAM disk.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::elf::ElfKernel;
use super::fields::{u16_at, u32_at};
use super::files::Files;
use super::identify::ELF_MAGIC;
use super::program_headers::{Executable, Low};
use super::zero_page::{BOOT_FLAG, HEADER_MAGIC};
use super::{initrd, kernel, modules, multiboot, zero_page};
use crate::config::{KernelProtocol, LinuxBoot, LinuxProtocol};
use crate::cpu::{CpuMode, Start};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

const AT: &str = "boot.kernel";
const HEADER_OFFSET: usize = 0x1f1;
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
    mode: CpuMode,
    entry: u64,
    end: u64,
    initrd_ceiling: u64,
    header: setup_header,
}

/// Load kernel, RAM disk and command line; returns how it starts.
pub(super) fn load(
    config: &LinuxBoot,
    memory: &GuestMemory,
    files: &Files<'_>,
    rsdp: Option<u64>,
) -> Result<Start> {
    let image = files.read(&config.kernel, AT, files.most)?;
    if config.protocol == LinuxProtocol::Pvh {
        let path = config.initrd.as_deref();
        let initrd = path.map(|path| modules::read_one(path, "boot.initrd", files)).transpose()?;
        let modules = initrd.into_iter().collect();
        return kernel::boot(&image, KernelProtocol::Pvh, &config.cmdline, modules, memory, rsdp);
    }
    let kernel = load_kernel(&image, config, memory)?;
    let initrd = match &config.initrd {
        Some(path) => initrd::load(path, memory, files, kernel.end, kernel.initrd_ceiling)?,
        None => (0, 0),
    };
    zero_page::write(memory, kernel.header, &config.cmdline, initrd, rsdp)?;
    Ok(zero_page::start(kernel.mode, kernel.entry))
}

fn load_kernel(image: &[u8], config: &LinuxBoot, memory: &GuestMemory) -> Result<Kernel> {
    if u32_at(image, 0x202) == Some(HEADER_MAGIC) && !image.starts_with(ELF_MAGIC) {
        return load_bzimage(image, config, memory);
    }
    if !image.starts_with(ELF_MAGIC) && multiboot::find(image).is_some() {
        let detail = "a kernel with a multiboot header, which is not Linux";
        return Err(bad(detail).hint("boot it by KernelBoot, or --boot kernel"));
    }
    let executable = Executable::new(image, AT)?;
    let (mode, protocol, other) = if executable.is_64 {
        (CpuMode::Kernel64, LinuxProtocol::Bits64, "64-bit")
    } else {
        (CpuMode::Kernel32, LinuxProtocol::Bits32, "32-bit")
    };
    if ![LinuxProtocol::Auto, protocol].contains(&config.protocol) {
        let detail = format!("this vmlinux has only a {other} entry, and perhaps that of PVH");
        return Err(Error::new(ErrorKind::Boot, "boot.protocol", detail));
    }
    let kernel = ElfKernel::new(executable, memory, Low::Nothing)?;
    kernel.write(memory)?;
    let (entry, end, header) = (kernel.entry, kernel.end(), zero_page::elf_header());
    Ok(Kernel { mode, entry, end, initrd_ceiling: INITRD_CEILING, header })
}

fn load_bzimage(image: &[u8], config: &LinuxBoot, memory: &GuestMemory) -> Result<Kernel> {
    if config.protocol == LinuxProtocol::Bits32 {
        let detail = "the 32-bit entry of a bzImage is not supported yet";
        return Err(Error::new(ErrorKind::Boot, "boot.protocol", detail));
    }
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
    let (mode, entry) = (CpuMode::Kernel64, address + ENTRY_64);
    Ok(Kernel { mode, entry, end: address + needed, initrd_ceiling, header })
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

fn bad(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Boot, AT, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::program_headers::tests::{elf, elf32};
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
    fn a_vmlinux_has_the_entry_of_its_class() {
        let with = |protocol| LinuxBoot { protocol, ..LinuxBoot::default() };
        let (auto, bits_64, bits_32) =
            (LinuxProtocol::Auto, LinuxProtocol::Bits64, LinuxProtocol::Bits32);
        let (wide, narrow) = (elf(0x10_0000, b"code"), elf32(0x10_0000, b"code"));
        for (image, mode, fits, other) in [
            (&wide, CpuMode::Kernel64, bits_64, bits_32),
            (&narrow, CpuMode::Kernel32, bits_32, bits_64),
        ] {
            for protocol in [auto, fits] {
                assert_eq!(load_kernel(image, &with(protocol), &memory()).unwrap().mode, mode);
            }
            let error = load_kernel(image, &with(other), &memory()).err().unwrap();
            assert_eq!(error.at, "boot.protocol");
        }
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
            let mut image =
                if which { elf(0x10_0000, &[0x90; 1000]) } else { bzimage(&[0x90; 100]) };
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

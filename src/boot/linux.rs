//! Loads Linux for its boot protocol (the kernel's Documentation/arch/x86/boot.rst) or by PVH: an
//! ELF vmlinux, or a bzImage with or without its own decompressor, and the initial RAM disk.

use std::borrow::Cow;

use linux_loader::loader::bootparam::setup_header;

use super::bzimage::BzImage;
use super::elf::ElfKernel;
use super::files::Files;
use super::identify::ELF_MAGIC;
use super::initrd::{self, Room};
use super::payload::{self, Refused};
use super::program_headers::{Executable, Low};
use super::{kernel, modules, multiboot, virtio_mmio, zero_page};
use crate::config::{KernelProtocol, LinuxBoot, LinuxProtocol};
use crate::cpu::{CpuMode, Start};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;
use crate::virtio::Place;

const AT: &str = "boot.kernel";
/// The limit for the RAM disk of a vmlinux, which has no header to say it. All x86-64 kernels allow
/// this.
const INITRD_CEILING: u64 = 0x7fff_ffff;
/// Where an ELF file has its class, and the class of 64-bit files.
const CLASS: usize = 4;
const ELFCLASS64: u8 = 2;

/// A kernel in memory.
struct Kernel<'a> {
    mode: CpuMode,
    entry: u64,
    end: u64,
    initrd_ceiling: u64,
    header: setup_header,
    /// The file, as it is once it is unpacked. None: it unpacks itself.
    vmlinux: Option<Cow<'a, [u8]>>,
}

/// Load kernel, RAM disk and command line; returns how it starts.
pub(super) fn load(
    config: &LinuxBoot,
    memory: &GuestMemory,
    files: &Files<'_>,
    rsdp: Option<u64>,
    places: &[Place],
) -> Result<Start> {
    let image = files.read(&config.kernel, AT, files.most)?;
    if config.protocol == LinuxProtocol::Pvh {
        return load_by_pvh(&image, config, memory, files, rsdp, places);
    }
    let kernel = load_kernel(&image, config, memory)?;
    let initrd = if config.initrd.is_empty() {
        (0, 0)
    } else {
        let room = Room { start: kernel.end, last: kernel.initrd_ceiling };
        initrd::load(&config.initrd, memory, files, room)?
    };
    // What is not unpacked here is a distribution's, which has it.
    let has_acpi = || kernel.vmlinux.as_deref().is_none_or(virtio_mmio::has_acpi);
    let uses_acpi = || rsdp.is_some() && has_acpi();
    let cmdline = virtio_mmio::command_line(&config.cmdline, places, uses_acpi);
    zero_page::write(memory, kernel.header, &cmdline, initrd, rsdp)?;
    Ok(zero_page::start(kernel.mode, kernel.entry))
}

/// The RAM disk is the kernel's only module.
fn load_by_pvh(
    image: &[u8],
    config: &LinuxBoot,
    memory: &GuestMemory,
    files: &Files<'_>,
    rsdp: Option<u64>,
    places: &[Place],
) -> Result<Start> {
    let unpacked = if is_bzimage(image) {
        let wanted = LinuxBoot { unpack: config.unpack.or(Some(true)), ..config.clone() };
        let found = unpack(&BzImage::new(image)?, &wanted, memory).map_err(|error| {
            if config.unpack.is_some() || error.at != "boot.unpack" {
                return error;
            }
            let detail =
                format!("{}, and only a kernel that is unpacked has a PVH entry", error.detail);
            Error::new(ErrorKind::Boot, "boot.protocol", detail)
        })?;
        Some(found.ok_or_else(|| {
            let detail = "a bzImage that unpacks itself has no PVH entry";
            Error::new(ErrorKind::Boot, "boot.protocol", detail)
        })?)
    } else {
        None
    };
    let mut modules = Vec::new();
    if !config.initrd.is_empty() {
        let room = Room { start: layout::HIGH_MEMORY, last: u64::MAX };
        let bytes = initrd::read(&config.initrd, memory, files, room)?;
        modules.push(modules::unnamed(bytes, "boot.initrd"));
    }
    let image = unpacked.as_deref().unwrap_or(image);
    let uses_acpi = || rsdp.is_some() && virtio_mmio::has_acpi(image);
    let cmdline = virtio_mmio::command_line(&config.cmdline, places, uses_acpi);
    kernel::boot(image, KernelProtocol::Pvh, &cmdline, modules, memory, rsdp)
}

fn is_bzimage(image: &[u8]) -> bool {
    BzImage::is(image) && !image.starts_with(ELF_MAGIC)
}

fn load_kernel<'a>(
    image: &'a [u8],
    config: &LinuxBoot,
    memory: &GuestMemory,
) -> Result<Kernel<'a>> {
    if is_bzimage(image) {
        return load_bzimage(image, config, memory);
    }
    if !image.starts_with(ELF_MAGIC) && multiboot::find(image).is_some() {
        let detail = "a kernel with a multiboot header, which is not Linux";
        return Err(bad(detail).hint("boot it by KernelBoot, or --boot kernel"));
    }
    load_vmlinux(image.into(), config.protocol, zero_page::elf_header(), INITRD_CEILING, memory)
}

fn load_vmlinux<'a>(
    image: Cow<'a, [u8]>,
    wanted: LinuxProtocol,
    header: setup_header,
    initrd_ceiling: u64,
    memory: &GuestMemory,
) -> Result<Kernel<'a>> {
    let executable = Executable::new(&image, AT)?;
    let (mode, protocol, other) = if executable.is_64 {
        (CpuMode::Kernel64, LinuxProtocol::Bits64, "64-bit")
    } else {
        (CpuMode::Kernel32, LinuxProtocol::Bits32, "32-bit")
    };
    if ![LinuxProtocol::Auto, protocol].contains(&wanted) {
        let detail = format!("this vmlinux has only a {other} entry, and perhaps that of PVH");
        return Err(Error::new(ErrorKind::Boot, "boot.protocol", detail));
    }
    let kernel = ElfKernel::new(executable, memory, Low::Nothing)?;
    kernel.write(memory)?;
    let (entry, end) = (kernel.entry, kernel.end());
    Ok(Kernel { mode, entry, end, initrd_ceiling, header, vmlinux: Some(image) })
}

fn load_bzimage<'a>(
    image: &'a [u8],
    config: &LinuxBoot,
    memory: &GuestMemory,
) -> Result<Kernel<'a>> {
    let bzimage = BzImage::new(image)?;
    let mut header = bzimage.header;
    let initrd_ceiling = u64::from(header.initrd_addr_max);
    if let Some(vmlinux) = unpack(&bzimage, config, memory)? {
        return load_vmlinux(vmlinux.into(), config.protocol, header, initrd_ceiling, memory);
    }
    let (mode, offset) = bzimage.entry(config.protocol)?;
    let place = bzimage.load(config.load_address, memory)?;
    header.code32_start = u32::try_from(place.address).map_err(|_| bad("it is above 4 GiB"))?;
    let (entry, end) = (place.address + offset, place.end);
    Ok(Kernel { mode, entry, end, initrd_ceiling, header, vmlinux: None })
}

/// The vmlinux in a bzImage, if it is to be loaded in place of the code that unpacks it.
///
/// # Errors
/// If that is demanded and impossible, or if the payload is damaged: the kernel's own code would
/// halt then, and say so where nobody may be looking.
fn unpack(
    bzimage: &BzImage<'_>,
    config: &LinuxBoot,
    memory: &GuestMemory,
) -> Result<Option<Vec<u8>>> {
    let refused = |why: &str| match config.unpack {
        Some(true) => Err(Error::new(ErrorKind::Boot, "boot.unpack", why)
            .hint("leave it out, so that the kernel unpacks itself")),
        _ => Ok(None),
    };
    let is_moved = config.load_address.is_some();
    if config.unpack == Some(false) || is_moved || config.protocol == LinuxProtocol::Bits32 {
        return Ok(None);
    }
    if bzimage.entry(LinuxProtocol::Bits64).is_err() {
        return refused("the kernel has no 64-bit entry");
    }
    let Some(packed) = bzimage.payload()? else {
        return refused("the header of the bzImage has no payload (payload_length is 0)");
    };
    // What the kernel unpacks to, it unpacks within init_size.
    let most = u64::from(bzimage.header.init_size).min(memory.size());
    match payload::unpack(packed, most) {
        Ok(vmlinux) if !vmlinux.starts_with(ELF_MAGIC) => refused("the payload is not an ELF file"),
        Ok(vmlinux) => match vmlinux.get(CLASS) {
            Some(&ELFCLASS64) => Ok(Some(vmlinux)),
            _ => refused("the payload is not a 64-bit ELF file"),
        },
        Err(Refused::Unknown(format)) => refused(&format!("the payload is compressed by {format}")),
        Err(Refused::Damaged(why)) => Err(bad(format!("the bzImage is damaged: {why}"))
            .hint("take the file again; LinuxBoot(unpack=False) lets the kernel unpack itself")),
    }
}

fn bad(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Boot, AT, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::bzimage::tests::{bzimage, set};
    use crate::boot::payload::tests::packed;
    use crate::boot::program_headers::tests::{elf, elf32};
    use crate::boot::zero_page::HEADER_MAGIC;
    use proptest::prelude::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(8 << 20).unwrap()
    }

    fn config(cmdline: &str) -> LinuxBoot {
        LinuxBoot { cmdline: cmdline.into(), ..LinuxBoot::default() }
    }

    #[test]
    fn a_bzimage_is_loaded_where_it_prefers() {
        let memory = memory();
        let image = bzimage(b"kernel");
        let kernel = load_kernel(&image, &config(""), &memory).unwrap();
        let mut body = [0; 6];
        memory.read(0x20_0000, &mut body).unwrap();
        assert_eq!((kernel.entry, kernel.end, &body), (0x20_0200, 0x20_1000, b"kernel"));
    }

    /// A bzImage with this payload.
    fn with_payload(payload: &[u8]) -> Vec<u8> {
        let mut image = bzimage(&[&[0x90; 0x20], payload].concat());
        set(&mut image, 0x248, 0x20);
        set(&mut image, 0x24c, u32::try_from(payload.len()).unwrap());
        image
    }

    fn unpack(unpack: Option<bool>) -> LinuxBoot {
        LinuxBoot { unpack, ..LinuxBoot::default() }
    }

    #[test]
    fn the_vmlinux_in_a_bzimage_is_started_in_its_place() {
        let image = with_payload(&packed(&elf(0x30_0000, b"vmlinux")));
        for wanted in [None, Some(true)] {
            let memory = memory();
            let kernel = load_kernel(&image, &unpack(wanted), &memory).unwrap();
            let mut code = [0; 7];
            memory.read(0x30_0000, &mut code).unwrap();
            assert_eq!((kernel.mode, kernel.entry), (CpuMode::Kernel64, 0x30_0000));
            assert_eq!((kernel.end, &code), (0x30_0007, b"vmlinux"));
            let (magic, cmdline) = (kernel.header.header, kernel.header.cmdline_size);
            assert_eq!((magic, cmdline), (HEADER_MAGIC, 255), "the header stays");
        }
        let kernel = load_kernel(&image, &unpack(Some(false)), &memory()).unwrap();
        assert_eq!(kernel.entry, 0x20_0200);
    }

    #[test]
    fn a_kernel_unpacks_itself_where_pyvmm_must_not() {
        let image = with_payload(&packed(&elf(0x30_0000, b"vmlinux")));
        let moved = LinuxBoot { load_address: Some(0x10_0000), ..LinuxBoot::default() };
        assert_eq!(load_kernel(&image, &moved, &memory()).unwrap().entry, 0x10_0200);
        let by_32 = LinuxBoot { protocol: LinuxProtocol::Bits32, ..LinuxBoot::default() };
        let kernel = load_kernel(&image, &by_32, &memory()).unwrap();
        assert_eq!((kernel.mode, kernel.entry), (CpuMode::Kernel32, 0x20_0000));
        let mut of_32_bits = image.clone();
        of_32_bits[0x236] = 0;
        let kernel = load_kernel(&of_32_bits, &unpack(None), &memory()).unwrap();
        assert_eq!((kernel.mode, kernel.entry), (CpuMode::Kernel32, 0x20_0000));
    }

    #[test]
    fn a_payload_that_pyvmm_cannot_start_is_left_to_the_kernel_or_refused() {
        let narrow = elf32(0x30_0000, b"vmlinux");
        for (payload, why) in [
            (&b""[..], "payload_length is 0"),
            (b"BZh91AY", "bzip2"),
            (b"\x89LZO\0\r\n", "lzo"),
            (&packed(b"not an ELF file"), "not an ELF file"),
            (&packed(&narrow), "not a 64-bit ELF file"),
        ] {
            let image = with_payload(payload);
            let kernel = load_kernel(&image, &unpack(None), &memory()).unwrap();
            assert_eq!(kernel.entry, 0x20_0200);
            let error = load_kernel(&image, &unpack(Some(true)), &memory()).err().unwrap();
            assert_eq!(error.at, "boot.unpack");
            assert!(error.detail.contains(why), "{error}");
        }
    }

    #[test]
    fn a_damaged_payload_is_an_error_unless_nobody_unpacks_it() {
        let mut payload = packed(&elf(0x30_0000, b"vmlinux"));
        payload.truncate(40);
        let image = with_payload(&payload);
        let error = load_kernel(&image, &unpack(None), &memory()).err().unwrap();
        assert!(error.detail.contains("damaged"), "{error}");
        load_kernel(&image, &unpack(Some(false)), &memory()).unwrap();
        // More than init_size is not what the kernel unpacks to.
        let bomb = with_payload(&packed(&[0; 0x1001]));
        let error = load_kernel(&bomb, &unpack(None), &memory()).err().unwrap();
        assert!(error.detail.contains("more than 4096"), "{error}");
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

//! Reads a bzImage: says where its kernel and its payload are, where the kernel goes and how it is
//! entered (the kernel's Documentation/arch/x86/boot.rst). What cannot be right is refused here.

use linux_loader::loader::bootparam::setup_header as SetupHeader;

use super::fields::u32_at;
use super::setup_header;
use super::zero_page::HEADER_MAGIC;
use crate::config::LinuxProtocol;
use crate::cpu::CpuMode;
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

const XLF_KERNEL_64: u16 = 1;
const SECTOR: usize = 512;
/// `setup_sects` if the header has zero there.
const DEFAULT_SECTORS: usize = 4;
/// The offset of the 64-bit entry from the start of the kernel.
const ENTRY_64: u64 = 0x200;

/// A bzImage whose header has been checked.
pub(super) struct BzImage<'a> {
    pub(super) header: SetupHeader,
    /// The kernel: what runs in protected mode, with the compressed payload in it.
    body: &'a [u8],
}

/// Where a kernel that unpacks itself is, and the end of the memory that it needs for this.
pub(super) struct Place {
    pub(super) address: u64,
    pub(super) end: u64,
}

impl<'a> BzImage<'a> {
    /// Whether a file claims to be one, of whatever version.
    pub(super) fn is(image: &[u8]) -> bool {
        u32_at(image, 0x202) == Some(HEADER_MAGIC)
    }

    /// # Errors
    /// [`ErrorKind::Boot`], with the field that is wrong.
    pub(super) fn new(image: &'a [u8]) -> Result<Self> {
        let header = setup_header::read(image)?;
        let sectors = match usize::from(header.setup_sects) {
            0 => DEFAULT_SECTORS,
            sectors => sectors,
        };
        let start = (sectors + 1) * SECTOR;
        let Some(body) = image.get(start..).filter(|body| !body.is_empty()) else {
            let length = image.len();
            return Err(bad(format!(
                "the bzImage is truncated: setup_sects says that the kernel starts at byte \
                 {start}, and the file has {length}"
            )));
        };
        let said = u64::from(header.syssize) * 16;
        // The size is rounded up, and a signature may follow the kernel.
        if body.len() as u64 + 15 < said {
            let length = body.len();
            return Err(bad(format!(
                "the bzImage is truncated: syssize says that the kernel has {said} bytes, and the \
                 file has {length}"
            )));
        }
        Ok(Self { header, body })
    }

    /// The compressed kernel, if the header says where it is.
    ///
    /// # Errors
    /// If it says so wrongly.
    pub(super) fn payload(&self) -> Result<Option<&'a [u8]>> {
        let (offset, length) = (self.header.payload_offset, self.header.payload_length);
        if length == 0 {
            return Ok(None);
        }
        let start = usize::try_from(offset).ok();
        let end = start.zip(usize::try_from(length).ok()).and_then(|(at, n)| at.checked_add(n));
        let payload = start.zip(end).and_then(|(start, end)| self.body.get(start..end));
        payload.map(Some).ok_or_else(|| {
            let has = self.body.len();
            bad(format!(
                "payload_offset {offset:#x} and payload_length {length:#x} are not within the \
                 bzImage's kernel, which has {has:#x} bytes"
            ))
            .hint("the file is damaged; with LinuxBoot(unpack=False) these fields are not used")
        })
    }

    /// How the kernel is entered, and the offset of the entry.
    ///
    /// # Errors
    /// If it has no such entry.
    pub(super) fn entry(&self, protocol: LinuxProtocol) -> Result<(CpuMode, u64)> {
        let has_64 = self.header.xloadflags & XLF_KERNEL_64 != 0;
        match protocol {
            LinuxProtocol::Auto if has_64 => Ok((CpuMode::Kernel64, ENTRY_64)),
            LinuxProtocol::Bits64 if has_64 => Ok((CpuMode::Kernel64, ENTRY_64)),
            LinuxProtocol::Bits64 => {
                let detail = "the bzImage has no 64-bit entry: bit 0 of its xloadflags is clear";
                Err(Error::new(ErrorKind::Boot, "boot.protocol", detail)
                    .hint("enter it by \"32-bit\", or build the kernel with CONFIG_64BIT"))
            }
            LinuxProtocol::Pvh => {
                let detail = "a bzImage that unpacks itself has no PVH entry";
                Err(Error::new(ErrorKind::Boot, "boot.protocol", detail)
                    .hint("name its vmlinux, or enter it by \"auto\""))
            }
            LinuxProtocol::Auto | LinuxProtocol::Bits32 => {
                // The field has the address of the entry if the kernel is at 1 MiB.
                let start = self.header.code32_start;
                let offset = u64::from(start).checked_sub(layout::HIGH_MEMORY);
                let offset = offset.filter(|offset| *offset < self.body.len() as u64);
                let offset = offset.ok_or_else(|| {
                    let end = layout::HIGH_MEMORY + self.body.len() as u64;
                    bad(format!(
                        "code32_start is {start:#x}, outside the bzImage's kernel, which is from \
                         0x100000 to {end:#x}"
                    ))
                })?;
                Ok((CpuMode::Kernel32, offset))
            }
        }
    }

    /// Put the kernel at an address of the user's, or at its own.
    ///
    /// # Errors
    /// If it does not run there, or there is not enough memory.
    pub(super) fn load(&self, wanted: Option<u64>, memory: &GuestMemory) -> Result<Place> {
        let place = self.place(wanted)?;
        let (address, size) = (place.address, place.end.saturating_sub(place.address));
        memory.check(address, size).map_err(|e| {
            bad(format!("the kernel needs {size:#x} bytes at {address:#x}: {}", e.detail))
                .hint("give the machine more memory (memory.size_mib)")
        })?;
        memory.write(address, self.body)?;
        Ok(place)
    }

    fn place(&self, wanted: Option<u64>) -> Result<Place> {
        let header = &self.header;
        let own = match header.pref_address {
            0 => layout::HIGH_MEMORY,
            address => address,
        };
        if !(layout::HIGH_MEMORY..layout::MMIO_GAP_START).contains(&own) {
            return Err(bad(format!(
                "pref_address is {own:#x}, and the kernel of a bzImage is between 1 MiB and 3 GiB"
            )));
        }
        let address = wanted.unwrap_or(own);
        let (kernel_unit, unit) = (self.kernel_alignment()?, self.min_alignment()?);
        let refused = |detail: String| Error::new(ErrorKind::Boot, "boot.load_address", detail);
        if header.relocatable_kernel == 0 {
            // What unpacks the kernel runs at 1 MiB too, where loaders without this field put it.
            if ![own, layout::HIGH_MEMORY].contains(&address) {
                return Err(refused(format!(
                    "{address:#x}: the kernel cannot be moved (relocatable_kernel is 0), only \
                     loaded at {own:#x}"
                ))
                .hint("leave load_address out, or build the kernel with CONFIG_RELOCATABLE"));
            }
        } else if !address.is_multiple_of(unit) {
            let odd =
                format!("{address:#x} is not a multiple of {unit:#x}, the kernel's min_alignment");
            return Err(match wanted {
                Some(_) => refused(odd),
                None => bad(format!("pref_address {odd}")).hint("name a load_address"),
            });
        }
        // The kernel unpacks itself at a multiple of its alignment, never below its own address.
        let runs_at = match header.relocatable_kernel {
            0 => own,
            _ => address.next_multiple_of(kernel_unit).max(own),
        };
        let unpacked = runs_at.saturating_add(u64::from(header.init_size));
        Ok(Place { address, end: unpacked.max(address + self.body.len() as u64) })
    }

    fn kernel_alignment(&self) -> Result<u64> {
        let unit = self.header.kernel_alignment;
        match unit {
            0 => Ok(1),
            unit if unit.is_power_of_two() => Ok(u64::from(unit)),
            unit => Err(bad(format!("kernel_alignment is {unit:#x}, not a power of two"))),
        }
    }

    fn min_alignment(&self) -> Result<u64> {
        let exponent = u32::from(self.header.min_alignment);
        let unit = 1u64.checked_shl(exponent).filter(|unit| *unit <= layout::MMIO_GAP_START);
        unit.ok_or_else(|| bad(format!("min_alignment is {exponent}: 2 to this power is too much")))
    }
}

fn bad(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Boot, "boot.kernel", detail)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::boot::zero_page::BOOT_FLAG;
    use proptest::prelude::*;

    /// A bzImage of one setup sector whose kernel is `body`.
    pub(in crate::boot) fn bzimage(body: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&BOOT_FLAG.to_le_bytes());
        image[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x211] = 1;
        set(&mut image, 0x214, 0x10_0000);
        set(&mut image, 0x22c, 0x7fff_ffff);
        set(&mut image, 0x230, 0x20_0000);
        image[0x236] = 1;
        set(&mut image, 0x238, 255);
        set(&mut image, 0x258, 0x20_0000);
        set(&mut image, 0x260, 0x1000);
        image.extend_from_slice(body);
        image
    }

    /// Change 32 bits of a header.
    pub(in crate::boot) fn set(image: &mut [u8], at: usize, value: u32) {
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn refused(image: &[u8]) -> String {
        BzImage::new(image).err().unwrap().to_string()
    }

    fn place(image: &[u8], wanted: Option<u64>) -> Result<(u64, u64)> {
        BzImage::new(image)?.place(wanted).map(|place| (place.address, place.end))
    }

    #[test]
    fn zero_sectors_mean_four() {
        let mut image = bzimage(&[7; 2048]);
        image[0x1f1] = 0;
        assert_eq!(BzImage::new(&image).unwrap().body, [7; 512]);
        image.truncate(2560);
        assert!(refused(&image).contains("setup_sects"));
    }

    type Change<'a> = &'a dyn Fn(&mut Vec<u8>);

    #[test]
    fn a_field_that_cannot_be_right_is_named() {
        let with = |change: Change<'_>| {
            let mut image = bzimage(&[0; 0x40]);
            change(&mut image);
            let bzimage = match BzImage::new(&image) {
                Ok(bzimage) => bzimage,
                Err(error) => return error.to_string(),
            };
            let tried = bzimage.place(None).map(drop);
            let tried = tried.and_then(|()| bzimage.payload().map(drop));
            tried
                .and_then(|()| bzimage.entry(LinuxProtocol::Bits32).map(drop))
                .unwrap_err()
                .to_string()
        };
        let wrong: &[(&str, Change<'_>)] = &[
            ("boot_flag", &|image| image[0x1fe] = 0),
            ("zImage", &|image| image[0x211] = 0),
            ("setup_sects", &|image| image[0x1f1] = 2),
            ("syssize", &|image| set(image, 0x1f4, 6)),
            ("truncated in its header", &|image| image.truncate(0x240)),
            ("pref_address", &|image| set(image, 0x258, 0x1000)),
            ("pref_address", &|image| set(image, 0x258, 0xc000_0000)),
            ("pref_address", &|image| set(image, 0x25c, 1)),
            ("kernel_alignment", &|image| set(image, 0x230, 3)),
            ("min_alignment", &|image| image[0x235] = 64),
            ("min_alignment", &|image| image[0x235] = 255),
            ("payload_offset", &|image| set(image, 0x24c, 0x41)),
            ("payload_offset", &|image| {
                set(image, 0x248, u32::MAX);
                set(image, 0x24c, u32::MAX);
            }),
            ("code32_start", &|image| set(image, 0x214, 0x10_0040)),
            ("code32_start", &|image| set(image, 0x214, 0)),
        ];
        for (field, change) in wrong {
            assert!(with(*change).contains(field), "{field}: {}", with(*change));
        }
    }

    #[test]
    fn an_address_that_is_not_aligned_is_named_by_where_it_comes_from() {
        let mut image = bzimage(b"kernel");
        image[0x234..0x236].copy_from_slice(&[1, 12]);
        let error = place(&image, Some(0x20_0001)).unwrap_err();
        assert_eq!(error.at, "boot.load_address", "{error}");
        set(&mut image, 0x258, 0x20_0001);
        let error = place(&image, None).unwrap_err();
        assert!(error.at == "boot.kernel" && error.detail.contains("pref_address"), "{error}");
        assert!(place(&image, Some(0x20_0000)).is_ok());
    }

    #[test]
    fn a_kernel_that_cannot_be_moved_stays_where_it_is() {
        let mut image = bzimage(b"kernel");
        assert_eq!(place(&image, None).unwrap(), (0x20_0000, 0x20_1000));
        assert_eq!(place(&image, Some(0x10_0000)).unwrap(), (0x10_0000, 0x20_1000));
        let error = place(&image, Some(0x40_0000)).unwrap_err();
        assert!(error.detail.contains("relocatable_kernel"), "{error}");
        // One that can be moved unpacks itself at a multiple of its alignment.
        image[0x234] = 1;
        image[0x235] = 12;
        assert_eq!(place(&image, Some(0x40_1000)).unwrap(), (0x40_1000, 0x60_1000));
        assert_eq!(place(&image, Some(0x10_0000)).unwrap(), (0x10_0000, 0x20_1000));
        let error = place(&image, Some(0x40_0800)).unwrap_err();
        assert!(error.detail.contains("min_alignment"), "{error}");
    }

    #[test]
    fn the_entry_is_of_64_bits_where_there_is_one() {
        let mut image = bzimage(&[0; 0x400]);
        set(&mut image, 0x214, 0x10_0020);
        let entry = |image: &[u8], protocol| BzImage::new(image).unwrap().entry(protocol);
        for protocol in [LinuxProtocol::Auto, LinuxProtocol::Bits64] {
            assert_eq!(entry(&image, protocol).unwrap(), (CpuMode::Kernel64, 0x200));
        }
        let bits_32 = (CpuMode::Kernel32, 0x20);
        assert_eq!(entry(&image, LinuxProtocol::Bits32).unwrap(), bits_32);
        image[0x236] = 0;
        assert_eq!(entry(&image, LinuxProtocol::Auto).unwrap(), bits_32);
        let error = entry(&image, LinuxProtocol::Bits64).unwrap_err();
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Boot, "boot.protocol"));
    }

    #[test]
    fn a_kernel_that_does_not_fit_says_what_it_needs() {
        let mut image = bzimage(b"kernel");
        set(&mut image, 0x260, 0x100_0000);
        let memory = GuestMemory::new(4 << 20).unwrap();
        let error = BzImage::new(&image).unwrap().load(None, &memory).err().unwrap();
        assert!(error.detail.contains("0x1000000 bytes at 0x200000"), "{error}");
    }

    proptest! {
        #[test]
        fn a_mutated_header_never_panics(
            changes in prop::collection::vec((0x1f1usize..0x270, any::<u8>()), 0..8),
            wanted in prop::option::of(any::<u64>()),
        ) {
            let mut image = bzimage(&[0; 64]);
            for (at, value) in changes {
                image[at] = value;
            }
            if let Ok(bzimage) = BzImage::new(&image) {
                let _ = (bzimage.payload().is_ok(), bzimage.entry(LinuxProtocol::Bits32).is_ok());
                if let Ok(place) = bzimage.place(wanted) {
                    prop_assert!(place.end > place.address);
                }
            }
        }
    }
}

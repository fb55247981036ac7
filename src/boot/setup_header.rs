//! Reads the setup header of a bzImage, of whatever version of the boot protocol.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::fields::u16_at;
use super::zero_page::BOOT_FLAG;
use crate::error::{Error, ErrorKind, Result};

const HEADER_OFFSET: usize = 0x1f1;
/// The oldest protocol that says how long its command line may be.
const OLDEST: u16 = 0x0206;
/// From this version on, the header says where the compressed kernel is.
const HAS_PAYLOAD: u16 = 0x0208;
/// From this version on, the header has a preferred address and the size of the unpacked kernel.
const HAS_ADDRESS: u16 = 0x020a;
/// From this version on, the header says whether there is a 64-bit entry.
const HAS_XLOADFLAGS: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
/// The limits of a header that has zeros there.
const DEFAULT_CMDLINE: u32 = 255;
const DEFAULT_INITRD_CEILING: u32 = 0x37ff_ffff;

/// The header, with zeros for the fields that its version does not have.
///
/// # Errors
/// [`ErrorKind::Boot`] if it is no header of a bzImage, or one that is too old.
pub(super) fn read(image: &[u8]) -> Result<setup_header> {
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
    let flag = u16_at(image, 0x1fe).unwrap_or_default();
    if flag != BOOT_FLAG {
        return Err(bad(format!("boot_flag of the bzImage is {flag:#x}, not 0xaa55"))
            .hint("the file is damaged; take it again"));
    }
    let (version, flags) = (header.version, header.loadflags);
    if version < OLDEST {
        let (major, minor) = (version >> 8, version & 0xff);
        return Err(bad(format!(
            "a Linux kernel of boot protocol {major}.{minor:02}; the oldest that pyvmm boots is 2.06"
        ))
        .hint("take a kernel of Linux 2.6.22 or newer"));
    }
    if flags & LOADED_HIGH == 0 {
        return Err(bad("a zImage, which is loaded below 1 MiB (bit 0 of its loadflags is clear)")
            .hint("build a bzImage: make bzImage"));
    }
    forget_newer_fields(&mut header);
    Ok(header)
}

fn forget_newer_fields(header: &mut setup_header) {
    if header.version < HAS_PAYLOAD {
        (header.payload_offset, header.payload_length) = (0, 0);
    }
    if header.version < HAS_ADDRESS {
        (header.pref_address, header.init_size, header.min_alignment) = (0, 0, 0);
    }
    if header.version < HAS_XLOADFLAGS {
        header.xloadflags = 0;
    }
    if header.cmdline_size == 0 {
        header.cmdline_size = DEFAULT_CMDLINE;
    }
    if header.initrd_addr_max == 0 {
        header.initrd_addr_max = DEFAULT_INITRD_CEILING;
    }
}

fn bad(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Boot, "boot.kernel", detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::bzimage::tests::{bzimage, set};

    #[test]
    fn an_older_header_has_no_newer_fields() {
        let mut image = bzimage(&[0; 0x40]);
        set(&mut image, 0x248, 0x10);
        set(&mut image, 0x24c, 0x10);
        image[0x235] = 21;
        let at = |image: &[u8]| {
            let header = read(image).unwrap();
            let (length, size) = (header.payload_length, header.init_size);
            (length, header.pref_address, size, header.min_alignment, header.xloadflags)
        };
        assert_eq!(at(&image), (0x10, 0x20_0000, 0x1000, 21, 1));
        image[0x206] = 0x0b;
        assert_eq!(at(&image), (0x10, 0x20_0000, 0x1000, 21, 0));
        image[0x206] = 0x09;
        assert_eq!(at(&image), (0x10, 0, 0, 0, 0));
        image[0x206] = 0x07;
        assert_eq!(at(&image), (0, 0, 0, 0, 0));
        image[0x206] = 0x05;
        let error = read(&image).unwrap_err();
        assert!(error.detail.contains("2.05"), "{error}");
    }

    #[test]
    fn limits_that_are_zero_are_those_of_old_loaders() {
        let mut image = bzimage(b"kernel");
        set(&mut image, 0x238, 0);
        set(&mut image, 0x22c, 0);
        let header = read(&image).unwrap();
        let (cmdline, initrd) = (header.cmdline_size, header.initrd_addr_max);
        assert_eq!((cmdline, initrd), (255, 0x37ff_ffff));
    }
}

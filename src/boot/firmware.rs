//! Maps firmware where a PC has it: read-only, ending at 4 GiB, and a copy of its last 128 KiB in
//! RAM, ending at 1 MiB, which firmware writes.

use super::files::Files;
use crate::config::FirmwareBoot;
use crate::cpu::{CpuMode, Start};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::{Backing, GuestMemory, anonymous};

const AT: &str = "boot.path";
/// Firmware comes in whole parts of this size.
const UNIT: usize = 64 << 10;
const MAX_SIZE: usize = 16 << 20;
/// How much of it there is below 1 MiB.
const SHADOW: usize = 128 << 10;

/// Map the image of the file; returns the start at its reset vector.
pub(super) fn load(boot: &FirmwareBoot, memory: &GuestMemory, files: &Files<'_>) -> Result<Start> {
    map(&files.read(&boot.path, AT, files.most)?, memory)
}

/// Map the image.
pub(super) fn map(image: &[u8], memory: &GuestMemory) -> Result<Start> {
    let bad = |detail: String| Error::new(ErrorKind::Boot, AT, detail);
    let size = image.len();
    if size == 0 || !size.is_multiple_of(UNIT) || size > MAX_SIZE {
        let detail = format!("{size} bytes: firmware has a multiple of 64 KiB, at most 16 MiB");
        return Err(bad(detail).hint("a kernel is booted by KernelBoot, LinuxBoot or FlatBoot"));
    }
    let tail = image.get(size.saturating_sub(SHADOW)..).unwrap_or(image);
    let shadow = layout::HIGH_MEMORY - tail.len() as u64;
    memory.check(shadow, tail.len() as u64)?;
    let rom = memory.add(
        layout::MMIO_GAP_END - size as u64,
        anonymous(size as u64)?,
        Backing { read_only: true, shared: false },
    )?;
    memory.write(rom.start, image)?;
    memory.write(shadow, tail)?;
    Ok(Start::new(CpuMode::Reset, layout::RESET_VECTOR))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(1 << 20).unwrap()
    }

    #[test]
    fn an_image_ends_at_4_gib_and_its_end_at_1_mib() {
        let memory = memory();
        let mut image = vec![0x11; 3 * UNIT];
        image[UNIT..2 * UNIT].fill(0x22);
        *image.last_mut().unwrap() = 0x33;
        let start = map(&image, &memory).unwrap();
        assert_eq!((start.mode, start.entry), (CpuMode::Reset, 0xffff_fff0));
        let byte = |at: u64| {
            let mut byte = [0];
            memory.read(at, &mut byte).unwrap();
            byte[0]
        };
        assert_eq!([byte(0xfffd_0000), byte(0xfffe_0000), byte(0xffff_ffff)], [0x11, 0x22, 0x33]);
        assert_eq!([byte(0xd_ffff), byte(0xe_0000), byte(0xf_ffff)], [0, 0x22, 0x33]);
        let slots = memory.slots();
        assert_eq!((slots.len(), slots[1].backing.read_only), (2, true));
    }

    #[test]
    fn a_size_that_no_firmware_has_is_refused_and_nothing_is_mapped() {
        let memory = memory();
        for size in [0, 1, UNIT - 1, UNIT + 1, MAX_SIZE + UNIT] {
            let error = map(&vec![0; size], &memory).unwrap_err();
            assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Boot, AT));
        }
        assert_eq!(memory.slots().len(), 1);
        map(&vec![0; MAX_SIZE], &memory).unwrap();
    }
}

//! The initial RAM disk, loaded as high in low memory as possible.

use std::path::Path;

use super::files::Files;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{self, PAGE};
use crate::memory::GuestMemory;

/// Load it above `floor` and not beyond `ceiling`. Returns its address and size.
pub(super) fn load(
    path: &Path,
    memory: &GuestMemory,
    files: &Files<'_>,
    floor: u64,
    ceiling: u64,
) -> Result<(u32, u32)> {
    let top = memory.size().min(layout::MMIO_GAP_START).min(ceiling);
    let bytes = files.read(path, "boot.initrd", top)?;
    let size = bytes.len() as u64;
    let address = top.checked_sub(size).map(|a| a & !(PAGE - 1)).filter(|a| *a >= floor);
    let fits = address.and_then(|a| Some((u32::try_from(a).ok()?, u32::try_from(size).ok()?)));
    let Some((address, size)) = fits else {
        let detail = format!("{}: {size} bytes do not fit above the kernel", path.display());
        return Err(Error::new(ErrorKind::Boot, "boot.initrd", detail)
            .hint("give the machine more memory (memory.size_mib)"));
    };
    if size > 0 {
        memory.write(u64::from(address), &bytes)?;
    }
    Ok((address, size))
}

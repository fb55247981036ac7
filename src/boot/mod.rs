//! Putting into guest memory what the machine starts with. No KVM here.

mod elf;
mod embedded;
mod flat;
mod initrd;
mod linux;
mod mptable;

use std::fs::File;
use std::io::Read;
use std::path::Path;

pub use embedded::embedded_guest;

use crate::config::{Boot, VmmConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::vm::GuestMemory;

/// Load what the configuration names; returns where vCPU 0 starts.
///
/// # Errors
/// When a file cannot be read, is not what it should be, or does not fit.
pub fn load(config: &VmmConfig, memory: &GuestMemory) -> Result<u64> {
    match &config.boot {
        Boot::Embedded => embedded::load(config, memory),
        Boot::Flat(flat) => flat::load(flat, memory),
        Boot::Linux(linux) => {
            let entry = linux::load(linux, memory)?;
            mptable::write(memory, config.cpu.vcpus)?;
            Ok(entry)
        }
    }
}

/// A whole file, refused when it is larger than guest memory could hold.
fn read_file(path: &Path, at: &str, most: u64) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| {
        let mut error = Error::os(ErrorKind::Boot, at, &e);
        error.detail = format!("{}: {}", path.display(), error.detail);
        error
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    // One byte more than fits: an endless file, such as a device, is found out without reading on.
    file.take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > most {
        let detail = format!("{}: larger than guest memory", path.display());
        return Err(Error::new(ErrorKind::Boot, at, detail));
    }
    Ok(bytes)
}

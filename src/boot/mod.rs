//! Putting into guest memory what the machine starts with. No KVM here.

mod elf;
mod embedded;
mod files;
mod flat;
mod initrd;
mod linux;
mod mptable;

pub use embedded::embedded_guest;
use files::Files;

use crate::config::{Boot, VmmConfig};
use crate::error::Result;
use crate::memory::GuestMemory;

/// Load what the configuration names; returns where vCPU 0 starts.
///
/// # Errors
/// When a file cannot be read, is not what it should be, or does not fit.
///
/// A pipe may have its writer wait for long: `interrupted` is asked now and then, and its error
/// ends the loading.
pub fn load(
    config: &VmmConfig,
    memory: &GuestMemory,
    interrupted: &dyn Fn() -> Result<()>,
) -> Result<u64> {
    let files = Files { most: memory.size(), interrupted };
    match &config.boot {
        Boot::Embedded => embedded::load(config, memory),
        Boot::Flat(flat) => flat::load(flat, memory, &files),
        Boot::Linux(linux) => {
            let entry = linux::load(linux, memory, &files)?;
            mptable::write(memory, config.cpu.vcpus)?;
            Ok(entry)
        }
    }
}

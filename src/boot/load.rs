//! Loads what the configuration names.

use super::files::Files;
use super::{embedded, flat, linux, mptable, program};
use crate::config::{Boot, VmmConfig};
use crate::error::Result;
use crate::memory::GuestMemory;

/// Load the code or kernel of the configuration. Returns the entry of vCPU 0.
///
/// # Errors
/// If a file cannot be read, is not what it should be, or does not fit.
///
/// Reading a pipe may take long, so `interrupted` is called periodically. Its error ends the
/// loading.
pub fn load(
    config: &VmmConfig,
    memory: &GuestMemory,
    interrupted: &dyn Fn() -> Result<()>,
) -> Result<u64> {
    let files = Files { most: memory.size(), interrupted };
    match &config.boot {
        Boot::Embedded => embedded::load(config, memory),
        Boot::Flat(flat) => flat::load(flat, memory, &files),
        Boot::Elf(elf) => program::load(elf, memory, &files),
        Boot::Linux(linux) => {
            let entry = linux::load(linux, memory, &files)?;
            mptable::write(memory, config.cpu.vcpus)?;
            Ok(entry)
        }
    }
}

//! Loads what the configuration names.

use super::files::Files;
use super::{acpi, embedded, firmware, flat, kernel, linux, mptable, program};
use crate::config::{Boot, VmmConfig};
use crate::cpu::{CpuMode, Start};
use crate::error::Result;
use crate::memory::GuestMemory;
use crate::virtio::Place;

/// Load the code or kernel of the configuration, which finds virtio devices at these places.
/// Returns how it starts.
///
/// # Errors
/// If a file cannot be read, is not what it should be, or does not fit.
///
/// Reading a pipe may take long, so `interrupted` is called periodically. Its error ends the
/// loading.
pub fn load(
    config: &VmmConfig,
    memory: &GuestMemory,
    places: &[Place],
    interrupted: &dyn Fn() -> Result<()>,
) -> Result<Start> {
    acpi::write(config, memory, places)?;
    let rsdp = acpi::rsdp(config);
    let files = Files { most: memory.size(), interrupted };
    match &config.boot {
        Boot::Embedded => Ok(Start::new(CpuMode::User64, embedded::load(config, memory)?)),
        Boot::Flat(flat) => {
            let entry = flat::load(flat, memory, &files)?;
            Ok(Start { stack: Some(flat.address), ..Start::new(flat.mode, entry) })
        }
        Boot::Elf(elf) => {
            let entry = program::load(elf, memory, &files)?;
            let stack = Some(elf.stack(memory.size()).end);
            Ok(Start { stack, ..Start::new(CpuMode::Program64, entry) })
        }
        Boot::Linux(linux) => {
            let start = linux::load(linux, memory, &files, rsdp, places)?;
            mptable::write(memory, config.cpu.vcpus)?;
            Ok(start)
        }
        Boot::Kernel(kernel) => {
            let start = kernel::load(kernel, memory, &files, rsdp)?;
            if config.has_irqchip() {
                mptable::write(memory, config.cpu.vcpus)?;
            }
            Ok(start)
        }
        Boot::Firmware(firmware) => firmware::load(firmware, memory, &files),
    }
}

//! The built-in guest, which runs by default. Its code is in `embedded.s`.

use crate::config::{ExitPort, VmmConfig};
use crate::error::Result;
use crate::memory::GuestMemory;

std::arch::global_asm!(include_str!("embedded.s"));

unsafe extern "C" {
    static pyvmm_guest_start: u8;
    static pyvmm_guest_settings: u8;
    static pyvmm_guest_end: u8;
}

/// Where the guest is loaded: low enough for a machine of one MiB.
const ADDRESS: u64 = 0x1_0000;

/// The guest's machine code, position-independent, for 64-bit ring 3.
#[must_use]
pub fn embedded_guest() -> &'static [u8] {
    let (start, end) = (&raw const pyvmm_guest_start, &raw const pyvmm_guest_end);
    // SAFETY: the two symbols enclose one read-only section of this module, made by embedded.s.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Write the guest and its settings; returns its entry.
pub(super) fn load(config: &VmmConfig, memory: &GuestMemory) -> Result<u64> {
    let settings = (&raw const pyvmm_guest_settings).addr() - (&raw const pyvmm_guest_start).addr();
    let ExitPort(exit_port) = config.exit_port;
    let [low, high] = exit_port.unwrap_or(0).to_le_bytes();
    memory.write(ADDRESS, embedded_guest())?;
    let is_connected = u8::from(config.serial.input.is_some());
    memory.write(ADDRESS + settings as u64, &[is_connected, 0, low, high])?;
    Ok(ADDRESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_end_the_guest() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let config = VmmConfig { exit_port: ExitPort(Some(0x510)), ..VmmConfig::default() };
        assert_eq!(load(&config, &memory).unwrap(), ADDRESS);
        let mut loaded = vec![0; embedded_guest().len()];
        memory.read(ADDRESS, &mut loaded).unwrap();
        let (code, settings) = loaded.split_at(loaded.len() - 4);
        assert_eq!(code, &embedded_guest()[..code.len()]);
        assert_eq!(settings, [0, 0, 0x10, 0x05]);
    }
}

//! Loads a kernel other than Linux.

use super::files::Files;
use crate::config::KernelBoot;
use crate::cpu::Start;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::GuestMemory;

/// Load the kernel and its modules.
pub(super) fn load(config: &KernelBoot, _memory: &GuestMemory, files: &Files<'_>) -> Result<Start> {
    files.read(&config.kernel, "boot.kernel", files.most)?;
    Err(Error::new(ErrorKind::Boot, "boot.kernel", "no protocol of it can be booted yet"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_refused_as_long_as_no_protocol_is_there() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let files = Files { most: 1 << 20, interrupted: &|| Ok(()) };
        let config = KernelBoot { kernel: "/dev/null".into(), ..KernelBoot::default() };
        assert_eq!(load(&config, &memory, &files).unwrap_err().kind, ErrorKind::Boot);
    }
}

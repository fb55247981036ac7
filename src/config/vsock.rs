//! The virtio socket device. Pure data.

use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's address.
    pub cid: u64,
    /// Where programs connect to the guest; the guest connects to paths that begin with it.
    pub uds_path: Option<PathBuf>,
}

impl Default for VsockConfig {
    fn default() -> Self {
        Self { cid: 3, uds_path: None }
    }
}

impl VsockConfig {
    /// # Errors
    /// [`ErrorKind::Config`] if the address is reserved or too large (virtio 1.2, 5.10.4).
    pub fn check(&self) -> Result<()> {
        if (3..u64::from(u32::MAX)).contains(&self.cid) {
            return Ok(());
        }
        let detail = format!("{} is not a number from 3 to {}", self.cid, u32::MAX - 1);
        Err(Error::new(ErrorKind::Config, "vsock.cid", detail).hint("0 to 2 are reserved"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_addresses_are_refused() {
        for cid in [0, 2, u64::from(u32::MAX), u64::MAX] {
            let error = VsockConfig { cid, ..VsockConfig::default() }.check().unwrap_err();
            assert_eq!(error.at, "vsock.cid");
        }
        VsockConfig::default().check().unwrap();
        VsockConfig { cid: u64::from(u32::MAX) - 1, uds_path: None }.check().unwrap();
    }
}

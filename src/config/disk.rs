//! A virtual disk. Pure data.

use super::boot::bad;
use crate::disk::{Contents, Layer};
use crate::error::Result;

/// The most bytes of a serial number.
const MOST_SERIAL: usize = 20;

/// How much a disk does in a second; None for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Bytes read and written.
    pub bytes: Option<u64>,
    /// Requests.
    pub operations: Option<u64>,
}

/// A disk.
#[derive(Debug)]
pub struct DiskConfig {
    /// What it contains at first.
    pub contents: Contents,
    /// What takes the writes.
    pub layer: Layer,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// The serial number, up to 20 printable ASCII characters.
    pub serial: String,
    /// The size of a logical block: 512, 1024, 2048 or 4096.
    pub block_size: u32,
    /// How much it does in a second.
    pub limits: RateLimits,
}

impl DiskConfig {
    /// A disk with these contents, which its writes change.
    #[must_use]
    pub fn new(contents: Contents) -> Self {
        let (layer, limits) = (Layer::None, RateLimits::default());
        let serial = String::new();
        Self { contents, layer, read_only: false, serial, block_size: 512, limits }
    }

    /// Check the values.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Config`] with the key.
    pub fn check(&self) -> Result<()> {
        let is_printable = self.serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if self.serial.len() > MOST_SERIAL || !is_printable {
            return Err(bad("disks.serial", "it is not up to 20 printable ASCII characters"));
        }
        if !matches!(self.block_size, 512 | 1024 | 2048 | 4096) {
            let detail = format!("{} is none of 512, 1024, 2048 and 4096", self.block_size);
            return Err(bad("disks.block_size", detail));
        }
        if [self.limits.bytes, self.limits.operations].contains(&Some(0)) {
            return Err(bad("disks.limits", "a limit of 0 would stop the disk"));
        }
        if self.read_only && self.layer != Layer::None {
            return Err(bad("disks.overlay", "a disk that is read-only needs no overlay"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_values_are_named_by_their_key() {
        let good = || DiskConfig::new(Contents::Bytes(Vec::new()));
        good().check().unwrap();
        let serial = DiskConfig { serial: "x".repeat(21), ..good() };
        let letters = DiskConfig { serial: "\u{e4}".into(), ..good() };
        let block = DiskConfig { block_size: 513, ..good() };
        let limits = RateLimits { operations: Some(0), bytes: None };
        let limits = DiskConfig { limits, ..good() };
        let layer = DiskConfig { layer: Layer::Memory, read_only: true, ..good() };
        for (config, key) in [
            (serial, "disks.serial"),
            (letters, "disks.serial"),
            (block, "disks.block_size"),
            (limits, "disks.limits"),
            (layer, "disks.overlay"),
        ] {
            assert_eq!(config.check().unwrap_err().at, key);
        }
    }
}

//! The boot information of a kernel, in the area below the EBDA: each part gets an address, and all
//! are written at once.

use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

/// The parts so far.
#[derive(Debug, Default)]
pub(super) struct Area {
    bytes: Vec<u8>,
}

impl Area {
    const SIZE: u64 = layout::EBDA_START - layout::ZERO_PAGE;

    /// Add a part. Returns its address, a multiple of 8.
    ///
    /// # Errors
    /// [`ErrorKind::Boot`] if there is no room.
    pub(super) fn add(&mut self, part: &[u8]) -> Result<u64> {
        let at = self.bytes.len().next_multiple_of(8);
        if (at + part.len()) as u64 > Self::SIZE {
            let most = Self::SIZE;
            let detail =
                format!("the command lines and the list of modules need more than {most} bytes");
            return Err(Error::new(ErrorKind::Boot, "boot.modules", detail));
        }
        self.bytes.resize(at, 0);
        self.bytes.extend(part);
        Ok(layout::ZERO_PAGE + at as u64)
    }

    /// Add a text and its closing zero.
    ///
    /// # Errors
    /// As for [`Self::add`].
    pub(super) fn add_text(&mut self, text: &str) -> Result<u64> {
        self.add(&[text.as_bytes(), &[0]].concat())
    }

    /// Write all parts.
    ///
    /// # Errors
    /// If guest memory is too small.
    pub(super) fn write(&self, memory: &GuestMemory) -> Result<()> {
        memory.write(layout::ZERO_PAGE, &self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_end_below_the_ebda() {
        let mut area = Area::default();
        assert_eq!(area.add_text("abc").unwrap(), layout::ZERO_PAGE);
        assert_eq!(area.add(&[7; 2]).unwrap(), layout::ZERO_PAGE + 8);
        let memory = GuestMemory::new(1 << 20).unwrap();
        area.write(&memory).unwrap();
        let mut bytes = [1; 10];
        memory.read(layout::ZERO_PAGE, &mut bytes).unwrap();
        assert_eq!(&bytes, b"abc\0\0\0\0\0\x07\x07");
        let room = usize::try_from(Area::SIZE - 16).unwrap();
        area.add(&vec![0; room]).unwrap();
        assert_eq!(area.add(&[0]).unwrap_err().at, "boot.modules");
    }
}

//! Guest memory: anonymous mappings around the MMIO gap, read and written with every bound checked.
//! A running guest may change the bytes at the same time; vm-memory's volatile accesses allow for that.

use std::sync::{Arc, OnceLock};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;
use crate::error::{Error, ErrorKind, Result};

/// The RAM of one machine, shared by all who hold it; unmapped when the last one lets go.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    mmap: Arc<GuestMemoryMmap>,
    size: u64,
}

impl GuestMemory {
    /// Zeroed memory of this many bytes. Pages cost nothing until they are touched.
    ///
    /// # Errors
    /// When it is more than the host's memory, or the mapping fails.
    pub fn new(size: u64) -> Result<Self> {
        let host = host_memory();
        if size > host {
            let detail = format!("{} MiB is more than the host's {} MiB", size >> 20, host >> 20);
            return Err(Error::new(ErrorKind::Config, "memory.size_mib", detail));
        }
        let ranges = layout::ram_ranges(size)
            .into_iter()
            .map(|(start, length)| Ok((GuestAddress(start), to_usize(length)?)))
            .collect::<Result<Vec<_>>>()?;
        let mmap = GuestMemoryMmap::from_ranges(&ranges)
            .map_err(|e| Error::new(ErrorKind::Memory, "memory.size_mib", e.to_string()))?;
        Ok(Self { mmap: Arc::new(mmap), size })
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The mapping itself, for loaders.
    #[must_use]
    pub fn mmap(&self) -> &GuestMemoryMmap {
        &self.mmap
    }

    /// Guest-physical start, bytes and host address of each range of RAM.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64, u64)> {
        let host = |region: &vm_memory::GuestRegionMmap| region.as_ptr() as u64;
        self.mmap.iter().map(|r| (r.start_addr().0, r.len(), host(r))).collect()
    }

    /// Check that a whole range is RAM.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`], with what RAM there is.
    pub fn check(&self, address: u64, length: u64) -> Result<()> {
        let mut at = address;
        let mut left = length;
        for (start, size, _) in self.ranges() {
            if at >= start && at - start < size {
                let here = left.min(size - (at - start));
                left -= here;
                at = at.saturating_add(here);
            }
        }
        if left == 0 && (length > 0 || layout::in_memory(self.size, address)) {
            return Ok(());
        }
        Err(self.outside(address, length))
    }

    /// Fill `data` from guest memory at `address`.
    ///
    /// # Errors
    /// When any byte of the range is outside RAM; `data` may then be partly filled.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        self.check(address, data.len() as u64)?;
        self.mmap
            .read_slice(data, GuestAddress(address))
            .map_err(|_| self.outside(address, data.len() as u64))
    }

    /// Write `data` to guest memory at `address`.
    ///
    /// # Errors
    /// When any byte of the range is outside RAM; nothing is written then.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        self.check(address, data.len() as u64)?;
        self.mmap
            .write_slice(data, GuestAddress(address))
            .map_err(|_| self.outside(address, data.len() as u64))
    }

    fn outside(&self, address: u64, length: u64) -> Error {
        let ranges: Vec<String> = layout::ram_ranges(self.size)
            .iter()
            .map(|(start, size)| format!("{start:#x} to {:#x}", start + size - 1))
            .collect();
        let detail =
            format!("{length} bytes there are not all in guest memory ({})", ranges.join(", "));
        Error::new(ErrorKind::Memory, format!("{address:#x}"), detail)
    }
}

fn host_memory() -> u64 {
    static SIZE: OnceLock<u64> = OnceLock::new();
    *SIZE.get_or_init(|| {
        // SAFETY: sysconf takes no pointers.
        let (pages, size) =
            unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
        u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(size).unwrap_or(0))
    })
}

fn to_usize(value: u64) -> Result<usize> {
    usize::try_from(value)
        .map_err(|_| Error::new(ErrorKind::Memory, "memory.size_mib", "too large for this host"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_back() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(0xf_fffe, b"ab").unwrap();
        let mut data = [0; 2];
        memory.read(0xf_fffe, &mut data).unwrap();
        assert_eq!(&data, b"ab");
    }

    #[test]
    fn a_write_past_the_end_writes_nothing() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        assert_eq!(memory.write(0xf_ffff, b"ab").unwrap_err().kind, ErrorKind::Memory);
        let mut data = [0; 1];
        memory.read(0xf_ffff, &mut data).unwrap();
        assert_eq!(data, [0]);
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        let error = GuestMemory::new(1 << 50).unwrap_err();
        assert_eq!(error.at, "memory.size_mib");
    }

    #[test]
    fn a_range_over_the_gap_is_refused() {
        let memory = GuestMemory::new(4 << 30).unwrap();
        memory.write(0x1_0000_0000, b"high").unwrap();
        assert!(memory.write(0xbfff_fffe, b"over").is_err());
    }

    proptest! {
        #[test]
        fn check_agrees_with_a_byte_by_byte_look(address in 0u64..(1 << 20) + 64, length in 0u64..64) {
            let memory = GuestMemory::new(1 << 20).unwrap();
            let all = (address..address + length.max(1)).all(|a| layout::in_memory(1 << 20, a));
            prop_assert_eq!(memory.check(address, length).is_ok(), all);
        }

        #[test]
        fn check_never_panics(address in any::<u64>(), length in any::<u64>()) {
            let _ = GuestMemory::new(1 << 20).unwrap().check(address, length);
        }
    }
}

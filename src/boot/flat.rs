//! Flat code: bytes at an address.

use super::files::Files;
use crate::config::{Code, FlatBoot};
use crate::cpu::CpuMode;
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::memory::GuestMemory;

/// Write the code and return its entry.
pub(super) fn load(flat: &FlatBoot, memory: &GuestMemory, files: &Files<'_>) -> Result<u64> {
    let read;
    let code = match &flat.code {
        Code::Bytes(bytes) => bytes,
        Code::File(path) => {
            read = files.read(path, "boot.path", files.most)?;
            &read
        }
    };
    if code.is_empty() {
        return Err(Error::new(ErrorKind::Boot, "boot.code", "there is no code: 0 bytes"));
    }
    if flat.mode != CpuMode::Real16 {
        keep_off_tables(flat.address, code.len() as u64)?;
    }
    memory.write(flat.address, code).map_err(|e| Error {
        kind: ErrorKind::Boot,
        at: "boot.address".into(),
        ..e
    })?;
    Ok(flat.entry.unwrap_or(flat.address))
}

fn keep_off_tables(address: u64, length: u64) -> Result<()> {
    let (start, end) = (layout::SYSTEM_AREA, layout::EBDA_START);
    if address >= end || address.saturating_add(length) <= start {
        return Ok(());
    }
    let detail =
        format!("{length} bytes at {address:#x} overlap the tables at {start:#x} to {end:#x}");
    Err(Error::new(ErrorKind::Boot, "boot.address", detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(flat: &FlatBoot, memory: &GuestMemory) -> Result<u64> {
        super::load(flat, memory, &Files { most: memory.size(), interrupted: &|| Ok(()) })
    }

    fn flat(address: u64, code: &[u8], mode: CpuMode) -> FlatBoot {
        FlatBoot { code: Code::Bytes(code.to_vec()), address, entry: None, mode }
    }

    #[test]
    fn code_is_written_where_it_should_be() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let entry = load(&flat(0x7c00, &[0xf4], CpuMode::Real16), &memory).unwrap();
        let mut byte = [0];
        memory.read(entry, &mut byte).unwrap();
        assert_eq!((entry, byte), (0x7c00, [0xf4]));
    }

    #[test]
    fn code_that_does_not_fit_is_refused() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        for (address, code) in
            [(0xf_ffff, &[0u8; 2][..]), (0x1000, &[]), (0x7_ffff, &[0; 2]), (0x9_fbff, &[0])]
        {
            let error = load(&flat(address, code, CpuMode::Long64), &memory).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Boot);
        }
        load(&flat(0x8_0000, &[0], CpuMode::Real16), &memory).unwrap();
    }
}

//! The configuration ports of a PCI bus without devices: mechanism #1. The reset control register
//! is one of its ports, if the machine has it. vCPU threads access it.

use super::Device;
use super::reset_ports::ResetRegister;
use crate::bytes::Reader;
use crate::error::Result;
use crate::exit_handler::Outcome;
use crate::sync::{Mutex, rank};

/// Ports, as offsets from 0xcf8. The address is accessed only as a whole.
const ADDRESS: u64 = 0;
const RESET: u64 = 1;
const DATA: u64 = 4;
/// The bits of the address that can be set.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// See the module.
#[derive(Debug)]
pub(crate) struct EmptyPci {
    address: Mutex<u32, rank::Pci>,
    reset: Option<ResetRegister>,
}

impl EmptyPci {
    pub(crate) fn new(reset: Option<ResetRegister>) -> Self {
        Self { address: Mutex::default(), reset }
    }
}

impl Device for EmptyPci {
    fn name(&self) -> &str {
        "pci"
    }

    /// No device answers, so all data is one bits.
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        match (offset, &self.reset, data.len()) {
            (ADDRESS, _, 4) => data.copy_from_slice(&self.address.lock().to_le_bytes()),
            (RESET, Some(reset), 1) => return reset.read(0, data),
            _ => data.fill(0xff),
        }
        Outcome::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        match (offset, &self.reset, data) {
            (ADDRESS, _, [first, second, third, fourth]) => {
                let address = u32::from_le_bytes([*first, *second, *third, *fourth]);
                *self.address.lock() = address & ADDRESS_BITS;
            }
            (RESET, Some(reset), [_]) => return reset.write(0, data),
            (DATA.., ..) | (..) => {}
        }
        Outcome::Continue
    }

    /// The address, and the state of the reset control register.
    fn save(&self) -> Result<Vec<u8>> {
        let mut bytes = self.address.lock().to_le_bytes().to_vec();
        if let Some(reset) = &self.reset {
            bytes.extend(reset.save()?);
        }
        Ok(bytes)
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let mut reader = Reader::new("pci", state);
        let address = reader.u32()?;
        match &self.reset {
            Some(reset) => reset.restore(reader.rest())?,
            None => reader.end()?,
        }
        *self.address.lock() = address & ADDRESS_BITS;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit_handler::{Exit, ExitReason};

    fn read<const N: usize>(pci: &EmptyPci, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        pci.read(offset, &mut data);
        data
    }

    #[test]
    fn the_address_reads_back_and_there_is_no_device() {
        let pci = EmptyPci::new(None);
        pci.write(ADDRESS, &0x8000_0003_u32.to_le_bytes());
        assert_eq!(read(&pci, ADDRESS), 0x8000_0000_u32.to_le_bytes());
        pci.write(3, &[1]);
        assert_eq!(read(&pci, ADDRESS), 0x8000_0000_u32.to_le_bytes(), "a byte is no address");
        assert_eq!((read(&pci, DATA), read(&pci, 6)), ([0xff; 4], [0xff; 2]));
        let other = EmptyPci::new(None);
        other.restore(&pci.save().unwrap()).unwrap();
        assert_eq!(read(&other, ADDRESS), 0x8000_0000_u32.to_le_bytes());
        assert!(other.restore(&[0; 5]).is_err());
    }

    #[test]
    fn the_reset_control_register_is_among_the_ports() {
        let pci = EmptyPci::new(Some(ResetRegister::reset_control()));
        assert_eq!(pci.write(RESET, &[2]), Outcome::Continue);
        let reset = Outcome::End(Box::new(Exit::new(ExitReason::Reset)));
        let other = EmptyPci::new(Some(ResetRegister::reset_control()));
        other.restore(&pci.save().unwrap()).unwrap();
        assert_eq!(read(&other, RESET), [2]);
        assert_eq!(pci.write(RESET, &[6]), reset);
    }
}

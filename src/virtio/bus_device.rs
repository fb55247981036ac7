//! The transport as a device on the memory bus. vCPU threads access it; any thread quiesces, saves
//! and restores it.

use super::registers::CONFIG;
use super::state;
use super::transport::Transport;
use crate::devices::Device;
use crate::error::Result;
use crate::exit_handler::Outcome;

impl Device for Transport {
    fn name(&self) -> &str {
        self.queues().name()
    }

    /// Registers are read by aligned accesses of four bytes only.
    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        if offset >= CONFIG {
            data.fill(0);
            self.device().read_config(offset - CONFIG, data);
        } else if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(&mut *data), offset % 4) {
            *data = self.register(offset).to_le_bytes();
        } else {
            data.fill(0);
        }
        Outcome::Continue
    }

    /// As for `read`. Other writes are ignored.
    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        if offset >= CONFIG {
            self.device().write_config(offset - CONFIG, data);
        } else if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
        Outcome::Continue
    }

    fn acts_by_itself(&self) -> bool {
        true
    }

    fn quiesce(&self) -> Result<()> {
        self.queues().hold();
        self.device().quiesce().inspect_err(|_| self.queues().release())
    }

    fn resume(&self) {
        self.device().resume();
        self.queues().release();
    }

    fn save(&self) -> Result<Vec<u8>> {
        state::save(self)
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        state::restore(self, state)
    }
}

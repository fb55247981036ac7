//! The serial port as a device on the bus: the guest's accesses, on vCPU threads, and its state for
//! a snapshot. `save`, `restore` and `quiesce` run while the vCPUs are stopped.

use smallvec::SmallVec;

use super::bus::Device;
use super::serial::Serial;
use crate::bytes::Reader;
use crate::error::Result;
use crate::exit_handler::Outcome;

impl Device for Serial {
    fn name(&self) -> &str {
        "COM1"
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        for (register, byte) in (offset..).zip(data.iter_mut()) {
            *byte = self.change(|guest| guest.uart.read(register));
        }
        Outcome::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        self.write_many(offset, data, data.len())
    }

    /// Accepts all elements even if the output is full; the guest waits after the instruction.
    fn write_many(&self, offset: u64, data: &[u8], size: usize) -> Outcome {
        let mut sent = SmallVec::<[u8; 16]>::new();
        for element in data.chunks(size.max(1)) {
            for (register, byte) in (offset..).zip(element) {
                sent.extend(self.change(|guest| guest.uart.write(register, *byte)));
            }
        }
        if sent.is_empty() { Outcome::Continue } else { self.print(&sent) }
    }

    fn wait_for_room(&self, is_called_out: &dyn Fn() -> bool) -> bool {
        self.output.wait_for_room(is_called_out)
    }

    fn wake(&self) {
        self.output.wake();
    }

    fn acts_by_itself(&self) -> bool {
        true
    }

    fn quiesce(&self) -> Result<()> {
        self.guest.lock().quiesced += 1;
        Ok(())
    }

    fn resume(&self) {
        self.change(|guest| {
            guest.quiesced = guest.quiesced.saturating_sub(1);
            if guest.quiesced == 0 {
                guest.queue.append(&mut guest.held);
            }
        });
    }

    /// Nine registers, and then, each after its length, the input in the UART, the input queued for
    /// it, the output that has not been taken, and the output that is kept. At the end, how much of
    /// the latter has not been matched.
    fn save(&self) -> Result<Vec<u8>> {
        let (registers, received, queue) = {
            let guest = self.guest.lock();
            let received: Vec<u8> = guest.uart.received().collect();
            let queue: Vec<u8> = guest.queue.iter().chain(&guest.held).copied().collect();
            (guest.uart.registers(), received, queue)
        };
        let (output, kept, unmatched) = self.output.copy();
        let length = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = registers.to_vec();
        for part in [received, queue, output, kept] {
            bytes.extend(length(part.len()));
            bytes.extend(part);
        }
        bytes.extend(length(unmatched));
        Ok(bytes)
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let mut reader = Reader::new("serial", state);
        let registers = reader.take::<9>()?;
        let mut part = || {
            let length = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
            reader.bytes(length).map(<[u8]>::to_vec)
        };
        let (received, queue, output) = (part()?, part()?, part()?);
        // Files of earlier versions end here.
        let (kept, unmatched) = match reader.is_empty() {
            true => (output.clone(), output.len()),
            false => {
                let length = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
                let kept = reader.bytes(length)?.to_vec();
                (kept, usize::try_from(reader.u32()?).unwrap_or(usize::MAX))
            }
        };
        reader.end()?;
        let unmatched = unmatched.min(kept.len());
        self.change(|guest| {
            guest.queue = guest.uart.restore(registers, received);
            guest.queue.extend(queue);
            guest.held.clear();
        });
        if self.input_waiting() == 0 {
            let _ = self.input_wanted.get().map(|wanted| wanted.write(1));
        }
        self.output.restore(output, &kept, unmatched);
        Ok(())
    }
}

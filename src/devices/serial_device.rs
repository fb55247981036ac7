//! The serial port as a device on the bus: the guest's accesses, on vCPU threads, and its state for
//! a snapshot. `save`, `restore` and `quiesce` run while the vCPUs are stopped.

use smallvec::SmallVec;

use super::bus::Device;
use super::serial::Serial;
use super::serial_kind::SerialKind;
use super::uart_receiver::Received;
use crate::bytes::{Reader, bad};
use crate::error::Result;
use crate::exit_handler::Outcome;

/// What a guest reads to find out whether there is a debug port.
const DEBUG_PORT_IS_HERE: u8 = 0xe9;

impl Device for Serial {
    fn name(&self) -> &str {
        self.kind.name()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        if self.kind == SerialKind::DebugPort {
            data.fill(DEBUG_PORT_IS_HERE);
            return Outcome::Continue;
        }
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
        if self.kind == SerialKind::DebugPort {
            return self.print(data);
        }
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
    /// it, the output that has not been taken, and the output that is kept; then how much of the
    /// latter has not been matched. At the end, the number of breaks, and their places in the
    /// input.
    fn save(&self) -> Result<Vec<u8>> {
        let (registers, received, queue) = {
            let guest = self.guest.lock();
            let received: Vec<Received> = guest.uart.received().collect();
            let queue: Vec<Received> = guest.queue.iter().chain(&guest.held).copied().collect();
            (guest.uart.registers(), received, queue)
        };
        let (output, kept, unmatched) = self.output.copy();
        let length = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        let breaks: Vec<usize> = received
            .iter()
            .chain(&queue)
            .enumerate()
            .filter_map(|(place, input)| (*input == Received::Break).then_some(place))
            .collect();
        let [received, queue] =
            [received, queue].map(|part| part.into_iter().map(Received::byte).collect());
        let mut bytes = registers.to_vec();
        for part in [received, queue, output, kept] {
            bytes.extend(length(part.len()));
            bytes.extend(part);
        }
        bytes.extend(length(unmatched));
        bytes.extend(length(breaks.len()));
        breaks.into_iter().for_each(|place| bytes.extend(length(place)));
        Ok(bytes)
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let Saved { registers, received, queue, output, kept, unmatched } = parse(state)?;
        self.change(|guest| {
            let input = guest.uart.restore(registers, received);
            guest.queue = input.into_iter().chain(queue).collect();
            guest.held.clear();
        });
        if self.input_waiting() == 0 {
            let _ = self.input_wanted.get().map(|wanted| wanted.write(1));
        }
        self.output.restore(output, &kept, unmatched);
        Ok(())
    }
}

/// A parsed state.
struct Saved {
    registers: [u8; 9],
    received: Vec<Received>,
    queue: Vec<Received>,
    output: Vec<u8>,
    kept: Vec<u8>,
    unmatched: usize,
}

fn parse(state: &[u8]) -> Result<Saved> {
    let mut reader = Reader::new("serial", state);
    let registers = reader.take::<9>()?;
    let (received, queue, output) = (part(&mut reader)?, part(&mut reader)?, part(&mut reader)?);
    // Files of earlier versions end here, or before the breaks.
    let (kept, unmatched) = match reader.is_empty() {
        true => (output.clone(), output.len()),
        false => (part(&mut reader)?, length(&mut reader)?),
    };
    let unmatched = unmatched.min(kept.len());
    let bytes = |part: Vec<u8>| part.into_iter().map(Received::Byte).collect::<Vec<_>>();
    let (mut received, mut queue) = (bytes(received), bytes(queue));
    let breaks = if reader.is_empty() { 0 } else { length(&mut reader)? };
    let (mut input, mut at) = (received.iter_mut().chain(&mut queue), 0);
    for _ in 0..breaks {
        let place = length(&mut reader)?;
        let found = place.checked_sub(at).and_then(|skipped| input.nth(skipped));
        *found.ok_or_else(|| bad("serial", "a break is outside the input"))? = Received::Break;
        at = place.saturating_add(1);
    }
    reader.end()?;
    Ok(Saved { registers, received, queue, output, kept, unmatched })
}

fn length(reader: &mut Reader<'_>) -> Result<usize> {
    Ok(usize::try_from(reader.u32()?).unwrap_or(usize::MAX))
}

fn part(reader: &mut Reader<'_>) -> Result<Vec<u8>> {
    let length = length(reader)?;
    reader.bytes(length).map(<[u8]>::to_vec)
}

//! The modem lines of a 16550A, and loop-back mode, which connects the outputs to the inputs.

use super::uart::Uart;
use super::uart_bits::{mcr, msr};

impl Uart {
    pub(super) fn loop_back(&mut self, byte: u8) {
        let is_fifo_on = self.is_fifo_on();
        self.receiver.push_or_overrun(byte, is_fifo_on);
    }

    /// The upper half of MSR. In loop-back mode it shows the outputs of MCR.
    pub(super) fn modem_lines(&self) -> u8 {
        if self.mcr & mcr::LOOP == 0 {
            return msr::READY;
        }
        let pairs = [
            (mcr::RTS, msr::CTS),
            (mcr::DTR, msr::DSR),
            (mcr::OUT1, msr::RING),
            (mcr::OUT2, msr::DCD),
        ];
        let is_set = |(output, _): &(u8, u8)| self.mcr & output != 0;
        pairs.into_iter().filter(is_set).fold(0, |lines, (_, line)| lines | line)
    }

    pub(super) fn set_modem_lines(&mut self, lines: u8) {
        let before = self.msr;
        let changed = (before ^ lines) & !msr::DELTAS;
        // Only the end of the ring indicator is reported.
        let reported = changed & !(msr::RING & lines);
        self.msr = lines | before & msr::DELTAS | reported >> 4;
        debug_assert_eq!(msr::RING >> 4, msr::RING_ENDED);
    }
}

#[cfg(test)]
mod tests {
    use super::super::uart::tests::with;
    use super::super::uart_bits::lsr;
    use super::*;

    #[test]
    fn loop_back_connects_outputs_to_inputs_and_nothing_to_the_line() {
        let mut uart = with(&[(2, 1), (4, mcr::LOOP | mcr::RTS | mcr::OUT2)]);
        assert_eq!(uart.read(6) & 0xf0, msr::CTS | msr::DCD);
        assert_eq!((uart.room(), uart.write(0, b'x'), uart.read(0)), (0, None, b'x'));
        for byte in 0..17 {
            uart.write(0, byte);
        }
        assert_eq!(uart.read(5) & lsr::OVERRUN, lsr::OVERRUN);
        assert_eq!(uart.read(5) & lsr::OVERRUN, 0, "reading clears it");
        assert!((0..16).all(|byte| uart.read(0) == byte));
        uart.write(4, mcr::LOOP | mcr::OUT1);
        uart.read(6);
        uart.write(4, mcr::LOOP);
        assert_eq!(uart.read(6), msr::RING_ENDED);
        uart.write(4, 0);
        assert_eq!((uart.read(6) & 0xf0, uart.room()), (msr::READY, 16));
    }
}

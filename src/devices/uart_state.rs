//! The saved state of a 16550A.

use super::uart::Uart;
use super::uart_bits::{fcr, ier, mcr};
use super::uart_receiver::{Received, Receiver};

/// See [`Uart::registers`].
const THR_PENDING: u8 = 1 << 1;
/// OUT2 connects the interrupt line. In states of earlier versions, the line is always connected.
const OUT2_CONNECTS: u8 = 1 << 2;
/// LSR has shown the error of the character at the top of the receiver.
const TOP_TOLD: u8 = 1 << 3;

impl Uart {
    /// Nine bytes for a snapshot. FCR cannot be read, so its place has room for three flags.
    pub(super) fn registers(&self) -> [u8; 9] {
        let flag = |is_set, bit| if is_set { bit } else { 0 };
        let flags = flag(self.is_thr_pending, THR_PENDING)
            | flag(self.receiver.is_top_told(), TOP_TOLD)
            | OUT2_CONNECTS;
        let [low, high] = self.divisor;
        let (control, status) = (self.fcr | flags, self.line_status());
        [low, high, self.ier, control, self.lcr, status, self.mcr, self.msr, self.scratch]
    }

    /// The characters the receiver holds.
    pub(super) fn received(&self) -> impl Iterator<Item = Received> {
        self.receiver.iter()
    }

    /// Restore a saved state. A pending interrupt is raised again, because it may not have arrived.
    /// Returns the characters that the receiver has no room for.
    pub(super) fn restore(
        &mut self,
        registers: [u8; 9],
        mut received: Vec<Received>,
    ) -> Vec<Received> {
        let [low, high, ier, control, lcr, status, mcr, msr, scratch] = registers;
        let out2 = if control & OUT2_CONNECTS == 0 { mcr::OUT2 } else { 0 };
        *self = Self {
            divisor: [low, high],
            ier: ier & ier::ALL,
            fcr: control & fcr::KEPT,
            lcr,
            mcr: mcr & mcr::ALL | out2,
            msr,
            scratch,
            is_thr_pending: control & THR_PENDING != 0,
            ..Self::default()
        };
        let rest = received.split_off(received.len().min(self.capacity()));
        self.receiver = Receiver::restored(status, control & TOP_TOLD != 0, received);
        self.update(false);
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::super::uart::tests::{fill, with};
    use super::super::uart_bits::iir;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_saved_comes_back(writes in prop::collection::vec((0u64..9, any::<u8>()), 0..40),
                                    input in prop::collection::vec(any::<u8>(), 0..20),
                                    breaks in any::<bool>(), reads in 0usize..5) {
            let mut uart = with(&writes);
            if breaks && uart.room() > 0 {
                uart.receive([Received::Break]);
            }
            fill(&mut uart, &input);
            for register in [0, 5].repeat(reads) {
                uart.read(register);
            }
            let mut other = Uart::default();
            let rest = other.restore(uart.registers(), uart.received().collect());
            prop_assert!(rest.is_empty());
            let is_pending = uart.cause() != iir::NONE && uart.mcr & mcr::OUT2 != 0;
            prop_assert_eq!(other.take_edge(), is_pending);
            (uart.has_risen, uart.is_cleared) = (false, false);
            prop_assert_eq!(other, uart);
        }
    }
    #[test]
    fn the_line_of_an_earlier_version_stays_connected() {
        let mut uart = Uart::default();
        uart.restore([1, 0, 2, 2, 3, 0x60, 0, 0xb0, 0], Vec::new());
        assert!(uart.take_edge());
        assert_eq!(uart.read(4), mcr::OUT2);
        let mut registers = uart.registers();
        registers[6] = 0;
        uart.restore(registers, Vec::new());
        assert!(!uart.take_edge());
    }
}

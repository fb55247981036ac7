//! The saved state of a 16550A.

use std::collections::VecDeque;

use super::uart::Uart;
use super::uart_bits::{fcr, ier, lsr, mcr};

/// See [`Uart::registers`].
const THR_PENDING: u8 = 1 << 1;

impl Uart {
    /// Nine bytes for a snapshot. FCR cannot be read, so its place has room for the pending
    /// interrupt of the transmitter.
    pub(super) fn registers(&self) -> [u8; 9] {
        let thr = if self.is_thr_pending { THR_PENDING } else { 0 };
        let [low, high] = self.divisor;
        let (control, status) = (self.fcr | thr, self.line_status());
        [low, high, self.ier, control, self.lcr, status, self.mcr, self.msr, self.scratch]
    }

    /// The bytes the receiver holds.
    pub(super) fn received(&self) -> impl Iterator<Item = u8> {
        self.received.iter().copied()
    }

    /// Restore a saved state. A pending interrupt is raised again, because it may not have arrived.
    /// Returns the bytes that the receiver has no room for.
    pub(super) fn restore(&mut self, registers: [u8; 9], received: Vec<u8>) -> VecDeque<u8> {
        let [low, high, ier, control, lcr, status, mcr, msr, scratch] = registers;
        let mut received = VecDeque::from(received);
        *self = Self {
            divisor: [low, high],
            ier: ier & ier::ALL,
            fcr: control & fcr::KEPT,
            lcr,
            mcr: mcr & mcr::ALL,
            msr,
            scratch,
            errors: status & lsr::ERRORS,
            is_thr_pending: control & THR_PENDING != 0,
            ..Self::default()
        };
        let rest = received.split_off(received.len().min(self.capacity()));
        self.received = received;
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
                                    input in prop::collection::vec(any::<u8>(), 0..20)) {
            let mut uart = with(&writes);
            fill(&mut uart, &input);
            let mut other = Uart::default();
            let rest = other.restore(uart.registers(), uart.received().collect());
            prop_assert!(rest.is_empty());
            prop_assert_eq!(other.take_edge(), uart.cause() != iir::NONE);
            (uart.has_risen, uart.is_cleared) = (false, false);
            prop_assert_eq!(other, uart);
        }
    }
}

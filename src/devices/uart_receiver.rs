//! The receiver of a 16550A: the FIFO, and the errors of its characters. There are no locks here.

use std::collections::VecDeque;

use super::uart_bits::lsr;

/// The size of the receiver with its FIFO enabled. Disabled, it holds one byte.
pub(super) const FIFO_SIZE: usize = 16;

/// What arrives on the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    Byte(u8),
    /// The line was low for longer than a character. The receiver loads one zero.
    Break,
}

impl Received {
    pub(super) fn byte(self) -> u8 {
        match self {
            Self::Byte(byte) => byte,
            Self::Break => 0,
        }
    }
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Receiver {
    fifo: VecDeque<Received>,
    /// The error bits of LSR.
    errors: u8,
    /// Whether LSR has shown the error of the character at the top.
    is_top_told: bool,
}

impl Receiver {
    pub(super) fn len(&self) -> usize {
        self.fifo.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Received> {
        self.fifo.iter().copied()
    }

    pub(super) fn extend(&mut self, received: impl IntoIterator<Item = Received>) {
        self.fifo.extend(received);
        self.tell_top();
    }

    /// Receive a byte in loop-back mode, in which nothing waits for room.
    pub(super) fn push_or_overrun(&mut self, byte: u8, is_fifo_on: bool) {
        if self.len() >= if is_fifo_on { FIFO_SIZE } else { 1 } {
            self.errors |= lsr::OVERRUN;
            if is_fifo_on {
                return; // the FIFO keeps what it has, and this byte is lost
            }
            self.fifo.clear();
        }
        self.extend([Received::Byte(byte)]);
    }

    /// Take the character at the top; 0 if there is none.
    pub(super) fn take(&mut self) -> u8 {
        let top = self.fifo.pop_front();
        self.is_top_told = false;
        self.tell_top();
        top.map_or(0, Received::byte)
    }

    /// Empty it. An overrun belongs to no character.
    pub(super) fn clear(&mut self) {
        self.fifo.clear();
        self.errors &= lsr::OVERRUN;
        self.is_top_told = false;
    }

    /// The bits of LSR that are the receiver's.
    pub(super) fn status(&self, is_fifo_on: bool) -> u8 {
        let ready = if self.fifo.is_empty() { 0 } else { lsr::DATA_READY };
        let flawed = if is_fifo_on && self.has_flaw() { lsr::FIFO_ERROR } else { 0 };
        self.errors | ready | flawed
    }

    pub(super) fn has_error(&self) -> bool {
        self.errors != 0
    }

    /// The guest has read LSR. Returns whether there were errors.
    pub(super) fn clear_errors(&mut self) -> bool {
        std::mem::take(&mut self.errors) != 0
    }

    /// Whether LSR shows an error of a character, or will show one.
    fn has_flaw(&self) -> bool {
        let rest = self.fifo.iter().skip(usize::from(self.is_top_told));
        self.errors & lsr::BREAK != 0 || rest.into_iter().any(|one| *one == Received::Break)
    }

    /// LSR shows the error of a character once it is at the top.
    fn tell_top(&mut self) {
        if !self.is_top_told && self.fifo.front() == Some(&Received::Break) {
            self.errors |= lsr::BREAK;
            self.is_top_told = true;
        }
    }

    /// A saved state: the error bits of `status`, and the characters, of which the first one may
    /// have been told.
    pub(super) fn restored(
        status: u8,
        is_top_told: bool,
        received: impl IntoIterator<Item = Received>,
    ) -> Self {
        let fifo: VecDeque<Received> = received.into_iter().collect();
        let is_top_told = is_top_told && fifo.front() == Some(&Received::Break);
        let mut restored = Self { fifo, errors: status & lsr::ERRORS, is_top_told };
        restored.tell_top();
        restored
    }

    pub(super) fn is_top_told(&self) -> bool {
        self.is_top_told
    }
}

#[cfg(test)]
mod tests {
    use super::super::uart::tests::with;
    use super::super::uart_bits::iir;
    use super::*;

    #[test]
    fn a_break_is_a_zero_whose_error_is_told_when_it_is_at_the_top() {
        let mut uart = with(&[(2, 1), (1, 5)]);
        uart.receive([Received::Byte(b'a'), Received::Break, Received::Byte(b'b')]);
        assert_eq!(uart.read(5), lsr::IDLE | lsr::DATA_READY | lsr::FIFO_ERROR);
        assert_eq!((uart.read(0), uart.read(2) & 0xf), (b'a', iir::LINE_STATUS));
        let shown = lsr::IDLE | lsr::DATA_READY | lsr::BREAK | lsr::FIFO_ERROR;
        assert_eq!((uart.read(5), uart.read(5)), (shown, lsr::IDLE | lsr::DATA_READY));
        assert_eq!((uart.read(0), uart.read(5) & lsr::BREAK, uart.read(0)), (0, 0, b'b'));
    }

    #[test]
    fn without_the_fifo_a_break_has_no_second_bit() {
        let mut uart = with(&[]);
        uart.receive([Received::Break]);
        assert_eq!(uart.read(5), lsr::IDLE | lsr::DATA_READY | lsr::BREAK);
    }

    #[test]
    fn a_cleared_receiver_forgets_all_but_an_overrun() {
        let mut receiver = Receiver::default();
        receiver.push_or_overrun(1, false);
        receiver.push_or_overrun(2, false);
        receiver.extend([Received::Break]);
        assert_eq!((receiver.take(), receiver.status(true) & lsr::BREAK), (2, lsr::BREAK));
        receiver.clear();
        assert_eq!((receiver.status(true), receiver.take()), (lsr::OVERRUN, 0));
    }
}

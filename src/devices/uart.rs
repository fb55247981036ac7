//! The registers of a 16550A, its receiver, and its interrupt line. Transmission takes no time, and
//! input waits for room, so only loop-back mode overruns the receiver. The receiver is in
//! `uart_receiver.rs`, the modem lines are in `uart_modem.rs`, and the saved state is in
//! `uart_state.rs`. There are no locks and no I/O here; [`super::Serial`] has both.

use super::uart_bits::{LCR_DIVISOR, fcr, ier, iir, lsr, mcr, msr};
use super::uart_receiver::{FIFO_SIZE, Received, Receiver};

/// The receiver's trigger levels, by the two top bits of FCR.
const TRIGGERS: [usize; 4] = [1, 4, 8, 14];

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Uart {
    pub(super) divisor: [u8; 2],
    pub(super) ier: u8,
    pub(super) fcr: u8,
    pub(super) lcr: u8,
    pub(super) mcr: u8,
    pub(super) msr: u8,
    pub(super) scratch: u8,
    pub(super) receiver: Receiver,
    /// Whether the holding register has become empty and the guest has not yet seen it in IIR.
    pub(super) is_thr_pending: bool,
    /// Whether the receiver has just been cleared. No input arrives until the guest's next access,
    /// so that the guest finds the receiver empty.
    pub(super) is_cleared: bool,
    pub(super) is_line_high: bool,
    pub(super) has_risen: bool,
}

impl Default for Uart {
    /// The state after the firmware: 9600 baud, and the interrupt line connected.
    fn default() -> Self {
        Self {
            divisor: [12, 0],
            ier: 0,
            fcr: 0,
            lcr: 3,
            mcr: mcr::OUT2,
            msr: msr::READY,
            scratch: 0,
            receiver: Receiver::default(),
            is_thr_pending: false,
            is_cleared: false,
            is_line_high: false,
            has_risen: false,
        }
    }
}

impl Uart {
    /// Return the value that the guest reads from one of the eight registers.
    pub(super) fn read(&mut self, register: u64) -> u8 {
        self.is_cleared = false;
        match (register, self.lcr & LCR_DIVISOR != 0) {
            (0, true) => self.divisor[0],
            (1, true) => self.divisor[1],
            (0, false) => {
                let byte = self.receiver.take();
                // With more to read, the line falls and rises again. An edge-triggered controller
                // then interrupts for each byte, as a handler that reads only one byte needs.
                self.update(true);
                byte
            }
            (1, false) => self.ier,
            (2, _) => self.read_identification(),
            (3, _) => self.lcr,
            (4, _) => self.mcr,
            (5, _) => {
                let value = self.line_status();
                let had_errors = self.receiver.clear_errors();
                self.update(had_errors);
                value
            }
            (6, _) => {
                let value = self.msr;
                self.msr &= !msr::DELTAS;
                self.update(value & msr::DELTAS != 0);
                value
            }
            (7, _) => self.scratch,
            _ => 0xff,
        }
    }

    /// Handle a write to a register. Returns the transmitted byte, if there is one.
    pub(super) fn write(&mut self, register: u64, value: u8) -> Option<u8> {
        self.is_cleared = false;
        match (register, self.lcr & LCR_DIVISOR != 0) {
            (0, true) => self.divisor[0] = value,
            (1, true) => self.divisor[1] = value,
            (0, false) => return self.transmit(value),
            (1, false) => {
                let changed = (self.ier ^ value) & ier::THR_EMPTY != 0;
                self.ier = value & ier::ALL;
                if changed {
                    self.is_thr_pending = value & ier::THR_EMPTY != 0;
                }
                self.update(false);
            }
            (2, _) => self.control_fifo(value),
            (3, _) => self.lcr = value,
            (4, _) => {
                self.mcr = value & mcr::ALL;
                self.set_modem_lines(self.modem_lines());
                self.update(false);
            }
            (7, _) => self.scratch = value,
            _ => {}
        }
        None
    }

    /// The number of bytes that the receiver accepts from the line now. In loop-back mode it is
    /// disconnected from the line.
    pub(super) fn room(&self) -> usize {
        if self.is_cleared || self.mcr & mcr::LOOP != 0 {
            return 0;
        }
        self.capacity().saturating_sub(self.receiver.len())
    }

    /// Receive characters, no more than there is room for.
    pub(super) fn receive(&mut self, received: impl IntoIterator<Item = Received>) {
        self.receiver.extend(received);
        // Arriving bytes end the receiver's timeout before it restarts.
        self.update(self.ier & ier::RECEIVED != 0);
    }

    /// Bytes that the guest has not read.
    pub(super) fn waiting(&self) -> usize {
        self.receiver.len()
    }

    /// Whether the interrupt line has risen since the last call.
    pub(super) fn take_edge(&mut self) -> bool {
        std::mem::take(&mut self.has_risen)
    }

    pub(super) fn is_fifo_on(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }

    pub(super) fn capacity(&self) -> usize {
        if self.is_fifo_on() { FIFO_SIZE } else { 1 }
    }

    fn trigger(&self) -> usize {
        match TRIGGERS.get(usize::from(self.fcr >> 6)) {
            Some(level) if self.is_fifo_on() => *level,
            _ => 1,
        }
    }

    pub(super) fn line_status(&self) -> u8 {
        lsr::IDLE | self.receiver.status(self.is_fifo_on())
    }

    /// The most urgent of the interrupts that are enabled and pending.
    pub(super) fn cause(&self) -> u8 {
        let is_enabled = |bit| self.ier & bit != 0;
        if is_enabled(ier::LINE_STATUS) && self.receiver.has_error() {
            return iir::LINE_STATUS;
        }
        if is_enabled(ier::RECEIVED) && self.receiver.len() > 0 {
            // No more bytes are on the way, so bytes below the trigger level have timed out.
            return if self.receiver.len() >= self.trigger() {
                iir::RECEIVED
            } else {
                iir::TIMEOUT
            };
        }
        if is_enabled(ier::THR_EMPTY) && self.is_thr_pending {
            return iir::THR_EMPTY;
        }
        if is_enabled(ier::MODEM_STATUS) && self.msr & msr::DELTAS != 0 {
            return iir::MODEM_STATUS;
        }
        iir::NONE
    }

    /// Update the line, which OUT2 connects to the interrupt controller. After the guest has
    /// `served` a cause, the line is briefly low, whatever else is pending.
    pub(super) fn update(&mut self, served: bool) {
        let is_high = self.cause() != iir::NONE && self.mcr & mcr::OUT2 != 0;
        self.has_risen |= is_high && (served || !self.is_line_high);
        self.is_line_high = is_high;
    }

    fn read_identification(&mut self) -> u8 {
        let cause = self.cause();
        if cause == iir::THR_EMPTY {
            self.is_thr_pending = false;
            self.update(true);
        }
        cause | if self.is_fifo_on() { iir::FIFO_ON } else { 0 }
    }

    fn transmit(&mut self, byte: u8) -> Option<u8> {
        self.is_thr_pending = true;
        let sent = if self.mcr & mcr::LOOP == 0 {
            Some(byte)
        } else {
            self.loop_back(byte);
            None
        };
        self.update(true);
        sent
    }

    fn control_fifo(&mut self, value: u8) {
        // Without the enable bit, the others are not programmed.
        let mut value = if value & fcr::ENABLE == 0 { 0 } else { value };
        if (value ^ self.fcr) & fcr::ENABLE != 0 {
            value |= fcr::CLEAR_RECEIVER | fcr::CLEAR_TRANSMITTER;
        }
        if value & fcr::CLEAR_RECEIVER != 0 {
            self.receiver.clear();
            // A driver that waits for interrupts may make no access before one arrives.
            self.is_cleared = self.ier & ier::RECEIVED == 0;
        }
        if value & fcr::CLEAR_TRANSMITTER != 0 {
            self.is_thr_pending = true;
        }
        self.fcr = value & fcr::KEPT;
        self.update(false);
    }
}

#[cfg(test)]
pub(super) mod tests {
    //! Covers src/devices/uart_bits.rs.

    use super::*;
    use proptest::prelude::*;

    /// A UART after these writes.
    pub(in crate::devices) fn with(writes: &[(u64, u8)]) -> Uart {
        let mut uart = Uart::default();
        for (register, value) in writes {
            uart.write(*register, *value);
        }
        uart.take_edge();
        uart
    }

    pub(in crate::devices) fn fill(uart: &mut Uart, bytes: &[u8]) -> usize {
        let count = uart.room().min(bytes.len());
        uart.receive(bytes[..count].iter().copied().map(Received::Byte));
        count
    }

    #[test]
    fn a_handler_that_reads_one_byte_an_interrupt_gets_all() {
        for fcr in [0, 1, 0xc1] {
            let mut uart = with(&[(2, fcr), (1, 1)]);
            let sent: Vec<u8> = (0..100).collect();
            let (mut at, mut received) = (fill(&mut uart, &sent), Vec::new());
            while uart.take_edge() {
                assert_eq!(uart.read(2) & 1, 0, "an interrupt is pending");
                received.push(uart.read(0));
                at += fill(&mut uart, &sent[at..]);
            }
            assert_eq!(received, sent, "FCR {fcr:#x}");
            assert_eq!(uart.read(2) & 0xf, iir::NONE);
        }
    }

    #[test]
    fn the_fifo_holds_sixteen_and_without_it_one() {
        assert_eq!(fill(&mut with(&[(2, 1), (1, 0)]), &[0; 99]), 16);
        assert_eq!(fill(&mut with(&[]), &[0; 99]), 1);
    }

    #[test]
    fn the_identification_tells_trigger_level_and_fifo() {
        let mut uart = with(&[(2, 0x81), (1, 1)]);
        fill(&mut uart, &[0; 7]);
        assert_eq!(uart.read(2), 0xc0 | iir::TIMEOUT);
        fill(&mut uart, &[0]);
        assert_eq!(uart.read(2), 0xc0 | iir::RECEIVED);
        uart.write(2, 0);
        assert_eq!(uart.read(2), iir::NONE, "FIFOs off, and emptied by that");
    }

    #[test]
    fn a_cleared_receiver_is_found_empty_although_more_waits() {
        let mut uart = with(&[(2, 1), (1, 0)]);
        assert_eq!(fill(&mut uart, &[1; 16]), 16);
        uart.write(2, 7);
        assert_eq!((uart.room(), uart.read(5) & 1), (0, 0));
        assert_eq!(uart.room(), 16, "from the next access on");
        // With the interrupt enabled there may be no access before it arrives.
        uart.write(1, 1);
        uart.write(2, 7);
        assert_eq!(uart.room(), 16);
    }

    #[test]
    fn the_empty_transmitter_interrupts_when_enabled_and_after_each_byte() {
        let mut uart = with(&[]);
        uart.write(1, 2);
        assert!(uart.take_edge());
        assert_eq!((uart.read(2), uart.read(2)), (iir::THR_EMPTY, iir::NONE));
        assert_eq!(uart.write(0, b'x'), Some(b'x'));
        assert!(uart.take_edge());
        assert_eq!(uart.read(2), iir::THR_EMPTY);
        uart.write(1, 0);
        uart.write(1, 2);
        assert_eq!(uart.read(2), iir::THR_EMPTY, "enabled again");
    }

    #[test]
    fn the_most_urgent_cause_comes_first_and_the_next_has_its_own_edge() {
        let mut uart = with(&[(4, mcr::LOOP | mcr::OUT2), (6, 0), (1, 0xf)]);
        uart.write(0, 1);
        uart.write(0, 2); // an overrun: one byte is held without the FIFO
        let mut causes = Vec::new();
        while uart.take_edge() {
            let cause = uart.read(2);
            causes.push(cause);
            match cause {
                iir::LINE_STATUS => assert_eq!(uart.read(5) & lsr::OVERRUN, lsr::OVERRUN),
                iir::RECEIVED => assert_eq!(uart.read(0), 2),
                iir::MODEM_STATUS => assert_ne!(uart.read(6) & msr::DELTAS, 0),
                _ => {}
            }
        }
        let all = [iir::LINE_STATUS, iir::RECEIVED, iir::THR_EMPTY, iir::MODEM_STATUS];
        assert_eq!(causes, all);
    }

    #[test]
    fn input_that_came_while_interrupts_were_off_is_told_when_they_are_on() {
        let mut uart = with(&[]);
        fill(&mut uart, b"x");
        assert!(!uart.take_edge());
        uart.write(1, 1);
        assert!(uart.take_edge());
    }

    #[test]
    fn out2_connects_the_line() {
        let mut uart = with(&[(4, 0), (1, 2)]);
        assert_eq!((uart.take_edge(), uart.cause()), (false, iir::THR_EMPTY));
        uart.write(4, mcr::OUT2);
        assert!(uart.take_edge(), "what was pending is told");
        uart.write(4, 0);
        assert!(!uart.is_line_high);
    }

    #[test]
    fn without_the_enable_bit_nothing_else_of_fcr_is_programmed() {
        let mut uart = with(&[]);
        fill(&mut uart, b"x");
        uart.write(2, 0xc2);
        assert_eq!((uart.waiting(), uart.fcr), (1, 0));
        uart.write(2, 1);
        assert_eq!(uart.waiting(), 0, "switching the FIFOs empties them");
    }

    #[test]
    fn the_divisor_latch_hides_two_registers() {
        let mut uart = with(&[(1, 5), (3, 0x83), (0, 0x34), (1, 0x12)]);
        assert_eq!((uart.read(0), uart.read(1)), (0x34, 0x12));
        uart.write(3, 3);
        assert_eq!((uart.read(1), uart.read(0)), (5, 0));
    }

    proptest! {
        #[test]
        fn nothing_is_pending_without_an_edge_that_told_of_it(
            accesses in prop::collection::vec((any::<bool>(), 0u64..9, any::<u8>()), 0..60)
        ) {
            let mut uart = Uart::default();
            let mut is_told = false;
            for (is_write, register, value) in accesses {
                if is_write { uart.write(register, value); } else { uart.read(register); }
                fill(&mut uart, &[value]);
                let is_pending = uart.cause() != iir::NONE && uart.mcr & mcr::OUT2 != 0;
                is_told = (is_told || uart.take_edge()) && is_pending;
                prop_assert_eq!(is_told, is_pending);
                prop_assert_eq!(uart.is_line_high, is_pending);
            }
        }
    }
}

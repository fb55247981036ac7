//! The bits of a 16550A's registers.

pub(super) mod ier {
    pub(in super::super) const RECEIVED: u8 = 1;
    pub(in super::super) const THR_EMPTY: u8 = 1 << 1;
    pub(in super::super) const LINE_STATUS: u8 = 1 << 2;
    pub(in super::super) const MODEM_STATUS: u8 = 1 << 3;
    pub(in super::super) const ALL: u8 = 0xf;
}

/// The causes of interrupts, the most urgent first.
pub(super) mod iir {
    pub(in super::super) const LINE_STATUS: u8 = 6;
    pub(in super::super) const RECEIVED: u8 = 4;
    pub(in super::super) const TIMEOUT: u8 = 0xc;
    pub(in super::super) const THR_EMPTY: u8 = 2;
    pub(in super::super) const MODEM_STATUS: u8 = 0;
    pub(in super::super) const NONE: u8 = 1;
    pub(in super::super) const FIFO_ON: u8 = 0xc0;
}

pub(super) mod fcr {
    pub(in super::super) const ENABLE: u8 = 1;
    pub(in super::super) const CLEAR_RECEIVER: u8 = 1 << 1;
    pub(in super::super) const CLEAR_TRANSMITTER: u8 = 1 << 2;
    /// The bits that are kept: the enable bit and the trigger level.
    pub(in super::super) const KEPT: u8 = 0xc1;
}

pub(super) const LCR_DIVISOR: u8 = 1 << 7;

pub(super) mod mcr {
    pub(in super::super) const DTR: u8 = 1;
    pub(in super::super) const RTS: u8 = 1 << 1;
    pub(in super::super) const OUT1: u8 = 1 << 2;
    pub(in super::super) const OUT2: u8 = 1 << 3;
    pub(in super::super) const LOOP: u8 = 1 << 4;
    pub(in super::super) const ALL: u8 = 0x1f;
}

pub(super) mod lsr {
    pub(in super::super) const DATA_READY: u8 = 1;
    pub(in super::super) const OVERRUN: u8 = 1 << 1;
    pub(in super::super) const BREAK: u8 = 1 << 4;
    /// With the FIFO on: a character in the receiver has an error.
    pub(in super::super) const FIFO_ERROR: u8 = 1 << 7;
    /// Overrun, parity, framing, break: a read of the register clears them.
    pub(in super::super) const ERRORS: u8 = 0x1e;
    /// The holding register and the shift register are empty.
    pub(in super::super) const IDLE: u8 = 0x60;
}

pub(super) mod msr {
    pub(in super::super) const DELTAS: u8 = 0xf;
    pub(in super::super) const RING_ENDED: u8 = 1 << 2;
    pub(in super::super) const CTS: u8 = 1 << 4;
    pub(in super::super) const DSR: u8 = 1 << 5;
    pub(in super::super) const RING: u8 = 1 << 6;
    pub(in super::super) const DCD: u8 = 1 << 7;
    /// A modem that is connected and ready.
    pub(in super::super) const READY: u8 = CTS | DSR | DCD;
}

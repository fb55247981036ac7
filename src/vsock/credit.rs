//! The credit of a connection (virtio 1.2, 5.10.6.3): each side sends no more than fits into the
//! other's buffer. All counts are modulo 2^32. Pure data.

use super::packet::Header;

/// The size of a connection's buffer for data that the host has not taken yet.
pub const BUFFER: u32 = 256 << 10;

/// What the guest may send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Incoming {
    /// Bytes that came.
    received: u32,
    /// Bytes that the host has taken.
    forwarded: u32,
    /// The count of forwarded bytes in the last packet to the guest.
    told: u32,
}

impl Incoming {
    /// How much the guest may send, by what it knows.
    pub(super) fn room(self) -> u32 {
        BUFFER - self.received.wrapping_sub(self.told)
    }

    /// Bytes came. Returns whether the guest was allowed to send them.
    #[must_use]
    pub(super) fn receive(&mut self, count: u32) -> bool {
        let is_allowed = count <= self.room();
        if is_allowed {
            self.received = self.received.wrapping_add(count);
        }
        is_allowed
    }

    /// The host has taken some of the received bytes.
    pub(super) fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
    }

    /// The count of forwarded bytes, for a packet that the guest is given now.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.told
    }

    /// Whether the guest should be told: it believes that less than half of the buffer is free, and
    /// more is.
    pub(super) fn is_update_due(self) -> bool {
        self.forwarded != self.told && self.room() < BUFFER / 2
    }
}

/// What the guest takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outgoing {
    sent: u32,
    forwarded: u32,
    buffer: u32,
}

impl Outgoing {
    /// A packet of the guest came. A count of forwarded bytes that is older than the known one, or
    /// more than was sent, is ignored: packets of several threads of a driver may pass each other.
    pub(super) fn update(&mut self, header: &Header) {
        self.buffer = header.buf_alloc;
        if self.sent.wrapping_sub(header.fwd_cnt) <= self.in_flight() {
            self.forwarded = header.fwd_cnt;
        }
    }

    fn in_flight(self) -> u32 {
        self.sent.wrapping_sub(self.forwarded)
    }

    /// How much the guest takes now. It may have made its buffer smaller than what it has to take.
    pub(super) fn room(self) -> u32 {
        self.buffer.saturating_sub(self.in_flight())
    }

    /// Bytes are on their way: at most [`Self::room`].
    pub(super) fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header { buf_alloc, fwd_cnt, ..Header::default() }
    }

    #[test]
    fn the_guest_may_fill_the_buffer_and_no_more() {
        let mut credit = Incoming::default();
        assert!(credit.receive(BUFFER));
        assert!(!credit.receive(1));
        credit.forward(10);
        assert!(!credit.receive(1), "it was not told yet");
        assert!(credit.is_update_due());
        assert_eq!(credit.tell(), 10);
        assert!(!credit.is_update_due());
        assert!(!credit.receive(11));
        assert!(credit.receive(10));
    }

    #[test]
    fn a_count_from_the_past_or_of_bytes_that_were_not_sent_is_ignored() {
        let mut credit = Outgoing::default();
        credit.update(&header(100, 0));
        credit.send(60);
        credit.update(&header(100, 40));
        assert_eq!(credit.room(), 80);
        credit.update(&header(100, 30));
        assert_eq!(credit.room(), 80);
        credit.update(&header(100, 61));
        assert_eq!(credit.room(), 80);
        credit.update(&header(10, 40));
        assert_eq!(credit.room(), 0, "the buffer is smaller than what is in it");
    }

    proptest! {
        /// Both sides of a direction, with every order of sending, taking and telling.
        #[test]
        fn no_more_is_in_flight_than_fits_also_where_counts_wrap(
            start in any::<u32>(),
            steps in prop::collection::vec((0u8..3, 0u32..BUFFER), 1..200),
        ) {
            let mut incoming = Incoming { received: start, forwarded: start, told: start };
            let mut outgoing = Outgoing { sent: start, forwarded: start, buffer: BUFFER };
            let mut held = 0u32;
            for (step, count) in steps {
                match step {
                    0 => {
                        let count = count.min(outgoing.room());
                        outgoing.send(count);
                        prop_assert!(incoming.receive(count));
                        held += count;
                        prop_assert!(held <= BUFFER);
                    }
                    1 => {
                        let count = count.min(held);
                        incoming.forward(count);
                        held -= count;
                    }
                    _ => {
                        let told = incoming.tell();
                        outgoing.update(&header(BUFFER, told));
                        prop_assert_eq!(outgoing.room(), BUFFER - held);
                    }
                }
                prop_assert_eq!(outgoing.room(), incoming.room());
            }
        }

        #[test]
        fn nothing_that_a_guest_says_gives_more_room_than_its_buffer(
            steps in prop::collection::vec((any::<u32>(), any::<u32>(), any::<u32>()), 1..100),
        ) {
            let mut credit = Outgoing::default();
            for (buffer, forwarded, count) in steps {
                credit.update(&header(buffer, forwarded));
                prop_assert!(credit.room() <= buffer);
                credit.send(count.min(credit.room()));
            }
        }
    }
}

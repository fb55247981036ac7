//! A serial port: a 16550A with a queue on each side.
//! The guest's side runs on vCPU threads; the host's side on the loop's thread or any other.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backlog::{Backlog, Chunk, Printed};
use super::history::{History, News};
use super::line::{LineEnd, SharedLine};
use super::serial_kind::SerialKind;
use super::uart::Uart;
use super::uart_receiver::Received;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::Outcome;
use crate::sync::{Mutex, rank};

/// A serial port.
#[derive(Debug)]
pub struct Serial {
    pub(super) kind: SerialKind,
    pub(super) guest: Mutex<GuestSide, rank::SerialGuest>,
    pub(super) output: Backlog,
    /// Created on first use.
    pub(super) input_wanted: OnceLock<Arc<EventFd>>,
}

/// The state that the guest's accesses change.
#[derive(Debug, Default)]
pub(super) struct GuestSide {
    pub(super) uart: Uart,
    irq: LineEnd,
    /// Input that the UART has no room for yet.
    pub(super) queue: VecDeque<Received>,
    /// How many have quiesced the port.
    pub(super) quiesced: usize,
    /// Input that came meanwhile.
    pub(super) held: VecDeque<Received>,
}

impl GuestSide {
    fn waiting(&self) -> usize {
        self.held.len() + self.queue.len() + self.uart.waiting()
    }
}

impl Serial {
    /// A port with an interrupt line, if there is one. `has_consumer`: whether a consumer takes the
    /// output.
    ///
    /// # Errors
    /// If no file descriptor can be created.
    pub(crate) fn new(
        kind: SerialKind,
        irq: Option<Arc<SharedLine>>,
        has_consumer: bool,
    ) -> Result<Self> {
        Ok(Self {
            kind,
            guest: Mutex::new(GuestSide { irq: LineEnd::new(irq), ..GuestSide::default() }),
            output: Backlog::new(has_consumer)?,
            input_wanted: OnceLock::new(),
        })
    }

    /// Readable when the guest has read all its input, and at the start.
    ///
    /// # Errors
    /// If no eventfd can be created.
    pub fn input_wanted(&self) -> Result<&Arc<EventFd>> {
        if let Some(wanted) = self.input_wanted.get() {
            return Ok(wanted);
        }
        let failed = |e: io::Error| Error::os(ErrorKind::Io, "serial", &e);
        let wanted = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        wanted.write(1).map_err(failed)?;
        Ok(self.input_wanted.get_or_init(|| Arc::new(wanted)))
    }

    /// Readable while there is output to take.
    ///
    /// # Errors
    /// If no file descriptor can be created.
    pub fn output_fd(&self) -> Result<RawFd> {
        self.output.fd()
    }

    /// Send input to the guest, of any size. The guest reads it at its own pace.
    pub fn feed(&self, bytes: &[u8]) {
        self.arrive(bytes.iter().copied().map(Received::Byte));
    }

    /// Send the guest a break, after the input so far.
    pub fn send_break(&self) {
        self.arrive([Received::Break]);
    }

    fn arrive(&self, input: impl IntoIterator<Item = Received>) {
        self.change(|guest| match guest.quiesced {
            0 => guest.queue.extend(input),
            _ => guest.held.extend(input),
        });
    }

    /// Bytes of input that the guest has not read yet.
    #[must_use]
    pub fn input_waiting(&self) -> usize {
        self.guest.lock().waiting()
    }

    /// Take all output.
    #[must_use]
    pub fn take_output(&self) -> Vec<u8> {
        let chunk = self.output.take(usize::MAX);
        self.output.finish_write(&chunk, chunk.bytes.len());
        chunk.bytes
    }

    /// Take at most `most` bytes of the output, to be reported to [`Self::finish_write`].
    pub fn take_chunk(&self, most: usize) -> Chunk {
        self.output.take(most)
    }

    /// The first `written` bytes of a chunk have been written; the others are put back.
    pub fn finish_write(&self, chunk: &Chunk, written: usize) {
        self.output.finish_write(chunk, written);
    }

    /// Notify the consumer again after this time.
    pub fn notify_after(&self, delay: Duration) {
        self.output.notify_after(delay);
    }

    /// The output cannot be written: the loop's iteration ends with this error, and further output
    /// is buffered as without a consumer.
    pub fn fail(&self, error: Error) {
        self.output.fail(self.kind.keyed(error));
    }

    /// The input cannot be read: the loop's iteration ends with this error.
    pub fn fail_input(&self, error: Error) {
        self.output.report(self.kind.keyed(error));
    }

    /// Takes the failure.
    #[must_use]
    pub fn take_failure(&self) -> Option<Error> {
        self.output.take_failure()
    }

    /// Bytes of output that a consumer has not written yet; 0 without one.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.output.waiting()
    }

    /// End the run once, at the byte that completes this text in the output from now on. An empty
    /// text never ends it.
    pub fn stop_at(&self, text: Vec<u8>) {
        self.output.stop_at(text);
    }

    /// End the run once one of these texts is in the output that nobody has matched. Returns
    /// whether one is there already; then nothing ends the run. No texts cancel the request.
    #[must_use]
    pub fn run_until(&self, texts: Vec<Vec<u8>>) -> bool {
        self.output.run_until(texts)
    }

    /// The position of the oldest output that is kept, the output from there on, and the position
    /// up to which it is matched.
    #[must_use]
    pub fn kept(&self) -> (News, u64) {
        self.output.history(|history| (history.since(0), history.matched()))
    }

    /// How many watches there are.
    #[must_use]
    pub fn watches(&self) -> usize {
        self.output.history(|history| history.watches())
    }

    /// Make every watch look at the output, and at the state of the machine.
    pub fn tell_watches(&self) {
        self.output.history(History::tell);
    }

    /// Take the text that ended a run.
    #[must_use]
    pub fn take_match(&self) -> Option<Vec<u8>> {
        self.output.take_match()
    }

    /// Change the guest's side, move input to the UART as far as it has room, and raise the
    /// resulting interrupts and notifications.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut GuestSide) -> T) -> T {
        let mut guest = self.guest.lock();
        let had_input = guest.waiting() > 0;
        let result = change(&mut guest);
        let GuestSide { uart, queue, .. } = &mut *guest;
        let room = uart.room().min(queue.len());
        if room > 0 {
            uart.receive(queue.drain(..room));
        }
        if had_input && guest.waiting() == 0 {
            let _ = self.input_wanted.get().map(|wanted| wanted.write(1));
        }
        let (is_high, has_risen) = (guest.uart.is_line_high, guest.uart.take_edge());
        guest.irq.drive(is_high, has_risen);
        result
    }

    pub(super) fn print(&self, sent: &[u8]) -> Outcome {
        // Without the lock of the guest's side, so that slow output does not block input.
        match self.output.print(sent) {
            Printed::Taken => Outcome::Continue,
            Printed::Full => Outcome::Wait,
            Printed::Found => Outcome::Stop,
        }
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/devices/serial_device.rs.

    use super::super::bus::Device;
    use super::super::line::tests::Levels;
    use super::*;

    fn port(irq: Option<&Levels>, has_consumer: bool) -> Serial {
        Serial::new(SerialKind::Uart("COM1"), irq.map(Levels::line), has_consumer).unwrap()
    }

    fn is_ready(serial: &Serial, milliseconds: i32) -> bool {
        let mut poll =
            libc::pollfd { fd: serial.output_fd().unwrap(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, milliseconds) > 0 }
    }

    fn read(serial: &Serial, register: u64) -> u8 {
        let mut data = [0];
        assert_eq!(serial.read(register, &mut data), Outcome::Continue);
        data[0]
    }

    #[test]
    fn what_the_guest_prints_can_be_taken() {
        let serial = port(None, true);
        serial.write_many(0, b"hello", 1);
        assert!(is_ready(&serial, 60_000));
        let chunk = serial.take_chunk(3);
        assert_eq!(chunk.bytes, b"hel");
        serial.finish_write(&chunk, 2);
        assert_eq!((serial.take_output().as_slice(), serial.backlog()), (&b"llo"[..], 0));
        assert!(!is_ready(&serial, 0));
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole() {
        let levels = Levels::default();
        let serial = port(Some(&levels), false);
        serial.input_wanted().unwrap().read().unwrap();
        serial.write(1, &[1]);
        let sent: Vec<u8> = (0..=255).collect();
        serial.feed(&sent);
        let received: Vec<u8> = (0..=255).map(|_| read(&serial, 0)).collect();
        assert_eq!(received, sent);
        assert_eq!(
            (serial.input_waiting(), serial.input_wanted().unwrap().read().unwrap()),
            (0, 1)
        );
        assert_eq!(levels.rises(), 256, "an interrupt for each byte");
    }

    #[test]
    fn input_that_a_driver_clears_away_is_read_by_it() {
        let serial = port(None, false);
        serial.input_wanted().unwrap().read().unwrap();
        serial.feed(b"x");
        serial.write(2, &[7]);
        assert_eq!((serial.input_waiting(), read(&serial, 5) & 1), (0, 0));
        assert_eq!(serial.input_wanted().unwrap().read().unwrap(), 1);
    }

    #[test]
    fn input_waits_while_the_port_is_quiesced() {
        let levels = Levels::default();
        let serial = port(Some(&levels), false);
        serial.write(1, &[1]);
        serial.feed(b"a");
        let before = levels.rises();
        serial.quiesce().unwrap();
        serial.quiesce().unwrap();
        serial.feed(b"bc");
        assert_eq!((read(&serial, 0), read(&serial, 5) & 1), (b'a', 0));
        assert_eq!((serial.input_waiting(), levels.rises()), (2, before));
        let other = port(None, false);
        other.restore(&serial.save().unwrap()).unwrap();
        assert_eq!((read(&other, 0), read(&other, 0)), (b'b', b'c'), "a snapshot has it");
        serial.resume();
        assert_eq!(read(&serial, 5) & 1, 0, "another still holds it");
        serial.resume();
        assert_eq!(levels.rises(), before + 1);
        assert_eq!((read(&serial, 0), read(&serial, 0)), (b'b', b'c'));
    }

    #[test]
    fn the_line_stays_high_until_the_guest_has_served_the_port() {
        let levels = Levels::default();
        let serial = port(Some(&levels), false);
        serial.write(1, &[1]);
        serial.feed(b"a");
        assert!(levels.is_high());
        assert_eq!((read(&serial, 0), levels.is_high()), (b'a', false));
    }

    #[test]
    fn a_debug_port_prints_and_says_that_it_is_there() {
        let debug = Serial::new(SerialKind::DebugPort, None, false).unwrap();
        debug.write_many(0, b"SeaBIOS", 1);
        assert_eq!((read(&debug, 0), debug.take_output()), (0xe9, b"SeaBIOS".to_vec()));
    }

    #[test]
    fn a_break_comes_in_its_turn_and_back_from_a_snapshot() {
        let serial = port(None, false);
        serial.feed(b"a");
        serial.send_break();
        serial.feed(b"b");
        let other = port(None, false);
        other.restore(&serial.save().unwrap()).unwrap();
        assert_eq!(other.save().unwrap(), serial.save().unwrap());
        for serial in [serial, other] {
            assert_eq!((read(&serial, 5) & 0x10, read(&serial, 0)), (0, b'a'));
            assert_eq!((read(&serial, 5) & 0x10, read(&serial, 0)), (0x10, 0));
            assert_eq!((read(&serial, 5) & 0x10, read(&serial, 0)), (0, b'b'));
        }
    }

    #[test]
    fn input_waits_for_the_end_of_loop_back_mode() {
        let serial = port(None, false);
        serial.write(4, &[0x10]);
        serial.feed(b"A");
        assert_eq!(read(&serial, 5) & 1, 0);
        serial.write(4, &[0x0b]);
        assert_eq!((read(&serial, 5) & 1, read(&serial, 0)), (1, b'A'));
    }

    #[test]
    fn a_guest_waits_behind_the_instruction_that_left_no_room() {
        let serial = port(None, true);
        assert_eq!(serial.write_many(0, &vec![b'x'; 1 << 17], 1), Outcome::Wait);
        assert!(!serial.wait_for_room(&|| true));
        assert_eq!(serial.take_output().len(), 1 << 17, "nothing is lost");
        assert!(serial.wait_for_room(&|| true));
    }

    #[test]
    fn what_is_saved_comes_back_with_input_and_output() {
        let serial = port(None, false);
        serial.write(7, &[0x5a]);
        serial.write(2, &[1]);
        serial.write_many(0, b"printed", 1);
        serial.feed(&[b'i'; 100]);
        let saved = serial.save().unwrap();
        let other = port(None, false);
        other.restore(&saved).unwrap();
        assert_eq!(other.save().unwrap(), saved);
        assert_eq!(read(&other, 7), 0x5a);
        assert_eq!((other.take_output(), other.input_waiting()), (b"printed".to_vec(), 100));
        // Where files of earlier versions end.
        let before_breaks = saved.len() - 4;
        let before_kept = before_breaks - 4 - b"printed".len() - 4;
        let earlier = [before_kept, before_breaks];
        for length in (0..saved.len()).filter(|length| !earlier.contains(length)) {
            assert_eq!(other.restore(&saved[..length]).unwrap_err().kind, ErrorKind::Snapshot);
        }
        for length in earlier {
            other.restore(&saved[..length]).unwrap();
            assert_eq!(other.save().unwrap(), saved);
        }
    }
}

//! The 16550 serial port: vm-superio's UART with a queue on each side.
//! The guest's side runs on vCPU threads; the host's side on the loop's thread or any other.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::{Device, Flow};
use crate::error::{Error, ErrorKind, Result};
use crate::snapshot::Reader;
use crate::sync::{Condvar, Mutex, rank};

/// Output kept where nobody takes it: the newest so many bytes.
const CAPTURE_SIZE: usize = 1 << 20;
/// A guest that prints more than this ahead of its taker waits.
const BACKLOG_SIZE: usize = 1 << 16;
/// Guests print byte by byte: the taker is told of the first one this much later, to find more with it,
const GATHER: Duration = Duration::from_millis(2);
/// or at once when so many have come together.
const GATHERED: usize = 4096;

/// The port's interrupt line; nothing happens on a machine without an interrupt controller.
#[derive(Debug)]
struct Irq(Option<Arc<EventFd>>);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |line| line.write(1))
    }
}

/// A serial port.
#[derive(Debug)]
pub struct Serial {
    guest: Mutex<GuestSide, rank::SerialGuest>,
    output: Mutex<Output, rank::SerialOutput>,
    /// Output was taken, or nobody waits for it any more.
    room: Condvar,
    /// Where `Output::ready` can be watched.
    output_fd: Option<RawFd>,
    /// Made when somebody asks for it.
    input_wanted: OnceLock<Arc<EventFd>>,
}

/// What the guest's accesses change.
#[derive(Debug)]
struct GuestSide {
    uart: Uart<Irq, NoEvents, Vec<u8>>,
    /// Input that the UART's FIFO has no room for yet.
    queue: VecDeque<u8>,
}

#[derive(Debug)]
struct Output {
    bytes: VecDeque<u8>,
    /// Somebody takes the output, so none is dropped and the guest may have to wait.
    has_taker: bool,
    /// The guest does not wait: the run is ending.
    released: bool,
    failed: Option<Error>,
    /// Expires when there is output to take; none without a taker.
    ready: Option<TimerFd>,
}

impl Serial {
    /// A port with an interrupt line, if there is one. `has_taker`: somebody will call [`Self::take`].
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(irq: Option<EventFd>, has_taker: bool) -> Result<Self> {
        let ready =
            if has_taker { Some(TimerFd::new().map_err(|e| failed(&e.into()))?) } else { None };
        let uart = Uart::new(Irq(irq.map(Arc::new)), Vec::new());
        let bytes = VecDeque::new();
        Ok(Self {
            output_fd: ready.as_ref().map(AsRawFd::as_raw_fd),
            guest: Mutex::new(GuestSide { uart, queue: VecDeque::new() }),
            output: Mutex::new(Output { bytes, released: false, failed: None, has_taker, ready }),
            room: Condvar::new(),
            input_wanted: OnceLock::new(),
        })
    }

    /// Readable when the guest has read all its input; readable at first, too.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn input_wanted(&self) -> Result<&Arc<EventFd>> {
        if let Some(wanted) = self.input_wanted.get() {
            return Ok(wanted);
        }
        let wanted = EventFd::new(EFD_NONBLOCK).map_err(|e| failed(&e))?;
        wanted.write(1).map_err(|e| failed(&e))?;
        Ok(self.input_wanted.get_or_init(|| Arc::new(wanted)))
    }

    /// Readable when there is output to take, for as long as it is not taken; none without a taker.
    #[must_use]
    pub fn output_fd(&self) -> Option<RawFd> {
        self.output_fd
    }

    /// Give the guest input. Takes any amount; the guest reads it at its own pace.
    pub fn feed(&self, bytes: &[u8]) {
        let mut guest = self.guest.lock();
        guest.queue.extend(bytes);
        guest.top_up();
    }

    /// Bytes of input that the guest has not read yet.
    #[must_use]
    pub fn input_waiting(&self) -> usize {
        let guest = self.guest.lock();
        guest.queue.len() + (FIFO_SIZE - guest.uart.fifo_capacity().min(FIFO_SIZE))
    }

    /// Take the output there is.
    #[must_use]
    pub fn take(&self) -> Vec<u8> {
        let mut output = self.output.lock();
        output.told();
        let bytes = std::mem::take(&mut output.bytes);
        self.room.notify_all();
        bytes.into()
    }

    /// A copy of at most `most` bytes of the output, which stays until [`Self::consume`].
    #[must_use]
    pub fn peek(&self, most: usize) -> Vec<u8> {
        let mut output = self.output.lock();
        output.told();
        output.bytes.iter().take(most).copied().collect()
    }

    /// Drop the oldest `count` bytes of the output: they have been written.
    pub fn consume(&self, count: usize) {
        let mut output = self.output.lock();
        let count = count.min(output.bytes.len());
        output.bytes.drain(..count);
        self.room.notify_all();
    }

    /// The output cannot be written: say so at the end of the turn, and drop what comes.
    pub fn fail(&self, error: Error) {
        let mut output = self.output.lock();
        output.bytes.clear();
        output.has_taker = false;
        output.failed.get_or_insert(error);
        self.room.notify_all();
    }

    /// The failure, once.
    #[must_use]
    pub fn take_failure(&self) -> Option<Error> {
        self.output.lock().failed.take()
    }

    /// Bytes of output that a taker has not taken yet; 0 without a taker.
    #[must_use]
    pub fn backlog(&self) -> usize {
        let output = self.output.lock();
        if output.has_taker { output.bytes.len() } else { 0 }
    }

    /// Whether the guest waits for its output to be taken, or goes on because the run is ending.
    pub fn release(&self, released: bool) {
        self.output.lock().released = released;
        self.room.notify_all();
    }

    fn send(&self, bytes: &[u8]) {
        let mut output = self.output.lock();
        while output.has_taker && !output.released && output.bytes.len() >= BACKLOG_SIZE {
            self.room.wait(&mut output);
        }
        let before = output.bytes.len();
        output.bytes.extend(bytes);
        let now = output.bytes.len();
        if !output.has_taker {
            output.bytes.drain(..now.saturating_sub(CAPTURE_SIZE));
        } else if before < GATHERED && now >= GATHERED {
            output.tell_in(Duration::from_nanos(1));
        } else if before == 0 {
            output.tell_in(GATHER);
        }
    }
}

impl Output {
    fn tell_in(&mut self, delay: Duration) {
        // Cannot fail: the descriptor is a timer's and the time is in range.
        let _ = self.ready.as_mut().map(|ready| ready.reset(delay, None));
    }

    /// The taker looks: not readable until there is more.
    fn told(&mut self) {
        // Cannot fail, as above.
        let _ = self.ready.as_mut().map(TimerFd::clear);
    }
}

fn failed(error: &io::Error) -> Error {
    Error::os(ErrorKind::Io, "serial", error)
}

const FIFO_SIZE: usize = 0x40;

impl GuestSide {
    /// Move queued input into the UART's FIFO.
    fn top_up(&mut self) {
        let room = self.uart.fifo_capacity().min(self.queue.len());
        if room == 0 {
            return;
        }
        let chunk: Vec<u8> = self.queue.iter().take(room).copied().collect();
        // In loop-back mode the UART takes nothing; a failed interrupt leaves the bytes in the FIFO.
        let taken = match self.uart.enqueue_raw_bytes(&chunk) {
            Ok(taken) => taken,
            Err(_) => room,
        };
        self.queue.drain(..taken.min(self.queue.len()));
    }
}

impl Device for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) -> Flow {
        let mut guest = self.guest.lock();
        for (register, byte) in (offset..).zip(data.iter_mut()) {
            *byte = guest.uart.read(u8::try_from(register).unwrap_or(u8::MAX));
        }
        if offset == 0 {
            guest.top_up();
            if guest.queue.is_empty() && guest.uart.fifo_capacity() == FIFO_SIZE {
                let _ = self.input_wanted.get().map(|wanted| wanted.write(1));
            }
        }
        Flow::Continue
    }

    fn write(&self, offset: u64, data: &[u8]) -> Flow {
        let mut guest = self.guest.lock();
        for (register, byte) in (offset..).zip(data) {
            // Fails only when the interrupt line does: nothing a guest could be told.
            let _ = guest.uart.write(u8::try_from(register).unwrap_or(u8::MAX), *byte);
        }
        let sent = std::mem::take(guest.uart.writer_mut());
        drop(guest);
        // Outside the UART's lock: the guest may wait here, and input must go on.
        if !sent.is_empty() {
            self.send(&sent);
        }
        Flow::Continue
    }

    /// Nine registers; then, each behind its length, what the UART holds for the guest, what waits behind that, and the
    /// output that nobody has taken.
    fn save(&self) -> Result<Vec<u8>> {
        let (state, queue) = {
            let guest = self.guest.lock();
            (guest.uart.state(), Vec::from(guest.queue.clone()))
        };
        let mut bytes = registers(&state).to_vec();
        let output = Vec::from(self.output.lock().bytes.clone());
        for part in [state.in_buffer, queue, output] {
            bytes.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
            bytes.extend(part);
        }
        Ok(bytes)
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let mut reader = Reader::new("serial", state);
        let registers = reader.take::<9>()?;
        let mut part = || {
            let length = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
            reader.bytes(length).map(<[u8]>::to_vec)
        };
        let (in_buffer, queue, bytes) = (part()?, part()?, part()?);
        reader.end()?;
        let mut guest = self.guest.lock();
        let irq = Irq(guest.uart.interrupt_evt().0.clone());
        let state = SerialState { in_buffer, ..with_registers(registers) };
        // An interrupt that was pending is pulsed again: the first pulse may not have arrived.
        guest.uart = Uart::from_state(&state, irq, NoEvents, Vec::new()).map_err(|e| {
            Error::new(ErrorKind::Snapshot, "serial", format!("its UART cannot be so: {e:?}"))
        })?;
        guest.queue = queue.into();
        if guest.queue.is_empty() && guest.uart.fifo_capacity() == FIFO_SIZE {
            let _ = self.input_wanted.get().map(|wanted| wanted.write(1));
        }
        drop(guest);
        let mut output = self.output.lock();
        output.bytes = bytes.into();
        if !output.bytes.is_empty() {
            output.tell_in(Duration::from_nanos(1));
        }
        self.room.notify_all();
        Ok(())
    }
}

fn registers(state: &SerialState) -> [u8; 9] {
    [
        state.baud_divisor_low,
        state.baud_divisor_high,
        state.interrupt_enable,
        state.interrupt_identification,
        state.line_control,
        state.line_status,
        state.modem_control,
        state.modem_status,
        state.scratch,
    ]
}

fn with_registers(registers: [u8; 9]) -> SerialState {
    let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] =
        registers;
    SerialState {
        baud_divisor_low: low,
        baud_divisor_high: high,
        interrupt_enable: enable,
        interrupt_identification: identification,
        line_control: line,
        line_status,
        modem_control: modem,
        modem_status,
        scratch,
        in_buffer: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(serial: &Serial, text: &[u8]) {
        for byte in text {
            serial.write(0, &[*byte]);
        }
    }

    fn is_ready(serial: &Serial, milliseconds: i32) -> bool {
        let mut poll =
            libc::pollfd { fd: serial.output_fd().unwrap(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, milliseconds) > 0 }
    }

    fn read(serial: &Serial) -> u8 {
        let mut data = [0];
        serial.read(0, &mut data);
        data[0]
    }

    #[test]
    fn what_the_guest_prints_can_be_taken() {
        let serial = Serial::new(None, true).unwrap();
        print(&serial, b"hello");
        assert!(is_ready(&serial, 60_000));
        assert_eq!(serial.peek(2), b"he");
        serial.consume(2);
        assert_eq!(serial.take(), b"llo");
        assert_eq!(serial.backlog(), 0);
        assert!(!is_ready(&serial, 0));
    }

    #[test]
    fn without_a_taker_the_newest_output_is_kept() {
        let serial = Serial::new(None, false).unwrap();
        for _ in 0..CAPTURE_SIZE / 1024 {
            serial.send(&[b'a'; 1024]);
        }
        serial.send(b"end");
        let kept = serial.take();
        assert_eq!(kept.len(), CAPTURE_SIZE);
        assert!(kept.ends_with(b"aend"));
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole() {
        let serial = Serial::new(None, false).unwrap();
        serial.input_wanted().unwrap().read().unwrap();
        let sent: Vec<u8> = (0..=255).collect();
        serial.feed(&sent);
        let received: Vec<u8> = (0..=255).map(|_| read(&serial)).collect();
        assert_eq!(received, sent);
        assert_eq!(
            (serial.input_waiting(), serial.input_wanted().unwrap().read().unwrap()),
            (0, 1)
        );
    }

    #[test]
    fn a_guest_waits_for_its_taker_and_is_released() {
        let serial = Arc::new(Serial::new(None, true).unwrap());
        let guest = {
            let serial = Arc::clone(&serial);
            std::thread::spawn(move || serial.send(&vec![b'x'; BACKLOG_SIZE]))
        };
        guest.join().unwrap();
        let waiting = {
            let serial = Arc::clone(&serial);
            std::thread::spawn(move || serial.send(b"more"))
        };
        serial.release(true);
        waiting.join().unwrap();
        assert_eq!(serial.take().len(), BACKLOG_SIZE + 4);
    }

    #[test]
    fn what_is_saved_comes_back_with_input_and_output() {
        let serial = Serial::new(None, false).unwrap();
        serial.write(7, &[0x5a]);
        print(&serial, b"printed");
        serial.feed(&[b'i'; 100]);
        let saved = serial.save().unwrap();
        let other = Serial::new(None, false).unwrap();
        other.restore(&saved).unwrap();
        assert_eq!(other.save().unwrap(), saved);
        let mut scratch = [0];
        other.read(7, &mut scratch);
        assert_eq!(scratch, [0x5a]);
        assert_eq!((other.take(), other.input_waiting()), (b"printed".to_vec(), 100));
        for length in 0..saved.len() {
            assert_eq!(other.restore(&saved[..length]).unwrap_err().kind, ErrorKind::Snapshot);
        }
    }

    #[test]
    fn a_failure_is_told_once_and_the_guest_goes_on() {
        let serial = Serial::new(None, true).unwrap();
        serial.fail(Error::new(ErrorKind::Io, "serial.output", "broken"));
        serial.send(&vec![b'x'; 2 * BACKLOG_SIZE]);
        assert_eq!(serial.take_failure().unwrap().detail, "broken");
        assert!(serial.take_failure().is_none());
    }
}

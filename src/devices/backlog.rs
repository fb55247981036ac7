//! The output of a serial port that its consumer has not taken yet. vCPU threads add to it, and
//! wait if it is full. Any thread, usually the loop's, takes from it.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::history::{AT_ONCE, History, new_timer, notify_delay};
use super::text_stop::TextStop;
use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex, rank};

/// How much output is kept without a consumer: the newest bytes.
const CAPTURE_SIZE: usize = 1 << 20;
/// The guest waits if this many bytes have not been taken.
const BACKLOG_SIZE: usize = 1 << 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Backlog {
    state: Mutex<State, rank::SerialOutput>,
    /// Signalled when there is room, or a vCPU that waits for it has to leave.
    room: Condvar,
    /// The file descriptor of `State::ready`, once it exists.
    fd: OnceLock<RawFd>,
}

#[derive(Debug)]
struct State {
    bytes: VecDeque<u8>,
    /// How many bytes a consumer is writing now.
    in_flight: usize,
    /// Whether the output has a consumer. Then no output is dropped, and the guest may have to
    /// wait.
    has_consumer: bool,
    failed: Option<Error>,
    /// Expires when there is output to take. Without a consumer, it is created on first use.
    ready: Option<TimerFd>,
    /// Whether `ready` expires: not after the output has failed.
    notifies: bool,
    /// Counts the restores that replaced the output. Pieces taken before a restore are not put
    /// back.
    epoch: u64,
    /// The text that the program wants to stop at.
    stop: TextStop,
    /// The texts that end `Vmm.run_until`.
    until: Vec<TextStop>,
    history: History,
}

/// Output that is being written; `Backlog::finish_write` takes the result.
#[derive(Debug)]
#[must_use]
pub struct Chunk {
    /// Its bytes.
    pub bytes: Vec<u8>,
    epoch: u64,
}

/// The result of printing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Printed {
    /// The guest continues.
    Taken,
    /// It continues when there is room.
    Full,
    /// It has printed the text that ends the run.
    Found,
}

impl Backlog {
    /// `has_consumer`: the output will be taken.
    ///
    /// # Errors
    /// If no timer can be made.
    pub(super) fn new(has_consumer: bool) -> Result<Self> {
        let state = State {
            bytes: VecDeque::new(),
            in_flight: 0,
            has_consumer,
            failed: None,
            ready: None,
            notifies: true,
            epoch: 0,
            stop: TextStop::default(),
            until: Vec::new(),
            history: History::default(),
        };
        let backlog =
            Self { state: Mutex::new(state), room: Condvar::new(), fd: OnceLock::default() };
        if has_consumer {
            backlog.fd()?;
        }
        Ok(backlog)
    }

    /// Readable when there is output to take.
    ///
    /// # Errors
    /// If no timer can be made.
    pub(super) fn fd(&self) -> Result<RawFd> {
        if let Some(fd) = self.fd.get() {
            return Ok(*fd);
        }
        let mut state = self.state.lock();
        if let Some(ready) = &state.ready {
            return Ok(ready.as_raw_fd());
        }
        let timer = new_timer()?;
        let fd = *self.fd.get_or_init(|| timer.as_raw_fd());
        state.ready = Some(timer);
        if !state.bytes.is_empty() {
            state.notify_after(AT_ONCE);
        }
        Ok(fd)
    }

    /// Take all that the guest prints. Never waits.
    pub(super) fn print(&self, bytes: &[u8]) -> Printed {
        let mut state = self.state.lock();
        let before = state.bytes.len();
        state.bytes.extend(bytes);
        let now = state.bytes.len();
        if let Some(delay) = notify_delay(before, now) {
            state.notify_after(delay);
        }
        if !state.has_consumer {
            state.bytes.drain(..now.saturating_sub(CAPTURE_SIZE));
        }
        state.history.push(bytes);
        let is_found = bytes.iter().any(|byte| state.stop.feed(*byte));
        if state.until(bytes) || is_found {
            return Printed::Found;
        }
        if state.is_full() { Printed::Full } else { Printed::Taken }
    }

    /// Wait until there is room, or until `is_called_out` is true after a [`Self::wake`]. Returns
    /// whether there is room.
    pub(super) fn wait_for_room(&self, is_called_out: &dyn Fn() -> bool) -> bool {
        let mut state = self.state.lock();
        while state.is_full() {
            if is_called_out() {
                return false;
            }
            self.room.wait(&mut state);
        }
        true
    }

    /// Make threads that wait for room check `is_called_out` again.
    pub(super) fn wake(&self) {
        // Under the lock, so that a thread between its check and its wait is not missed.
        let _state = self.state.lock();
        self.room.notify_all();
    }

    /// Take at most `most` bytes. They are not part of a snapshot, and no other call returns them.
    pub(super) fn take(&self, most: usize) -> Chunk {
        let mut state = self.state.lock();
        // Not readable until there is more. Cannot fail on a timer's descriptor.
        let _ = state.ready.as_mut().map(TimerFd::clear);
        let count = most.min(state.bytes.len());
        let bytes = if count == state.bytes.len() {
            std::mem::take(&mut state.bytes).into()
        } else {
            state.bytes.drain(..count).collect()
        };
        state.in_flight += count;
        self.room.notify_all();
        Chunk { bytes, epoch: state.epoch }
    }

    /// The first `written` bytes of a chunk have been written. The others are put back in front.
    pub(super) fn finish_write(&self, chunk: &Chunk, written: usize) {
        let mut state = self.state.lock();
        if chunk.epoch != state.epoch {
            return;
        }
        state.in_flight = state.in_flight.saturating_sub(chunk.bytes.len());
        if let Some(left) = chunk.bytes.get(written..).filter(|left| !left.is_empty()) {
            let later = std::mem::replace(&mut state.bytes, left.to_vec().into());
            state.bytes.extend(later);
        }
    }

    /// Notify the consumer again after this time.
    pub(super) fn notify_after(&self, delay: Duration) {
        self.state.lock().notify_after(delay);
    }

    /// The output cannot be written: from now on it is buffered as without a consumer.
    pub(super) fn fail(&self, error: Error) {
        let mut state = self.state.lock();
        (state.has_consumer, state.notifies) = (false, false);
        state.failed.get_or_insert(error);
        self.room.notify_all();
    }

    /// Report a failure of the port that does not affect the output.
    pub(super) fn report(&self, error: Error) {
        self.state.lock().failed.get_or_insert(error);
    }

    /// Take the failure.
    pub(super) fn take_failure(&self) -> Option<Error> {
        self.state.lock().failed.take()
    }

    /// Bytes that a consumer has not written yet; 0 without one.
    pub(super) fn waiting(&self) -> usize {
        let state = self.state.lock();
        if state.has_consumer { state.bytes.len() + state.in_flight } else { 0 }
    }

    /// See [`TextStop`].
    pub(super) fn stop_at(&self, text: Vec<u8>) {
        self.state.lock().stop = TextStop::at(text);
    }

    /// Take the text that was found.
    pub(super) fn take_match(&self) -> Option<Vec<u8>> {
        self.state.lock().stop.take_match()
    }

    /// End the run once one of these texts is in the output that no watch has matched. Returns
    /// whether one is there already; then nothing ends the run. No texts cancel the request.
    pub(super) fn run_until(&self, texts: Vec<Vec<u8>>) -> bool {
        let mut state = self.state.lock();
        state.until = texts.into_iter().map(TextStop::at).collect();
        let unmatched = state.history.since(state.history.matched()).bytes;
        state.until(&unmatched)
    }

    /// The bytes that have not been taken, all that is kept, and how much of it is not matched.
    pub(super) fn copy(&self) -> (Vec<u8>, Vec<u8>, usize) {
        let state = self.state.lock();
        let kept = state.history.since(0);
        let matched = state.history.matched() - kept.position;
        let unmatched = kept.bytes.len().saturating_sub(usize::try_from(matched).unwrap_or(0));
        (state.bytes.clone().into(), kept.bytes, unmatched)
    }

    /// Look at or change the history.
    pub(super) fn history<T>(&self, of: impl FnOnce(&mut History) -> T) -> T {
        of(&mut self.state.lock().history)
    }

    /// Restore a saved state.
    pub(super) fn restore(&self, bytes: Vec<u8>, kept: &[u8], unmatched: usize) {
        let mut state = self.state.lock();
        state.history.restore(kept, unmatched);
        state.until.clear();
        state.bytes = bytes.into();
        state.in_flight = 0;
        state.epoch += 1;
        if !state.bytes.is_empty() {
            state.notify_after(AT_ONCE);
        }
        self.room.notify_all();
    }
}

impl State {
    fn is_full(&self) -> bool {
        self.has_consumer && self.bytes.len() >= BACKLOG_SIZE
    }

    fn notify_after(&mut self, delay: Duration) {
        // Cannot fail: the descriptor is a timer's and the time is in range.
        let ready = self.ready.as_mut().filter(|_| self.notifies);
        let _ = ready.map(|ready| ready.reset(delay, None));
    }

    /// Whether these bytes complete a text that ends `run_until`. Then no other one ends it.
    fn until(&mut self, bytes: &[u8]) -> bool {
        let is_found = bytes.iter().any(|byte| {
            // Each gets the byte, also after one that it completes.
            self.until.iter_mut().filter_map(|text| text.feed(*byte).then_some(())).count() > 0
        });
        if is_found {
            self.until.clear();
        }
        is_found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn all(backlog: &Backlog) -> Vec<u8> {
        let chunk = backlog.take(usize::MAX);
        backlog.finish_write(&chunk, chunk.bytes.len());
        chunk.bytes
    }

    #[test]
    fn without_a_consumer_the_newest_output_is_kept() {
        let backlog = Backlog::new(false).unwrap();
        for _ in 0..CAPTURE_SIZE / 1024 {
            assert_eq!(backlog.print(&[b'a'; 1024]), Printed::Taken);
        }
        backlog.print(b"end");
        let kept = all(&backlog);
        assert_eq!(kept.len(), CAPTURE_SIZE);
        assert!(kept.ends_with(b"aend"));
    }

    #[test]
    fn what_could_not_be_written_comes_first_the_next_time() {
        let backlog = Backlog::new(true).unwrap();
        backlog.print(b"hello");
        let chunk = backlog.take(4);
        backlog.print(b" there");
        assert_eq!((chunk.bytes.as_slice(), backlog.waiting()), (&b"hell"[..], 11));
        backlog.finish_write(&chunk, 1);
        assert_eq!((backlog.waiting(), all(&backlog)), (10, b"ello there".to_vec()));
    }

    #[test]
    fn what_was_taken_before_a_restore_is_not_put_back() {
        let backlog = Backlog::new(true).unwrap();
        backlog.print(b"gone");
        let piece = backlog.take(4);
        backlog.restore(b"new".to_vec(), b"", 0);
        backlog.finish_write(&piece, 0);
        assert_eq!(all(&backlog), b"new");
    }

    #[test]
    fn a_vcpu_that_waits_for_room_is_called_out_and_woken_by_room() {
        let backlog = Arc::new(Backlog::new(true).unwrap());
        assert_eq!(backlog.print(&[b'x'; BACKLOG_SIZE]), Printed::Full);
        let called_out = Arc::new(AtomicBool::new(false));
        let wait = || {
            let (backlog, called_out) = (Arc::clone(&backlog), Arc::clone(&called_out));
            std::thread::spawn(move || backlog.wait_for_room(&|| called_out.load(Ordering::SeqCst)))
        };
        let waiting = wait();
        called_out.store(true, Ordering::SeqCst);
        backlog.wake();
        assert!(!waiting.join().unwrap());
        called_out.store(false, Ordering::SeqCst);
        let waiting = wait();
        assert_eq!(all(&backlog).len(), BACKLOG_SIZE);
        assert!(waiting.join().unwrap());
    }

    #[test]
    fn a_failure_is_told_once_and_what_was_not_written_is_kept() {
        let backlog = Backlog::new(true).unwrap();
        backlog.print(b"left");
        backlog.fail(Error::new(ErrorKind::Io, "serial.output", "broken"));
        assert_eq!(backlog.print(&[b'x'; 2 * BACKLOG_SIZE]), Printed::Taken);
        assert_eq!(backlog.take_failure().unwrap().detail, "broken");
        assert!(backlog.take_failure().is_none());
        assert!(all(&backlog).starts_with(b"leftx"));
    }
}

//! The newest output of a serial port, whether or not it has been taken, and the watches of threads
//! that wait for more. Pure data, which `backlog.rs` changes under its lock.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use crate::error::{Error, ErrorKind, Result};

/// How much output is kept: the newest bytes.
const KEPT: usize = 1 << 18;
/// Guests print byte by byte. The consumer is notified this long after the first byte, so that it
/// takes several at once,
const NOTIFY_DELAY: Duration = Duration::from_millis(2);
/// or immediately when this many bytes are buffered.
const NOTIFY_SIZE: usize = 4096;
pub(super) const AT_ONCE: Duration = Duration::from_nanos(1);

/// When to notify a reader whose unread bytes have become more: `None` if it is notified already.
pub(super) fn notify_delay(before: usize, now: usize) -> Option<Duration> {
    if before < NOTIFY_SIZE && now >= NOTIFY_SIZE {
        Some(AT_ONCE)
    } else {
        (before == 0).then_some(NOTIFY_DELAY)
    }
}

/// A timer, which is readable when it has expired.
///
/// # Errors
/// If no timer can be created.
pub(super) fn new_timer() -> Result<TimerFd> {
    TimerFd::new().map_err(|e| Error::os(ErrorKind::Io, "serial", &std::io::Error::from(e)))
}

/// See the module. Positions count the bytes that were ever printed, also before a restore.
#[derive(Debug, Default)]
pub(super) struct History {
    bytes: VecDeque<u8>,
    /// The position after the last byte.
    end: u64,
    /// The position up to which a watch has matched the output.
    matched: u64,
    /// Counts restores.
    epoch: u64,
    watches: Vec<Watching>,
    next_watch: u64,
}

/// One watch.
#[derive(Debug)]
struct Watching {
    id: u64,
    /// Expires when there is something to look at.
    timer: TimerFd,
    /// Bytes printed since the last look.
    unseen: usize,
    /// The position of the next look, and the epoch of the last one; `None` before the first.
    at: Option<(u64, u64)>,
}

/// New output for a watch.
#[derive(Debug, PartialEq, Eq)]
pub struct News {
    /// The position of the first byte. It differs from the end of the last news if output was
    /// dropped, or the state was restored.
    pub position: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl History {
    pub(super) fn push(&mut self, printed: &[u8]) {
        let kept = &printed[printed.len().saturating_sub(KEPT)..];
        let excess = (self.bytes.len() + kept.len()).saturating_sub(KEPT);
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
        self.end += printed.len() as u64;
        for watch in &mut self.watches {
            let before = watch.unseen;
            watch.unseen += printed.len();
            if let Some(delay) = notify_delay(before, watch.unseen) {
                watch.notify_after(delay);
            }
        }
    }

    /// The position of the first byte that is kept.
    pub(super) fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// The position up to which the output is matched.
    pub(super) fn matched(&self) -> u64 {
        self.matched.max(self.start())
    }

    /// The output from a position on, as far as it is kept.
    pub(super) fn since(&self, position: u64) -> News {
        let position = position.clamp(self.start(), self.end);
        let skipped = usize::try_from(position - self.start()).unwrap_or(usize::MAX);
        News { position, bytes: self.bytes.iter().skip(skipped).copied().collect() }
    }

    /// Replace everything. Positions continue, so that those from before are recognized.
    pub(super) fn restore(&mut self, bytes: &[u8], unmatched: usize) {
        self.bytes.clear();
        self.bytes.extend(&bytes[bytes.len().saturating_sub(KEPT)..]);
        // One position is left out, so that a watch of the old output finds a gap.
        self.end += 1 + bytes.len() as u64;
        self.matched = self.end - unmatched as u64;
        self.epoch += 1;
        self.tell();
    }

    /// # Errors
    /// If no timer can be created.
    pub(super) fn watch(&mut self) -> Result<(u64, RawFd)> {
        let timer = new_timer()?;
        let (id, fd) = (self.next_watch, timer.as_raw_fd());
        self.next_watch += 1;
        self.watches.push(Watching { id, timer, unseen: 0, at: None });
        Ok((id, fd))
    }

    pub(super) fn unwatch(&mut self, id: u64) {
        self.watches.retain(|watch| watch.id != id);
    }

    pub(super) fn watches(&self) -> usize {
        self.watches.len()
    }

    /// The output since the last look of a watch; at first, all that is not matched.
    pub(super) fn look(&mut self, id: u64) -> News {
        let (matched, epoch) = (self.matched(), self.epoch);
        let at = self.watches.iter().find(|watch| watch.id == id).and_then(|watch| watch.at);
        let news = match at {
            Some((at, seen)) if seen == epoch => self.since(at),
            _ => self.since(matched),
        };
        if let Some(watch) = self.watches.iter_mut().find(|watch| watch.id == id) {
            watch.unseen = 0;
            watch.at = Some((self.end, epoch));
            // Cannot fail on a timer's descriptor.
            let _ = watch.timer.clear();
        }
        news
    }

    /// A watch has matched the output that it has looked at up to this position.
    pub(super) fn match_up_to(&mut self, id: u64, position: u64) {
        let seen = self.watches.iter().find(|watch| watch.id == id).and_then(|watch| watch.at);
        if seen.is_some_and(|(_, epoch)| epoch == self.epoch) {
            self.matched = self.matched.max(position.min(self.end));
        }
    }

    /// Make every watch look.
    pub(super) fn tell(&mut self) {
        self.watches.iter_mut().for_each(|watch| watch.notify_after(AT_ONCE));
    }
}

impl Watching {
    fn notify_after(&mut self, delay: Duration) {
        // Cannot fail: the descriptor is a timer's and the time is in range.
        let _ = self.timer.reset(delay, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(news: &News) -> &[u8] {
        &news.bytes
    }

    #[test]
    fn the_newest_output_is_kept_and_positions_go_on() {
        let mut history = History::default();
        history.push(&vec![b'a'; KEPT]);
        history.push(b"end");
        assert_eq!((history.start(), history.since(0).bytes.len()), (3, KEPT));
        assert_eq!(bytes(&history.since(KEPT as u64)), b"end");
        history.push(&vec![b'b'; 2 * KEPT]);
        assert_eq!(history.since(0).bytes, vec![b'b'; KEPT]);
        assert_eq!(history.start(), 2 * KEPT as u64 + 3);
    }

    #[test]
    fn a_watch_begins_after_what_is_matched_and_sees_each_byte_once() {
        let mut history = History::default();
        history.push(b"seen, new");
        let (first, _) = history.watch().unwrap();
        assert_eq!(bytes(&history.look(first)), b"seen, new");
        history.match_up_to(first, 6);
        let (second, _) = history.watch().unwrap();
        assert_eq!(history.look(second), News { position: 6, bytes: b"new".to_vec() });
        history.push(b"er");
        assert_eq!(history.look(first), history.look(second));
        assert_eq!(bytes(&history.look(first)), b"");
        history.match_up_to(first, 3);
        assert_eq!(history.matched(), 6, "it never goes back");
    }

    #[test]
    fn a_restore_begins_again_where_the_saved_state_was_matched() {
        let mut history = History::default();
        history.push(b"old");
        let (id, _) = history.watch().unwrap();
        let last = history.look(id).position + 3;
        history.restore(b"saved, unmatched", 9);
        history.match_up_to(id, last);
        let news = history.look(id);
        assert_eq!(bytes(&news), b"unmatched");
        assert_ne!(news.position, last, "there is a gap");
        history.push(b"!");
        assert_eq!(bytes(&history.look(id)), b"!");
        history.unwatch(id);
        assert_eq!(history.watches(), 0);
    }
}

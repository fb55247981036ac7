//! A thread's wait for the output of a serial port, beside its consumer. Any thread.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::history::News;
use super::serial::Serial;
use crate::error::Result;
use crate::poll::take_count;

/// Sees the output that no watch has matched before, and then all new output. It takes nothing from
/// the port's consumer.
#[derive(Debug)]
pub struct OutputWatch {
    serial: Arc<Serial>,
    id: u64,
    fd: RawFd,
    told: Arc<AtomicBool>,
    is_cancelled: AtomicBool,
}

impl OutputWatch {
    /// # Errors
    /// If no file descriptor can be created.
    pub fn new(serial: &Arc<Serial>) -> Result<Self> {
        let (id, fd) = serial.output.history(super::history::History::watch)?;
        let serial = Arc::clone(serial);
        Ok(Self { serial, id, fd, told: Arc::default(), is_cancelled: AtomicBool::new(false) })
    }

    /// The output since the last call.
    #[must_use]
    pub fn look(&self) -> News {
        // SeqCst: before the look, so that a later notification is not lost.
        self.told.store(false, Ordering::SeqCst);
        self.serial.output.history(|history| history.look(self.id))
    }

    /// The output up to this position is matched: watches that begin later do not see it.
    pub fn match_up_to(&self, position: u64) {
        self.serial.output.history(|history| history.match_up_to(self.id, position));
    }

    /// Readable when there is something to look at.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.fd
    }

    /// Whether the subscriber has been called since the last look.
    #[must_use]
    pub fn is_told(&self) -> bool {
        // SeqCst: pairs with `look`.
        self.told.load(Ordering::SeqCst)
    }

    /// End the wait. From any thread.
    pub fn cancel(&self) {
        // SeqCst: before the notification that makes the waiting thread read it.
        self.is_cancelled.store(true, Ordering::SeqCst);
        self.serial.tell_watches();
    }

    /// Whether it is cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        // SeqCst: pairs with `cancel`.
        self.is_cancelled.load(Ordering::SeqCst)
    }

    /// The subscriber that notifies the watch in an event loop.
    #[must_use]
    pub fn subscriber(&self) -> Box<dyn MutEventSubscriber + Send> {
        Box::new(Told { fd: self.fd, told: Arc::clone(&self.told) })
    }
}

impl Drop for OutputWatch {
    fn drop(&mut self) {
        self.serial.output.history(|history| history.unwatch(self.id));
    }
}

struct Told {
    fd: RawFd,
    told: Arc<AtomicBool>,
}

impl MutEventSubscriber for Told {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // Another machine's thread may dispatch this event, and must not find it ready again.
        let _ = take_count(self.fd);
        // SeqCst: pairs with `look`.
        self.told.store(true, Ordering::SeqCst);
    }

    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new_raw(self.fd, EventSet::IN));
    }
}

#[cfg(test)]
mod tests {
    use super::super::bus::Device;
    use super::*;
    use crate::event::EventManager;

    #[test]
    fn a_loop_tells_the_watch_of_output_and_of_its_end() {
        let serial = Arc::new(
            Serial::new(super::super::serial_kind::SerialKind::Uart("COM1"), None, false).unwrap(),
        );
        let watch = OutputWatch::new(&serial).unwrap();
        let manager = EventManager::new().unwrap();
        let id = manager.add_subscriber(watch.subscriber());
        serial.write_many(0, b"text", 1);
        manager.run_with_timeout(60_000).unwrap();
        assert!(watch.is_told());
        assert_eq!((watch.look().bytes, watch.is_told()), (b"text".to_vec(), false));
        watch.match_up_to(2);
        assert_eq!(OutputWatch::new(&serial).unwrap().look().bytes, b"xt");
        assert_eq!(serial.take_output(), b"text", "the output is still there for its consumer");
        watch.cancel();
        manager.run_with_timeout(60_000).unwrap();
        assert!(watch.is_told() && watch.is_cancelled());
        manager.remove_subscriber(id).unwrap();
    }
}

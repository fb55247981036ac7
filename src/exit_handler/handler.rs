//! `ExitHandler` with `kick()`, `VmmExitHandler` with its eventfd and flag, and
//! `WrappedExitHandler`, which all vCPUs share. `kick` may be called from any thread; `process`
//! runs on the loop's thread.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Result;
use crate::event::EventManager;
use crate::poll::take_count;
use crate::process::ProcessTag;
use crate::sync::{Mutex, rank};

/// Notified by a vCPU when its guest has ended.
pub trait ExitHandler {
    /// Notify the owner of the run loop. Called on the vCPU's thread; must not block.
    ///
    /// # Errors
    /// If the notification fails.
    fn kick(&self) -> io::Result<()>;
}

/// Stops a run loop: a kick writes to an eventfd, and the loop reads a flag.
#[derive(Debug)]
pub struct VmmExitHandler {
    exit_event: Arc<EventFd>,
    keep_running: bool,
    /// The loop of the machine that it stops.
    own_loop: Weak<EventManager>,
}

impl VmmExitHandler {
    /// A handler whose loop keeps running.
    ///
    /// # Errors
    /// If no eventfd can be created.
    pub fn new() -> io::Result<Self> {
        let exit_event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self { exit_event, keep_running: true, own_loop: Weak::new() })
    }

    /// The eventfd that a kick writes to.
    #[must_use]
    pub fn exit_event(&self) -> &Arc<EventFd> {
        &self.exit_event
    }

    /// False once a kick has been processed.
    #[must_use]
    pub fn keep_running(&self) -> bool {
        self.keep_running
    }

    /// Write to the exit event.
    ///
    /// # Errors
    /// If the write fails. A full counter is not an error, because it also wakes the loop.
    pub fn kick(&self) -> io::Result<()> {
        match self.exit_event.write(1) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    /// Whether a kick is pending.
    #[must_use]
    pub fn is_kicked(&self) -> bool {
        let mut poll =
            libc::pollfd { fd: self.exit_event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call, which does not wait.
        unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
    }

    /// Process a kick in another loop: clear the flag, drain the event, and wake the machine's own
    /// loop, which does not see the event any more.
    ///
    /// # Errors
    /// If the wake-up fails.
    pub fn stop_elsewhere(&mut self) -> Result<()> {
        self.keep_running = false;
        // Fails if there was no kick. Not a plain read: a duplicate's holder may make it blocking.
        let _ = take_count(self.exit_event.as_raw_fd());
        self.own_loop.upgrade().map_or(Ok(()), |own_loop| own_loop.kick())
    }

    /// Prepare for another run: set the flag and drop previous kicks.
    pub fn rearm(&mut self) {
        self.take_stop();
    }

    /// [`Self::rearm`]. Returns whether there was a kick, processed or not.
    pub fn take_stop(&mut self) -> bool {
        // As in `stop`.
        let kicks = take_count(self.exit_event.as_raw_fd()).unwrap_or(0);
        !std::mem::replace(&mut self.keep_running, true) || kicks > 0
    }
}

impl MutEventSubscriber for VmmExitHandler {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.event_set().contains(EventSet::IN) {
            self.keep_running = false;
        }
        if events.event_set().contains(EventSet::ERROR) {
            let _ = ops.remove(Events::new(&*self.exit_event, EventSet::IN));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        // By edge, and not drained: in each loop that watches it, a kick arrives once.
        let events = Events::new(&*self.exit_event, EventSet::IN | EventSet::EDGE_TRIGGERED);
        // Fails only for a handler that is already registered; it is kicked there.
        let _ = ops.add(events);
    }
}

/// The handler, shared by the loop, the VM and every vCPU.
#[derive(Clone, Debug)]
pub struct WrappedExitHandler {
    handler: Arc<Mutex<VmmExitHandler, rank::ExitHandler>>,
    /// Outside the lock, which another thread may have held at a fork.
    process_tag: ProcessTag,
}

impl WrappedExitHandler {
    /// A new handler, not yet shared.
    ///
    /// # Errors
    /// If no eventfd can be created.
    pub fn new() -> io::Result<Self> {
        let handler = Arc::new(Mutex::new(VmmExitHandler::new()?));
        Ok(Self { handler, process_tag: ProcessTag::current() })
    }

    /// False once a kick has been processed by the loop.
    #[must_use]
    pub fn keep_running(&self) -> bool {
        self.handler.lock().keep_running()
    }

    /// Whether the loop has a pending kick.
    #[must_use]
    pub fn is_kicked(&self) -> bool {
        self.handler.lock().is_kicked()
    }

    /// Name the loop of the machine that it stops.
    pub(crate) fn set_own_loop(&self, own_loop: &Arc<EventManager>) {
        self.handler.lock().own_loop = Arc::downgrade(own_loop);
    }

    /// # Errors
    /// In a forked child, where a kick would end the parent's run.
    pub fn check_process(&self) -> Result<()> {
        self.process_tag.check("exit handler")
    }

    /// Whether this is a forked child's copy.
    #[must_use]
    pub fn is_forked_child(&self) -> bool {
        self.process_tag.is_forked_child()
    }

    /// See [`VmmExitHandler::rearm`].
    pub fn rearm(&self) {
        self.handler.lock().rearm();
    }

    /// See [`VmmExitHandler::take_stop`].
    pub fn take_stop(&self) -> bool {
        self.handler.lock().take_stop()
    }

    /// The shared handler.
    #[must_use]
    pub fn inner(&self) -> &Arc<Mutex<VmmExitHandler, rank::ExitHandler>> {
        &self.handler
    }
}

impl ExitHandler for WrappedExitHandler {
    fn kick(&self) -> io::Result<()> {
        self.handler.lock().kick()
    }
}

impl MutEventSubscriber for WrappedExitHandler {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.handler.lock().process(events, ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.handler.lock().init(ops);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, SubscriberOps};

    #[test]
    fn a_kick_clears_the_flag_when_the_loop_processes_it() {
        let handler = WrappedExitHandler::new().unwrap();
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(handler.clone());
        assert!(handler.keep_running());
        handler.kick().unwrap();
        assert!(handler.keep_running(), "a kick is seen when it is processed, not before");
        assert_eq!(manager.run_with_timeout(1000).unwrap(), 1);
        assert!(!handler.keep_running());
    }

    #[test]
    fn a_processed_kick_cancels_no_later_run() {
        let handler = WrappedExitHandler::new().unwrap();
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(handler.clone());
        handler.kick().unwrap();
        manager.run_with_timeout(1000).unwrap();
        handler.kick().unwrap();
        handler.rearm();
        assert_eq!(manager.run_with_timeout(0).unwrap(), 0);
        assert!(handler.keep_running());
    }

    #[test]
    fn a_kick_arrives_in_each_loop_once() {
        let handler = WrappedExitHandler::new().unwrap();
        let mut loops = [EventManager::new().unwrap(), EventManager::new().unwrap()];
        let _ = loops.each_mut().map(|manager| manager.add_subscriber(handler.clone()));
        handler.kick().unwrap();
        let arrived = loops.map(|mut manager| [1000, 0].map(|ms| manager.run_with_timeout(ms)));
        assert!(matches!(arrived, [[Ok(1), Ok(0)], [Ok(1), Ok(0)]]));
    }

    #[test]
    fn an_error_event_removes_the_handler() {
        let mut handler = VmmExitHandler::new().unwrap();
        let error = Events::new(&**handler.exit_event(), EventSet::ERROR);
        let other = WrappedExitHandler::new().unwrap();
        let mut manager = EventManager::new().unwrap();
        let id = manager.add_subscriber(other);
        handler.init(&mut manager.event_ops(id).unwrap());
        handler.process(error, &mut manager.event_ops(id).unwrap());
        handler.kick().unwrap();
        assert_eq!(manager.run_with_timeout(0).unwrap(), 0, "its fd is not watched any more");
    }

    #[test]
    fn a_full_counter_is_kick_enough() {
        let handler = VmmExitHandler::new().unwrap();
        handler.exit_event().write(u64::MAX - 1).unwrap();
        handler.kick().unwrap();
    }
}

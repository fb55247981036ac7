//! `EventManager`: the real `event_manager::EventManager` behind a lock, so that any thread can
//! change its subscribers (`registering.rs`) while another waits (`run.rs`). The wait happens
//! outside the lock, on the manager's own epoll set; only the dispatch of what is ready takes it.
//! Subscribers run on the thread that runs the loop.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use event_manager::EventManager as Upstream;

use super::epoll_set::EpollSet;
use super::errors::event_error;
use super::registrations::Registrations;
use super::turn_lock::{NextTurn, TurnGuard, TurnLock};
use crate::error::Result;
use crate::process::ProcessTag;
use crate::sync::{Mutex, rank};
use crate::trace::Recorders;

/// The event manager: subscribers, their file descriptors, and the loop that dispatches events to
/// them.
///
/// Several threads may run the loop, and one of them at a time waits and dispatches. Subscribers
/// are called with the manager's lock held. They change their registrations through the `EventOps`
/// passed to them, and must not call the manager itself.
pub struct EventManager {
    pub(super) registrations: Mutex<Registrations, rank::EventManager>,
    pub(super) epoll: EpollSet,
    process_tag: ProcessTag,
    /// Counts removed registrations; incremented under the lock.
    pub(super) removals: Arc<AtomicU64>,
    pub(super) turns: TurnLock,
    /// Traces that record the loop.
    pub recorders: Recorders,
}

impl std::fmt::Debug for EventManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventManager").field("epoll", &self.epoll).finish_non_exhaustive()
    }
}

impl EventManager {
    /// A manager with no subscribers.
    ///
    /// # Errors
    /// If the process has no file descriptor left, or /proc is not mounted.
    pub fn new() -> Result<Self> {
        let mut upstream = Upstream::new().map_err(event_error)?;
        let epoll = EpollSet::of(&mut upstream)?;
        let registrations = Mutex::new(Registrations::new(upstream));
        let (process_tag, removals) = (ProcessTag::current(), Arc::default());
        let (turns, recorders) = (TurnLock::default(), Recorders::default());
        Ok(Self { registrations, epoll, process_tag, removals, turns, recorders })
    }

    /// The next iteration of this thread, without a time limit. Called before the thread checks
    /// whether what it waits for has come, because another thread may dispatch that.
    pub fn next_turn(&self) -> NextTurn {
        self.turns.next()
    }

    /// Begin an iteration, unless another thread performs one.
    pub(crate) fn begin_turn(&self) -> Option<TurnGuard<'_>> {
        self.turns.begin()
    }

    /// Wait until another thread's iteration has ended.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
    pub(crate) fn await_turn(&self, next: NextTurn) {
        self.turns.wait(next);
    }

    /// Have threads that wait for another thread's iteration check their requests, one of which was
    /// made before this. It does not end the iteration.
    pub(crate) fn wake_waiting(&self) {
        self.turns.wake();
    }

    /// Whether a thread performs an iteration.
    pub(crate) fn is_in_turn(&self) -> bool {
        self.turns.is_led()
    }

    /// Whether an event is ready to be dispatched. Waits for nobody.
    ///
    /// # Errors
    /// If epoll fails.
    pub fn is_ready(&self) -> Result<bool> {
        self.epoll.wait(Some(Instant::now()), None)
    }

    /// End the wait of the thread in `run_with_timeout`, or the next wait. From any thread.
    ///
    /// # Errors
    /// If the wake-up cannot be written.
    pub fn kick(&self) -> Result<()> {
        self.check_process()?;
        self.epoll.wake()
    }

    /// # Errors
    /// In a forked child, because the epoll set belongs to the parent.
    pub fn check_process(&self) -> Result<()> {
        self.process_tag.check("event manager")
    }

    /// A file descriptor for other loops to wait on, readable when an event is ready. It stays the
    /// same file for the life of the manager.
    ///
    /// # Errors
    /// If the process has no file descriptor left, or in a forked child.
    pub fn host_fd(&self) -> Result<RawFd> {
        self.check_process()?;
        let _registrations = self.registrations.lock();
        self.epoll.host_number()
    }

    /// Call `f` with the manager's lock held, as subscribers are called.
    pub fn locked<T>(&self, f: impl FnOnce() -> T) -> T {
        let _registrations = self.registrations.lock();
        f()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use event_manager::{EventOps, EventSet, Events, MutEventSubscriber, SubscriberId};
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[derive(Default)]
    struct Counter(Arc<AtomicUsize>);

    impl MutEventSubscriber for Counter {
        fn process(&mut self, _events: Events, _ops: &mut EventOps) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        fn init(&mut self, _ops: &mut EventOps) {}
    }

    fn manager() -> (EventManager, SubscriberId, Arc<AtomicUsize>) {
        let manager = EventManager::new().unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let id = manager.add_subscriber(Box::new(Counter(Arc::clone(&count))));
        (manager, id, count)
    }

    fn ready_eventfd() -> EventFd {
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        fd.write(1).unwrap();
        fd
    }

    #[test]
    fn events_are_dispatched_by_fd_and_counted() {
        let (manager, id, count) = manager();
        let fd = ready_eventfd();
        manager.add(id, Events::new(&fd, EventSet::IN)).unwrap();
        assert_eq!(manager.run().unwrap(), 1);
        assert_eq!(count.load(Ordering::SeqCst), 1);
        fd.read().unwrap();
        assert_eq!(manager.run_with_timeout(0).unwrap(), 0);
    }

    #[test]
    fn a_subscriber_added_while_another_thread_waits_is_dispatched() {
        let (manager, id, count) = manager();
        let manager = Arc::new(manager);
        let waiter = {
            let manager = Arc::clone(&manager);
            std::thread::spawn(move || manager.run().unwrap())
        };
        let fd = ready_eventfd();
        manager.add(id, Events::new(&fd, EventSet::IN)).unwrap();
        assert_eq!(waiter.join().unwrap(), 1);
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn an_fd_registered_twice_is_an_error() {
        let (manager, id, _) = manager();
        let fd = ready_eventfd();
        manager.add(id, Events::new(&fd, EventSet::IN)).unwrap();
        let error = manager.add(id, Events::new(&fd, EventSet::IN)).unwrap_err();
        assert!(error.detail.contains("already registered"), "{error}");
    }

    #[test]
    fn a_number_used_again_after_a_close_can_be_registered_again() {
        let (manager, id, count) = manager();
        let first = ready_eventfd();
        let number = first.as_raw_fd();
        manager.add(id, Events::new(&first, EventSet::IN)).unwrap();
        drop(first);
        let second = ready_eventfd();
        assert_eq!(second.as_raw_fd(), number, "the kernel gives the lowest free number");
        manager.add(id, Events::new(&second, EventSet::IN)).unwrap();
        assert_eq!(manager.run_with_timeout(1000).unwrap(), 1);
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_closed_fd_with_a_living_duplicate_is_gone_when_its_subscriber_goes() {
        let (manager, id, count) = manager();
        let first = ready_eventfd();
        let duplicate = first.try_clone().unwrap();
        manager.add(id, Events::new(&first, EventSet::IN)).unwrap();
        drop(first);
        manager.remove_subscriber(id).map(drop).unwrap();
        duplicate.write(1).unwrap();
        assert_eq!(manager.run_with_timeout(0).unwrap(), 0);
        assert_eq!(count.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn dropping_a_stale_registration_keeps_the_others_and_wakes_who_waits() {
        let (manager, id, count) = manager();
        let kept = EventFd::new(EFD_NONBLOCK).unwrap();
        manager.add(id, Events::new(&kept, EventSet::IN)).unwrap();
        let manager = Arc::new(manager);
        let waiter = {
            let manager = Arc::clone(&manager);
            std::thread::spawn(move || manager.run().unwrap())
        };
        let closed = EventFd::new(EFD_NONBLOCK).unwrap();
        let _duplicate = closed.try_clone().unwrap();
        let other = manager.add_subscriber(Box::new(Counter::default()));
        manager.add(other, Events::new(&closed, EventSet::IN)).unwrap();
        drop(closed);
        manager.remove_subscriber(other).map(drop).unwrap();
        let late = ready_eventfd();
        manager.add(id, Events::new(&late, EventSet::IN)).unwrap();
        assert_eq!(waiter.join().unwrap(), 1);
        late.read().unwrap();
        kept.write(1).unwrap();
        assert_eq!(manager.run_with_timeout(1000).unwrap(), 1);
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_host_goes_on_hearing_after_a_stale_registration_was_dropped() {
        let (manager, id, _) = manager();
        let kept = EventFd::new(EFD_NONBLOCK).unwrap();
        manager.add(id, Events::new(&kept, EventSet::IN)).unwrap();
        let host = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        host.ctl(ControlOperation::Add, manager.host_fd().unwrap(), event).unwrap();
        let is_ready = || host.wait(0, &mut [EpollEvent::default()]).unwrap() == 1;
        let gone = ready_eventfd();
        let _duplicate = gone.try_clone().unwrap();
        let other = manager.add_subscriber(Box::new(Counter::default()));
        manager.add(other, Events::new(&gone, EventSet::IN)).unwrap();
        assert!(is_ready());
        drop(gone);
        manager.remove_subscriber(other).map(drop).unwrap();
        manager.run_with_timeout(0).unwrap();
        assert!(!is_ready());
        kept.write(1).unwrap();
        assert!(is_ready());
    }

    #[test]
    fn a_regular_file_is_refused_with_the_reason() {
        let (manager, id, _) = manager();
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let error = manager.add(id, Events::new(&file, EventSet::IN)).unwrap_err();
        assert!(error.detail.contains("regular file"), "{error}");
    }

    #[test]
    fn a_number_closed_before_it_was_removed_can_be_added_again() {
        let (manager, id, _) = manager();
        for keep_duplicate in [false, true] {
            let fd = ready_eventfd();
            let number = fd.as_raw_fd();
            let _duplicate = keep_duplicate.then(|| fd.try_clone().unwrap());
            manager.add(id, Events::new(&fd, EventSet::IN)).unwrap();
            drop(fd);
            manager.remove(id, number).unwrap();
            assert_eq!(manager.run_with_timeout(0).unwrap(), 0);
            let again = ready_eventfd();
            // SAFETY: the number is this test's, and nothing owns it since it was closed.
            unsafe { libc::dup2(again.as_raw_fd(), number) };
            manager.add(id, Events::new_raw(number, EventSet::IN)).unwrap();
            assert_eq!(manager.run_with_timeout(1000).unwrap(), 1);
            manager.remove(id, number).unwrap();
        }
    }

    #[test]
    fn a_panicking_subscriber_is_an_error_of_the_run() {
        struct Panics;
        impl MutEventSubscriber for Panics {
            fn process(&mut self, _events: Events, _ops: &mut EventOps) {
                panic!("on purpose")
            }
            fn init(&mut self, _ops: &mut EventOps) {}
        }
        let manager = EventManager::new().unwrap();
        let id = manager.add_subscriber(Box::new(Panics));
        let fd = ready_eventfd();
        manager.add(id, Events::new(&fd, EventSet::IN)).unwrap();
        assert_eq!(manager.run_with_timeout(1000).unwrap_err().kind, ErrorKind::Event);
    }
}

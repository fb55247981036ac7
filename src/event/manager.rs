//! `EventManager`: the real `event_manager::EventManager` behind a lock, so that any thread may
//! change its subscribers while another waits. The wait happens outside the lock, on the manager's
//! own epoll set; only the dispatch of what is ready takes it. Subscribers run on the thread that
//! turns the loop.

use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventManager as Upstream, Events, SubscriberId, SubscriberOps};

use super::epoll_set::EpollSet;
use super::errors::{at_fd, event_error};
use super::inner::{Inner, ops};
use super::recorded::Recorded;
use super::subscriber::BoxedSubscriber;
use super::waits::Waits;
use crate::error::{Error, ErrorKind, Result};
use crate::process::Birthplace;
use crate::sync::{Mutex, rank};
use crate::trace::Recorders;

/// The event manager: subscribers, their file descriptors, and the loop that dispatches events to
/// them.
///
/// One thread at a time turns the loop. Subscribers are called with the manager's lock held: they
/// change what they watch through the `EventOps` they are given, and must not call the manager
/// itself.
pub struct EventManager {
    pub(super) inner: Mutex<Inner, rank::EventManager>,
    pub(super) epoll: EpollSet,
    birthplace: Birthplace,
    /// Goes up, under the lock, with each registration that is taken back.
    removals: Arc<AtomicU64>,
    pub(super) waits: Waits,
    /// Traces that see the loop's turns.
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
    /// When the process has no file descriptor left, or /proc is not mounted.
    pub fn new() -> Result<Self> {
        let mut upstream = Upstream::new().map_err(event_error)?;
        let epoll = EpollSet::of(&mut upstream)?;
        let inner = Mutex::new(Inner::new(upstream));
        let (birthplace, removals) = (Birthplace::here(), Arc::default());
        let (waits, recorders) = (Waits::default(), Recorders::default());
        Ok(Self { inner, epoll, birthplace, removals, waits, recorders })
    }

    /// Register a subscriber; its `init` runs before this returns.
    pub fn add_subscriber(&self, subscriber: BoxedSubscriber) -> SubscriberId {
        self.add_unrecorded(Box::new(Recorded(subscriber)))
    }

    /// The same for one whose events are no events of a trace.
    pub(crate) fn add_unrecorded(&self, subscriber: BoxedSubscriber) -> SubscriberId {
        self.inner.lock().upstream.add_subscriber(subscriber)
    }

    /// Unregister a subscriber with all its file descriptors and return it.
    ///
    /// # Errors
    /// When no subscriber has this id.
    pub fn remove_subscriber(&self, id: SubscriberId) -> Result<BoxedSubscriber> {
        self.check_process()?;
        let mut inner = self.inner.lock();
        ops(&mut inner.upstream, id)?;
        // One that its owner closed while a duplicate of it lives on cannot be forgotten by number,
        // and would reach upstream as an fd it does not know.
        let left = inner.unwatch_all(id);
        inner.stale.extend(left.into_iter().filter(|fd| !self.epoll.forget(*fd)));
        let subscriber = inner.upstream.remove_subscriber(id).map_err(event_error)?;
        self.count_removal();
        inner.closed.retain(|_, owner| *owner != id);
        // Without descriptors it is tried again before the next dispatch, which says so: the
        // subscriber is gone by now.
        let _ = inner.drop_stale(&self.epoll);
        Ok(subscriber)
    }

    /// Watch `events` for the subscriber, from any thread.
    ///
    /// # Errors
    /// When the id is unknown, the fd is watched already, or epoll refuses it.
    pub fn add(&self, id: SubscriberId, events: Events) -> Result<()> {
        self.check_process()?;
        let mut inner = self.inner.lock();
        let fd = events.fd();
        if inner.stale.contains(&fd) {
            inner.drop_stale(&self.epoll)?;
        }
        if let Some(owner) = inner.watched(fd).map(|watched| watched.owner) {
            if self.epoll.watches(fd) {
                let detail = format!("file descriptor {fd} is registered already");
                return Err(Error::new(ErrorKind::Event, "EventOps.add", detail));
            }
            // The number's former file was closed while it was registered: forget that one.
            self.count_removal();
            inner.forget_closed(&self.epoll, owner, fd)?;
        } else if let Some(owner) = inner.closed.get(&fd).copied() {
            inner.forget_closed(&self.epoll, owner, fd)?;
        }
        ops(&mut inner.upstream, id)?.add(events).map_err(|e| at_fd("EventOps.add", fd, e))?;
        inner.watch(id, events);
        Ok(())
    }

    /// Change what is watched of an fd that the subscriber has added.
    ///
    /// # Errors
    /// When the id is unknown, the fd is another subscriber's or nobody's, or epoll refuses the
    /// events.
    pub fn modify(&self, id: SubscriberId, events: Events) -> Result<()> {
        self.check_process()?;
        let mut inner = self.inner.lock();
        let fd = events.fd();
        inner.check_owner("EventOps.modify", id, fd)?;
        ops(&mut inner.upstream, id)?
            .modify(events)
            .map_err(|e| at_fd("EventOps.modify", fd, e))?;
        inner.watch(id, events);
        Ok(())
    }

    /// Have what is ready on `fd` reported again: an edge-triggered or one-shot event that was
    /// fetched and not handled. Does nothing for an fd that the subscriber does not watch any more.
    pub fn rearm(&self, id: SubscriberId, fd: RawFd) {
        let mut inner = self.inner.lock();
        let watched = inner.watched(fd).filter(|watched| watched.owner == id);
        if let (Some(watched), Ok(ops)) = (watched, ops(&mut inner.upstream, id)) {
            // Fails only for an fd that was closed since: then there is nothing to report.
            let _ = ops.modify(watched.events);
        }
    }

    /// Stop watching an fd that the subscriber has added. It may have been closed since.
    ///
    /// # Errors
    /// When the id is unknown or the fd is another subscriber's or nobody's.
    pub fn remove(&self, id: SubscriberId, fd: RawFd) -> Result<()> {
        self.check_process()?;
        let mut inner = self.inner.lock();
        inner.check_owner("EventOps.remove", id, fd)?;
        self.stop_watching(&mut inner, id, fd)
    }

    /// Stop watching an fd if its number was closed and a duplicate keeps the registration alive:
    /// nobody could handle the hang-up that it reports for ever. Says whether that was so.
    ///
    /// # Errors
    /// When the epoll set cannot be purged.
    pub fn remove_if_closed(&self, id: SubscriberId, fd: RawFd) -> Result<bool> {
        let mut inner = self.inner.lock();
        if inner.check_owner("", id, fd).is_err() || self.epoll.watches(fd) {
            return Ok(false);
        }
        self.stop_watching(&mut inner, id, fd).map(|()| true)
    }

    fn stop_watching(&self, inner: &mut Inner, id: SubscriberId, fd: RawFd) -> Result<()> {
        inner.unwatch(fd);
        self.count_removal();
        if ops(&mut inner.upstream, id)?.remove(Events::empty_raw(fd)).is_err() {
            inner.closed.insert(fd, id);
            inner.stale.push(fd);
            // As in `remove_subscriber`.
            let _ = inner.drop_stale(&self.epoll);
        }
        Ok(())
    }

    /// How often a registration was taken back. While it stays, every fetched event still has its
    /// receiver.
    #[must_use]
    pub fn removals(&self) -> u64 {
        // Acquire: who sees the count finds the removal done.
        self.removals.load(Ordering::Acquire)
    }

    /// The count of [`Self::removals`], for a subscriber to note when it is called.
    #[must_use]
    pub fn removal_counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.removals)
    }

    fn count_removal(&self) {
        // Release: pairs with the acquire in `removals`.
        self.removals.fetch_add(1, Ordering::Release);
    }

    /// Whether this subscriber still watches this fd: what a queued event is checked against.
    #[must_use]
    pub fn is_watching(&self, id: SubscriberId, fd: RawFd) -> bool {
        self.inner.lock().watched(fd).is_some_and(|watched| watched.owner == id)
    }

    /// From here on several threads may turn this loop at once. One of them may take the event, or
    /// the kick, that another waits for: so none waits for longer than 50 ms. Returns when no
    /// thread is in a longer wait any more.
    ///
    /// # Errors
    /// When the wake-up cannot be written.
    pub fn share(&self) -> Result<()> {
        self.waits.share(|| self.kick())
    }

    /// End the wait of whoever is in `run_with_timeout`, or the next one. From any thread.
    ///
    /// # Errors
    /// When the wake-up cannot be written.
    pub fn kick(&self) -> Result<()> {
        self.check_process()?;
        self.epoll.wake()
    }

    /// # Errors
    /// In a forked child: its epoll set is its parent's.
    pub fn check_process(&self) -> Result<()> {
        self.birthplace.check("event manager")
    }

    /// [`Self::run_with_timeout`] without waiting, not even for the manager's lock: none when
    /// another thread holds it, or when nothing was ready. `take` is called after the dispatch,
    /// under the lock still.
    ///
    /// # Errors
    /// When epoll fails.
    pub fn try_dispatch(&self, take: impl FnOnce()) -> Result<Option<usize>> {
        self.check_process()?;
        let Some(mut inner) = self.inner.try_lock() else {
            return Ok(None);
        };
        let Dispatched { events, woken } = self.dispatch(&mut inner)?;
        take();
        Ok((events > 0 || woken).then_some(events))
    }

    /// A number for other loops to wait on: readable when an event is ready. It is the same file as
    /// long as the manager lives.
    ///
    /// # Errors
    /// When the process has no file descriptor left, or in a forked child.
    pub fn host_fd(&self) -> Result<RawFd> {
        self.check_process()?;
        let _inner = self.inner.lock();
        self.epoll.host_number()
    }

    /// Under the lock that subscribers are called with.
    pub fn locked<T>(&self, f: impl FnOnce() -> T) -> T {
        let _inner = self.inner.lock();
        f()
    }

    /// Dispatch what is ready now, without waiting.
    pub(super) fn dispatch(&self, inner: &mut Inner) -> Result<Dispatched> {
        inner.drop_stale(&self.epoll)?;
        // Upstream's dispatch has an `unreachable!` for an fd it does not know. Stale registrations
        // are dropped when they arise; this keeps one that got through, or a panic in a subscriber,
        // from unwinding a run.
        match catch_unwind(AssertUnwindSafe(|| inner.upstream.run_with_timeout(0))) {
            Ok(result) => {
                let woken = self.epoll.take_woken();
                let events = result.map_err(event_error)?.saturating_sub(usize::from(woken));
                Ok(Dispatched { events, woken })
            }
            Err(_) => {
                let detail = "a subscriber panicked, or an event came for an unknown fd";
                Err(Error::new(ErrorKind::Event, "EventManager.run", detail))
            }
        }
    }
}

/// What a dispatch came to.
pub(super) struct Dispatched {
    pub(super) events: usize,
    /// Somebody wants the loop to look at something else.
    pub(super) woken: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventOps, EventSet, MutEventSubscriber};
    use std::os::fd::AsRawFd;
    use std::sync::atomic::AtomicUsize;
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
        assert!(error.detail.contains("registered already"), "{error}");
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
        let ghost = EventFd::new(EFD_NONBLOCK).unwrap();
        let _duplicate = ghost.try_clone().unwrap();
        let other = manager.add_subscriber(Box::new(Counter::default()));
        manager.add(other, Events::new(&ghost, EventSet::IN)).unwrap();
        drop(ghost);
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
            // SAFETY: a number of ours, put where the closed one was; nothing owns it.
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

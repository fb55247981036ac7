//! Adds, changes and removes subscribers of an `EventManager` and their registrations, from any
//! thread.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{Events, SubscriberId, SubscriberOps};

use super::errors::{at_fd, event_error};
use super::manager::EventManager;
use super::recorded::Recorded;
use super::registrations::{Registrations, ops};
use super::subscriber::BoxedSubscriber;
use crate::error::{Error, ErrorKind, Result};

impl EventManager {
    /// Register a subscriber; its `init` runs before this returns.
    pub fn add_subscriber(&self, subscriber: BoxedSubscriber) -> SubscriberId {
        self.add_unrecorded(Box::new(Recorded(subscriber)))
    }

    /// Register a subscriber whose events are not recorded in traces.
    pub(crate) fn add_unrecorded(&self, subscriber: BoxedSubscriber) -> SubscriberId {
        self.registrations.lock().upstream.add_subscriber(subscriber)
    }

    /// Unregister a subscriber with all its file descriptors and return it.
    ///
    /// # Errors
    /// If no subscriber has this id.
    pub fn remove_subscriber(&self, id: SubscriberId) -> Result<BoxedSubscriber> {
        self.check_process()?;
        let mut registrations = self.registrations.lock();
        ops(&mut registrations.upstream, id)?;
        // A file whose number was closed while a duplicate is open cannot be removed by number, and
        // its events would reach upstream with an unknown fd.
        let left = registrations.unwatch_all(id);
        registrations.stale.extend(left.into_iter().filter(|fd| !self.epoll.forget(*fd)));
        let subscriber = registrations.upstream.remove_subscriber(id).map_err(event_error)?;
        self.count_removal();
        registrations.closed.retain(|_, owner| *owner != id);
        // If no descriptor is available, the next dispatch tries again and reports an error. The
        // subscriber is already removed.
        let _ = registrations.drop_stale(&self.epoll);
        Ok(subscriber)
    }

    /// Watch `events` for the subscriber, from any thread.
    ///
    /// # Errors
    /// If the id is unknown, the fd is watched already, or epoll refuses it.
    pub fn add(&self, id: SubscriberId, events: Events) -> Result<()> {
        self.check_process()?;
        let mut registrations = self.registrations.lock();
        let fd = events.fd();
        if registrations.stale.contains(&fd) {
            registrations.drop_stale(&self.epoll)?;
        }
        if let Some(owner) = registrations.watched(fd).map(|watched| watched.owner) {
            if self.epoll.watches(fd) {
                let detail = format!("file descriptor {fd} is already registered");
                return Err(Error::new(ErrorKind::Event, "EventOps.add", detail));
            }
            // The number's previous file was closed while registered: remove that registration.
            self.count_removal();
            registrations.forget_closed(&self.epoll, owner, fd)?;
        } else if let Some(owner) = registrations.closed.get(&fd).copied() {
            registrations.forget_closed(&self.epoll, owner, fd)?;
        }
        ops(&mut registrations.upstream, id)?
            .add(events)
            .map_err(|e| at_fd("EventOps.add", fd, e))?;
        registrations.watch(id, events);
        Ok(())
    }

    /// Change the events of an fd that the subscriber has added.
    ///
    /// # Errors
    /// If the id is unknown, the fd is not registered by this subscriber, or epoll refuses the
    /// events.
    pub fn modify(&self, id: SubscriberId, events: Events) -> Result<()> {
        self.check_process()?;
        let mut registrations = self.registrations.lock();
        let fd = events.fd();
        registrations.check_owner("EventOps.modify", id, fd)?;
        ops(&mut registrations.upstream, id)?
            .modify(events)
            .map_err(|e| at_fd("EventOps.modify", fd, e))?;
        registrations.watch(id, events);
        Ok(())
    }

    /// Report the ready events of `fd` again, after an edge-triggered or one-shot event was fetched
    /// but not handled. Does nothing if the subscriber no longer watches the fd.
    pub fn rearm(&self, id: SubscriberId, fd: RawFd) {
        let mut registrations = self.registrations.lock();
        let watched = registrations.watched(fd).filter(|watched| watched.owner == id);
        if let (Some(watched), Ok(ops)) = (watched, ops(&mut registrations.upstream, id)) {
            // Fails only if the fd was closed meanwhile. Then there is nothing to report.
            let _ = ops.modify(watched.events);
        }
    }

    /// Stop watching an fd that the subscriber has added. The fd may already be closed.
    ///
    /// # Errors
    /// If the id is unknown or the fd is not registered by this subscriber.
    pub fn remove(&self, id: SubscriberId, fd: RawFd) -> Result<()> {
        self.check_process()?;
        let mut registrations = self.registrations.lock();
        registrations.check_owner("EventOps.remove", id, fd)?;
        self.stop_watching(&mut registrations, id, fd)
    }

    /// Stop watching an fd if its number was closed and a duplicate keeps the registration alive.
    /// Otherwise it would report a hang-up endlessly. Returns whether that was the case.
    ///
    /// # Errors
    /// If the epoll set cannot be purged.
    pub fn remove_if_closed(&self, id: SubscriberId, fd: RawFd) -> Result<bool> {
        let mut registrations = self.registrations.lock();
        if registrations.check_owner("", id, fd).is_err() || self.epoll.watches(fd) {
            return Ok(false);
        }
        self.stop_watching(&mut registrations, id, fd).map(|()| true)
    }

    fn stop_watching(
        &self,
        registrations: &mut Registrations,
        id: SubscriberId,
        fd: RawFd,
    ) -> Result<()> {
        registrations.unwatch(fd);
        self.count_removal();
        if ops(&mut registrations.upstream, id)?.remove(Events::empty_raw(fd)).is_err() {
            registrations.closed.insert(fd, id);
            registrations.stale.push(fd);
            // As in `remove_subscriber`.
            let _ = registrations.drop_stale(&self.epoll);
        }
        Ok(())
    }

    /// The number of removed registrations. While it is unchanged, every fetched event still has
    /// its subscriber.
    #[must_use]
    pub fn removals(&self) -> u64 {
        // Acquire: a thread that sees the count sees the removal.
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

    /// Whether this subscriber still watches this fd. Queued events are checked with this.
    #[must_use]
    pub fn is_watching(&self, id: SubscriberId, fd: RawFd) -> bool {
        self.registrations.lock().watched(fd).is_some_and(|watched| watched.owner == id)
    }
}

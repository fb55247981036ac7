//! The data of the event manager's lock: the crate's manager, and which subscriber watches which
//! descriptor. Used by the thread that holds the lock.

use std::collections::HashMap;
use std::os::fd::RawFd;

use event_manager::{EventManager as Upstream, EventOps, Events, SubscriberId, SubscriberOps};

use super::epoll_set::EpollSet;
use super::errors::{at_fd, event_error, refused};
use super::subscriber::BoxedSubscriber;
use crate::error::{Error, ErrorKind, Result};

pub(super) struct Registrations {
    pub(super) upstream: Upstream<BoxedSubscriber>,
    /// The registrations made by [`add`](super::EventManager::add), by fd.
    watched: HashMap<RawFd, Registration>,
    /// Their fds by owner, so that removing one subscriber does not visit the others.
    owned: HashMap<SubscriberId, Vec<RawFd>>,
    /// Numbers that were closed before they were removed. Upstream still assigns them to their
    /// owners.
    pub(super) closed: HashMap<RawFd, SubscriberId>,
    /// Numbers whose stale registrations could not be dropped yet, because no descriptor was
    /// available.
    pub(super) stale: Vec<RawFd>,
}

#[derive(Clone, Copy)]
pub(super) struct Registration {
    pub(super) owner: SubscriberId,
    pub(super) events: Events,
}

impl Registrations {
    pub(super) fn new(upstream: Upstream<BoxedSubscriber>) -> Self {
        let (watched, owned) = (HashMap::new(), HashMap::new());
        Self { upstream, watched, owned, closed: HashMap::new(), stale: Vec::new() }
    }

    /// The events and the owner of an fd.
    pub(super) fn watched(&self, fd: RawFd) -> Option<Registration> {
        self.watched.get(&fd).copied()
    }

    pub(super) fn watch(&mut self, owner: SubscriberId, events: Events) {
        if self.watched.insert(events.fd(), Registration { owner, events }).is_none() {
            self.owned.entry(owner).or_default().push(events.fd());
        }
    }

    pub(super) fn unwatch(&mut self, fd: RawFd) {
        let owner = self.watched.remove(&fd).map(|watched| watched.owner);
        let Some(owned) = owner.and_then(|owner| self.owned.get_mut(&owner)) else { return };
        if let Some(at) = owned.iter().position(|owned| *owned == fd) {
            owned.swap_remove(at);
        }
    }

    /// Remove all registrations of a subscriber. Returns their fds.
    pub(super) fn unwatch_all(&mut self, owner: SubscriberId) -> Vec<RawFd> {
        let fds = self.owned.remove(&owner).unwrap_or_default();
        for fd in &fds {
            self.watched.remove(fd);
        }
        fds
    }

    /// Drop the remaining stale registrations. Until then nothing may be dispatched, because
    /// upstream does not know a subscriber for their events.
    pub(super) fn drop_stale(&mut self, epoll: &EpollSet) -> Result<()> {
        if !self.stale.is_empty() {
            epoll.drop_stale(&self.stale)?;
            self.stale.clear();
        }
        Ok(())
    }

    pub(super) fn check_owner(&self, at: &str, id: SubscriberId, fd: RawFd) -> Result<()> {
        match self.watched.get(&fd) {
            Some(watched) if watched.owner == id => Ok(()),
            Some(_) => {
                let detail = format!("file descriptor {fd} belongs to another subscriber");
                Err(Error::new(ErrorKind::Event, at, detail))
            }
            None => {
                let detail = format!("file descriptor {fd} is not registered");
                Err(Error::new(ErrorKind::Event, at, detail))
            }
        }
    }

    /// Make upstream remove `fd`, whose registered file is gone and whose number now names another
    /// file.
    pub(super) fn forget_closed(
        &mut self,
        epoll: &EpollSet,
        owner: SubscriberId,
        fd: RawFd,
    ) -> Result<()> {
        epoll.drop_stale(&[fd])?;
        // Upstream removes an fd only if epoll deletes it, so it is registered there briefly.
        epoll.add_placeholder(fd).map_err(|e| refused("EventOps.add", fd, &e))?;
        self.unwatch(fd);
        self.closed.remove(&fd);
        ops(&mut self.upstream, owner)?
            .remove(Events::empty_raw(fd))
            .map_err(|e| at_fd("EventOps.add", fd, e))
    }
}

pub(super) fn ops(
    upstream: &mut Upstream<BoxedSubscriber>,
    id: SubscriberId,
) -> Result<EventOps<'_>> {
    upstream.event_ops(id).map_err(event_error)
}

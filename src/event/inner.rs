//! What the event manager's lock guards: the crate's manager, and who watches what. On whichever thread holds the lock.

use std::collections::HashMap;
use std::os::fd::RawFd;

use event_manager::{EventManager as Upstream, EventOps, Events, SubscriberId, SubscriberOps};

use super::BoxedSubscriber;
use super::epoll_set::EpollSet;
use super::errors::{at_fd, event_error, refused};
use crate::error::{Error, ErrorKind, Result};

pub(super) struct Inner {
    pub(super) upstream: Upstream<BoxedSubscriber>,
    /// What is watched, by fd, of what came through [`add`](super::EventManager::add)(super::EventManager::add).
    pub(super) watched: HashMap<RawFd, Watched>,
    /// What was closed before it was removed: upstream still takes these numbers for their owners'.
    pub(super) closed: HashMap<RawFd, SubscriberId>,
}

#[derive(Clone, Copy)]
pub(super) struct Watched {
    pub(super) owner: SubscriberId,
    pub(super) events: Events,
}

impl Inner {
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

    /// Make upstream forget `fd`, whose registered file is gone and whose number names another file now.
    pub(super) fn forget_closed(
        &mut self,
        epoll: &EpollSet,
        owner: SubscriberId,
        fd: RawFd,
    ) -> Result<()> {
        epoll.drop_ghosts(&[fd])?;
        // Upstream forgets an fd only when epoll deletes it: so epoll must have it for a moment.
        epoll.add_placeholder(fd).map_err(|e| refused("EventOps.add", fd, &e))?;
        self.watched.remove(&fd);
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

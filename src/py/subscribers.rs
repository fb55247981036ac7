//! The Python objects subscribed to an event manager, by token, with the sources they watch.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use event_manager::SubscriberId;
use parking_lot::Mutex;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::batch::{Drain, Ready, TokenHasher};
use super::event_fd::os_error;
use crate::error::{Error, ErrorKind};
use crate::event::EventManager;

type ByNumber<K, V> = HashMap<K, V, BuildHasherDefault<TokenHasher>>;

/// See the module. No Python code runs under its lock.
#[derive(Debug, Default)]
pub(super) struct Subscribers(Mutex<ByNumber<u64, Subscriber>>);

#[derive(Debug)]
pub(super) struct Subscriber {
    pub(super) id: SubscriberId,
    object: Py<PyAny>,
    /// Sources stay alive while they are registered.
    sources: HashMap<RawFd, Py<PyAny>>,
    drained: ByNumber<RawFd, Arc<dyn Drain>>,
}

impl Subscriber {
    pub(super) fn into_object(self) -> Py<PyAny> {
        self.object
    }
}

/// The subscriber an event is for, and what its source was drained of.
pub(super) struct Receiver {
    pub(super) object: Py<PyAny>,
    pub(super) count: Option<u64>,
}

/// What is kept of a source while it is registered.
pub(super) struct WatchedSource {
    pub(super) object: Option<Py<PyAny>>,
    pub(super) drain: Option<Arc<dyn Drain>>,
}

fn unknown_id(at: &str) -> PyErr {
    Error::new(ErrorKind::Event, at, "no subscriber has this id, or no longer").into()
}

impl Subscribers {
    pub(super) fn insert(&self, token: u64, id: SubscriberId, object: Py<PyAny>) {
        let (sources, drained) = (HashMap::new(), HashMap::default());
        self.0.lock().insert(token, Subscriber { id, object, sources, drained });
    }

    pub(super) fn remove(&self, token: u64) -> PyResult<Subscriber> {
        let subscriber = self.0.lock().remove(&token);
        subscriber.ok_or_else(|| unknown_id("EventManager.remove_subscriber"))
    }

    pub(super) fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// All of them, to be dropped outside the lock.
    pub(super) fn take_all(&self) -> impl Sized {
        std::mem::take(&mut *self.0.lock())
    }

    /// The crate's id of a subscriber.
    pub(super) fn id_of(&self, token: u64) -> Option<SubscriberId> {
        self.0.lock().get(&token).map(|subscriber| subscriber.id)
    }

    /// The crate's id of the subscriber that uses an `EventOps`.
    pub(super) fn known_id(&self, token: u64) -> PyResult<SubscriberId> {
        self.id_of(token).ok_or_else(|| unknown_id("EventOps"))
    }

    /// The subscriber an event is for, if it is still there, still watches the event's fd, and that is still ready
    /// where it is to be drained.
    pub(super) fn receiver(
        &self,
        py: Python<'_>,
        ready: &Ready,
        core: &EventManager,
    ) -> PyResult<Option<Receiver>> {
        let subscribers = self.0.lock();
        let Some(subscriber) = subscribers.get(&ready.token) else {
            return Ok(None);
        };
        let fd = ready.events.fd();
        if core.removals() != ready.removals && !core.is_watching(subscriber.id, fd) {
            return Ok(None);
        }
        let count = match subscriber.drained.get(&fd).map(|source| source.take()) {
            None => None,
            Some(Ok(count)) => Some(count),
            Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Some(Err(e)) => return Err(os_error(&e)),
        };
        Ok(Some(Receiver { object: subscriber.object.clone_ref(py), count }))
    }

    pub(super) fn keep_source(&self, token: u64, fd: RawFd, source: WatchedSource) {
        let WatchedSource { object, drain } = source;
        let mut former = None;
        if let Some(subscriber) = self.0.lock().get_mut(&token) {
            former = object.and_then(|object| subscriber.sources.insert(fd, object));
            match drain {
                Some(drain) => drop(subscriber.drained.insert(fd, drain)),
                None => drop(subscriber.drained.remove(&fd)),
            }
        }
        // Dropping it may run Python code: not under the lock.
        drop(former);
    }

    /// The source, to be dropped outside the lock.
    pub(super) fn forget_source(&self, token: u64, fd: RawFd) -> Option<Py<PyAny>> {
        let mut subscribers = self.0.lock();
        let subscriber = subscribers.get_mut(&token)?;
        subscriber.drained.remove(&fd);
        subscriber.sources.remove(&fd)
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Some(subscribers) = self.0.try_lock() else {
            return Ok(());
        };
        for subscriber in subscribers.values() {
            visit.call(&subscriber.object)?;
            subscriber.sources.values().try_for_each(|source| visit.call(source))?;
        }
        Ok(())
    }
}

//! The Python objects subscribed to an event manager, by token, with the sources they watch.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use event_manager::SubscriberId;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::context::Context;
use super::queue::{Drain, QueuedEvent, TokenHasher};
use crate::error::{Error, ErrorKind};
use crate::event::EventManager;
use crate::py::descriptor::os_error;
use crate::py::gil_cell::GilCell;

type ByNumber<K, V> = HashMap<K, V, BuildHasherDefault<TokenHasher>>;

/// See the module. No Python code runs while it is accessed.
#[derive(Debug, Default)]
pub(crate) struct Subscribers(GilCell<ByNumber<u64, Subscriber>>);

#[derive(Debug)]
pub(crate) struct Subscriber {
    pub(crate) id: SubscriberId,
    object: Py<PyAny>,
    /// The context in which it was added.
    context: Context,
    /// Sources stay alive while they are registered. Most subscribers have one.
    first: Option<(RawFd, RegisteredSource)>,
    others: ByNumber<RawFd, RegisteredSource>,
}

impl Subscriber {
    pub(crate) fn into_object(self) -> Py<PyAny> {
        self.object
    }
}

/// The subscriber of an event, and the count of its drained source.
pub(crate) struct Receiver<'py> {
    pub(crate) object: Bound<'py, PyAny>,
    pub(crate) context: Context,
    pub(crate) count: Option<u64>,
}

/// The data of a source while it is registered.
#[derive(Debug)]
pub(crate) struct RegisteredSource {
    pub(crate) object: Option<Py<PyAny>>,
    pub(crate) drain: Option<Arc<dyn Drain>>,
}

fn unknown_id(at: &str) -> PyErr {
    Error::new(ErrorKind::Event, at, "no subscriber has this id: it may have been removed").into()
}

impl Subscriber {
    fn new(id: SubscriberId, object: Py<PyAny>, context: Context) -> Self {
        Self { id, object, context, first: None, others: HashMap::default() }
    }

    fn source(&self, fd: RawFd) -> Option<&RegisteredSource> {
        match &self.first {
            Some((first, source)) if *first == fd => Some(source),
            _ => self.others.get(&fd),
        }
    }

    /// Store a source. Returns the previous one, to be dropped where Python code may run.
    fn keep(&mut self, fd: RawFd, source: RegisteredSource) -> Option<RegisteredSource> {
        match &mut self.first {
            Some((first, former)) if *first == fd => Some(std::mem::replace(former, source)),
            None if self.others.is_empty() => {
                self.first = Some((fd, source));
                None
            }
            _ => self.others.insert(fd, source),
        }
    }

    fn forget(&mut self, fd: RawFd) -> Option<RegisteredSource> {
        match self.first.take_if(|(first, _)| *first == fd) {
            Some((_, source)) => Some(source),
            None => self.others.remove(&fd),
        }
    }

    fn sources(&self) -> impl Iterator<Item = &RegisteredSource> {
        self.first.iter().map(|(_, source)| source).chain(self.others.values())
    }
}

impl Subscribers {
    pub(crate) fn insert(
        &self,
        py: Python<'_>,
        token: u64,
        id: SubscriberId,
        object: Py<PyAny>,
        context: Context,
    ) {
        let subscriber = Subscriber::new(id, object, context);
        self.0.with(py, |subscribers| subscribers.insert(token, subscriber));
    }

    pub(crate) fn remove(&self, py: Python<'_>, token: u64) -> PyResult<Subscriber> {
        let subscriber = self.0.with(py, |subscribers| subscribers.remove(&token));
        subscriber.ok_or_else(|| unknown_id("EventManager.remove_subscriber"))
    }

    pub(crate) fn len(&self, py: Python<'_>) -> usize {
        self.0.with(py, |subscribers| subscribers.len())
    }

    /// Take all of them, to be dropped where Python code may run.
    pub(crate) fn take_all(&self, py: Python<'_>) -> impl Sized + use<> {
        self.0.with(py, std::mem::take)
    }

    /// The crate's id of a subscriber.
    pub(crate) fn id_of(&self, py: Python<'_>, token: u64) -> Option<SubscriberId> {
        self.0.with(py, |subscribers| subscribers.get(&token).map(|subscriber| subscriber.id))
    }

    /// The crate's id of the subscriber that uses an `EventOps`.
    pub(crate) fn known_id(&self, py: Python<'_>, token: u64) -> PyResult<SubscriberId> {
        self.id_of(py, token).ok_or_else(|| unknown_id("EventOps"))
    }

    /// The subscriber of an event, if it still exists, still watches the event's fd, and a source
    /// to be drained is still ready.
    pub(crate) fn receiver<'py>(
        &self,
        py: Python<'py>,
        ready: &QueuedEvent,
        core: &EventManager,
    ) -> PyResult<Option<Receiver<'py>>> {
        self.0.with(py, |subscribers| {
            let Some(subscriber) = subscribers.get(&ready.token) else {
                return Ok(None);
            };
            let fd = ready.events.fd();
            if core.removals() != ready.removals && !core.is_watching(subscriber.id, fd) {
                return Ok(None);
            }
            let drain = subscriber.source(fd).and_then(|source| source.drain.as_ref());
            let count = match drain.map(|source| source.take()) {
                None => None,
                Some(Ok(count)) => Some(count),
                Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Some(Err(e)) => return Err(os_error(&e)),
            };
            let context = subscriber.context.clone_ref(py);
            Ok(Some(Receiver { object: subscriber.object.bind(py).clone(), context, count }))
        })
    }

    pub(crate) fn keep_source(
        &self,
        py: Python<'_>,
        token: u64,
        fd: RawFd,
        source: RegisteredSource,
    ) {
        let former = self.0.with(py, |subscribers| match subscribers.get_mut(&token) {
            Some(subscriber) => subscriber.keep(fd, source),
            None => Some(source),
        });
        // Dropped outside `with`, because that may run Python code.
        drop(former);
    }

    pub(crate) fn forget_source(&self, py: Python<'_>, token: u64, fd: RawFd) {
        let former = self.0.with(py, |subscribers| subscribers.get_mut(&token)?.forget(fd));
        drop(former);
    }

    /// For `__traverse__`.
    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        // SAFETY: the collector holds the GIL.
        let visited = unsafe {
            self.0.peek(|subscribers| {
                subscribers.values().try_for_each(|subscriber| {
                    visit.call(&subscriber.object)?;
                    visit.call(subscriber.context.object())?;
                    subscriber.sources().try_for_each(|source| visit.call(&source.object))
                })
            })
        };
        visited.unwrap_or(Ok(()))
    }
}

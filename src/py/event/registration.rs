//! Adds and removes subscribers, from any thread: `EventManager.add_subscriber`,
//! `remove_subscriber`, `event_ops`, `on`.

use std::sync::Arc;

use event_manager::EventSet;
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;

use super::context::Context;
use super::events::{PyEventOps, PySubscriberId};
use super::exit_handler::as_native_subscriber;
use super::manager::PyEventManager;
use super::queue::QueueingSubscriber;
use crate::error::{Error, ErrorKind};
use crate::py::depth;
use crate::py::ending::import;
use crate::py::returned::refuse_awaitable;

/// Call a new subscriber's `init(ops)`, on the thread that adds it.
fn init(
    manager: &Bound<'_, PyEventManager>,
    token: u64,
    subscriber: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let py = manager.py();
    depth::check()?;
    let ops = Bound::new(py, PyEventOps::new())?;
    let returned = {
        let _call = ops.get().begin(manager, token);
        subscriber.call_method1(intern!(py, "init"), (&ops,))
    };
    refuse_awaitable(&returned?, || Ok(format!("{}.init", subscriber.get_type().qualname()?)))
}

impl PyEventManager {
    fn add_python(slf: &Bound<'_, Self>, token: u64, object: &Bound<'_, PyAny>) -> PyResult<()> {
        let this = slf.get();
        for method in ["init", "process"] {
            if !object.getattr_opt(method)?.is_some_and(|method| method.is_callable()) {
                let class = object.get_type();
                return Err(PyTypeError::new_err(format!(
                    "a subscriber needs {method}(), which {} lacks",
                    class.name()?
                )));
            }
        }
        let collector = QueueingSubscriber {
            token,
            removals: this.core().removal_counter(),
            queue: Arc::clone(this.event_queue()),
        };
        let (kept, context) = (object.clone().unbind(), Context::copy_current(slf.py())?);
        let id = slf.py().detach(|| this.core().add_unrecorded(Box::new(collector)));
        this.subscribers().insert(slf.py(), token, id, kept, context);
        init(slf, token, object).inspect_err(|_| {
            // The caller should see the exception of init(), not another error.
            let _ = this.take_out(slf.py(), token);
        })
    }

    fn check_id(&self, at: &str, id: &PySubscriberId) -> PyResult<()> {
        if id.manager == self.number() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Event, at, "this id belongs to another event manager").into())
    }

    fn take_out(&self, py: Python<'_>, token: u64) -> PyResult<Py<PyAny>> {
        self.core().check_process()?;
        let subscriber = self.subscribers().remove(py, token)?;
        py.detach(|| self.core().remove_subscriber(subscriber.id).map(drop))?;
        Ok(subscriber.into_object())
    }
}

#[pymethods]
impl PyEventManager {
    /// Register an object with `init(ops)` and `process(events, ops)`. Calls its `init` before it
    /// returns.
    ///
    /// Raises:
    ///     TypeError: a method is missing.
    ///     Exception: the exception raised by `init`; the subscriber is not registered.
    pub(crate) fn add_subscriber(
        slf: &Bound<'_, Self>,
        subscriber: &Bound<'_, PyAny>,
    ) -> PyResult<PySubscriberId> {
        let this = slf.get();
        this.check()?;
        let token = this.new_token();
        match as_native_subscriber(subscriber)? {
            Some(native) => {
                let context = Context::copy_current(slf.py())?;
                let object = subscriber.clone().unbind();
                let id = slf.py().detach(|| this.core().add_subscriber(native));
                this.subscribers().insert(slf.py(), token, id, object, context);
            }
            None => Self::add_python(slf, token, subscriber)?,
        }
        Ok(PySubscriberId { manager: this.number(), token })
    }

    /// Unregister a subscriber and all its file descriptors, and return it.
    ///
    /// Raises:
    ///     EventError: this manager does not have the subscriber, or no longer has it.
    pub(crate) fn remove_subscriber(
        &self,
        py: Python<'_>,
        id: &PySubscriberId,
    ) -> PyResult<Py<PyAny>> {
        self.check()?;
        self.check_id("EventManager.remove_subscriber", id)?;
        self.take_out(py, id.token)
    }

    /// Return an `EventOps` for a subscriber. It is usable from any thread while the subscriber is
    /// registered.
    ///
    /// Raises:
    ///     EventError: this manager does not have the subscriber, or no longer has it.
    fn event_ops(slf: &Bound<'_, Self>, id: &PySubscriberId) -> PyResult<PyEventOps> {
        slf.get().check()?;
        slf.get().check_id("EventManager.event_ops", id)?;
        slf.get().subscribers().known_id(slf.py(), id.token)?;
        Ok(PyEventOps::lasting(slf.clone().unbind(), id.token))
    }

    /// Decorate a function to be called with each event of a source.
    ///
    /// `data` and `drain` are the same as for `Events`.
    ///
    /// The function gets the attributes `subscriber_id`, for `remove_subscriber`, and
    /// `subscriber_ids`, which has the ids of all its decorators. If the function cannot take
    /// attributes, as a bound method, the decorator returns a callable that has them.
    #[pyo3(
        signature = (source, event_set = EventSet::IN.bits(), data = 0, *, drain = false),
        text_signature = "($self, source, event_set=1, data=0, *, drain=False)"
    )]
    fn on<'py>(
        slf: &Bound<'py, Self>,
        source: &Bound<'py, PyAny>,
        event_set: u32,
        data: u32,
        drain: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        slf.get().check()?;
        let callbacks = import(slf.py(), "pyvmm.callbacks")?;
        callbacks.call_method1("on", (slf, source, event_set, data, drain))
    }

    /// Whether this manager has removed the subscriber with this id.
    fn _has_removed(&self, py: Python<'_>, id: &PySubscriberId) -> bool {
        id.manager == self.number() && self.subscribers().id_of(py, id.token).is_none()
    }
}

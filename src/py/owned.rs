//! Access to the data of the binding's objects. It is refused in a forked child and while the
//! interpreter finalizes. Another thread may have held any lock at the fork, or may have been put
//! to sleep in the middle of a run. Access is therefore refused before any lock is taken, and data
//! that cannot be accessed is not dropped.

use std::mem::ManuallyDrop;
use std::sync::OnceLock;

use super::ending;
use crate::error::{Error, ErrorKind, Result};
use crate::process::ProcessTag;

/// Data that belongs to the process that created it, while its interpreter runs.
#[derive(Debug)]
pub(super) struct Owned<T> {
    process_tag: ProcessTag,
    /// The name of the data, for errors.
    what: &'static str,
    /// Empty before it is filled, and after it is taken.
    value: ManuallyDrop<OnceLock<T>>,
}

impl<T> Owned<T> {
    pub(super) fn new(what: &'static str, value: T) -> Self {
        let value = ManuallyDrop::new(OnceLock::from(value));
        Self { process_tag: ProcessTag::current(), what, value }
    }

    /// An empty value that is filled later.
    pub(super) fn vacant(what: &'static str) -> Self {
        let value = ManuallyDrop::new(OnceLock::new());
        Self { process_tag: ProcessTag::current(), what, value }
    }

    fn made_already(&self) -> Error {
        Error::new(ErrorKind::State, self.what, "it is already initialized")
    }

    /// Check that it is still empty.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it is already filled, in a forked child, and while the interpreter
    /// finalizes.
    pub(super) fn check_vacant(&self) -> Result<()> {
        self.process_tag.check(self.what)?;
        ending::check()?;
        self.value.get().map_or(Ok(()), |_| Err(self.made_already()))
    }

    /// Fill it.
    ///
    /// # Errors
    /// As [`Self::check_vacant`].
    pub(super) fn fill(&self, value: T) -> Result<()> {
        self.check_vacant()?;
        self.value.set(value).map_err(|_| self.made_already())
    }

    /// Access the data.
    ///
    /// # Errors
    /// [`ErrorKind::State`] in a forked child, and while the interpreter finalizes.
    pub(super) fn get(&self) -> Result<&T> {
        self.process_tag.check(self.what)?;
        ending::check()?;
        let vacant = || {
            let error = Error::new(ErrorKind::State, self.what, "it is not initialized");
            error.hint("a subclass's __init__ calls super().__init__() before it uses the object")
        };
        self.value.get().ok_or_else(vacant)
    }

    /// The data, to be compared only. The caller checks the process.
    pub(super) fn known(&self) -> Option<&T> {
        self.value.get()
    }

    /// # Errors
    /// [`ErrorKind::State`] in a forked child.
    pub(super) fn check_process(&self) -> Result<()> {
        self.process_tag.check(self.what)
    }

    /// Access the data where no error can be reported: in a finalizer, `repr`, or the garbage
    /// collector.
    pub(super) fn peek(&self) -> Option<&T> {
        if self.process_tag.is_forked_child() || ending::is_ending() {
            return None;
        }
        ending::guard_thread();
        self.value.get()
    }

    /// Take the data to drop it. None if it must not be dropped.
    pub(super) fn take(&mut self) -> Option<T> {
        if self.process_tag.is_forked_child() || ending::is_ending() {
            return None;
        }
        self.value.take()
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

//! What an object of the binding reaches, and the one way to it: not from a forked child, and not
//! while the interpreter ends.
//!
//! Another thread may have held any lock at the fork, or may have been put to sleep in the middle
//! of a run. So the way is refused before a lock is touched; and what cannot be reached is not
//! dropped either.

use std::mem::ManuallyDrop;
use std::sync::OnceLock;

use super::ending;
use crate::error::{Error, ErrorKind, Result};
use crate::process::ProcessTag;

/// Something that belongs to the process that made it, for as long as its interpreter lives.
#[derive(Debug)]
pub(super) struct Owned<T> {
    process_tag: ProcessTag,
    /// What it is, for the error.
    what: &'static str,
    /// Empty until it is made, and once it was taken.
    value: ManuallyDrop<OnceLock<T>>,
}

impl<T> Owned<T> {
    pub(super) fn new(what: &'static str, value: T) -> Self {
        let value = ManuallyDrop::new(OnceLock::from(value));
        Self { process_tag: ProcessTag::current(), what, value }
    }

    /// For something that is made later.
    pub(super) fn vacant(what: &'static str) -> Self {
        let value = ManuallyDrop::new(OnceLock::new());
        Self { process_tag: ProcessTag::current(), what, value }
    }

    fn made_already(&self) -> Error {
        Error::new(ErrorKind::State, self.what, "it is already initialized")
    }

    /// Whether it is still to be made.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where it has been, in a forked child, and where the interpreter ends.
    pub(super) fn check_vacant(&self) -> Result<()> {
        self.process_tag.check(self.what)?;
        ending::check()?;
        self.value.get().map_or(Ok(()), |_| Err(self.made_already()))
    }

    /// Put in what has been made.
    ///
    /// # Errors
    /// As [`Self::check_vacant`].
    pub(super) fn fill(&self, value: T) -> Result<()> {
        self.check_vacant()?;
        self.value.set(value).map_err(|_| self.made_already())
    }

    /// The thing itself.
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

    /// The same for what reports no error: a finalizer, a representation, the garbage collector.
    pub(super) fn peek(&self) -> Option<&T> {
        if self.process_tag.is_forked_child() || ending::is_ending() {
            return None;
        }
        ending::guard_thread();
        self.value.get()
    }

    /// Take it out to be dropped; none where it must not be.
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

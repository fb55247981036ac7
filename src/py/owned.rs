//! What an object of the binding reaches, and the one way to it: not from a forked child, and not
//! while the interpreter ends.
//!
//! Another thread may have held any lock at the fork, or may have been put to sleep in the middle
//! of a run. So the way is refused before a lock is touched; and what cannot be reached is not
//! dropped either.

use std::mem::ManuallyDrop;

use super::ending;
use crate::error::{Error, ErrorKind, Result};
use crate::process::ProcessTag;

/// Something that belongs to the process that made it, for as long as its interpreter lives.
#[derive(Debug)]
pub(super) struct Owned<T> {
    process_tag: ProcessTag,
    /// What it is, for the error.
    what: &'static str,
    /// None once it was taken.
    value: ManuallyDrop<Option<T>>,
}

impl<T> Owned<T> {
    pub(super) fn new(what: &'static str, value: T) -> Self {
        Self { process_tag: ProcessTag::current(), what, value: ManuallyDrop::new(Some(value)) }
    }

    /// The thing itself.
    ///
    /// # Errors
    /// [`ErrorKind::State`] in a forked child, and where the interpreter ends.
    pub(super) fn get(&self) -> Result<&T> {
        self.process_tag.check(self.what)?;
        ending::check()?;
        let gone = || Error::new(ErrorKind::State, self.what, "it is closed");
        self.value.as_ref().ok_or_else(gone)
    }

    /// The same for what reports no error: a finalizer, a representation, the garbage collector.
    pub(super) fn peek(&self) -> Option<&T> {
        if self.process_tag.is_forked_child() || ending::is_ending() {
            return None;
        }
        ending::guard_thread();
        self.value.as_ref()
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

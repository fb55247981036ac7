//! The error type of the crate: its kind, its place, a description, the errno, and a hint. The
//! binding maps each kind to one Python exception class.

use std::fmt;

/// What went wrong, in the categories that a caller can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A value of the configuration cannot be used.
    Config,
    /// This host has no usable KVM.
    Unavailable,
    /// KVM refused a call.
    Kvm,
    /// A guest address is outside guest memory.
    Memory,
    /// A kernel, initrd or code cannot be loaded.
    Boot,
    /// The call is not possible in this state.
    State,
    /// The object is closed. Created by [`Error::closed`].
    Closed,
    /// The event manager or an event source refused a call.
    Event,
    /// Input or output of a stream failed.
    Io,
    /// A snapshot cannot be used: it is damaged, of another machine, or has changed.
    Snapshot,
    /// A wait has lasted for as long as it may.
    Timeout,
}

/// An error of this crate. `at` names the place: a configuration key, an ioctl, an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The category.
    pub kind: ErrorKind,
    /// The configuration key, system call or address.
    pub at: String,
    /// What happened, in a sentence without a full stop.
    pub detail: String,
    /// The operating system's error number, if there is one.
    pub errno: Option<i32>,
    /// What to do about it, if known.
    pub hint: Option<&'static str>,
}

/// A result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error at a place.
    pub fn new(kind: ErrorKind, at: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { kind, at: at.into(), detail: detail.into(), errno: None, hint: None }
    }

    /// The error of every call on something closed: "the machine is closed".
    pub fn closed(what: &str) -> Self {
        Self::new(ErrorKind::Closed, what, format!("the {what} is closed"))
    }

    /// The same error with what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
        self
    }

    /// An error of a system call.
    pub fn os(kind: ErrorKind, at: impl Into<String>, error: &std::io::Error) -> Self {
        let errno = error.raw_os_error();
        Self { errno, ..Self::new(kind, at, error.to_string()) }
    }

    /// An error of a KVM ioctl; `at` names the ioctl.
    pub fn kvm(at: &str, error: kvm_ioctls::Error) -> Self {
        Self::os(ErrorKind::Kvm, at, &std::io::Error::from_raw_os_error(error.errno()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind != ErrorKind::Closed {
            write!(f, "{}: ", self.at)?;
        }
        f.write_str(&self.detail)?;
        match self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_place_detail_and_hint() {
        let error =
            Error::new(ErrorKind::Config, "memory.size_mib", "0 is too small").hint("use 1");
        assert_eq!(error.to_string(), "memory.size_mib: 0 is too small; use 1");
    }

    #[test]
    fn what_is_closed_is_said_in_one_sentence() {
        let error = Error::closed("machine");
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Closed, "machine"));
        assert_eq!(error.to_string(), "the machine is closed");
    }

    #[test]
    fn a_system_error_keeps_its_number() {
        let error = Error::kvm("KVM_RUN", kvm_ioctls::Error::new(libc::EFAULT));
        assert_eq!(error.errno, Some(libc::EFAULT));
        assert!(error.to_string().starts_with("KVM_RUN: Bad address"));
    }
}

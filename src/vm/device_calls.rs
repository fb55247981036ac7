//! The machines whose devices this thread is quiescing, saving, restoring or resuming. If such a
//! device paused, snapshotted or reset its own machine, it would be called again without end, so
//! these calls are refused. Any thread; the record is thread-local.

use std::cell::RefCell;

use crate::error::{Error, ErrorKind, Result};

thread_local! {
    static CALLED: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// While it lives, its thread calls devices of a machine.
#[derive(Debug)]
pub(crate) struct DeviceCalls(());

impl DeviceCalls {
    /// `machine` is the machine's `KvmVm::id`.
    pub(super) fn begin(machine: usize) -> Self {
        // Fails while the thread ends, when it makes no other call.
        let _ = CALLED.try_with(|called| called.borrow_mut().push(machine));
        Self(())
    }
}

impl Drop for DeviceCalls {
    fn drop(&mut self) {
        let _ = CALLED.try_with(|called| called.borrow_mut().pop());
    }
}

/// # Errors
/// [`ErrorKind::State`] on a thread that calls devices of this machine.
pub(super) fn check(machine: usize, what: &str) -> Result<()> {
    let is_called = CALLED.try_with(|called| called.borrow().contains(&machine));
    if !is_called.unwrap_or(false) {
        return Ok(());
    }
    let detail = "a device of this machine is being quiesced, saved, restored or resumed";
    let error = Error::new(ErrorKind::State, what, detail);
    Err(error.hint("call it after the device's method has returned"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_refused_for_the_machines_whose_devices_it_calls() {
        let outer = DeviceCalls::begin(1);
        {
            let _inner = DeviceCalls::begin(2);
            assert_eq!(check(2, "pause").unwrap_err().kind, ErrorKind::State);
            assert_eq!(check(1, "pause").unwrap_err().at, "pause");
            check(3, "pause").unwrap();
            std::thread::spawn(|| check(1, "pause").unwrap()).join().unwrap();
        }
        check(2, "pause").unwrap();
        drop(outer);
        check(1, "pause").unwrap();
    }
}

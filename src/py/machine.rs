//! The KVM side of a `KvmVm`, until it is closed. The threads that close it wait for each other.

use std::sync::Arc;

use pyo3::prelude::*;

use super::interrupt;
use super::kick_handler::Handler;
use super::registry::Close;
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::sync::{Condvar, Mutex, rank};
use crate::vcpu::{VmRunState, is_thread_of};
use crate::vm::KvmVm;

/// The machine, until it is closed.
#[derive(Debug)]
pub(super) struct Machine {
    state: Mutex<Open, rank::Machine>,
    /// Signalled when a closing thread has released it.
    closed: Condvar,
    /// Identifies the threads of its vCPUs.
    id: usize,
}

#[derive(Debug)]
struct Open {
    /// None once it is closed.
    vm: Option<Arc<KvmVm<Handler>>>,
    /// The number of `close` calls that may still hold it.
    closers: usize,
}

impl Machine {
    pub(super) fn new(vm: KvmVm<Handler>) -> Self {
        let id = vm.id();
        let open = Open { vm: Some(Arc::new(vm)), closers: 0 };
        Self { state: Mutex::new(open), closed: Condvar::new(), id }
    }

    pub(super) fn vm(&self) -> Option<Arc<KvmVm<Handler>>> {
        self.state.lock().vm.clone()
    }

    pub(super) fn get(&self) -> Result<Arc<KvmVm<Handler>>> {
        self.vm().ok_or_else(|| Error::closed("machine"))
    }

    pub(super) fn memory(&self) -> Result<GuestMemory> {
        Ok(self.get()?.memory().clone())
    }

    pub(super) fn state(&self) -> VmRunState {
        self.get().map_or(VmRunState::Closed, |vm| vm.state())
    }
}

impl Machine {
    pub(super) fn is_closing(&self) -> bool {
        self.vm().is_some_and(|vm| vm.is_closing())
    }

    pub(super) fn close_interruptibly(self: &Arc<Self>, py: Python<'_>) -> PyResult<()> {
        let others_close = self.state.lock().closers > 0 && !is_thread_of(self.id);
        let is_busy = self.vm().is_some_and(|vm| {
            vm.begin_close();
            vm.is_busy()
        });
        if others_close || is_busy {
            let this = Arc::clone(self);
            interrupt::waiting(py, move || this.close())
        } else {
            py.detach(|| self.close());
            Ok(())
        }
    }
}

impl Close for Machine {
    fn stop(&self) {
        // There is no loop to drop.
    }

    fn is_open(&self) -> bool {
        self.vm().is_some()
    }

    fn close(&self) {
        let vm = {
            let mut state = self.state.lock();
            if state.vm.as_ref().is_some_and(|vm| vm.is_forked_child()) {
                return;
            }
            state.closers += 1;
            state.vm.clone()
        };
        vm.iter().for_each(|vm| vm.close());
        // Taken only after it is closed, because another closing thread waits for the same.
        let last = self.state.lock().vm.take();
        drop((vm, last));
        let mut state = self.state.lock();
        state.closers -= 1;
        self.closed.notify_all();
        // The others wait for the callback that closes it.
        while state.closers > 0 && !is_thread_of(self.id) {
            self.closed.wait(&mut state);
        }
    }
}

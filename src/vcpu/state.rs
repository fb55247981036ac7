//! The run state of a machine: a pure state machine, and the shared state with a condition
//! variable.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::limit::deadline_of;
use crate::poll::wait_for_either;
use crate::sync::{Condvar, Mutex, rank};

/// The run state of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmRunState {
    /// Built; its guest has not run yet.
    Created,
    /// Its vCPUs are running.
    Running,
    /// The host has paused the vCPUs or ended the last run; they can continue. The guest may have
    /// ended just before the pause.
    Paused,
    /// The guest has ended. Its memory can still be read, and the machine can be reset.
    Exiting,
    /// Everything is released.
    Closed,
}

impl VmRunState {
    /// Every state.
    pub const ALL: [Self; 5] =
        [Self::Created, Self::Running, Self::Paused, Self::Exiting, Self::Closed];

    /// Whether a machine may go from this state to the next. This is the whole table, except for a
    /// reset ([`RunState::revive`]).
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        match self {
            Self::Created => matches!(next, Self::Running | Self::Closed),
            Self::Running => matches!(next, Self::Paused | Self::Exiting),
            Self::Paused => matches!(next, Self::Running | Self::Exiting | Self::Closed),
            Self::Exiting => matches!(next, Self::Closed),
            Self::Closed => false,
        }
    }

    /// The state's name, as Python's `VmRunState` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Exiting => "exiting",
            Self::Closed => "closed",
        }
    }
}

/// The state that the machine's threads share.
#[derive(Debug)]
pub struct RunState {
    state: Mutex<VmRunState, rank::RunState>,
    changed: Condvar,
    /// Written at each change, for threads that also wait for other file descriptors.
    wakers: Mutex<Vec<Arc<EventFd>>, rank::RunStateWakers>,
}

impl Default for RunState {
    fn default() -> Self {
        Self::at(VmRunState::Created)
    }
}

impl RunState {
    fn at(state: VmRunState) -> Self {
        Self { state: Mutex::new(state), changed: Condvar::new(), wakers: Mutex::default() }
    }

    /// The current state.
    #[must_use]
    pub fn get(&self) -> VmRunState {
        *self.state.lock()
    }

    /// Enter `next` if the table allows it, and wake waiting threads. Returns the previous state.
    ///
    /// # Errors
    /// If the table does not allow it. The error is the current state, which does not change.
    pub fn set_and_notify(&self, next: VmRunState) -> Result<VmRunState, VmRunState> {
        let mut state = self.state.lock();
        let before = *state;
        if !before.may_become(next) {
            return Err(before);
        }
        *state = next;
        self.changed.notify_all();
        // Fails if the counter is at its maximum: it is readable already then.
        self.wakers.lock().iter().for_each(|fd| drop(fd.write(1)));
        Ok(before)
    }

    /// After a reset of an ended guest: from `Exiting` to `Paused`. Otherwise nothing changes.
    pub fn revive(&self) {
        self.change(VmRunState::Exiting, VmRunState::Paused);
    }

    /// Mark a machine as one that has not run: from `Paused` to `Created`. Otherwise nothing
    /// changes.
    pub fn renew(&self) {
        self.change(VmRunState::Paused, VmRunState::Created);
    }

    fn change(&self, from: VmRunState, to: VmRunState) {
        let mut state = self.state.lock();
        if *state == from {
            *state = to;
            self.changed.notify_all();
            self.wakers.lock().iter().for_each(|fd| drop(fd.write(1)));
        }
    }

    /// Wait until the state is one of `wanted`, and return it; `None` after the timeout.
    pub fn wait_for(&self, wanted: &[VmRunState], timeout: Option<Duration>) -> Option<VmRunState> {
        let deadline = deadline_of(timeout);
        let mut state = self.state.lock();
        while !wanted.contains(&state) {
            match deadline {
                None => self.changed.wait(&mut state),
                Some(deadline) if self.changed.wait_until(&mut state, deadline) => {
                    return wanted.contains(&state).then_some(*state);
                }
                Some(_) => {}
            }
        }
        Some(*state)
    }

    /// [`Self::wait_for`] with a deadline; also returns if `interrupt` becomes readable or a signal
    /// arrives.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn wait_for_or(
        &self,
        wanted: &[VmRunState],
        deadline: Option<Instant>,
        interrupt: Option<RawFd>,
    ) -> io::Result<Option<VmRunState>> {
        let waker = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        self.wakers.lock().push(Arc::clone(&waker));
        let mut is_woken = true;
        while is_woken && !wanted.contains(&self.get()) {
            // Fails if the counter is zero.
            let _ = waker.read();
            if wanted.contains(&self.get()) {
                break;
            }
            is_woken = wait_for_either([waker.as_raw_fd(), interrupt.unwrap_or(-1)], deadline)
                .is_ok_and(|[is_woken, _]| is_woken);
        }
        self.wakers.lock().retain(|fd| !Arc::ptr_eq(fd, &waker));
        let state = self.get();
        Ok(wanted.contains(&state).then_some(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn only_the_tables_transitions_happen() {
        for from in VmRunState::ALL {
            for to in VmRunState::ALL {
                let run_state = RunState::at(from);
                let result = run_state.set_and_notify(to);
                assert_eq!(result.is_ok(), from.may_become(to), "{from:?} to {to:?}");
                let now = if from.may_become(to) { to } else { from };
                assert_eq!(run_state.get(), now);
            }
        }
    }

    #[test]
    fn a_closed_machine_stays_closed() {
        assert!(VmRunState::ALL.iter().all(|next| !VmRunState::Closed.may_become(*next)));
    }

    #[test]
    fn only_a_guest_that_has_ended_is_revived() {
        for from in VmRunState::ALL {
            let run_state = RunState::at(from);
            run_state.revive();
            let is_ended = from == VmRunState::Exiting;
            assert_eq!(run_state.get(), if is_ended { VmRunState::Paused } else { from });
        }
    }

    #[test]
    fn a_waiter_is_told() {
        let run_state = Arc::new(RunState::default());
        let waiter = {
            let run_state = Arc::clone(&run_state);
            std::thread::spawn(move || run_state.wait_for(&[VmRunState::Running], None))
        };
        run_state.set_and_notify(VmRunState::Running).unwrap();
        assert_eq!(waiter.join().unwrap(), Some(VmRunState::Running));
        assert_eq!(run_state.wait_for(&[VmRunState::Closed], Some(Duration::ZERO)), None);
    }

    #[test]
    fn a_waiter_is_told_or_interrupted() {
        let run_state = Arc::new(RunState::default());
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let fd = Some(interrupt.as_raw_fd());
        let waiter = {
            let run_state = Arc::clone(&run_state);
            std::thread::spawn(move || run_state.wait_for_or(&[VmRunState::Running], None, fd))
        };
        run_state.set_and_notify(VmRunState::Running).unwrap();
        assert_eq!(waiter.join().unwrap().unwrap(), Some(VmRunState::Running));
        interrupt.write(1).unwrap();
        assert_eq!(run_state.wait_for_or(&[VmRunState::Closed], None, fd).unwrap(), None);
        assert!(run_state.wakers.lock().is_empty());
    }
}

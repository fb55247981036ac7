//! The run state of a machine: a pure state machine, and the word with a condvar that threads share.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Where a machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmRunState {
    /// Built, its guest has not run.
    Created,
    /// Its vCPUs are running.
    Running,
    /// The host has paused the vCPUs or ended the last run; they go on from there. A guest may turn out to have ended
    /// while the pause came.
    Paused,
    /// The guest has ended; its memory can still be read, and a reset brings it back.
    Exiting,
    /// Everything is released.
    Closed,
}

impl VmRunState {
    /// Every state.
    pub const ALL: [Self; 5] =
        [Self::Created, Self::Running, Self::Paused, Self::Exiting, Self::Closed];

    /// Whether a machine may go from this state to the next: the whole table, but for a reset ([`RunState::revive`]).
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
    state: Mutex<VmRunState>,
    changed: Condvar,
}

impl Default for RunState {
    fn default() -> Self {
        Self { state: Mutex::new(VmRunState::Created), changed: Condvar::new() }
    }
}

impl RunState {
    /// The state now.
    #[must_use]
    pub fn get(&self) -> VmRunState {
        *self.state.lock()
    }

    /// Enter `next` if the table allows it and tell who waits. Returns the state before.
    ///
    /// # Errors
    /// With the present state, when the table does not allow it; nothing changes then.
    pub fn set_and_notify(&self, next: VmRunState) -> Result<VmRunState, VmRunState> {
        let mut state = self.state.lock();
        let before = *state;
        if !before.may_become(next) {
            return Err(before);
        }
        *state = next;
        self.changed.notify_all();
        Ok(before)
    }

    /// A guest that had ended has been brought back to what it was: from `Exiting` to `Paused`. Else nothing.
    pub fn revive(&self) {
        let mut state = self.state.lock();
        if *state == VmRunState::Exiting {
            *state = VmRunState::Paused;
            self.changed.notify_all();
        }
    }

    /// Wait until the state is one of `wanted`; the state then, or none when the time passed first.
    pub fn wait_for(&self, wanted: &[VmRunState], timeout: Option<Duration>) -> Option<VmRunState> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state.lock();
        while !wanted.contains(&state) {
            match deadline {
                None => self.changed.wait(&mut state),
                Some(deadline) if self.changed.wait_until(&mut state, deadline).timed_out() => {
                    return wanted.contains(&state).then_some(*state);
                }
                Some(_) => {}
            }
        }
        Some(*state)
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
                let run_state = RunState { state: Mutex::new(from), changed: Condvar::new() };
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
            let run_state = RunState { state: Mutex::new(from), changed: Condvar::new() };
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
}

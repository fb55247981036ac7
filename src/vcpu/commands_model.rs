//! A model that runs the commands of `commands.rs` in every order of their steps: `make loom`. If a
//! command or an answer is lost, a thread waits forever, and loom reports a deadlock.

use std::sync::Arc;

use loom::sync::{Condvar, Mutex, MutexGuard};
use loom::thread::{JoinHandle, spawn};

use super::commands::{Commands, Next, VcpuCommand};

/// What the guest does when it is entered.
#[derive(Clone, Copy, PartialEq)]
enum Guest {
    /// It runs until it is stopped.
    Spins,
    /// It ends by itself.
    Ends,
}

/// A guest that counts what is done with it.
#[derive(Debug, Default)]
struct Vcpu {
    entries: usize,
    completions: usize,
}

/// What `handle.rs` and `own_thread.rs` put around the commands. The kick has its own model, so
/// the stop word is under the lock here.
struct Handle {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    commands: Commands<Vcpu>,
    has_thread: bool,
    is_stopped: bool,
    is_in_guest: bool,
    /// Whether a thread that is idle has been so for long enough.
    is_late: bool,
}

impl Handle {
    fn new() -> Arc<Self> {
        let state = State {
            commands: Commands::new(Vcpu::default()),
            has_thread: false,
            is_stopped: false,
            is_in_guest: false,
            is_late: false,
        };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Wait for a change. If none comes, loom reports a deadlock.
    fn wait_until(&self, is_over: impl Fn(&State) -> bool) {
        let mut state = self.lock();
        while !is_over(&state) {
            state = self.changed.wait(state).unwrap();
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// Begin a run, with a new thread if there is none or if another one `is_wanted`.
    fn begin(self: &Arc<Self>, guest: Guest, is_wanted: bool) -> Option<JoinHandle<()>> {
        let mut state = self.lock();
        state.commands.begin_run();
        if state.has_thread && !is_wanted {
            return None;
        }
        let number = state.commands.next_thread();
        let handle = Arc::clone(self);
        let thread = spawn(move || handle.serve(number, guest));
        state.commands.replace_thread(number);
        state.has_thread = true;
        self.changed.notify_all();
        Some(thread)
    }

    fn run(&self) {
        self.change(|state| {
            let is_stopped = &mut state.is_stopped;
            state.commands.run(|| *is_stopped = false)
        });
    }

    fn stop(&self, command: VcpuCommand) {
        self.change(|state| {
            state.commands.stop(command);
            state.is_stopped = true;
        });
    }

    fn pause(&self) {
        let counted = self.lock().commands.transitions;
        self.stop(VcpuCommand::Park);
        self.wait_until(|state| {
            state.commands.is_at_rest(false) || state.commands.transitions != counted
        });
    }

    fn resume(&self) {
        if self.lock().commands.runs_on_resume {
            self.run();
        }
    }

    fn end_run(&self) {
        self.stop(VcpuCommand::Park);
        self.change(|state| state.commands.end_run());
    }

    fn wait_until_in_guest(&self) {
        self.wait_until(|state| state.is_in_guest);
    }

    fn wait_until_settled(&self) {
        self.wait_until(|state| state.commands.is_settled());
    }

    /// The own thread.
    fn serve(&self, number: u64, guest: Guest) {
        while let Some((mut vcpu, completes)) = self.next(number) {
            let mut by_itself = false;
            if completes {
                vcpu.completions += 1;
            } else {
                by_itself = self.enter(&mut vcpu, guest);
            }
            let last = self.change(|state| {
                state.commands.stopped(by_itself);
                state.commands.rest(vcpu)
            });
            assert!(last.is_none());
            self.change(|state| state.commands.reported());
        }
    }

    fn enter(&self, vcpu: &mut Vcpu, guest: Guest) -> bool {
        self.change(|state| state.is_in_guest = true);
        vcpu.entries += 1;
        if guest == Guest::Spins {
            self.wait_until(|state| state.is_stopped);
        }
        self.change(|state| state.is_in_guest = false);
        guest == Guest::Ends
    }

    fn next(&self, number: u64) -> Option<(Vcpu, bool)> {
        let mut state = self.lock();
        loop {
            match state.commands.next(number, false) {
                Next::Enter(vcpu) => return Some((vcpu, false)),
                Next::Complete(vcpu) => return Some((vcpu, true)),
                Next::Wait => state = self.changed.wait(state).unwrap(),
                Next::WaitIdle => {
                    if !state.is_late {
                        state = self.changed.wait(state).unwrap();
                    }
                    // A command may have come with the end of the wait.
                    if state.is_late && state.commands.expire(number) {
                        state.has_thread = false;
                        return None;
                    }
                }
                Next::End => return None,
            }
        }
    }

    /// End the thread, and return the vCPU.
    fn end(&self, threads: impl IntoIterator<Item = JoinHandle<()>>) -> Vcpu {
        self.stop(VcpuCommand::Exit);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let mut state = self.lock();
        assert!(state.commands.is_settled());
        state.commands.vcpu.take().unwrap()
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    // Without a bound a model takes minutes.
    builder.preemption_bound = Some(3);
    builder.check(model);
}

fn beside(handle: &Arc<Handle>, act: impl FnOnce(&Handle) + 'static) -> JoinHandle<()> {
    let handle = Arc::clone(handle);
    spawn(move || act(&handle))
}

#[test]
fn a_run_reaches_a_thread_that_may_be_ending_because_it_was_idle() {
    check(|| {
        let handle = Handle::new();
        let first = handle.begin(Guest::Spins, false);
        handle.run();
        handle.wait_until_in_guest();
        handle.end_run();
        let clock = beside(&handle, |handle| handle.change(|state| state.is_late = true));
        handle.wait_until_settled();
        let second = handle.begin(Guest::Spins, false);
        handle.run();
        handle.wait_until_in_guest();
        clock.join().unwrap();
        assert_eq!(handle.end(first.into_iter().chain(second)).entries, 2);
    });
}

#[test]
fn a_thread_that_is_replaced_ends_and_the_new_one_takes_the_run() {
    check(|| {
        let handle = Handle::new();
        let first = handle.begin(Guest::Spins, false).unwrap();
        let second = handle.begin(Guest::Spins, true);
        handle.run();
        first.join().unwrap();
        handle.wait_until_in_guest();
        assert_eq!(handle.end(second).entries, 1);
    });
}

#[test]
fn an_end_is_followed_while_parked_and_while_a_run_is_on_its_way() {
    check(|| {
        let handle = Handle::new();
        let own = handle.begin(Guest::Spins, false);
        let closes = beside(&handle, |handle| handle.stop(VcpuCommand::Exit));
        handle.run();
        closes.join().unwrap();
        // A pause or a resume after it changes nothing.
        handle.stop(VcpuCommand::Park);
        handle.resume();
        own.into_iter().for_each(|thread| thread.join().unwrap());
        let state = handle.lock();
        assert!(state.commands.vcpu.is_some() && !state.commands.is_leaving());
    });
}

#[test]
fn a_completion_is_answered_also_if_a_run_comes_in_between() {
    check(|| {
        let handle = Handle::new();
        let own = handle.begin(Guest::Spins, false);
        let snapshots = beside(&handle, |handle| {
            if handle.change(|state| state.commands.complete()) {
                handle.wait_until_settled();
            }
        });
        assert!(handle.begin(Guest::Spins, false).is_none());
        handle.run();
        handle.wait_until_in_guest();
        snapshots.join().unwrap();
        let vcpu = handle.end(own);
        assert!(vcpu.completions <= 1);
        assert_eq!(vcpu.entries, 1);
    });
}

#[test]
fn a_completion_is_made_once_also_if_the_machine_is_paused_meanwhile() {
    check(|| {
        let handle = Handle::new();
        let own = handle.begin(Guest::Spins, false);
        let pauses = beside(&handle, |handle| {
            handle.stop(VcpuCommand::Park);
            // A run that is held at rest.
            handle.change(|state| state.commands.begin_run());
        });
        let asked = handle.change(|state| state.commands.complete());
        handle.wait_until_settled();
        pauses.join().unwrap();
        let vcpu = handle.end(own);
        assert_eq!((asked, vcpu.completions, vcpu.entries), (true, 1, 0));
    });
}

#[test]
fn a_pause_beside_a_resume_returns_and_the_next_resume_runs() {
    check(|| {
        let handle = Handle::new();
        let own = handle.begin(Guest::Spins, false);
        handle.run();
        let pauses = beside(&handle, |handle| handle.pause());
        handle.resume();
        pauses.join().unwrap();
        handle.resume();
        handle.wait_until_in_guest();
        assert!(handle.end(own).entries >= 1);
    });
}

#[test]
fn a_guest_that_has_ended_is_not_entered_by_a_resume_but_by_the_next_run() {
    check(|| {
        let handle = Handle::new();
        let own = handle.begin(Guest::Ends, false);
        handle.run();
        let pauses = beside(&handle, |handle| {
            handle.pause();
            handle.resume();
        });
        handle.wait_until(|state| {
            let commands = &state.commands;
            commands.vcpu.as_ref().is_some_and(|vcpu| vcpu.entries == 1) && commands.is_settled()
        });
        pauses.join().unwrap();
        handle.resume();
        assert!(handle.lock().commands.is_held());
        assert!(handle.begin(Guest::Ends, false).is_none());
        handle.run();
        handle
            .wait_until(|state| state.commands.vcpu.as_ref().is_some_and(|vcpu| vcpu.entries == 2));
        assert_eq!(handle.end(own).entries, 2);
    });
}

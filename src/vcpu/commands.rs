//! The commands to a vCPU's own thread, and the vCPU while it is at rest: what is asked, taken,
//! answered, parked and ended. No lock, thread or descriptor is here: the lock is `handle.rs`'s, and
//! `own_thread.rs` waits and notifies. `make loom` runs this in every order of its steps.

/// What the vCPU's own thread does with the vCPU at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VcpuCommand {
    /// Leave it there.
    Park,
    /// Enter its guest.
    Run,
    /// Complete what its last exit has left, and rest.
    Complete,
    /// Leave it there and end.
    Exit,
}

/// What the own thread does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<V> {
    /// Enter the guest.
    Enter(V),
    /// Complete the last exit.
    Complete(V),
    /// Wait for a change.
    Wait,
    /// Wait for a change, but only as long as a thread may be idle.
    WaitIdle,
    /// End.
    End,
}

/// The vCPU at rest, and the command to its own thread. `V` is the vCPU.
#[derive(Debug)]
pub(super) struct Commands<V> {
    /// `None` while a thread has it.
    pub(super) vcpu: Option<V>,
    pub(super) command: VcpuCommand,
    /// The number of the own thread, which outlives the run.
    thread: Option<u64>,
    /// How many such threads have been started.
    threads: u64,
    /// Between the start and the end of a run, the own thread does not end when it is idle.
    is_in_run: bool,
    /// Whether [`Self::resume`] makes it enter its guest: it was running when it was stopped.
    pub(super) runs_on_resume: bool,
    /// How often the vCPU has come to rest or left. If the count has changed since a request to
    /// stop, the vCPU was at rest in between.
    pub(super) transitions: u64,
    /// Whether the own thread is completing the last exit and reporting the outcome.
    pub(super) is_completing: bool,
    /// Whether the thread that had the vCPU is reporting why it rests, which may call an exit
    /// handler in Python.
    pub(super) is_reporting: bool,
    /// Whether the vCPU was lost in a panic on its thread.
    pub(super) is_lost: bool,
    /// Whether its machine is closed.
    pub(super) is_closed: bool,
}

impl<V> Commands<V> {
    pub(super) fn new(vcpu: V) -> Self {
        Self {
            vcpu: Some(vcpu),
            command: VcpuCommand::Park,
            thread: None,
            threads: 0,
            is_in_run: false,
            runs_on_resume: false,
            transitions: 0,
            is_completing: false,
            is_reporting: false,
            is_lost: false,
            is_closed: false,
        }
    }

    /// Whether it has no command to enter the guest. With such a command the vCPU counts as
    /// running, even before a thread has taken it.
    pub(super) fn is_held(&self) -> bool {
        self.command != VcpuCommand::Run
    }

    /// Whether it is at rest: out of its guest, and it does not enter again without a command. Its
    /// thread may be in a callback meanwhile.
    pub(super) fn is_at_rest(&self, is_in_callback: bool) -> bool {
        let is_held = is_in_callback && self.is_held();
        self.vcpu.is_some() || is_held || self.is_lost || self.is_closed
    }

    /// Whether a thread has it and brings it to rest without another command. False for a vCPU that
    /// was lost in a panic.
    pub(super) fn is_leaving(&self) -> bool {
        let is_out = self.vcpu.is_none() || self.is_completing;
        is_out && self.is_held() && !self.is_lost && !self.is_closed
    }

    /// Whether its last exit is finished: it is not leaving its guest, and why it rests has been
    /// reported.
    pub(super) fn is_settled(&self) -> bool {
        !self.is_leaving() && !self.is_reporting
    }

    /// Begin a run, with the vCPU at rest until [`Self::run`]. A pending command to complete its
    /// last exit stays, because another thread waits for it; entering the guest completes the exit
    /// too.
    pub(super) fn begin_run(&mut self) {
        if self.command != VcpuCommand::Complete {
            self.command = VcpuCommand::Park;
        }
        self.runs_on_resume = false;
        self.is_in_run = true;
    }

    pub(super) fn end_run(&mut self) {
        self.is_in_run = false;
        self.runs_on_resume = false;
    }

    /// Have the own thread enter the guest. `clear_stop` is point 7 of the kick. A command to end is
    /// not replaced; then this returns false.
    pub(super) fn run(&mut self, clear_stop: impl FnOnce()) -> bool {
        if self.command == VcpuCommand::Exit {
            return false;
        }
        clear_stop();
        if self.command == VcpuCommand::Complete {
            self.is_completing = false; // The next entry completes it.
        }
        self.command = VcpuCommand::Run;
        self.runs_on_resume = false;
        self.transitions += 1;
        true
    }

    /// Give a command to stop, which replaces a pending one. The command to end is never replaced.
    pub(super) fn stop(&mut self, command: VcpuCommand) {
        self.runs_on_resume |= self.command == VcpuCommand::Run;
        let comes_first = match self.command {
            VcpuCommand::Exit => true,
            VcpuCommand::Complete => command == VcpuCommand::Park,
            VcpuCommand::Park | VcpuCommand::Run => false,
        };
        if !comes_first {
            self.command = command;
        }
    }

    /// Have the own thread complete the last exit. Returns whether it does.
    pub(super) fn complete(&mut self) -> bool {
        if self.thread.is_none() || self.command != VcpuCommand::Park {
            return false;
        }
        self.command = VcpuCommand::Complete;
        self.is_completing = true;
        true
    }

    /// The number for a new own thread. [`Self::replace_thread`] makes it the current one.
    pub(super) fn next_thread(&self) -> u64 {
        self.threads + 1
    }

    /// A thread of this number is the own thread now. A previous one finds this, and ends.
    pub(super) fn replace_thread(&mut self, number: u64) {
        self.threads = number;
        self.thread = Some(number);
    }

    /// The own thread is no longer needed.
    pub(super) fn forget_thread(&mut self) {
        self.thread = None;
    }

    /// What the thread of this number does next. `is_here`: the caller of `run_here` follows the
    /// command to run, instead of the own thread.
    pub(super) fn next(&mut self, number: u64, is_here: bool) -> Next<V> {
        if self.command == VcpuCommand::Exit || self.thread != Some(number) {
            return Next::End;
        }
        let completes = self.command == VcpuCommand::Complete;
        let is_mine = self.command != VcpuCommand::Park && (completes || !is_here);
        match self.vcpu.take_if(|_| is_mine) {
            Some(vcpu) if completes => {
                self.command = VcpuCommand::Park;
                Next::Complete(vcpu)
            }
            Some(vcpu) => Next::Enter(vcpu),
            None if self.is_in_run || self.command != VcpuCommand::Park => Next::Wait,
            None => Next::WaitIdle,
        }
    }

    /// Have the thread of this number end if it still has nothing to do, after it has been idle for
    /// long enough. Returns whether it ends.
    pub(super) fn expire(&mut self, number: u64) -> bool {
        let is_idle = self.command == VcpuCommand::Park && !self.is_in_run;
        let ends = is_idle && self.thread == Some(number);
        if ends {
            self.thread = None;
        }
        ends
    }

    /// The thread that has the vCPU is about to put it to rest. If it stopped `by_itself`, it rests
    /// until the next run, even if the machine is paused and resumed in between; that thread then
    /// reports why. Otherwise a command to run came after the one to stop, and is followed.
    pub(super) fn stopped(&mut self, by_itself: bool) {
        if by_itself {
            if self.command == VcpuCommand::Run {
                self.command = VcpuCommand::Park;
            }
            self.runs_on_resume = false;
        }
        self.is_reporting = by_itself;
    }

    /// The vCPU comes to rest. Returns what is to be dropped without the lock: the vCPU, if its
    /// machine has been closed meanwhile.
    #[must_use]
    pub(super) fn rest(&mut self, vcpu: V) -> Option<V> {
        self.transitions += 1;
        if self.is_closed { Some(vcpu) } else { self.vcpu.replace(vcpu) }
    }

    /// The reason for the rest has been reported.
    pub(super) fn reported(&mut self) {
        (self.is_completing, self.is_reporting) = (false, false);
    }
}

#[cfg(all(test, loom))]
mod tests {
    use std::sync::Arc;

    use loom::sync::{Condvar, Mutex, MutexGuard};
    use loom::thread::{JoinHandle, spawn};

    use super::*;

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
                    Next::WaitIdle if state.is_late && state.commands.expire(number) => {
                        state.has_thread = false;
                        return None;
                    }
                    Next::Wait | Next::WaitIdle => state = self.changed.wait(state).unwrap(),
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
            let pauses = beside(&handle, |handle| handle.stop(VcpuCommand::Park));
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
                commands.vcpu.as_ref().is_some_and(|vcpu| vcpu.entries == 1)
                    && commands.is_settled()
            });
            pauses.join().unwrap();
            handle.resume();
            assert!(handle.lock().commands.is_held());
            assert!(handle.begin(Guest::Ends, false).is_none());
            handle.run();
            handle.wait_until(|state| {
                state.commands.vcpu.as_ref().is_some_and(|vcpu| vcpu.entries == 2)
            });
            assert_eq!(handle.end(own).entries, 2);
        });
    }
}

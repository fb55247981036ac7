//! The commands to a vCPU's own thread, and the vCPU while it is at rest: what is asked, taken,
//! answered, parked and ended. No lock, thread or descriptor is here: `handle.rs` has the lock, and
//! `own_thread.rs` waits and notifies. `commands_model.rs` runs this in every order of its steps.

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
    /// Whether a resume makes it enter its guest: it was running when it was stopped.
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

    /// Have the own thread enter the guest. `clear_stop` is point 7 of the kick. A command to end
    /// is not replaced; then this returns false.
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

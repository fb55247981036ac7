//! Notices that a guest has halted permanently. With an interrupt controller in the kernel, KVM
//! does not exit for HLT, and `run` would wait forever. On the thread that runs the loop.

use std::time::{Duration, Instant};

use crate::exit_handler::ExitHandler;
use crate::vm::KvmVm;

/// When it looks first, and how long it then waits at most. The wait doubles each time: a guest
/// that is idle or busy for long costs a look at the clocks twice a second.
const FIRST: Duration = Duration::from_millis(20);
const MOST: Duration = Duration::from_millis(500);
/// The CPU time that a vCPU's thread uses at most between two looks while its guest is halted: the
/// host makes it leave its guest for a snapshot, for example.
const QUIET: Duration = Duration::from_millis(2);

/// Looks at the CPU times of the vCPUs' threads. Only if none has advanced much, it has the vCPUs
/// leave their guests for a moment, because only then KVM tells whether interrupts are on.
#[derive(Debug)]
pub(super) struct HaltWatch<'a, EH: ExitHandler> {
    vm: &'a KvmVm<EH>,
    due: Instant,
    wait: Duration,
    /// The CPU times at the last look.
    times: Option<Vec<Duration>>,
}

impl<'a, EH: ExitHandler> HaltWatch<'a, EH> {
    /// A watch of this machine; `None` if KVM exits for HLT.
    pub(super) fn new(vm: &'a KvmVm<EH>) -> Option<Self> {
        let due = Instant::now() + FIRST;
        vm.hides_halts().then_some(Self { vm, due, wait: FIRST, times: None })
    }

    /// When it wants to look next.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    fn is_quiet(&self) -> bool {
        let (Some(now), Some(before)) = (self.vm.cpu_times(), &self.times) else { return false };
        // Another thread may run the vCPU by now, whose time is less.
        now.iter().zip(before).all(|(now, before)| now.saturating_sub(*before) < QUIET)
    }

    /// Look if it is time to.
    pub(super) fn look(&mut self) {
        if Instant::now() < self.due {
            return;
        }
        if self.is_quiet() {
            // Fails if the machine is paused or a vCPU is in a callback: then it is not halted.
            let _ = self.vm.end_if_halted();
        }
        // After the vCPUs have left their guests, which takes time.
        self.times = self.vm.cpu_times();
        self.due = Instant::now() + self.wait;
        self.wait = (self.wait * 2).min(MOST);
    }
}

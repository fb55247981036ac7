//! Where the exits of a machine's vCPUs go: the buses with their devices, hooks that look at an
//! exit first, and observers that look at it afterwards. Shared by the vCPUs' threads; hooks and
//! observers come and go while they run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::exit::{Data, ExitKind, VcpuExit};
use crate::devices::Buses;
use crate::exit_handler::Outcome;
use crate::memory::DeviceWindows;
use crate::sync::{RwLock, rank};
use crate::trace::{Recording, Track};

/// Looks at exits before they are answered. Called on the vCPU's thread, which lends the vCPU
/// meanwhile.
pub trait ExitHook: Send + Sync + std::fmt::Debug {
    /// What becomes of the exit, with what the guest finds in `reply`; none leaves it to the
    /// devices.
    fn on_exit(&self, vcpu: u64, exit: &VcpuExit, reply: &mut Reply) -> Option<Outcome>;
}

/// What the guest finds after an exit that a hook has answered with [`Outcome::Continue`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Reply {
    /// A read gives all one bits; a write has been taken.
    #[default]
    Default,
    /// A read gives these bytes.
    Data(Data),
    /// It executes the instruction again.
    Retry,
}

/// Sees every exit after it has been answered. Called on the vCPU's thread; must be quick.
pub trait Observer: Send + Sync + std::fmt::Debug {
    /// A guest is about to be entered.
    fn enters(&self, _vcpu: u64, _at: Instant) {}

    /// Where the answer to an exit is recorded while it is made.
    fn track(&self, _vcpu: u64) -> Option<Arc<Track>> {
        None
    }

    /// An exit has been answered.
    fn saw(&self, seen: &Seen);
}

/// An exit and its times.
#[derive(Debug)]
pub struct Seen<'a> {
    /// The vCPU's number.
    pub vcpu: u64,
    /// The exit.
    pub exit: &'a VcpuExit,
    /// When the guest was entered before it,
    pub entered: Instant,
    /// when it came out,
    pub left: Instant,
    /// and when the exit had been answered.
    pub answered: Instant,
}

/// Above the bits of the kinds of exits.
const OBSERVED: u64 = 1 << 63;

/// See the module.
#[derive(Debug, Default)]
pub struct Dispatch {
    /// The buses.
    pub buses: Buses,
    /// A bit for each kind of exit that a hook wants to see, and [`OBSERVED`]. Zero costs one look
    /// an exit.
    watched: AtomicU64,
    hook: RwLock<Option<Arc<dyn ExitHook>>, rank::ExitHook>,
    observers: RwLock<Vec<Arc<dyn Observer>>, rank::Observers>,
}

impl DeviceWindows for Dispatch {
    fn windows(&self) -> Vec<(u64, u64)> {
        self.buses.mmio.ranges()
    }
}

/// What is watched at one exit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watched(u64);

impl Watched {
    pub(super) fn is_observed(self) -> bool {
        self.0 & OBSERVED != 0
    }

    pub(super) fn has_hook(self, kind: ExitKind) -> bool {
        self.0 & kind.bit() != 0
    }
}

impl Dispatch {
    /// Have a hook look at exits of these kinds, from the next exit on. It takes the former one's
    /// place.
    pub fn set_hook(&self, hook: Arc<dyn ExitHook>, kinds: &[ExitKind]) {
        let bits = kinds.iter().fold(0, |bits, kind| bits | kind.bit());
        *self.hook.write() = Some(hook);
        self.change_watched(|watched| watched & OBSERVED | bits);
    }

    /// Tell an observer of every exit, from the next entry on.
    pub fn observe(&self, observer: Arc<dyn Observer>) {
        self.observers.write().push(observer);
        self.change_watched(|watched| watched | OBSERVED);
    }

    /// Tell the observer nothing more.
    pub fn unobserve(&self, observer: &Arc<dyn Observer>) {
        let mut observers = self.observers.write();
        observers.retain(|known| !Arc::ptr_eq(known, observer));
        if observers.is_empty() {
            self.change_watched(|watched| watched & !OBSERVED);
        }
    }

    /// The machine is closed: nobody is called any more. What they hold is given back, which may be
    /// the machine.
    pub(crate) fn close(&self) {
        self.watched.store(0, Ordering::Release);
        let hook = self.hook.write().take();
        let observers = std::mem::take(&mut *self.observers.write());
        let devices = [self.buses.pio.clear(), self.buses.mmio.clear()];
        // Outside the locks: it may run the program's code.
        drop((hook, observers, devices));
    }

    fn change_watched(&self, change: impl Fn(u64) -> u64) {
        // Release: who sees a bit finds the hook or the observer that it stands for.
        let _ =
            self.watched.fetch_update(Ordering::Release, Ordering::Relaxed, |w| Some(change(w)));
    }

    pub(super) fn watched(&self) -> Watched {
        // Acquire: pairs with the release above.
        Watched(self.watched.load(Ordering::Acquire))
    }

    pub(super) fn hook(&self) -> Option<Arc<dyn ExitHook>> {
        self.hook.read().clone()
    }

    pub(super) fn enters(&self, vcpu: u64, at: Instant) {
        self.observers.read().iter().for_each(|observer| observer.enters(vcpu, at));
    }

    /// Record this thread, which answers an exit, where an observer wants it.
    pub(super) fn recording(&self, vcpu: u64) -> Option<Recording> {
        Recording::on(self.observers.read().iter().filter_map(|observer| observer.track(vcpu)))
    }

    pub(super) fn saw(&self, seen: &Seen) {
        self.observers.read().iter().for_each(|observer| observer.saw(seen));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Mutex;

    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<u64>, rank::Test>);

    impl ExitHook for Log {
        fn on_exit(&self, _: u64, _: &VcpuExit, _: &mut Reply) -> Option<Outcome> {
            None
        }
    }

    impl Observer for Log {
        fn saw(&self, seen: &Seen) {
            self.0.lock().push(seen.vcpu);
        }
    }

    #[test]
    fn a_hook_sees_the_kinds_it_asked_for() {
        let dispatch = Dispatch::default();
        assert!(!dispatch.watched().has_hook(ExitKind::Io));
        dispatch.set_hook(Arc::<Log>::default(), &[ExitKind::Io, ExitKind::Hlt]);
        let watched = dispatch.watched();
        assert!(watched.has_hook(ExitKind::Io) && watched.has_hook(ExitKind::Hlt));
        assert!(!watched.has_hook(ExitKind::Mmio) && !watched.is_observed());
        dispatch.set_hook(Arc::<Log>::default(), &[]);
        assert!(!dispatch.watched().has_hook(ExitKind::Io));
    }

    #[test]
    fn observers_come_and_go_beside_a_hook() {
        let dispatch = Dispatch::default();
        dispatch.set_hook(Arc::<Log>::default(), &[ExitKind::Hlt]);
        let log = Arc::<Log>::default();
        let observer: Arc<dyn Observer> = Arc::clone(&log) as _;
        dispatch.observe(Arc::clone(&observer));
        assert!(dispatch.watched().is_observed() && dispatch.watched().has_hook(ExitKind::Hlt));
        let now = Instant::now();
        let seen = Seen { vcpu: 3, exit: &VcpuExit::Hlt, entered: now, left: now, answered: now };
        dispatch.saw(&seen);
        dispatch.unobserve(&observer);
        dispatch.saw(&seen);
        assert_eq!(*log.0.lock(), [3]);
        assert!(!dispatch.watched().is_observed() && dispatch.watched().has_hook(ExitKind::Hlt));
    }
}

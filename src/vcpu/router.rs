//! Routes the exits of a machine's vCPUs: to hooks first, then to the devices on the buses, and
//! afterwards to observers. The vCPUs' threads share it. Hooks and observers can be added and
//! removed while they run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::answer::Answer;
use super::exit::{Data, ExitKind, VcpuExit};
use crate::devices::{Access, BusCache, Buses};
use crate::exit_handler::Outcome;
use crate::sync::{CachedArc, Published, RwLock, rank};
use crate::trace::{Recording, Track};

/// Sees exits before and after they are answered. Called on the vCPU's thread; the host can access
/// the vCPU during the call.
pub trait ExitHook: Send + Sync + std::fmt::Debug {
    /// Answer the exit, with the data for the guest in `reply`; `None` leaves it to the next hook
    /// and the devices.
    fn on_exit(&self, vcpu: u64, exit: &VcpuExit, reply: &mut Reply) -> Option<Outcome>;

    /// See how the exit was answered, before the guest continues. Returns whether the run stops
    /// here; if it ends anyway, this changes nothing.
    fn on_answer(&self, _vcpu: u64, _exit: &VcpuExit, _answer: &Answer<'_>) -> bool {
        false
    }
}

/// How the guest continues after an exit that a hook has answered with [`Outcome::Continue`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Reply {
    /// A read gives all one bits; a write is complete.
    #[default]
    Default,
    /// A read gives these bytes.
    Data(Data),
    /// The guest executes the instruction again.
    Retry,
}

/// The order in which hooks are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HookPriority {
    /// Hooks of pyvmm itself, for example a debugger's.
    Host,
    /// Hooks of the program.
    Program,
}

/// Sees every exit after it has been answered. Called on the vCPU's thread; must return quickly.
pub trait Observer: Send + Sync + std::fmt::Debug {
    /// Called right before a guest is entered.
    fn before_entry(&self, _vcpu: u64, _at: Instant) {}

    /// The track that records how an exit is answered.
    fn track(&self, _vcpu: u64) -> Option<Arc<Track>> {
        None
    }

    /// Called after an exit has been answered.
    fn after_exit(&self, seen: &AnsweredExit);
}

/// An exit and its times.
#[derive(Debug)]
pub struct AnsweredExit<'a> {
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

/// A hook, its place in the order, and the kinds whose exits and answers it looks at, as the mask
/// has them.
#[derive(Clone, Debug)]
pub(super) struct HookEntry {
    hook: Arc<dyn ExitHook>,
    priority: HookPriority,
    kinds: u64,
}

/// The bits of the kinds whose answers have a hook are this many above those of the exits.
const ANSWERS: u32 = 32;

/// Above the bits of the kinds.
const OBSERVED: u64 = 1 << 63;

/// The buses, hooks and observers of one machine.
#[derive(Debug, Default)]
pub struct ExitRouter {
    /// The buses.
    pub buses: Buses,
    /// One bit for each kind whose exits have a hook, one for each whose answers have one, and
    /// [`OBSERVED`]. If all are zero, an exit
    /// costs one load.
    mask: AtomicU64,
    /// In the order in which they are asked. A call in progress keeps its copy of the list.
    hooks: Published<[HookEntry], rank::ExitHooks>,
    observers: RwLock<Vec<Arc<dyn Observer>>, rank::Observers>,
}

/// A vCPU's copies of what it looks up at each exit. Former devices and hooks stay alive in them
/// until the next exit, or until the vCPU comes to rest.
#[derive(Debug, Default)]
pub(super) struct RouterCache {
    pio: BusCache,
    mmio: BusCache,
    pub(super) hooks: CachedArc<[HookEntry]>,
}

impl RouterCache {
    pub(super) fn bus(&mut self, access: Access) -> &mut BusCache {
        match access {
            Access::Pio => &mut self.pio,
            Access::Mmio => &mut self.mmio,
        }
    }
}

/// Which exits hooks and observers see.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExitMask(u64);

impl ExitMask {
    pub(super) fn is_observed(self) -> bool {
        self.0 & OBSERVED != 0
    }

    pub(super) fn has_hook(self, kind: ExitKind) -> bool {
        self.0 & kind.bit() != 0
    }

    pub(super) fn has_answer_hook(self, kind: ExitKind) -> bool {
        self.0 & kind.bit() << ANSWERS != 0
    }
}

impl ExitRouter {
    /// Set the kinds of exits and of answers that a hook sees, from the next exit on. Without
    /// kinds, the hook is removed. A new hook is asked after the others of its priority.
    pub fn set_hook(
        &self,
        priority: HookPriority,
        hook: &Arc<dyn ExitHook>,
        exits: &[ExitKind],
        answers: &[ExitKind],
    ) {
        let bits = |kinds: &[ExitKind]| kinds.iter().fold(0, |bits, kind| bits | kind.bit());
        let kinds = bits(exits) | bits(answers) << ANSWERS;
        let (former, ()) = self.hooks.change(|hooks| {
            let mut changed = hooks.to_vec();
            match changed.iter_mut().find(|entry| Arc::ptr_eq(&entry.hook, hook)) {
                Some(entry) => entry.kinds = kinds,
                None => changed.push(HookEntry { hook: Arc::clone(hook), priority, kinds }),
            }
            changed.retain(|entry| entry.kinds != 0);
            // Stable: within a priority they stay in the order in which they were added.
            changed.sort_by_key(|entry| entry.priority);
            (changed.into(), ())
        });
        // Under the lock again, so that the mask is that of the last list.
        let bits = |hooks: &[HookEntry]| hooks.iter().fold(0, |bits, entry| bits | entry.kinds);
        self.hooks.with(|hooks| self.change_mask(|mask| mask & OBSERVED | bits(hooks)));
        // Outside the lock: dropping a hook may run Python code.
        drop(former);
    }

    /// Whether an observer sees the exits.
    pub(crate) fn is_observed(&self) -> bool {
        self.mask().is_observed()
    }

    /// Add an observer, which sees every exit from the next entry on.
    pub fn observe(&self, observer: Arc<dyn Observer>) {
        self.observers.write().push(observer);
        self.change_mask(|mask| mask | OBSERVED);
    }

    /// Remove an observer.
    pub fn unobserve(&self, observer: &Arc<dyn Observer>) {
        let mut observers = self.observers.write();
        observers.retain(|known| !Arc::ptr_eq(known, observer));
        if observers.is_empty() {
            self.change_mask(|mask| mask & !OBSERVED);
        }
    }

    /// Remove all hooks, observers and devices when the machine is closed. They may refer to the
    /// machine.
    pub(crate) fn close(&self) {
        self.mask.store(0, Ordering::Release);
        let hooks = self.hooks.change(|_| (Arc::new([]), ()));
        let observers = std::mem::take(&mut *self.observers.write());
        let devices = [self.buses.pio.clear(), self.buses.mmio.clear()];
        // Outside the locks: this may run Python code.
        drop((hooks, observers, devices));
    }

    fn change_mask(&self, change: impl Fn(u64) -> u64) {
        // Release: a thread that sees a bit finds the hook or the observer that it stands for.
        let _ = self.mask.fetch_update(Ordering::Release, Ordering::Relaxed, |m| Some(change(m)));
    }

    pub(super) fn mask(&self) -> ExitMask {
        // Acquire: pairs with the release above.
        ExitMask(self.mask.load(Ordering::Acquire))
    }

    /// The hooks, as `copy` keeps them.
    pub(super) fn hooks<'a>(&self, copy: &'a mut CachedArc<[HookEntry]>) -> &'a [HookEntry] {
        self.hooks.read(copy)
    }

    pub(super) fn before_entry(&self, vcpu: u64, at: Instant) {
        self.observers.read().iter().for_each(|observer| observer.before_entry(vcpu, at));
    }

    /// If an observer traces this vCPU, record on this thread while it answers an exit.
    pub(super) fn recording(&self, vcpu: u64) -> Option<Recording> {
        Recording::on(self.observers.read().iter().filter_map(|observer| observer.track(vcpu)))
    }

    pub(super) fn after_exit(&self, seen: &AnsweredExit) {
        self.observers.read().iter().for_each(|observer| observer.after_exit(seen));
    }
}

/// Ask the hooks of an exit's kind, the host's first, until one decides. No lock is held while a
/// hook runs.
pub(super) fn ask_hooks(
    hooks: &[HookEntry],
    vcpu: u64,
    exit: &VcpuExit,
) -> Option<(Outcome, Reply)> {
    let bit = exit.kind()?.bit();
    let mut asked = hooks.iter().filter(|entry| entry.kinds & bit != 0);
    asked.find_map(|entry| {
        let mut reply = Reply::Default;
        entry.hook.on_exit(vcpu, exit, &mut reply).map(|outcome| (outcome, reply))
    })
}

/// Report how an exit was answered to all hooks of its kind, the host's first. Returns whether one
/// of them stops the run. No lock is held while a hook runs.
pub(super) fn report_answer(
    hooks: &[HookEntry],
    vcpu: u64,
    exit: &VcpuExit,
    answer: &mut Answer<'_>,
) -> bool {
    let Some(kind) = exit.kind() else { return false };
    let mut is_stopped = false;
    for entry in hooks.iter().filter(|entry| entry.kinds & kind.bit() << ANSWERS != 0) {
        is_stopped |= entry.hook.on_answer(vcpu, exit, answer);
        answer.ends_run |= is_stopped;
    }
    is_stopped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Mutex;

    /// Which hooks were asked.
    type Asked = Arc<Mutex<Vec<u64>, rank::Test>>;

    #[derive(Debug)]
    struct Hook(u64, Asked, Option<Reply>);

    impl ExitHook for Hook {
        fn on_exit(&self, _: u64, _: &VcpuExit, reply: &mut Reply) -> Option<Outcome> {
            self.1.lock().push(self.0);
            *reply = self.2.clone()?;
            Some(Outcome::Continue)
        }
    }

    fn hook(number: u64, asked: &Asked, reply: Option<Reply>) -> Arc<dyn ExitHook> {
        Arc::new(Hook(number, Arc::clone(asked), reply))
    }

    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<u64>, rank::Test>);

    impl Observer for Log {
        fn after_exit(&self, seen: &AnsweredExit) {
            self.0.lock().push(seen.vcpu);
        }
    }

    fn ask(router: &ExitRouter, exit: &VcpuExit) -> Option<(Outcome, Reply)> {
        ask_hooks(router.hooks(&mut CachedArc::default()), 0, exit)
    }

    const IN: VcpuExit = VcpuExit::IoIn { port: 1, size: 1, count: 1 };

    #[test]
    fn a_hook_sees_the_kinds_it_asked_for() {
        let (router, asked) = (ExitRouter::default(), Asked::default());
        assert!(!router.mask().has_hook(ExitKind::Io));
        let hook = hook(1, &asked, None);
        router.set_hook(HookPriority::Program, &hook, &[ExitKind::Io, ExitKind::Hlt], &[]);
        let mask = router.mask();
        assert!(mask.has_hook(ExitKind::Io) && mask.has_hook(ExitKind::Hlt));
        assert!(!mask.has_hook(ExitKind::Mmio) && !mask.is_observed());
        ask(&router, &VcpuExit::Shutdown);
        assert!(asked.lock().is_empty());
        ask(&router, &IN);
        assert_eq!(*asked.lock(), [1]);
        router.set_hook(HookPriority::Program, &hook, &[], &[]);
        assert!(!router.mask().has_hook(ExitKind::Io));
        ask(&router, &IN);
        assert_eq!(*asked.lock(), [1], "it is removed");
    }

    #[test]
    fn hooks_of_the_host_are_asked_first_and_the_first_that_decides_ends_it() {
        let (router, asked) = (ExitRouter::default(), Asked::default());
        let add = |priority, number, reply| {
            router.set_hook(priority, &hook(number, &asked, reply), &[ExitKind::Io], &[]);
        };
        add(HookPriority::Program, 3, Some(Reply::Retry));
        add(HookPriority::Host, 1, None);
        add(HookPriority::Host, 2, None);
        add(HookPriority::Program, 4, None);
        assert_eq!(ask(&router, &IN), Some((Outcome::Continue, Reply::Retry)));
        assert_eq!(*asked.lock(), [1, 2, 3]);
    }

    #[test]
    fn a_hook_for_answers_sees_them_and_may_stop() {
        #[derive(Debug)]
        struct Answers(bool, Asked);
        impl ExitHook for Answers {
            fn on_exit(&self, _: u64, _: &VcpuExit, _: &mut Reply) -> Option<Outcome> {
                None
            }
            fn on_answer(&self, _: u64, _: &VcpuExit, answer: &Answer<'_>) -> bool {
                self.1.lock().push(u64::from(answer.ends_run));
                self.0
            }
        }
        let (router, seen) = (ExitRouter::default(), Asked::default());
        for stops in [true, false] {
            let hook: Arc<dyn ExitHook> = Arc::new(Answers(stops, Arc::clone(&seen)));
            router.set_hook(HookPriority::Program, &hook, &[], &[ExitKind::Io]);
        }
        let mask = router.mask();
        assert!(mask.has_answer_hook(ExitKind::Io) && !mask.has_answer_hook(ExitKind::Hlt));
        assert!(!mask.has_hook(ExitKind::Io) && !mask.is_observed());
        let report = |exit| {
            let (by, data) = (crate::vcpu::AnsweredBy::Nothing, None);
            let mut answer = Answer { by, data, device: None, ends_run: false };
            report_answer(router.hooks(&mut CachedArc::default()), 0, exit, &mut answer)
        };
        assert!(report(&IN) && !report(&VcpuExit::Hlt));
        assert_eq!(*seen.lock(), [0, 1], "the second is told that the first ends the run");
    }

    #[test]
    fn a_hook_that_goes_leaves_the_kinds_of_the_others() {
        let (router, asked) = (ExitRouter::default(), Asked::default());
        let (one, other) = (hook(1, &asked, None), hook(2, &asked, None));
        router.set_hook(HookPriority::Host, &one, &[ExitKind::Debug, ExitKind::Io], &[]);
        router.set_hook(HookPriority::Program, &other, &[ExitKind::Io], &[]);
        router.set_hook(HookPriority::Host, &one, &[], &[]);
        assert!(router.mask().has_hook(ExitKind::Io) && !router.mask().has_hook(ExitKind::Debug));
        assert_eq!(ask(&router, &IN), None);
        assert_eq!(*asked.lock(), [2]);
        router.close();
        assert_eq!((ask(&router, &IN), Arc::strong_count(&other)), (None, 1));
    }

    #[test]
    fn observers_come_and_go_beside_a_hook() {
        let (router, asked) = (ExitRouter::default(), Asked::default());
        router.set_hook(HookPriority::Program, &hook(1, &asked, None), &[ExitKind::Hlt], &[]);
        let log = Arc::<Log>::default();
        let observer: Arc<dyn Observer> = Arc::clone(&log) as _;
        router.observe(Arc::clone(&observer));
        assert!(router.mask().is_observed() && router.mask().has_hook(ExitKind::Hlt));
        let now = Instant::now();
        let seen =
            AnsweredExit { vcpu: 3, exit: &VcpuExit::Hlt, entered: now, left: now, answered: now };
        router.after_exit(&seen);
        router.unobserve(&observer);
        router.after_exit(&seen);
        assert_eq!(*log.0.lock(), [3]);
        assert!(!router.mask().is_observed() && router.mask().has_hook(ExitKind::Hlt));
    }
}

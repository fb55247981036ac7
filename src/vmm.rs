//! The spine: a configuration becomes a machine, top to bottom; `run` turns the event loop until the exit
//! handler says stop, and shuts the machine down. The caller's thread runs the loop; any thread may call
//! the rest.

use std::path::Path;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use event_manager::SubscriberId;
use parking_lot::{Condvar, Mutex};

use crate::boot;
use crate::config::{ExitPort, SerialConfig, VmmConfig};
use crate::devices::{self, Access, Device, Serial};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::exit_handler::{Exit, ExitHandler, ExitReason, WrappedExitHandler};
use crate::fixup::Counts;
use crate::snapshot::{Held, Parts};
use crate::trace::{self, Trace, Watching};
use crate::vcpu::{Cell, Dispatch, VmRunState};
use crate::vm::{GuestMemory, KvmVm, layout};

/// The longest wait where another loop may take what this one waits for.
const SLICE: Duration = Duration::from_millis(50);

/// How long the end of a run waits for somebody to take the guest's last output.
const PATIENCE: Duration = Duration::from_secs(1);

/// A machine: its KVM side, its devices, and the event loop they share.
#[derive(Debug)]
pub struct Vmm {
    /// None once it is closed.
    vm: Mutex<Option<Arc<KvmVm<WrappedExitHandler>>>>,
    event_manager: Arc<EventManager>,
    exit_handler: WrappedExitHandler,
    dispatch: Arc<Dispatch>,
    watching: Watching,
    serial: Arc<Serial>,
    fixups: Arc<Counts>,
    /// Where the vCPUs start.
    pub(crate) entry: u64,
    pub(crate) exit_port: ExitPort,
    /// Somebody has paused the machine and not resumed it: whoever pauses it for a moment leaves it paused.
    pub(crate) is_paused: Mutex<bool>,
    pub(crate) held: Held,
    /// Subscribers that are the machine's own and go with it.
    own_subscribers: Mutex<Vec<SubscriberId>>,
    runner: Mutex<Runner>,
    run_ended: Condvar,
}

fn deadline_of(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

/// Who is inside `run`.
#[derive(Debug, Default)]
struct Runner {
    thread: Option<ThreadId>,
    /// `start` was called, and nobody has waited to the end.
    is_started: bool,
    /// `close` was called from inside: it happens when the run ends.
    close_at_end: bool,
}

impl TryFrom<VmmConfig> for Vmm {
    type Error = Error;

    fn try_from(config: VmmConfig) -> Result<Self> {
        Self::with_event_manager(config, None)
    }
}

impl Vmm {
    /// A machine in a loop that others use too; none for one of its own.
    ///
    /// # Errors
    /// When a value cannot be used, a file cannot be loaded, or KVM refuses a part.
    pub fn with_event_manager(
        config: VmmConfig,
        shared: Option<Arc<EventManager>>,
    ) -> Result<Self> {
        config.validate()?;
        let memory = GuestMemory::new(config.memory.size_mib << 20)?;
        let entry = boot::load(&config, &memory)?;
        let event_manager = match shared {
            Some(shared) => shared.share().map(|()| shared)?,
            None => Arc::new(EventManager::new()?),
        };
        let exit_handler =
            WrappedExitHandler::new().map_err(|e| Error::os(ErrorKind::Event, "eventfd", &e))?;
        let dispatch = Arc::new(Dispatch::default());
        let vm = KvmVm::new(&config, memory, Arc::clone(&dispatch), exit_handler.clone())?;
        let irq = vm.irq(layout::COM1_IRQ)?;
        let serial = devices::attach(&dispatch.buses, irq, &config.serial, config.exit_port)?;
        let parts = Parts { vm, event_manager, exit_handler, dispatch, serial, entry };
        Self::assemble(parts, config.serial, config.exit_port)
    }

    /// The machine of these parts, in its loop.
    pub(crate) fn assemble(
        parts: Parts,
        streams: SerialConfig,
        exit_port: ExitPort,
    ) -> Result<Self> {
        let Parts { vm, event_manager, exit_handler, dispatch, serial, entry } = parts;
        let mut own_subscribers =
            vec![event_manager.add_subscriber(Box::new(exit_handler.clone()))];
        own_subscribers.extend(devices::connect(&serial, streams, &event_manager)?);
        let fixups = Arc::clone(vm.fixups());
        let watching = Watching::new(vm.cells().len() as u64, &dispatch, &event_manager);
        Ok(Self {
            vm: Mutex::new(Some(Arc::new(vm))),
            event_manager,
            exit_handler,
            dispatch,
            watching,
            serial,
            fixups,
            entry,
            exit_port,
            is_paused: Mutex::new(false),
            held: Held::default(),
            own_subscribers: Mutex::new(own_subscribers),
            runner: Mutex::default(),
            run_ended: Condvar::new(),
        })
    }
}

impl Vmm {
    /// Run until the guest ends, `stop` is called, or the time passes. `turn` turns the event loop once, waiting until the
    /// time it is given at most; its error ends the run.
    ///
    /// After a stop, a timeout or an error another `run` goes on where this one ended.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when another thread is in `run`, the guest has ended or the machine is closed;
    /// [`ErrorKind::Io`] when a stream of the serial port fails; what `turn` returns.
    pub fn run<E: From<Error>>(
        &self,
        timeout: Option<Duration>,
        mut turn: impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        let vm = self.vm()?;
        let _running = self.enter_run("run", false)?;
        let deadline = deadline_of(timeout);
        let ended = self
            .start_vcpus(&vm)
            .map_err(E::from)
            .and_then(|()| self.turn_until(deadline, &mut turn));
        let reason = ended.map(|reason| reason.unwrap_or(ExitReason::Timeout));
        self.finish(&vm, reason, deadline, &mut turn)
    }

    /// Start the vCPUs and return; [`Self::wait`] turns the event loop for them.
    ///
    /// # Errors
    /// [`ErrorKind::State`] as for `run`.
    pub fn start(&self) -> Result<()> {
        let vm = self.vm()?;
        let running = self.enter_run("start", false)?;
        self.start_vcpus(&vm)?;
        self.runner.lock().is_started = true;
        drop(running);
        Ok(())
    }

    /// What `run` does, for a machine that has been started; none when the time passed: then the guest goes on.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine has not been started, or another thread waits; else as for `run`.
    pub fn wait<E: From<Error>>(
        &self,
        timeout: Option<Duration>,
        mut turn: impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<Exit>, E> {
        let vm = self.vm()?;
        let _running = self.enter_run("wait", true)?;
        let deadline = deadline_of(timeout);
        let reason = match self.turn_until(deadline, &mut turn) {
            Ok(None) => return Ok(None),
            Ok(Some(reason)) => Ok(reason),
            Err(error) => Err(error),
        };
        self.runner.lock().is_started = false;
        self.finish(&vm, reason, deadline, &mut turn).map(Some)
    }

    fn start_vcpus(&self, vm: &KvmVm<WrappedExitHandler>) -> Result<()> {
        vm.check_may_run()?;
        *self.is_paused.lock() = false;
        self.serial.release(false);
        // After a stop from before this run the guest does not start for nothing.
        if !self.exit_handler.is_kicked() {
            vm.run(vm.first_address(self.entry))?;
        }
        Ok(())
    }

    /// Turn the loop until the exit handler says stop; none when the deadline came first.
    fn turn_until<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Option<ExitReason>, E> {
        while self.exit_handler.keep_running() {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(None);
            }
            self.turn(deadline, turn)?;
        }
        Ok(Some(ExitReason::Stopped))
    }

    /// The end of a run: shut the machine down and bring out what the guest printed last.
    fn finish<E: From<Error>>(
        &self,
        vm: &KvmVm<WrappedExitHandler>,
        reason: std::result::Result<ExitReason, E>,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<Exit, E> {
        self.serial.release(true);
        vm.shutdown();
        self.exit_handler.rearm();
        let reason = reason?;
        if self.serial.backlog() > 0 {
            self.drain_serial(deadline, turn)?;
            self.exit_handler.rearm();
        }
        Ok(vm.exit().unwrap_or_else(|| Exit::new(reason)))
    }

    /// One turn of the event loop.
    fn turn<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let slice = self.exit_handler.is_in_several_loops().then(|| Instant::now() + SLICE);
        let until = slice
            .map_or(deadline, |slice| Some(deadline.map_or(slice, |deadline| deadline.min(slice))));
        let recording = self.event_manager.recorders.recording();
        turn(until)?;
        if recording.is_some() {
            trace::flush();
        }
        self.serial.take_failure().map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// Bring out what the guest printed last. A stop, the deadline, or a taker that takes nothing for a while
    /// leaves the rest for another run or [`Serial::take`].
    fn drain_serial<E: From<Error>>(
        &self,
        deadline: Option<Instant>,
        turn: &mut impl FnMut(Option<Instant>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut left = self.serial.backlog();
        let mut patience = Instant::now() + PATIENCE;
        while left > 0 && self.exit_handler.keep_running() {
            let until = deadline.map_or(patience, |deadline| deadline.min(patience));
            self.turn(Some(until), turn)?;
            let now = self.serial.backlog();
            if now < left {
                patience = Instant::now() + PATIENCE;
            } else if Instant::now() >= until {
                break;
            }
            left = now;
        }
        Ok(())
    }

    /// End the run in progress, or the next one if there is none. It may go on later. From any thread.
    ///
    /// # Errors
    /// When the exit event cannot be written, or in a forked child.
    pub fn stop(&self) -> Result<()> {
        self.exit_handler.check_process()?;
        self.exit_handler.kick().map_err(|e| Error::os(ErrorKind::Event, "stop", &e))
    }

    /// Stop, wait for the run to end, and release everything. Does nothing the second time. Called from
    /// inside a run, it takes effect when that run ends.
    pub fn close(&self) {
        let Ok(vm) = self.vm() else { return };
        if vm.is_foreign() {
            return; // the run in progress, if any, is the parent's
        }
        let is_inside = vm.has_this_thread();
        drop(vm);
        let mut runner = self.runner.lock();
        if is_inside {
            // Of a machine that was started, whoever waits for it closes it.
            runner.close_at_end = true;
            let _ = self.stop();
            return;
        }
        while let Some(thread) = runner.thread {
            let _ = self.stop();
            if thread == std::thread::current().id() {
                runner.close_at_end = true;
                return;
            }
            self.run_ended.wait(&mut runner);
        }
        self.release();
    }

    fn release(&self) {
        let vm = self.vm.lock().take();
        for id in self.own_subscribers.lock().drain(..) {
            // Fails when the program has removed it already.
            let _ = self.event_manager.remove_subscriber(id);
        }
        drop(vm);
        self.dispatch.close();
    }

    /// Bring the vCPUs of the run in progress out of the guest and wait until they are at rest. From any thread or
    /// callback; the loop goes on turning.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is not running.
    pub fn pause(&self) -> Result<()> {
        let vm = self.vm()?;
        *self.is_paused.lock() = true;
        vm.pause()
    }

    /// Let the vCPUs that `pause` stopped go on.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when no run is in progress, or the guest has ended.
    pub fn resume(&self) -> Result<()> {
        let vm = self.vm()?;
        *self.is_paused.lock() = false;
        vm.resume()
    }

    /// The vCPUs, to be looked into while they are at rest. Before the first run they stand where it will start.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is closed.
    pub fn vcpus(&self) -> Result<Vec<Arc<Cell>>> {
        let vm = self.vm()?;
        vm.prepare(self.entry)?;
        Ok(vm.cells())
    }

    pub(crate) fn enter_run(&self, what: &str, for_started: bool) -> Result<Running<'_>> {
        let mut runner = self.runner.lock();
        let detail = match (&runner.thread, runner.is_started, for_started) {
            (Some(_), _, _) => "the machine is running already: one run at a time",
            (None, true, false) => "the machine has been started: wait() for it",
            (None, false, true) => "the machine has not been started: start() or run() it",
            (None, _, _) => {
                runner.thread = Some(std::thread::current().id());
                return Ok(Running(self));
            }
        };
        Err(Error::new(ErrorKind::State, what, detail))
    }

    /// The KVM side of the machine.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when it is closed.
    pub fn vm(&self) -> Result<Arc<KvmVm<WrappedExitHandler>>> {
        self.vm
            .lock()
            .clone()
            .ok_or_else(|| Error::new(ErrorKind::State, "vmm", "the machine is closed"))
    }

    /// The event manager whose loop `run` turns.
    #[must_use]
    pub fn event_manager(&self) -> &Arc<EventManager> {
        &self.event_manager
    }

    /// Put a device on one of the buses, at any time.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the range is no such bus's, or something else answers there.
    pub fn add_device(
        &self,
        access: Access,
        base: u64,
        length: u64,
        device: Arc<dyn Device>,
    ) -> Result<()> {
        let vm = self.vm()?;
        vm.check_process()?;
        let bad = |detail: String| Err(Error::new(ErrorKind::Config, format!("{base:#x}"), detail));
        let end = base.saturating_add(length);
        if access == Access::Pio && end > 0x1_0000 {
            return bad("ports go from 0 to 0xffff".into());
        }
        let taken = match access {
            Access::Pio => vm.kernel_ports(),
            Access::Mmio => vm.kernel_addresses(),
        };
        if let Some((start, _)) =
            taken.iter().find(|(start, size)| base < start + size && *start < end)
        {
            return bad(format!("overlaps what KVM or memory answers at {start:#x}"));
        }
        self.dispatch.buses.bus(access).add(base, length, device)
    }

    /// The handler that ends a run.
    #[must_use]
    pub fn exit_handler(&self) -> &WrappedExitHandler {
        &self.exit_handler
    }

    /// Where the vCPUs' exits go: the buses, hooks and observers.
    #[must_use]
    pub fn dispatch(&self) -> &Arc<Dispatch> {
        &self.dispatch
    }

    /// What it can be watched with: counters, and a trace.
    #[must_use]
    pub fn watching(&self) -> &Watching {
        &self.watching
    }

    /// See [`Watching::start_trace`].
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the machine is closed, too.
    pub fn start_trace(&self, path: &Path) -> Result<Arc<Trace>> {
        self.vm()?.check_process()?;
        self.watching.start_trace(path)
    }

    /// The instructions that KVM refused and that were executed here.
    #[must_use]
    pub fn fixups(&self) -> &Counts {
        &self.fixups
    }

    /// The first serial port.
    #[must_use]
    pub fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// Whether vCPU threads are there, or somebody is inside `run`.
    pub(crate) fn is_in_run(&self) -> bool {
        let runner = self.runner.lock();
        runner.thread.is_some() || runner.is_started
    }

    /// Guest memory.
    ///
    /// # Errors
    /// When the machine is closed, or in a forked child.
    pub fn memory(&self) -> Result<GuestMemory> {
        let vm = self.vm()?;
        vm.check_process()?;
        Ok(vm.memory().clone())
    }

    /// Where the machine stands.
    #[must_use]
    pub fn state(&self) -> VmRunState {
        self.vm().map_or(VmRunState::Closed, |vm| vm.state())
    }
}

impl Drop for Vmm {
    /// In a loop that others use too, the machine's subscribers must not outlive it.
    fn drop(&mut self) {
        self.close();
    }
}

/// While it lives, its thread is the one inside `run`.
pub(crate) struct Running<'a>(&'a Vmm);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut runner = self.0.runner.lock();
        runner.thread = None;
        if std::mem::take(&mut runner.close_at_end) {
            self.0.release();
        }
        self.0.run_ended.notify_all();
    }
}

//! The exit path: `ExitHandler` with `kick()`, `VmmExitHandler` with its eventfd and flag,
//! `WrappedExitHandler`, which all vCPUs share, and `Exit`, the result of `run()`. `kick` may be
//! called from any thread; `process` runs on the loop's thread.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Result;
use crate::event::EventManager;
use crate::poll::take_count;
use crate::process::ProcessTag;
use crate::sync::{Mutex, rank};

/// Notified by a vCPU when its guest has ended.
pub trait ExitHandler {
    /// Notify the owner of the run loop. Called on the vCPU's thread; must not block.
    ///
    /// # Errors
    /// If the notification fails.
    fn kick(&self) -> io::Result<()>;
}

/// Stops a run loop: a kick writes to an eventfd, and the loop reads a flag.
#[derive(Debug)]
pub struct VmmExitHandler {
    exit_event: Arc<EventFd>,
    keep_running: bool,
    /// The loop of the machine that it stops.
    own_loop: Weak<EventManager>,
}

impl VmmExitHandler {
    /// A handler whose loop keeps running.
    ///
    /// # Errors
    /// If no eventfd can be created.
    pub fn new() -> io::Result<Self> {
        let exit_event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self { exit_event, keep_running: true, own_loop: Weak::new() })
    }

    /// The eventfd that a kick writes to.
    #[must_use]
    pub fn exit_event(&self) -> &Arc<EventFd> {
        &self.exit_event
    }

    /// False once a kick has been processed.
    #[must_use]
    pub fn keep_running(&self) -> bool {
        self.keep_running
    }

    /// Write to the exit event.
    ///
    /// # Errors
    /// If the write fails. A full counter is not an error, because it also wakes the loop.
    pub fn kick(&self) -> io::Result<()> {
        match self.exit_event.write(1) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    /// Whether a kick is pending.
    #[must_use]
    pub fn is_kicked(&self) -> bool {
        let mut poll =
            libc::pollfd { fd: self.exit_event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call, which does not wait.
        unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
    }

    /// Process a kick in another loop: clear the flag, drain the event, and wake the machine's own
    /// loop, which does not see the event any more.
    ///
    /// # Errors
    /// If the wake-up fails.
    pub fn stop_elsewhere(&mut self) -> Result<()> {
        self.keep_running = false;
        // Fails if there was no kick. Not a plain read: a duplicate's holder may make it blocking.
        let _ = take_count(self.exit_event.as_raw_fd());
        self.own_loop.upgrade().map_or(Ok(()), |own_loop| own_loop.kick())
    }

    /// Prepare for another run: set the flag and drop previous kicks.
    pub fn rearm(&mut self) {
        self.take_stop();
    }

    /// [`Self::rearm`]. Returns whether there was a kick, processed or not.
    pub fn take_stop(&mut self) -> bool {
        // As in `stop`.
        let kicks = take_count(self.exit_event.as_raw_fd()).unwrap_or(0);
        !std::mem::replace(&mut self.keep_running, true) || kicks > 0
    }
}

impl MutEventSubscriber for VmmExitHandler {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.event_set().contains(EventSet::IN) {
            self.keep_running = false;
        }
        if events.event_set().contains(EventSet::ERROR) {
            let _ = ops.remove(Events::new(&*self.exit_event, EventSet::IN));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        // By edge, and not drained: in each loop that watches it, a kick arrives once.
        let events = Events::new(&*self.exit_event, EventSet::IN | EventSet::EDGE_TRIGGERED);
        // Fails only for a handler that is already registered; it is kicked there.
        let _ = ops.add(events);
    }
}

/// The handler, shared by the loop, the VM and every vCPU.
#[derive(Clone, Debug)]
pub struct WrappedExitHandler {
    handler: Arc<Mutex<VmmExitHandler, rank::ExitHandler>>,
    /// Outside the lock, which another thread may have held at a fork.
    process_tag: ProcessTag,
}

impl WrappedExitHandler {
    /// A new handler, not yet shared.
    ///
    /// # Errors
    /// If no eventfd can be created.
    pub fn new() -> io::Result<Self> {
        let handler = Arc::new(Mutex::new(VmmExitHandler::new()?));
        Ok(Self { handler, process_tag: ProcessTag::current() })
    }

    /// False once a kick has been processed by the loop.
    #[must_use]
    pub fn keep_running(&self) -> bool {
        self.handler.lock().keep_running()
    }

    /// Whether the loop has a pending kick.
    #[must_use]
    pub fn is_kicked(&self) -> bool {
        self.handler.lock().is_kicked()
    }

    /// Name the loop of the machine that it stops.
    pub(crate) fn set_own_loop(&self, own_loop: &Arc<EventManager>) {
        self.handler.lock().own_loop = Arc::downgrade(own_loop);
    }

    /// # Errors
    /// In a forked child, where a kick would end the parent's run.
    pub fn check_process(&self) -> Result<()> {
        self.process_tag.check("exit handler")
    }

    /// Whether this is a forked child's copy.
    #[must_use]
    pub fn is_forked_child(&self) -> bool {
        self.process_tag.is_forked_child()
    }

    /// See [`VmmExitHandler::rearm`].
    pub fn rearm(&self) {
        self.handler.lock().rearm();
    }

    /// See [`VmmExitHandler::take_stop`].
    pub fn take_stop(&self) -> bool {
        self.handler.lock().take_stop()
    }

    /// The shared handler.
    #[must_use]
    pub fn inner(&self) -> &Arc<Mutex<VmmExitHandler, rank::ExitHandler>> {
        &self.handler
    }
}

impl ExitHandler for WrappedExitHandler {
    fn kick(&self) -> io::Result<()> {
        self.handler.lock().kick()
    }
}

impl MutEventSubscriber for WrappedExitHandler {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.handler.lock().process(events, ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.handler.lock().init(ops);
    }
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest executed HLT with no in-kernel interrupt controller to wake it.
    Halt,
    /// The guest requested a reset (through the i8042 controller, or KVM's system event).
    Reset,
    /// The guest shut down: a triple fault, or KVM's system event.
    Shutdown,
    /// The guest wrote to the exit port; the code is the value.
    Code,
    /// The host stopped the run.
    Stopped,
    /// The timeout of `run` passed.
    Timeout,
    /// `KVM_EXIT_DEBUG`: a breakpoint or a single step that no hook has handled.
    Debug,
    /// `KVM_EXIT_INTERNAL_ERROR`: KVM could not continue, often because of an instruction that it
    /// cannot emulate.
    InternalError,
    /// `KVM_EXIT_FAIL_ENTRY`: the processor refused the vCPU's state.
    FailEntry,
    /// An exit that pyvmm does not handle; the code is KVM's number.
    UnknownExit,
    /// The vCPU itself failed: `KVM_RUN` returned an error.
    VcpuError,
    /// An ELF program has raised an exception.
    Exception,
}

impl ExitReason {
    /// The name of the reason in Python's `ExitReason`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Halt => "halt",
            Self::Reset => "reset",
            Self::Shutdown => "shutdown",
            Self::Code => "code",
            Self::Stopped => "stopped",
            Self::Timeout => "timeout",
            Self::Debug => "debug",
            Self::InternalError => "internal-error",
            Self::FailEntry => "fail-entry",
            Self::UnknownExit => "unknown-exit",
            Self::VcpuError => "vcpu-error",
            Self::Exception => "exception",
        }
    }

    /// Whether another `run` can continue the guest, because the host ended this run.
    #[must_use]
    pub fn resumable(self) -> bool {
        matches!(self, Self::Stopped | Self::Timeout | Self::Debug)
    }
}

/// How a run ended: the reason, the guest's code, the vCPU, and for a fault its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Why the run ended.
    pub reason: ExitReason,
    /// The guest's exit code, or the number of an unknown exit or a failed entry.
    pub code: Option<u64>,
    /// The vCPU that ended. None if the host ended the run.
    pub vcpu: Option<u64>,
    /// For a fault: KVM's report, the instruction bytes and the registers, as text.
    pub fault: Option<String>,
    /// The exception that an ELF program has raised.
    pub exception: Option<Exception>,
}

/// An exception, as the processor says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its number.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error_code: Option<u64>,
    /// For a page fault, the address that could not be reached.
    pub cr2: Option<u64>,
    /// The instruction that failed, or after a trap the next one.
    pub rip: u64,
    /// The function or label that it is in.
    pub symbol: Option<String>,
}

/// The next step of a vCPU after an exit. A device, a hook or the exit itself decides it, and the
/// vCPU's thread carries it out.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Enter the guest again, unless the vCPU has been kicked.
    Continue,
    /// As `Continue`, once the device has room for more
    /// ([`crate::devices::Device::wait_for_room`]).
    Wait,
    /// The run ends, and the guest could continue. The device or hook has stored the reason with
    /// its owner.
    Stop,
    /// The guest has ended. In a box, because each exit passes an outcome through many hands.
    End(Box<Exit>),
}

impl Exit {
    /// An exit with only a reason.
    #[must_use]
    pub fn new(reason: ExitReason) -> Self {
        Self { reason, code: None, vcpu: None, fault: None, exception: None }
    }

    /// An exit with a code.
    #[must_use]
    pub fn with_code(reason: ExitReason, code: u64) -> Self {
        Self { code: Some(code), ..Self::new(reason) }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason.name())?;
        if let Some(code) = self.code {
            write!(f, " {code}")?;
        }
        if let Some(vcpu) = self.vcpu {
            write!(f, " (vCPU {vcpu})")?;
        }
        match &self.fault {
            Some(fault) => write!(f, "\n{fault}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, SubscriberOps};

    #[test]
    fn a_kick_clears_the_flag_when_the_loop_processes_it() {
        let handler = WrappedExitHandler::new().unwrap();
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(handler.clone());
        assert!(handler.keep_running());
        handler.kick().unwrap();
        assert!(handler.keep_running(), "a kick is seen when it is processed, not before");
        assert_eq!(manager.run_with_timeout(1000).unwrap(), 1);
        assert!(!handler.keep_running());
    }

    #[test]
    fn a_processed_kick_cancels_no_later_run() {
        let handler = WrappedExitHandler::new().unwrap();
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(handler.clone());
        handler.kick().unwrap();
        manager.run_with_timeout(1000).unwrap();
        handler.kick().unwrap();
        handler.rearm();
        assert_eq!(manager.run_with_timeout(0).unwrap(), 0);
        assert!(handler.keep_running());
    }

    #[test]
    fn a_kick_arrives_in_each_loop_once() {
        let handler = WrappedExitHandler::new().unwrap();
        let mut loops = [EventManager::new().unwrap(), EventManager::new().unwrap()];
        let _ = loops.each_mut().map(|manager| manager.add_subscriber(handler.clone()));
        handler.kick().unwrap();
        let arrived = loops.map(|mut manager| [1000, 0].map(|ms| manager.run_with_timeout(ms)));
        assert!(matches!(arrived, [[Ok(1), Ok(0)], [Ok(1), Ok(0)]]));
    }

    #[test]
    fn an_error_event_removes_the_handler() {
        let mut handler = VmmExitHandler::new().unwrap();
        let error = Events::new(&**handler.exit_event(), EventSet::ERROR);
        let other = WrappedExitHandler::new().unwrap();
        let mut manager = EventManager::new().unwrap();
        let id = manager.add_subscriber(other);
        handler.init(&mut manager.event_ops(id).unwrap());
        handler.process(error, &mut manager.event_ops(id).unwrap());
        handler.kick().unwrap();
        assert_eq!(manager.run_with_timeout(0).unwrap(), 0, "its fd is not watched any more");
    }

    #[test]
    fn a_full_counter_is_kick_enough() {
        let handler = VmmExitHandler::new().unwrap();
        handler.exit_event().write(u64::MAX - 1).unwrap();
        handler.kick().unwrap();
    }

    #[test]
    fn an_exit_reads_as_a_line() {
        let exit = Exit { vcpu: Some(1), ..Exit::with_code(ExitReason::Code, 42) };
        assert_eq!(exit.to_string(), "code 42 (vCPU 1)");
    }
}

//! The parts of a machine before it is assembled. Pure data.

use std::sync::Arc;

use crate::devices::Serial;
use crate::event::EventManager;
use crate::exit_handler::WrappedExitHandler;
use crate::vcpu::ExitRouter;
use crate::vm::KvmVm;

/// The parts of a machine.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) vm: KvmVm<WrappedExitHandler>,
    pub(crate) event_manager: Arc<EventManager>,
    pub(crate) exit_handler: WrappedExitHandler,
    pub(crate) router: Arc<ExitRouter>,
    pub(crate) serial: Arc<Serial>,
    pub(crate) entry: u64,
}

//! The parts of a machine before it is assembled.

use std::sync::Arc;

use crate::devices::Attached;
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::exit_handler::WrappedExitHandler;
use crate::vcpu::ExitRouter;
use crate::virtio;
use crate::vm::KvmVm;

/// The machine itself, for KVM.
pub(super) type Vm = KvmVm<WrappedExitHandler>;

/// The parts of a machine.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) vm: Vm,
    pub(crate) event_manager: Arc<EventManager>,
    pub(crate) exit_handler: WrappedExitHandler,
    pub(crate) router: Arc<ExitRouter>,
    pub(crate) attached: Attached,
    pub(crate) virtio: Vec<virtio::Attached>,
    pub(crate) entry: u64,
}

/// The event loop of a new machine, a shared one or its own, and the handler that ends the
/// machine's runs there.
///
/// # Errors
/// If the process has no file descriptor left.
pub(super) fn event_loop(
    shared: Option<Arc<EventManager>>,
) -> Result<(Arc<EventManager>, WrappedExitHandler)> {
    let event_manager = match shared {
        Some(shared) => shared,
        None => Arc::new(EventManager::new()?),
    };
    let exit_handler =
        WrappedExitHandler::new().map_err(|e| Error::os(ErrorKind::Event, "eventfd", &e))?;
    exit_handler.set_own_loop(&event_manager);
    Ok((event_manager, exit_handler))
}

//! The Python binding: the only code that names pyo3. One file for each class or two; `callback` alone is
//! where the loop and the vCPU threads enter Python.

mod batch;
mod callback;
mod config;
mod device;
mod endpoint;
mod errors;
mod event_fd;
mod event_manager;
mod events;
mod exit;
mod exit_handler;
mod hooks;
mod host;
mod kvm;
mod live;
mod memory;
mod memory_parts;
mod raised;
mod serial;
mod snapshot;
mod subscribers;
mod timer_fd;
mod vcpu;
mod vcpu_exit;
mod vm;
mod vmm;
mod vmm_devices;

pub use endpoint::PyRemoteEndpoint;
pub use event_fd::PyEventFd;
pub use event_manager::PyEventManager;
pub use events::{PyEventOps, PyEvents, PySubscriberId};
pub use exit_handler::{PyVmmExitHandler, PyWrappedExitHandler};
pub(crate) use host::{cpu_features, embedded_guest, kick_signal, kvm_info, set_kick_signal};
pub use kvm::PyKvm;
pub(crate) use live::close_all;
pub use memory::PyGuestMemory;
pub use memory_parts::{PyDirtyPages, PyMemorySlot};
pub use serial::PySerial;
pub use snapshot::PySnapshot;
pub use timer_fd::PyTimerFd;
pub use vcpu::{PyMsrBytes, PyRegisterBytes, PyVcpu};
pub use vcpu_exit::PyVcpuExit;
pub use vm::PyKvmVm;
pub use vmm::PyVmm;
pub use vmm_devices::PyIrqLine;

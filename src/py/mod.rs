//! The Python binding, and the only code that uses pyo3, with one file for each class or two. The
//! loop and the vCPU threads enter Python only through `enter.rs`, with no Rust lock held. Compiled
//! only with the `python` feature.

mod answers;
mod balloon;
mod config;
mod config_boot;
mod config_cpu;
mod config_disk;
mod config_part;
mod config_virtio;
mod console;
mod cpuid;
mod depth;
mod descriptor;
mod device;
mod disk;
mod disk_backend;
mod ending;
mod enter;
mod errors;
mod event;
mod exit;
mod gil_cell;
mod hooks;
#[cfg(debug_assertions)]
mod hop;
mod host;
mod interpreter;
mod interrupt;
mod items;
mod kick_handler;
mod kvm;
mod lease;
mod machine;
mod memory;
mod network;
mod network_conditions;
mod network_port;
mod network_snapshot;
mod notebook;
mod owned;
mod parts;
mod pending_outcome;
mod processor;
mod recorded;
mod registers;
mod registry;
mod resources;
mod returned;
mod serial;
mod snapshot;
mod stats;
mod symbols;
mod thread_state;
mod trace;
mod unanswered;
mod user_net;
mod vcpu;
mod vcpu_exit;
mod virtio;
mod virtio_chain;
mod virtio_console;
mod virtio_custom;
mod vm;
mod vmm;
mod vsock;
mod wakeup;

pub use balloon::PyBalloonDevice;
pub use console::PyOutputWatch;
pub(crate) use cpuid::{cpuid_features, cpuid_table};
pub use disk::PyDiskDevice;
pub use event::{
    PyEventFd, PyEventManager, PyEventOps, PyEvents, PyRemoteEndpoint, PySubscriberId, PyTimerFd,
    PyVmmExitHandler, PyWrappedExitHandler,
};
pub(crate) use host::{cpu_features, embedded_guest, kick_signal, kvm_info, set_kick_signal};
pub(crate) use interpreter::prepare;
pub use kvm::PyKvm;
pub use memory::{PyDirtyPages, PyGuestMemory, PyMemorySlot};
pub use network::{PyFrozenNetwork, PyNetwork};
pub use network_port::PyNetworkPort;
pub use registers::{PyMsrBytes, PyRegister, PyRegisterBytes, PyRegisterView};
pub(crate) use registry::close_all;
pub use serial::PySerial;
pub use snapshot::PySnapshot;
pub use stats::PyStats;
pub use trace::PyTrace;
pub use user_net::PyUserNetwork;
pub use vcpu::PyVcpu;
pub use vcpu_exit::PyVcpuExit;
pub use virtio::PyVirtioDevice;
pub use virtio_chain::{PyDescriptorChain, PyVirtqueue};
pub use virtio_console::PyConsoleDevice;
pub use virtio_custom::PyVirtioTransport;
pub use vm::PyKvmVm;
pub use vmm::{PyCancel, PyIrqLine, PyVmm};

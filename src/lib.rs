//! pyvmm: a KVM virtual machine monitor that lives inside a Python process.
//!
//! The flow, in the order things happen:
//!
//! 1. a [`config::VmmConfig`] is checked and becomes a [`vmm::Vmm`] ([`vmm::Vmm::try_from`]);
//! 2. which holds a [`vm::KvmVm`], the KVM side of the machine, with its [`memory::GuestMemory`],
//!    where [`boot::load`] has put what the machine starts with;
//! 3. [`vmm::Vmm::run`] starts one thread a vCPU ([`vm::KvmVm::run`]);
//! 4. a vCPU's exit goes through one `match` (`vcpu/run.rs`) to a bus, [`devices::Buses`];
//! 5. and there to a [`devices::Device`], which may write an eventfd;
//! 6. the loop's [`event::EventManager`] dispatches it to a subscriber, in Rust or in Python;
//! 7. a guest's end kicks the [`exit_handler::ExitHandler`] and becomes an [`exit_handler::Exit`]:
//!    the loop stops, the machine shuts down, and `run` returns it.
//!
//! The rooms, from the ground up. Each imports only from rooms before it, which `test_layers.py`
//! checks:
//!
//! ```text
//! error process limit sync hop bytes layout x86 kvm poll resources
//! debug fixup memory trace
//! event exit_handler cpu net disk share config devices vsock virtio boot
//! vcpu vm snapshot vmm
//! py
//! ```
//!
//! Everything but `py` builds and is tested without Python.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("pyvmm needs Linux on x86-64");

pub mod boot;
mod bytes;
pub mod config;
pub mod cpu;
pub mod debug;
pub mod devices;
pub mod disk;
pub mod error;
pub mod event;
pub mod exit_handler;
pub mod fixup;
mod hop;
pub mod kvm;
pub mod layout;
pub mod limit;
pub mod memory;
pub mod net;
mod poll;
mod process;
#[cfg(feature = "python")]
pub mod py;
pub mod resources;
pub mod share;
pub mod snapshot;
pub mod sync;
pub mod trace;
pub mod vcpu;
pub mod virtio;
pub mod vm;
pub mod vmm;
pub mod vsock;
mod x86;

/// Everything that Python sees of this crate. Python's import calls `PyInit__pyvmm`, which is
/// `py/interpreter.rs`'s.
#[cfg(feature = "python")]
// What only the GIL guards (`py/gil_cell.rs`, `py/event/queue.rs`, `py/event/events.rs`) is not
// sound without one.
#[pyo3::pymodule(gil_used = true)]
#[pyo3(name = "_native")]
mod _pyvmm {
    #[pymodule_init]
    fn prepare() -> pyo3::PyResult<()> {
        crate::py::prepare()
    }

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "Python's name")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    use crate::py::{
        PyBalloonDevice, PyConsoleDevice, PyDescriptorChain, PyDirtyPages, PyDiskDevice, PyEventFd,
        PyEventManager, PyEventOps, PyEvents, PyFrameQueue, PyGuestMemory, PyIrqLine, PyKvm,
        PyKvmVm, PyMemorySlot, PyMsrBytes, PyNetDevice, PyNetwork, PyNetworkPort, PyRegister,
        PyRegisterBytes, PyRegisterView, PyRemoteEndpoint, PySerial, PySnapshot, PyStats,
        PySubscriberId, PyTimerFd, PyTrace, PyUserNetwork, PyVcpu, PyVcpuExit, PyVirtioDevice,
        PyVirtioTransport, PyVirtqueue, PyVmm, PyVmmExitHandler, PyWrappedExitHandler, close_all,
        cpu_features, cpuid_features, cpuid_table, embedded_guest, kick_signal, kvm_info,
        set_kick_signal,
    };
}

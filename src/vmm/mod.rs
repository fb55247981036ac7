//! A complete machine: a `KvmVm`, its devices and its event loop, which may be shared. It is run,
//! stopped, forked and reset here. No KVM ioctl is made here. `run` runs the loop on the caller's
//! thread; any thread may call the rest.

mod begin;
mod devices;
mod halt_watch;
mod instruments;
mod life;
mod machine;
mod parts;
mod renew;
mod resets;
mod restore;
mod run;
mod run_here;
mod runner;
mod snapshot;
mod together;
mod virtio;
#[cfg_attr(not(feature = "python"), allow(dead_code, reason = "for the binding"))]
mod watch;

pub use instruments::Instruments;
pub use machine::Vmm;
pub use restore::ForkConfig;
#[cfg(feature = "python")]
pub(crate) use runner::closed;
#[cfg(feature = "python")]
pub(crate) use watch::{Turn, Watcher};

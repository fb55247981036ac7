//! A whole machine: a `KvmVm`, its devices and the event loop that it shares with others; run,
//! stopped, copied and reset. No KVM ioctl here. `run` turns the loop on the caller's thread; any
//! thread may call the rest.

mod here;
mod instruments;
mod life;
mod machine;
mod parts;
mod renew;
mod resets;
mod run;
mod runner;
mod snapshot;

pub use instruments::Watching;
pub use machine::Vmm;
#[cfg(feature = "python")]
pub(crate) use runner::closed;
pub use snapshot::ForkConfig;

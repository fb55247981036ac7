//! `Vmm` for Python: the machine, with one file for each group of its methods, and the forks of a
//! snapshot, which are machines too. Its devices, hooks, vCPUs and memory have their own files in
//! the folder above. Runs on the caller's thread; every wait releases the GIL.

mod close;
mod console;
mod create;
mod devices;
mod event_loop;
mod eventfds;
mod fork;
mod hooks;
mod interrupts;
mod loop_objects;
mod object;
mod pool;
mod run;
mod snapshot;

pub use interrupts::PyIrqLine;
pub use object::PyVmm;
pub use run::PyCancel;

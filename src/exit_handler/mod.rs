//! The exit path: `exit.rs` has how a run ends and what a vCPU does next, `handler.rs` what stops
//! the loop then. Devices, hooks and vCPUs return an [`Outcome`] on their threads, and the loop
//! processes a kick.

mod exit;
mod handler;

pub use exit::{Exception, Exit, ExitReason, Outcome};
pub use handler::{ExitHandler, VmmExitHandler, WrappedExitHandler};

//! A trace: every hop of a machine (exit, device, event, callback) with its times, one track per
//! thread. A thread is recorded while a [`Recording`] exists on it, and writes the file when its
//! track is full. `vmm/instruments.rs` chooses what a machine records; nothing here knows vCPUs or
//! loops.

mod recording;
mod sink;
#[allow(clippy::module_inception, reason = "it is where `Trace` is")]
mod trace;
mod track;

pub use recording::{Recorders, Recording, flush, is_recorded, record};
pub use sink::{Span, Value};
pub use trace::Trace;
pub use track::Track;

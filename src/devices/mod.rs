//! The buses and the devices a PC needs to boot. Devices are called on the vCPU's thread that
//! exited.

mod backlog;
mod bus;
mod debug_exit;
mod i8042;
mod line;
mod open;
mod platform;
mod rtc;
mod serial;
mod streams;
mod text_stop;
mod uart;
mod uart_bits;

pub use backlog::Piece;
pub use bus::{Access, Bus, Buses, Device, Unanswered, each};
pub use debug_exit::DebugExit;
pub use i8042::I8042;
pub use line::InterruptLine;
pub use open::{Direction, duplicate, input_file};
pub(crate) use platform::attach;
pub use rtc::Rtc;
pub use serial::Serial;
pub(crate) use streams::connect;

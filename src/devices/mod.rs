//! The buses and the devices a PC needs to boot. Devices are called on the vCPU's thread that exited.

mod backlog;
mod bus;
mod debug_exit;
mod i8042;
mod open;
mod rtc;
mod serial;
mod streams;
mod text_stop;
mod uart;
mod uart_bits;

use std::sync::Arc;

pub use backlog::Piece;
pub use bus::{Access, Bus, Buses, Device, Flow, Unanswered, each};
pub use debug_exit::DebugExit;
pub use i8042::I8042;
pub use open::{Direction, duplicate, input_file};
pub use rtc::Rtc;
pub use serial::Serial;
pub(crate) use streams::connect;
use streams::has_consumer;

use crate::config::{ExitPort, SerialConfig};
use crate::error::Result;
use crate::vm::layout;

/// A line to a machine's interrupt controllers, as a device sees it.
pub trait InterruptLine: Send + Sync + std::fmt::Debug {
    /// Raise the line and lower it again. The interrupt is pending when this returns: a guest that goes on takes it before it
    /// can end. An irqfd gives no such promise, because the kernel injects from a work queue.
    fn pulse(&self);
}

/// Put the built-in devices on the buses; returns the serial port, whose interrupt line this is.
pub(crate) fn attach(
    buses: &Buses,
    irq: Option<Box<dyn InterruptLine>>,
    config: &SerialConfig,
    exit_port: ExitPort,
) -> Result<Arc<Serial>> {
    let serial = Arc::new(Serial::new(irq, has_consumer(config))?);
    let port = |base: u16, length, device| buses.pio.add(u64::from(base), length, device);
    port(layout::COM1, 8, Arc::clone(&serial) as Arc<dyn Device>)?;
    port(layout::I8042, 5, Arc::new(I8042::default()))?;
    port(layout::RTC, 2, Arc::new(Rtc::default()))?;
    if let ExitPort(Some(base)) = exit_port {
        port(base, 4, Arc::new(DebugExit))?;
    }
    Ok(serial)
}

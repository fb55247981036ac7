//! The devices that every machine has, at their places. On the thread that makes the machine.

use std::sync::Arc;

use super::bus::{Buses, Device};
use super::debug_exit::DebugExit;
use super::i8042::I8042;
use super::line::InterruptLine;
use super::rtc::Rtc;
use super::serial::Serial;
use super::streams::has_consumer;
use crate::config::{ExitPort, SerialConfig};
use crate::error::Result;
use crate::layout;

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

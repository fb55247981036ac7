//! Attaches the devices that every machine has. Runs on the thread that builds the machine.

use std::sync::Arc;

use super::bus::{Access, Buses, Device};
use super::debug_exit::DebugExit;
use super::i8042::I8042;
use super::line::InterruptLine;
use super::rtc::Rtc;
use super::serial::Serial;
use super::streams::has_consumer;
use crate::config::{ExitPort, SerialConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::resources::{Kind, Resources};

/// Claim the built-in devices' ports and interrupt line, before boot data names them.
///
/// # Errors
/// [`ErrorKind::Config`] when KVM or another device answers at the exit port.
pub(crate) fn claim(resources: &Resources, irqchip: bool, exit_port: ExitPort) -> Result<()> {
    let claim = |base: u16, length, name| {
        claim_range(resources, Access::Pio, (u64::from(base), length), name)
    };
    claim(layout::COM1, 8, "COM1")?;
    claim(layout::RTC, 2, "RTC")?;
    // KVM's speaker port is between the ports of the i8042.
    let ports: &[(u16, u64)] = if irqchip { &[(0, 1), (2, 3)] } else { &[(0, 5)] };
    for (offset, length) in ports {
        claim(layout::I8042 + offset, *length, "i8042")?;
    }
    if irqchip {
        resources.share(Kind::Gsi, (u64::from(layout::COM1_IRQ), 1), "COM1");
    }
    match exit_port {
        ExitPort(Some(base)) => {
            claim(base, 4, "exit port").map_err(|e| Error { at: "exit_port".into(), ..e })
        }
        ExitPort(None) => Ok(()),
    }
}

/// Claim the range of a device.
///
/// # Errors
/// [`ErrorKind::Config`] with the present owner of the range.
pub(crate) fn claim_range(
    resources: &Resources,
    access: Access,
    (base, length): (u64, u64),
    name: &str,
) -> Result<()> {
    resources.claim(access.kind(), (base, length), name).map_err(|other| {
        Error::new(ErrorKind::Config, format!("{base:#x}"), format!("overlaps {other}"))
    })
}

/// Add the built-in devices to the buses. Returns the serial port, which uses this interrupt line.
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

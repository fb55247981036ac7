//! Attaches the built-in devices: those that every machine has, and the parts of a PC. Runs on the
//! thread that builds the machine.

use std::sync::Arc;

use super::bus::{Access, Buses, Device};
use super::debug_exit::DebugExit;
use super::i8042::I8042;
use super::line::InterruptLine;
use super::pvpanic::Pvpanic;
use super::reset_ports::ResetRegister;
use super::rtc::Rtc;
use super::serial::Serial;
use super::streams::has_consumer;
use crate::config::{ExitPort, PcPart, Platform, SerialConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::layout;
use crate::resources::{ResourceKind, Resources};

/// Claim the built-in devices' ports and interrupt line, before boot data names them.
///
/// # Errors
/// [`ErrorKind::Config`] if KVM or another device answers at the exit port.
pub(crate) fn claim(resources: &Resources, platform: &Platform) -> Result<()> {
    let Platform { irqchip, exit_port, .. } = *platform;
    let claim = |ports, name| claim_range(resources, Access::Pio, ports, name);
    layout::device_ports(irqchip).iter().try_for_each(|(ports, name)| claim(*ports, name))?;
    platform.part_ports().try_for_each(|(ports, name)| claim(ports, name))?;
    if irqchip {
        resources.share(ResourceKind::Gsi, (u64::from(layout::COM1_IRQ), 1), "COM1");
    }
    match exit_port {
        ExitPort(Some(base)) => claim((u64::from(base), layout::EXIT_PORTS), "exit port")
            .map_err(|e| Error { at: "exit_port".into(), ..e }),
        ExitPort(None) => Ok(()),
    }
}

/// Claim the range of a device. Claims are what keeps devices apart: a bus trusts them.
///
/// # Errors
/// [`ErrorKind::Config`] if the range is empty or wraps around, or with the present owner of the
/// range.
pub(crate) fn claim_range(
    resources: &Resources,
    access: Access,
    (base, length): (u64, u64),
    name: &str,
) -> Result<()> {
    let refused = |detail| Error::new(ErrorKind::Config, format!("{base:#x}"), detail);
    if length == 0 || base.checked_add(length - 1).is_none() {
        return Err(refused(format!("a device cannot have {length} addresses here")));
    }
    resources
        .claim(access.kind(), (base, length), name)
        .map_err(|other| refused(format!("overlaps {other}")))
}

/// Add the built-in devices to the buses. Returns the serial port, which uses this interrupt line.
pub(crate) fn attach(
    buses: &Buses,
    irq: Option<Box<dyn InterruptLine>>,
    config: &SerialConfig,
    platform: &Platform,
) -> Result<Arc<Serial>> {
    let serial = Arc::new(Serial::new(irq, has_consumer(config))?);
    let port = |base: u16, length, device| buses.pio.add(u64::from(base), length, device);
    port(layout::COM1, 8, Arc::clone(&serial) as Arc<dyn Device>);
    port(layout::I8042, 5, Arc::new(I8042::default()));
    port(layout::RTC, 2, Arc::new(Rtc::default()));
    if let ExitPort(Some(base)) = platform.exit_port {
        port(base, layout::EXIT_PORTS, Arc::new(DebugExit));
    }
    platform.parts.iter().for_each(|part| attach_part(buses, part));
    Ok(serial)
}

/// Add a part of a PC to the buses.
fn attach_part(buses: &Buses, part: PcPart) {
    let port = |base: u16, device| buses.pio.add(u64::from(base), 1, device);
    match part {
        PcPart::Acpi => {}
        PcPart::Pvpanic => port(layout::PVPANIC, Arc::new(Pvpanic)),
        PcPart::ResetPorts => {
            port(layout::RESET_CONTROL, Arc::new(ResetRegister::reset_control()));
            port(layout::SYSTEM_CONTROL, Arc::new(ResetRegister::system_control()));
        }
    }
}

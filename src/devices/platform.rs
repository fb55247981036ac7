//! Attaches the built-in devices, those that every machine has and the parts of a PC, and connects
//! them to the machine's loop. Runs on the thread that builds the machine.

use std::sync::Arc;

use event_manager::SubscriberId;

use super::acpi_pm::AcpiPm;
use super::bus::{Access, Buses, Device};
use super::debug_exit::DebugExit;
use super::i8042::I8042;
use super::line::{InterruptLine, SharedLine};
use super::pvpanic::Pvpanic;
use super::reset_ports::ResetRegister;
use super::rtc::Rtc;
use super::rtc_timer;
use super::serial::Serial;
use super::streams::{self, has_consumer};
use crate::config::{ExitPort, PcPart, Platform, SerialConfig, VmmConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
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
        for (line, name) in layout::DEVICE_LINES {
            resources.share(ResourceKind::Gsi, (u64::from(line), 1), name);
        }
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

/// What the firmware finds out about a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MachineSize {
    /// The size of memory in bytes, for the clock's RAM. A restored clock has what was saved.
    pub(crate) memory: u64,
    pub(crate) vcpus: u64,
}

impl MachineSize {
    pub(crate) fn of(config: &VmmConfig) -> Self {
        Self { memory: config.memory.size_mib << 20, vcpus: config.cpu.vcpus }
    }
}

/// The built-in devices that the machine uses beyond the buses.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) serial: Arc<Serial>,
    rtc: Arc<Rtc>,
}

impl Attached {
    /// Connect the streams and timers of the devices. Returns the subscribers added for them.
    ///
    /// # Errors
    /// If a stream cannot be used.
    pub(crate) fn connect(
        &self,
        streams: SerialConfig,
        manager: &EventManager,
    ) -> Result<Vec<SubscriberId>> {
        let mut ids = streams::connect(&self.serial, streams, manager)?;
        ids.extend(rtc_timer::connect(&self.rtc, manager));
        Ok(ids)
    }
}

/// Add the built-in devices to the buses. `line` gives them their interrupt lines.
pub(crate) fn attach(
    buses: &Buses,
    line: impl Fn(u32) -> Option<Box<dyn InterruptLine>>,
    config: &SerialConfig,
    platform: &Platform,
    size: MachineSize,
) -> Result<Attached> {
    let line = |number| line(number).map(SharedLine::new);
    let serial = Arc::new(Serial::new("COM1", line(layout::COM1_IRQ), has_consumer(config))?);
    let rtc = Arc::new(Rtc::new(line(layout::RTC_IRQ), size.memory, size.vcpus)?);
    let port = |base: u16, length, device| buses.pio.add(u64::from(base), length, device);
    port(layout::COM1, 8, Arc::clone(&serial) as Arc<dyn Device>);
    port(layout::I8042, 5, Arc::new(I8042::new(line(layout::KEYBOARD_IRQ))));
    port(layout::RTC, 2, Arc::clone(&rtc) as Arc<dyn Device>);
    if let ExitPort(Some(base)) = platform.exit_port {
        port(base, layout::EXIT_PORTS, Arc::new(DebugExit));
    }
    platform.parts.iter().for_each(|part| attach_part(buses, part));
    Ok(Attached { serial, rtc })
}

/// Add a part of a PC to the buses.
fn attach_part(buses: &Buses, part: PcPart) {
    let port = |base: u16, device| buses.pio.add(u64::from(base), 1, device);
    match part {
        PcPart::Acpi => {
            buses.pio.add(layout::PM_BASE.into(), layout::PM_PORTS, Arc::new(AcpiPm::default()));
        }
        PcPart::Pvpanic => port(layout::PVPANIC, Arc::new(Pvpanic)),
        PcPart::ResetPorts => {
            port(layout::RESET_CONTROL, Arc::new(ResetRegister::reset_control()));
            port(layout::SYSTEM_CONTROL, Arc::new(ResetRegister::system_control()));
        }
    }
}

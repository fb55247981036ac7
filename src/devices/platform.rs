//! Attaches the built-in devices, those that every machine has and the parts of a PC, and connects
//! them to the machine's loop. Runs on the thread that builds the machine.

use std::sync::Arc;

use event_manager::SubscriberId;

use super::acpi_pm::AcpiPm;
use super::bus::{Access, Buses, Device};
use super::debug_exit::DebugExit;
use super::fw_cfg::FwCfg;
use super::hpet::Hpet;
use super::i8042::I8042;
use super::line::{InterruptLine, SharedLine};
use super::pci::EmptyPci;
use super::pvpanic::Pvpanic;
use super::reset_ports::ResetRegister;
use super::rtc::Rtc;
use super::rtc_timer;
use super::serial::Serial;
use super::serial_kind::SerialKind;
use super::streams::{self, has_consumer};
use super::vga::Vga;
use crate::config::{ExitPort, PcPart, PcParts, Platform, SerialConfig, VmmConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventManager;
use crate::layout;
use crate::memory::GuestMemory;
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
        for (line, name) in platform.parts.iter().filter_map(|p| Some((p.line()?, p.name()))) {
            resources.share(ResourceKind::Gsi, (u64::from(line), 1), name);
        }
    }
    let ranges = platform.parts.iter().filter_map(|part| Some((part.addresses()?, part.name())));
    for (range, name) in ranges {
        claim_range(resources, Access::Mmio, range, name)?;
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

/// What the firmware finds out about a machine. A restored machine has what was saved.
#[derive(Debug)]
pub(crate) struct MachineFacts {
    /// The size of memory in bytes.
    pub(crate) size: u64,
    pub(crate) vcpus: u64,
    pub(crate) memory: GuestMemory,
    /// The files of fw_cfg.
    pub(crate) files: Vec<(String, Vec<u8>)>,
}

impl MachineFacts {
    pub(crate) fn of(
        config: &VmmConfig,
        memory: &GuestMemory,
        files: Vec<(String, Vec<u8>)>,
    ) -> Self {
        let (size, vcpus) = (config.memory.size_mib << 20, config.cpu.vcpus);
        Self { size, vcpus, memory: memory.clone(), files }
    }
}

/// The streams of a machine's ports.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    /// Those of COM1.
    pub(crate) serial: SerialConfig,
    /// Those of the other ports that print, where they have any.
    pub(crate) others: [Option<SerialConfig>; 4],
}

/// The built-in devices that the machine uses beyond the buses.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) serial: Arc<Serial>,
    /// In the order of [`PcPart::PRINTING`].
    pub(crate) others: [Option<Arc<Serial>>; 4],
    pub(crate) vga: Option<Arc<Vga>>,
    rtc: Arc<Rtc>,
}

impl Attached {
    /// Connect the streams and timers of the devices. Returns the subscribers added for them.
    ///
    /// # Errors
    /// If a stream cannot be used.
    pub(crate) fn connect(
        &self,
        streams: Streams,
        manager: &EventManager,
    ) -> Result<Vec<SubscriberId>> {
        let mut ids = streams::connect(&self.serial, streams.serial, manager)?;
        for (port, config) in self.others.iter().zip(streams.others) {
            if let (Some(port), Some(config)) = (port, config) {
                let connected = streams::connect(port, config, manager);
                ids.extend(connected.map_err(|error| port.kind.keyed(error))?);
            }
        }
        ids.extend(rtc_timer::connect(&self.rtc, manager));
        Ok(ids)
    }
}

/// Add the built-in devices to the buses. `line` gives them their interrupt lines.
pub(crate) fn attach(
    buses: &Buses,
    line: impl Fn(u32) -> Option<Box<dyn InterruptLine>>,
    streams: &Streams,
    platform: &Platform,
    facts: &MachineFacts,
) -> Result<Attached> {
    let line = |number| line(number).map(SharedLine::new);
    let com1 = line(layout::COM1_IRQ);
    let kind = SerialKind::Uart("COM1");
    let serial = Arc::new(Serial::new(kind, com1.clone(), has_consumer(&streams.serial))?);
    let rtc = Arc::new(Rtc::new(line(layout::RTC_IRQ), facts.size, facts.vcpus)?);
    let port = |base: u16, length, device| buses.pio.add(u64::from(base), length, device);
    port(layout::COM1, layout::COM_PORTS, Arc::clone(&serial) as Arc<dyn Device>);
    port(layout::I8042, 5, Arc::new(I8042::new(line(layout::KEYBOARD_IRQ))));
    port(layout::RTC, 2, Arc::clone(&rtc) as Arc<dyn Device>);
    if let ExitPort(Some(base)) = platform.exit_port {
        port(base, layout::EXIT_PORTS, Arc::new(DebugExit));
    }
    let vga = platform.parts.has(PcPart::Screen).then(Arc::<Vga>::default);
    if let Some(vga) = &vga {
        port(layout::VGA, layout::VGA_PORTS, Arc::clone(vga) as Arc<dyn Device>);
    }
    platform.parts.iter().for_each(|part| attach_part(buses, part, platform.parts, facts));
    let others = attach_others(buses, com1, line, streams, platform.parts)?;
    Ok(Attached { serial, others, vga, rtc })
}

/// Add the ports that print, other than COM1. COM3 shares COM1's line, and COM4 COM2's.
fn attach_others(
    buses: &Buses,
    com1: Option<Arc<SharedLine>>,
    line: impl Fn(u32) -> Option<Arc<SharedLine>>,
    streams: &Streams,
    parts: PcParts,
) -> Result<[Option<Arc<Serial>>; 4]> {
    let needs_second = parts.has(PcPart::Com2) || parts.has(PcPart::Com4);
    let com2 = if needs_second { line(layout::COM2.1) } else { None };
    let ports = [
        (layout::COM2.0, SerialKind::Uart("COM2"), com2.clone()),
        (layout::COM3.0, SerialKind::Uart("COM3"), com1),
        (layout::COM4.0, SerialKind::Uart("COM4"), com2),
        (layout::DEBUG_PORT, SerialKind::DebugPort, None),
    ];
    let mut others = [None, None, None, None];
    let configs = PcPart::PRINTING.into_iter().zip(&streams.others);
    for (((base, kind, line), (part, config)), port) in
        ports.into_iter().zip(configs).zip(&mut others)
    {
        if parts.has(part) {
            let has_consumer = config.as_ref().is_some_and(has_consumer);
            let device = Arc::new(Serial::new(kind, line, has_consumer)?);
            let length = if kind == SerialKind::DebugPort { 1 } else { layout::COM_PORTS };
            buses.pio.add(u64::from(base), length, Arc::clone(&device) as Arc<dyn Device>);
            *port = Some(device);
        }
    }
    Ok(others)
}

/// Add a part of a PC to the buses.
fn attach_part(buses: &Buses, part: PcPart, parts: PcParts, facts: &MachineFacts) {
    let port = |base: u16, device| buses.pio.add(u64::from(base), 1, device);
    match part {
        PcPart::Acpi => {
            buses.pio.add(layout::PM_BASE.into(), layout::PM_PORTS, Arc::new(AcpiPm::default()));
        }
        PcPart::Pvpanic => port(layout::PVPANIC, Arc::new(Pvpanic)),
        PcPart::ResetPorts => {
            if !parts.has(PcPart::Pci) {
                port(layout::RESET_CONTROL, Arc::new(ResetRegister::reset_control()));
            }
            port(layout::SYSTEM_CONTROL, Arc::new(ResetRegister::system_control()));
        }
        PcPart::Pci => {
            let reset = parts.has(PcPart::ResetPorts).then(ResetRegister::reset_control);
            buses.pio.add(
                u64::from(layout::PCI),
                layout::PCI_PORTS,
                Arc::new(EmptyPci::new(reset)),
            );
        }
        PcPart::Hpet => buses.mmio.add(layout::HPET, layout::HPET_SIZE, Arc::<Hpet>::default()),
        PcPart::FwCfg => {
            let size = (facts.size, facts.vcpus);
            let fw_cfg = FwCfg::new(facts.memory.clone(), size, &facts.files);
            buses.pio.add(u64::from(layout::FW_CFG), layout::FW_CFG_PORTS, Arc::new(fw_cfg));
        }
        // `attach` adds these, which the machine uses too.
        PcPart::Com2 | PcPart::Com3 | PcPart::Com4 | PcPart::Screen | PcPart::DebugPort => {}
    }
}

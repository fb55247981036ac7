//! The parts of a PC: which there are, their ports, and which of them a machine has. Pure data.

use crate::layout;

/// A range of ports: start and count.
type Ports = (u64, u64);

/// The parts of a PC that not every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PcPart {
    /// ACPI's tables and registers.
    Acpi,
    /// The port by which a guest reports a panic.
    Pvpanic,
    /// The ports 0xcf9 and 0x92, which reset the machine.
    ResetPorts,
    /// The second serial port.
    Com2,
    /// The third serial port.
    Com3,
    /// The fourth serial port.
    Com4,
    /// The VGA text screen's registers.
    Screen,
    /// The port that takes the messages of firmware.
    DebugPort,
    /// The configuration ports of a PCI bus without devices.
    Pci,
    /// The main counter of an HPET.
    Hpet,
    /// Files and facts for firmware.
    FwCfg,
}

impl PcPart {
    /// All of them. The place in this list is the bit in a snapshot, which never changes.
    pub const ALL: [Self; 11] = [
        Self::Acpi,
        Self::Pvpanic,
        Self::ResetPorts,
        Self::Com2,
        Self::Com3,
        Self::Com4,
        Self::Screen,
        Self::DebugPort,
        Self::Pci,
        Self::Hpet,
        Self::FwCfg,
    ];

    /// Those that print text, in the order of [`super::VmmConfig::others`].
    pub const PRINTING: [Self; 4] = [Self::Com2, Self::Com3, Self::Com4, Self::DebugPort];

    /// Its key in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Acpi => "acpi",
            Self::Pvpanic => "pvpanic",
            Self::ResetPorts => "reset_ports",
            Self::Com2 => "com2",
            Self::Com3 => "com3",
            Self::Com4 => "com4",
            Self::Screen => "screen",
            Self::DebugPort => "debug_port",
            Self::Pci => "pci",
            Self::Hpet => "hpet",
            Self::FwCfg => "fw_cfg",
        }
    }

    /// Whether a PC has it by default.
    fn is_usual(self) -> bool {
        !matches!(self, Self::Com2 | Self::Com3 | Self::Com4 | Self::Hpet | Self::FwCfg)
    }

    /// Its interrupt line.
    #[must_use]
    pub fn line(self) -> Option<u32> {
        match self {
            Self::Com2 => Some(layout::COM2.1),
            Self::Com3 => Some(layout::COM3.1),
            Self::Com4 => Some(layout::COM4.1),
            _ => None,
        }
    }

    /// Its guest-physical addresses.
    #[must_use]
    pub fn addresses(self) -> Option<(u64, u64)> {
        (self == Self::Hpet).then_some((layout::HPET, layout::HPET_SIZE))
    }

    /// Its ports.
    #[must_use]
    pub fn ports(self) -> &'static [Ports] {
        match self {
            Self::Acpi => &[(layout::PM_BASE as u64, layout::PM_PORTS)],
            Self::Pvpanic => &[(layout::PVPANIC as u64, 1)],
            Self::ResetPorts => {
                &[(layout::RESET_CONTROL as u64, 1), (layout::SYSTEM_CONTROL as u64, 1)]
            }
            Self::Com2 => &[(layout::COM2.0 as u64, layout::COM_PORTS)],
            Self::Com3 => &[(layout::COM3.0 as u64, layout::COM_PORTS)],
            Self::Com4 => &[(layout::COM4.0 as u64, layout::COM_PORTS)],
            Self::Screen => &[(layout::VGA as u64, layout::VGA_PORTS)],
            Self::DebugPort => &[(layout::DEBUG_PORT as u64, 1)],
            Self::Pci => &[(layout::PCI as u64, layout::PCI_PORTS)],
            Self::Hpet => &[],
            Self::FwCfg => &[(layout::FW_CFG as u64, layout::FW_CFG_PORTS)],
        }
    }

    fn overlaps(self, (start, count): Ports) -> bool {
        self.ports().iter().any(|(base, length)| *base < start + count && start < base + length)
    }

    const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// A set of parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PcParts(u32);

impl PcParts {
    /// Whether the part is in the set.
    #[must_use]
    pub fn has(self, part: PcPart) -> bool {
        self.0 & part.bit() != 0
    }

    /// The set with the part.
    #[must_use]
    pub fn with(self, part: PcPart) -> Self {
        Self(self.0 | part.bit())
    }

    /// The set without the part.
    #[must_use]
    pub fn without(self, part: PcPart) -> Self {
        Self(self.0 & !part.bit())
    }

    /// The parts of the set.
    pub fn iter(self) -> impl Iterator<Item = PcPart> {
        PcPart::ALL.into_iter().filter(move |part| self.has(*part))
    }

    /// The bits that represent it in a snapshot.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }

    /// From the bits of a snapshot; `None` if there are other bits.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        let known = PcPart::ALL.into_iter().fold(0, |bits, part| bits | part.bit());
        (bits & !known == 0).then_some(Self(bits))
    }

    /// The names, for messages.
    #[must_use]
    pub fn names(self) -> String {
        let names: Vec<_> = self.iter().map(PcPart::name).collect();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    }
}

/// The exit port's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitPort(pub Option<u16>);

impl Default for ExitPort {
    fn default() -> Self {
        Self(Some(layout::EXIT_PORT))
    }
}

/// Which parts a machine has. `None` means only a PC, a machine that boots a kernel or firmware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlatformConfig {
    /// ACPI's tables and registers.
    pub acpi: Option<bool>,
    /// The port by which a guest reports a panic.
    pub pvpanic: Option<bool>,
    /// The ports 0xcf9 and 0x92, which reset the machine.
    pub reset_ports: Option<bool>,
    /// The VGA text screen's registers.
    pub screen: Option<bool>,
    /// The port that takes the messages of firmware.
    pub debug_port: Option<bool>,
    /// The configuration ports of a PCI bus without devices.
    pub pci: Option<bool>,
    /// The main counter of an HPET. A PC has none by default.
    pub hpet: Option<bool>,
}

impl PlatformConfig {
    fn of(&self, part: PcPart) -> Option<bool> {
        match part {
            PcPart::Acpi => self.acpi,
            PcPart::Pvpanic => self.pvpanic,
            PcPart::ResetPorts => self.reset_ports,
            PcPart::Screen => self.screen,
            PcPart::DebugPort => self.debug_port,
            PcPart::Pci => self.pci,
            PcPart::Hpet => self.hpet,
            // There if they have a configuration.
            PcPart::Com2 | PcPart::Com3 | PcPart::Com4 | PcPart::FwCfg => None,
        }
    }

    /// Those of the parts that nobody has asked for.
    #[must_use]
    pub fn by_default(&self, parts: PcParts) -> PcParts {
        parts.iter().filter(|part| self.of(*part).is_none()).fold(PcParts::default(), PcParts::with)
    }

    /// The parts of a machine. A part that is there by default gives way to the exit port.
    #[must_use]
    pub fn parts(&self, is_pc: bool, ExitPort(exit_port): ExitPort) -> PcParts {
        let exit_ports = exit_port.map(|base| (u64::from(base), layout::EXIT_PORTS));
        let gives_way = |part: PcPart| exit_ports.is_some_and(|ports| part.overlaps(ports));
        let is_usual = |part: PcPart| is_pc && part.is_usual() && !gives_way(part);
        let is_there = |part| self.of(part).unwrap_or_else(|| is_usual(part));
        let there = PcPart::ALL.into_iter().filter(|part| is_there(*part));
        there.fold(PcParts::default(), PcParts::with)
    }
}

/// What a machine has besides vCPUs and memory, as far as its addresses depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Platform {
    /// Whether there is an in-kernel interrupt controller.
    pub irqchip: bool,
    /// The exit port.
    pub exit_port: ExitPort,
    /// The parts of a PC.
    pub parts: PcParts,
    /// Those that give way to a device of the program, because they are there by default.
    pub yielding: PcParts,
}

impl Platform {
    /// The ports of its parts, and their names. The reset control register is one of PCI's ports.
    pub fn part_ports(&self) -> impl Iterator<Item = (Ports, &'static str)> {
        let has_pci = self.parts.has(PcPart::Pci);
        let is_own = move |part, (base, _): Ports| {
            part != PcPart::ResetPorts || !has_pci || base != u64::from(layout::RESET_CONTROL)
        };
        self.parts.iter().flat_map(move |part| {
            let own = part.ports().iter().filter(move |ports| is_own(part, **ports));
            own.map(move |ports| (*ports, part.name()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_PORT: ExitPort = ExitPort(None);

    #[test]
    fn a_pc_has_all_parts_and_another_machine_those_that_it_asks_for() {
        let default = PlatformConfig::default();
        assert_eq!(default.parts(false, NO_PORT), PcParts::default());
        let usual = "acpi, pvpanic, reset_ports, screen, debug_port, pci";
        assert_eq!(default.parts(true, NO_PORT).names(), usual);
        let (acpi, pvpanic, hpet) = (Some(false), Some(true), Some(true));
        let some = PlatformConfig { acpi, pvpanic, hpet, ..default };
        assert_eq!(some.parts(false, NO_PORT).names(), "pvpanic, hpet");
        let names = "pvpanic, reset_ports, screen, debug_port, pci, hpet";
        assert_eq!(some.parts(true, NO_PORT).names(), names);
    }

    #[test]
    fn a_part_by_default_gives_way_to_the_exit_port_and_one_that_is_asked_for_stays() {
        let port = ExitPort(Some(layout::PVPANIC - 3));
        let mut config = PlatformConfig::default();
        let names = "acpi, reset_ports, screen, debug_port, pci";
        assert_eq!(config.parts(true, port).names(), names);
        config.pvpanic = Some(true);
        assert!(config.parts(true, port).has(PcPart::Pvpanic));
    }

    #[test]
    fn a_platform_lists_the_ports_of_its_parts() {
        let parts = PcParts::default().with(PcPart::Pvpanic);
        let platform = Platform { parts, ..Platform::default() };
        let ports: Vec<_> = platform.part_ports().collect();
        assert_eq!(ports, [((0x505, 1), "pvpanic")]);
        let parts = PcParts::default().with(PcPart::ResetPorts).with(PcPart::Pci);
        let platform = Platform { parts, ..Platform::default() };
        let ports: Vec<_> = platform.part_ports().collect();
        assert_eq!(ports, [((0x92, 1), "reset_ports"), ((0xcf8, 8), "pci")]);
    }

    #[test]
    fn parts_come_back_from_their_bits_and_no_other_bits_do() {
        for bits in 0..8 {
            assert_eq!(PcParts::from_bits(bits).map(PcParts::bits), Some(bits));
        }
        assert_eq!(PcParts::from_bits(1 << 31), None);
        for (at, part) in PcPart::ALL.into_iter().enumerate() {
            assert_eq!(PcParts::default().with(part).bits(), 1 << at);
        }
    }
}

//! The configuration of a machine as plain structs, and its validation. `boot.rs` has what it
//! starts.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use super::boot::{Boot, Code, bad};
use super::platform::{ExitPort, PcPart, Platform, PlatformConfig};
use super::virtio::VirtioConfig;
use crate::cpu::CpuConfig;
use crate::error::Result;
use crate::layout;

/// A whole machine.
#[derive(Debug, Default)]
pub struct VmmConfig {
    /// Guest memory.
    pub memory: MemoryConfig,
    /// The vCPUs and their features.
    pub cpu: CpuConfig,
    /// The code or kernel that the machine starts.
    pub boot: Boot,
    /// The first serial port, COM1.
    pub serial: SerialConfig,
    /// The other ports that print: COM2, COM3, COM4 and the debug port, where they are configured.
    pub others: [Option<SerialConfig>; 4],
    /// A write to this port ends the run with the value as its code. None for no such port.
    pub exit_port: ExitPort,
    /// An in-kernel PIC, I/O APIC and LAPICs. By default only for a PC.
    pub irqchip: Option<bool>,
    /// An in-kernel PIT. By default the same as `irqchip`.
    pub pit: Option<bool>,
    /// The parts of a PC that it has.
    pub platform: PlatformConfig,
    /// The files of fw_cfg by name, if the machine has it.
    pub fw_cfg: Option<Vec<(String, Code)>>,
    /// The virtio devices, in the order of their addresses.
    pub virtio: Vec<VirtioConfig>,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Size in MiB, from 1.
    pub size_mib: u64,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size_mib: 128 }
    }
}

/// The streams of a serial port.
#[derive(Debug, Default)]
pub struct SerialConfig {
    /// Where the output goes. None keeps the newest output for the host.
    pub output: Option<SerialOutput>,
    /// Where the input comes from. None means only the host sends input.
    pub input: Option<SerialInput>,
    /// The bytes that the guest receives at the end of the input.
    pub input_eof: Vec<u8>,
}

/// Where serial output goes.
#[derive(Debug)]
pub enum SerialOutput {
    /// Written on the loop's thread.
    Fd(OwnedFd),
    /// A file, created or truncated when the machine is built.
    File(PathBuf),
    /// Taken by a subscriber of the machine's event manager, such as Python's.
    Subscriber,
}

/// Where serial input comes from.
#[derive(Debug)]
pub enum SerialInput {
    /// Read on the loop's thread.
    Fd(OwnedFd),
    /// Given by a subscriber of the machine's event manager, such as Python's.
    Subscriber,
}

impl VmmConfig {
    /// Whether the machine has an in-kernel interrupt controller.
    #[must_use]
    pub fn has_irqchip(&self) -> bool {
        self.irqchip.unwrap_or_else(|| self.is_pc())
    }

    /// Whether the machine is a PC: it boots a kernel or firmware, which expects a PC's parts.
    #[must_use]
    pub fn is_pc(&self) -> bool {
        self.boot.is_pc()
    }

    /// What the machine has besides vCPUs and memory.
    #[must_use]
    pub fn platform(&self) -> Platform {
        let exit_port = self.exit_port;
        let parts = self.platform.parts(self.is_pc(), exit_port);
        let yielding = self.platform.by_default(parts);
        let others = PcPart::PRINTING.into_iter().zip(&self.others);
        let configured = others.filter_map(|(part, config)| config.is_some().then_some(part));
        let fw_cfg = self.fw_cfg.is_some().then_some(PcPart::FwCfg);
        let (parts, yielding) =
            configured.chain(fw_cfg).fold((parts, yielding), |(all, yielding), part| {
                (all.with(part), yielding.without(part))
            });
        Platform { irqchip: self.has_irqchip(), exit_port, parts, yielding }
    }

    /// Whether the machine has an in-kernel PIT.
    #[must_use]
    pub fn has_pit(&self) -> bool {
        self.pit.unwrap_or_else(|| self.has_irqchip())
    }

    /// Check the values as far as possible without I/O.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Config`], with the key of the first bad value as its place.
    pub fn validate(&self) -> Result<()> {
        let size = checked_size(self.memory.size_mib)?;
        self.cpu.check()?;
        if self.has_pit() && !self.has_irqchip() {
            return Err(bad("pit", "a PIT needs irqchip = true"));
        }
        if let ExitPort(Some(port)) = self.exit_port {
            check_exit_port(u64::from(port), &self.platform())?;
        }
        self.boot.validate(size, self.cpu.vcpus, self.has_irqchip())
    }
}

/// Check that the ports exist and nothing else answers at them.
fn check_exit_port(start: u64, platform: &Platform) -> Result<()> {
    let end = start + layout::EXIT_PORTS;
    if end > 0x1_0000 {
        return Err(bad("exit_port", format!("{start:#x} leaves no room for 4 ports")));
    }
    let kernel = layout::KERNEL_PORTS.iter().filter(|_| platform.irqchip);
    let devices = kernel.chain(layout::device_ports(platform.irqchip)).copied();
    let mut taken = devices.chain(platform.part_ports());
    match taken.find(|((first, count), _)| *first < end && start < first + count) {
        Some((_, name)) => Err(bad("exit_port", format!("{start:#x} overlaps {name}"))),
        None => Ok(()),
    }
}

fn checked_size(size_mib: u64) -> Result<u64> {
    // KVM's slots hold at most 2^31 - 1 pages of 4 KiB each.
    let most = (1 << 23) - 1;
    if !(1..=most).contains(&size_mib) {
        return Err(bad("memory.size_mib", format!("{size_mib} is not from 1 to {most}")));
    }
    Ok(size_mib << 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Code, ElfBoot, FlatBoot};
    use crate::cpu::CpuMode;
    use proptest::prelude::*;

    fn flat(address: u64, mode: CpuMode) -> VmmConfig {
        let code = Code::Bytes(vec![0xf4]);
        let boot = Boot::Flat(FlatBoot { code, address, entry: None, mode });
        VmmConfig { boot, ..VmmConfig::default() }
    }

    fn place(config: &VmmConfig) -> String {
        config.validate().unwrap_err().at
    }

    #[test]
    fn the_default_machine_is_valid() {
        VmmConfig::default().validate().unwrap();
    }

    #[test]
    fn bad_values_are_named_by_their_key() {
        let mut config = flat(0x1000, CpuMode::Real16);
        config.memory.size_mib = 0;
        assert_eq!(place(&config), "memory.size_mib");
        config.memory.size_mib = 1;
        config.cpu.vcpus = 0;
        assert_eq!(place(&config), "cpu.vcpus");
        config.cpu.vcpus = 1;
        config.cpu.hide = vec!["no such feature".into()];
        assert_eq!(place(&config), "cpu.hide");
        config.cpu.hide.clear();
        config.exit_port = ExitPort(Some(0x3f8));
        assert_eq!(place(&config), "exit_port");
        config.exit_port = ExitPort(Some(0xffff));
        assert_eq!(place(&config), "exit_port");
        config.exit_port = ExitPort(Some(0x3f6)); // the last two are COM1's
        assert_eq!(place(&config), "exit_port");
        config.exit_port = ExitPort(Some(0x20)); // a PIC's, if there is one
        config.validate().unwrap();
        config.irqchip = Some(true);
        assert_eq!(place(&config), "exit_port");
        config.irqchip = None;
        config.exit_port = ExitPort(Some(layout::PVPANIC - 1));
        config.validate().unwrap();
        config.platform.pvpanic = Some(true);
        assert_eq!(place(&config), "exit_port");
        config.exit_port = ExitPort(None);
        config.pit = Some(true);
        assert_eq!(place(&config), "pit");
    }

    #[test]
    fn an_entry_outside_its_mode_is_refused() {
        assert_eq!(place(&flat(0x10_0000, CpuMode::Real16)), "boot.entry");
        assert_eq!(place(&flat(1 << 40, CpuMode::Long64)), "boot.address");
        assert_eq!(place(&flat(0x1000, CpuMode::Kernel64)), "boot.mode");
    }

    #[test]
    fn an_elf_program_has_one_vcpu_a_stack_and_no_interrupt_controller() {
        let boot = Boot::Elf(ElfBoot { stack_kib: 64, ..ElfBoot::default() });
        let mut config = VmmConfig { boot, ..VmmConfig::default() };
        config.validate().unwrap();
        config.irqchip = Some(true);
        assert_eq!(place(&config), "irqchip");
        config.irqchip = None;
        config.cpu.vcpus = 2;
        assert_eq!(place(&config), "cpu.vcpus");
        config.cpu.vcpus = 1;
        config.boot = Boot::Elf(ElfBoot::default());
        assert_eq!(place(&config), "boot.stack_kib");
        config.boot = flat(0x1000, CpuMode::Program64).boot;
        assert_eq!(place(&config), "boot.mode");
    }

    proptest! {
        #[test]
        fn validate_never_panics(size in any::<u64>(), vcpus in any::<u64>(), port in any::<u16>(),
                                 address in any::<u64>(), entry in any::<Option<u64>>()) {
            let mut config = flat(address, CpuMode::Protected32);
            config.memory.size_mib = size;
            config.cpu.vcpus = vcpus;
            config.exit_port = ExitPort(Some(port));
            if let Boot::Flat(flat) = &mut config.boot {
                flat.entry = entry;
            }
            let _ = config.validate();
        }
    }
}

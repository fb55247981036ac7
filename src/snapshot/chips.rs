//! The state in KVM that belongs to no vCPU: the clock, the PIT and the interrupt controllers. Any
//! thread, with all vCPUs stopped.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use super::state::{Record, RecordKind, Records, bytes, from_bytes, get, put};
use crate::bytes::{Reader, bad};
use crate::error::Result;
use crate::kvm::checked as kvm;
use crate::vm::MachineSpec;

/// The order in which the chips are set. KVM forwards what is pending at the slave to the master,
/// which is therefore set after it.
const CHIPS: [u16; 3] = [1, 0, 2];

/// Interrupt lines of the I/O APIC.
const LINES: u32 = 24;

/// KVM's number of a chip.
fn chip(number: u16) -> u32 {
    match number {
        0 => KVM_IRQCHIP_PIC_MASTER,
        1 => KVM_IRQCHIP_PIC_SLAVE,
        _ => KVM_IRQCHIP_IOAPIC,
    }
}

/// Read the clock and the chips. `lines` has a bit for each interrupt line that the host holds
/// high, which KVM does not report.
pub(crate) fn capture(vm: &VmFd, spec: &MachineSpec, lines: u32) -> Result<Records> {
    let mut all = Records::new();
    let clock = kvm("KVM_GET_CLOCK", vm.get_clock())?;
    put(&mut all, RecordKind::Clock, 0, bytes(&clock));
    if spec.pit {
        put(&mut all, RecordKind::Pit, 0, bytes(&kvm("KVM_GET_PIT2", vm.get_pit2())?));
    }
    if spec.irqchip {
        for number in 0..3 {
            let mut state = kvm_irqchip { chip_id: chip(number), ..Default::default() };
            kvm("KVM_GET_IRQCHIP", vm.get_irqchip(&mut state))?;
            put(&mut all, RecordKind::Irqchip, number, bytes(&state));
        }
    }
    if lines != 0 {
        put(&mut all, RecordKind::IrqLines, 0, lines.to_le_bytes());
    }
    Ok(all)
}

fn one(records: &[Record], kind: RecordKind, number: u16) -> Result<&[u8]> {
    get(records, kind, number).ok_or_else(|| bad(kind.name(), "the state has none"))
}

/// Set the interrupt controllers and the lines into them. This comes before the vCPUs, because the
/// I/O APIC sends its pending interrupts to the LAPICs again, whose state includes them already.
pub(crate) fn apply_controllers(
    vm: &VmFd,
    spec: &MachineSpec,
    records: &[Record],
    lines: &mut u32,
) -> Result<()> {
    if spec.pit {
        // Without a mode the timer is off, so no tick of the previous state follows.
        let mut off: kvm_pit_state2 = from_bytes("pit", one(records, RecordKind::Pit, 0)?)?;
        off.channels.iter_mut().for_each(|channel| channel.mode = 0xff);
        kvm("KVM_SET_PIT2", vm.set_pit2(&off))?;
    }
    if !spec.irqchip {
        return Ok(());
    }
    let wanted = match get(records, RecordKind::IrqLines, 0) {
        Some(bytes) => Reader::new("irq_lines", bytes).u32()?,
        None => 0,
    };
    let changed = *lines ^ wanted;
    for line in (0..LINES).filter(|line| changed & 1 << line != 0) {
        kvm("KVM_IRQ_LINE", vm.set_irq_line(line, wanted & 1 << line != 0))?;
        *lines ^= 1 << line;
    }
    for number in CHIPS {
        let mut state: kvm_irqchip =
            from_bytes("irqchip", one(records, RecordKind::Irqchip, number)?)?;
        state.chip_id = chip(number);
        kvm("KVM_SET_IRQCHIP", vm.set_irqchip(&state))?;
    }
    Ok(())
}

/// Set the timers, after everything else: the PIT ticks from here on, and the clock continues from
/// where it was.
pub(crate) fn apply_timers(vm: &VmFd, spec: &MachineSpec, records: &[Record]) -> Result<()> {
    if spec.pit {
        kvm("KVM_SET_PIT2", vm.set_pit2(&from_bytes("pit", one(records, RecordKind::Pit, 0)?)?))?;
    }
    let saved: kvm_clock_data = from_bytes("clock", one(records, RecordKind::Clock, 0)?)?;
    let clock = kvm_clock_data { clock: saved.clock, ..Default::default() };
    kvm("KVM_SET_CLOCK", vm.set_clock(&clock))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PcParts;
    use crate::error::ErrorKind;

    #[test]
    fn what_is_missing_is_named() {
        let Ok(kvm) = crate::kvm::open_kvm() else { return };
        let vm = kvm.create_vm().unwrap();
        let (exit_port, parts) = (None, PcParts::default());
        let spec =
            MachineSpec { vcpus: 1, irqchip: false, pit: false, fixups: false, exit_port, parts };
        let error = apply_timers(&vm, &spec, &[]).unwrap_err();
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Snapshot, "clock"));
        let captured = capture(&vm, &spec, 0).unwrap();
        apply_controllers(&vm, &spec, &captured, &mut 0).unwrap();
        apply_timers(&vm, &spec, &captured).unwrap();
    }
}

//! The machine's state in KVM that is no vCPU's: clock, PIT and interrupt controllers. While all vCPUs are at rest.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::shape::Shape;
use super::state::{Kind, Record, Records, bad, get, put};
use super::vcpu::{bytes, kvm, plain};
use crate::error::Result;

const CHIPS: [u16; 3] = [0, 1, 2];

/// KVM's number of a chip.
fn chip(number: u16) -> u32 {
    match number {
        0 => KVM_IRQCHIP_PIC_MASTER,
        1 => KVM_IRQCHIP_PIC_SLAVE,
        _ => KVM_IRQCHIP_IOAPIC,
    }
}

/// The clock, and with an interrupt controller the chips.
pub(super) fn capture(vm: &VmFd, shape: &Shape) -> Result<Records> {
    let mut all = Records::new();
    let clock = kvm("KVM_GET_CLOCK", vm.get_clock())?;
    put(&mut all, Kind::Clock, 0, bytes(&clock));
    if shape.pit {
        put(&mut all, Kind::Pit, 0, bytes(&kvm("KVM_GET_PIT2", vm.get_pit2())?));
    }
    if shape.irqchip {
        for number in CHIPS {
            let mut state = kvm_irqchip { chip_id: chip(number), ..Default::default() };
            kvm("KVM_GET_IRQCHIP", vm.get_irqchip(&mut state))?;
            put(&mut all, Kind::Irqchip, number, bytes(&state));
        }
    }
    Ok(all)
}

/// Set what a capture found. The clock goes on from where it stood.
pub(super) fn apply(vm: &VmFd, shape: &Shape, records: &[Record]) -> Result<()> {
    let one = |kind: Kind, number| {
        get(records, kind, number).ok_or_else(|| bad(kind.name(), "the state has none"))
    };
    if shape.irqchip {
        for number in CHIPS {
            let mut state: kvm_irqchip = plain("irqchip", one(Kind::Irqchip, number)?)?;
            state.chip_id = chip(number);
            kvm("KVM_SET_IRQCHIP", vm.set_irqchip(&state))?;
        }
    }
    if shape.pit {
        kvm("KVM_SET_PIT2", vm.set_pit2(&plain("pit", one(Kind::Pit, 0)?)?))?;
    }
    let saved: kvm_clock_data = plain("clock", one(Kind::Clock, 0)?)?;
    let clock = kvm_clock_data { clock: saved.clock, ..Default::default() };
    kvm("KVM_SET_CLOCK", vm.set_clock(&clock))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn what_is_missing_is_named() {
        let Ok(kvm) = crate::vm::open_kvm() else { return };
        let vm = kvm.create_vm().unwrap();
        let shape = Shape { vcpus: 1, irqchip: false, pit: false, fixups: false, exit_port: None };
        let error = apply(&vm, &shape, &[]).unwrap_err();
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Snapshot, "clock"));
        apply(&vm, &shape, &capture(&vm, &shape).unwrap()).unwrap();
    }
}

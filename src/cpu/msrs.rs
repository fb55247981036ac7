//! The MSRs and the two LAPIC lines as a PC's firmware leaves them.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{Error, ErrorKind, Result};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, with write-back as the default type.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Set the MSRs that a kernel expects firmware to have set.
///
/// # Errors
/// If KVM refuses one.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<()> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries)
        .map_err(|_| Error::new(ErrorKind::Kvm, "KVM_SET_MSRS", "too many MSRs"))?;
    let set = vcpu.set_msrs(&msrs).map_err(|e| Error::kvm("KVM_SET_MSRS", e))?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => {
            let detail = format!("KVM refuses MSR {:#x}", refused.index);
            Err(Error::new(ErrorKind::Kvm, "KVM_SET_MSRS", detail))
        }
    }
}

/// IA32_APIC_BASE: the local APIC is on, in x2APIC mode.
const APIC_X2: u64 = 1 << 11 | 1 << 10;

/// Switch the local APIC to x2APIC mode, as firmware does with all of them if an id has more than 8
/// bits (Intel SDM volume 3, 11.12.8). The vCPU has its CPUID.
///
/// # Errors
/// If KVM refuses it.
#[allow(clippy::disallowed_methods, reason = "a new vCPU has no CR8 in its run page")]
pub fn set_x2apic_mode(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(|e| Error::kvm("KVM_GET_SREGS", e))?;
    sregs.apic_base |= APIC_X2;
    vcpu.set_sregs(&sregs).map_err(|e| Error::kvm("KVM_SET_SREGS", e))
}

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_NMI: u8 = 4;
const DELIVER_EXTINT: u8 = 7;

/// Connect LINT0 to the PIC and LINT1 to the NMI, as the MP table says.
///
/// # Errors
/// If KVM refuses the LAPIC's state.
pub fn set_lapic_lines(vcpu: &VcpuFd) -> Result<()> {
    let mut lapic = vcpu.get_lapic().map_err(|e| Error::kvm("KVM_GET_LAPIC", e))?;
    set_delivery(&mut lapic, LVT_LINT0, DELIVER_EXTINT);
    set_delivery(&mut lapic, LVT_LINT1, DELIVER_NMI);
    vcpu.set_lapic(&lapic).map_err(|e| Error::kvm("KVM_SET_LAPIC", e))
}

/// The delivery mode is bits 8 to 10 of the register, the low bits of its second byte.
fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u8) {
    if let Some(byte) = lapic.regs.get_mut(register + 1) {
        let bits = u8::from_ne_bytes(byte.to_ne_bytes()) & !7 | mode;
        *byte = std::ffi::c_char::from_ne_bytes(bits.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delivery_mode_leaves_the_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LVT_LINT0 + 1] = 0x55;
        set_delivery(&mut lapic, LVT_LINT0, DELIVER_EXTINT);
        assert_eq!(lapic.regs[LVT_LINT0 + 1], 0x57);
    }
}

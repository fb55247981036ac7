//! The CPUID of a vCPU's state: set once, and compared afterwards. On the thread that has stopped
//! the vCPU.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::state::{Record, RecordKind, from_bytes, get};
use crate::bytes::bad;
use crate::cpu::cpuid::{of_vcpu, without_tail};
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::checked as kvm;
use crate::vcpu::Vcpu;

/// Check the CPUID of a state. Once a vCPU has run, its CPUID cannot change.
///
/// # Errors
/// [`ErrorKind::State`] if the state has another one.
pub(crate) fn check(vcpu: &mut Vcpu, number: u16, records: &[Record]) -> Result<()> {
    let Some(table) = get(records, RecordKind::Cpuid, number) else { return Ok(()) };
    if !vcpu.has_run || vcpu.accepted_cpuid.as_deref() == Some(table) {
        return Ok(());
    }
    let here = of_vcpu(vcpu.fd())?;
    let constant_part =
        |table: &[kvm_cpuid_entry2]| table.iter().map(constant_part).collect::<Vec<_>>();
    if constant_part(&here) != constant_part(&entries(table)?) {
        let detail = format!("the snapshot has another CPUID than vCPU {number}, which has run");
        return Err(Error::new(ErrorKind::State, "reset", detail).hint("fork the snapshot"));
    }
    vcpu.accepted_cpuid = Some(table.to_vec());
    Ok(())
}

/// An entry without the fields that depend on the guest's registers: MONITOR, OSXSAVE, APIC, OSPKE,
/// and the size of xsave.
fn constant_part(entry: &kvm_cpuid_entry2) -> [u32; 6] {
    let kvm_cpuid_entry2 { function, index, eax, mut ebx, mut ecx, mut edx, .. } = *entry;
    match (function, index) {
        (1, _) => (ecx, edx) = (ecx & !(1 << 3 | 1 << 27), edx & !(1 << 9)),
        (7, 0) => ecx &= !(1 << 4),
        (0xd, 0 | 1) => ebx = 0,
        _ => {}
    }
    [function, index, eax, ebx, ecx, edx]
}

/// Set the CPUID of a vCPU that has not run.
///
/// # Errors
/// If the record is no table, or KVM refuses it.
pub(super) fn set(vcpu: &Vcpu, table: &[u8]) -> Result<()> {
    kvm("KVM_SET_CPUID2", vcpu.fd().set_cpuid2(&table_of(table)?))
}

/// The CPUID table of a record.
pub(crate) fn table_of(table: &[u8]) -> Result<CpuId> {
    CpuId::from_entries(&entries(table)?).map_err(|e| bad("cpuid", format!("{e:?}")))
}

pub(super) fn entries(table: &[u8]) -> Result<Vec<kvm_cpuid_entry2>> {
    let size = size_of::<kvm_cpuid_entry2>();
    let entries: Result<Vec<_>> =
        table.chunks(size).map(|entry| from_bytes("cpuid", entry)).collect();
    Ok(without_tail(entries?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_make_a_cpuid_table_panic(table in prop::collection::vec(any::<u8>(), 0..200)) {
            let whole = table.len() % size_of::<kvm_cpuid_entry2>() == 0;
            prop_assert_eq!(table_of(&table).is_ok(), whole);
        }
    }
}

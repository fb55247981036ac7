//! A vCPU's model-specific registers: those that KVM lists, and those that a guest can change
//! although KVM does not list them. On the thread that has stopped the vCPU.

use kvm_bindings::{Msrs, kvm_msr_entry};

use crate::bytes::{Reader, bad};
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::checked as kvm;
use crate::kvm::open_kvm;
use crate::process::OnceBox;
use crate::vcpu::Vcpu;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_DEBUGCTL: u32 = 0x1d9;
/// One call takes fewer than KVM's MAX_IO_MSRS, which is 256.
const MAX_AT_ONCE: usize = 255;
/// Bit 0 is set if the guest uses KVM's clock.
const KVM_SYSTEM_TIME: [u32; 2] = [0x12, 0x4b56_4d01];

/// The registers that this KVM provides, in the order in which they are set. Read once per
/// process.
static LIST: OnceBox<Vec<u32>> = OnceBox::new();

/// Registers that KVM keeps for a guest although KVM_GET_MSR_INDEX_LIST leaves them out: Intel SDM
/// volume 4, AMD APM volume 2. EFER and the bases of FS, GS and the LAPIC are special registers.
pub(super) fn unlisted() -> impl Iterator<Item = u32> {
    let mtrrs = [0x2ff, 0x250, 0x258, 0x259].into_iter().chain(0x268..0x270).chain(0x200..0x210);
    // For each of 32 machine-check banks: control, status, address and miscellaneous, and the
    // second control.
    let machine_check = (0x400..0x480).chain(0x280..0x2a0);
    // DEBUGCTL, TSC_AUX, VM_CR, and the errata that AMD processors report to the guest.
    let others = [0x1d9, 0xc000_0103, 0xc001_0114, 0xc001_0140, 0xc001_0141];
    // KVM's own, including those that newer versions and other implementations have added.
    mtrrs.chain(machine_check).chain(others).chain(0x4b56_4d00..0x4b56_4d20)
}

/// Index and value of each model-specific register that KVM provides.
pub(super) fn capture(vcpu: &Vcpu) -> Result<Vec<u8>> {
    let mut list = LIST.get_or_try_init(|| read_list(vcpu))?.clone();
    let values = values(vcpu, &mut list)?;
    let mut found = Vec::with_capacity(12 * values.len());
    for entry in &values {
        found.extend(entry.index.to_le_bytes());
        found.extend(entry.data.to_le_bytes());
    }
    Ok(found)
}

/// The registers of this KVM, in the order in which they are set.
fn read_list(vcpu: &Vcpu) -> Result<Vec<u32>> {
    let listed = kvm("KVM_GET_MSR_INDEX_LIST", open_kvm()?.get_msr_index_list())?;
    let mut list = listed.as_slice().to_vec();
    let mut more: Vec<u32> = unlisted().filter(|index| !list.contains(index)).collect();
    // A register that KVM returns but refuses to set cannot be changed by a guest either.
    let given = values(vcpu, &mut more)?;
    let mut left = given.as_slice();
    while !left.is_empty() {
        let (count, refused) = set(vcpu, left)?;
        list.extend(left.iter().take(count).map(|entry| entry.index));
        left = left.get(count + usize::from(refused.is_some())..).unwrap_or(&[]);
    }
    // A deadline refers to the counter, which is therefore set first.
    list.sort_by_key(|index| match *index {
        IA32_TSC => 0,
        IA32_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(list)
}

/// The registers of a list with their values. Those that KVM does not provide are removed from the
/// list.
fn values(vcpu: &Vcpu, list: &mut Vec<u32>) -> Result<Vec<kvm_msr_entry>> {
    let mut all = Vec::with_capacity(list.len());
    while all.len() < list.len() {
        let entries: Vec<kvm_msr_entry> = list
            .iter()
            .skip(all.len())
            .take(MAX_AT_ONCE)
            .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
            .collect();
        let mut msrs = wrap(&entries)?;
        let count = kvm("KVM_GET_MSRS", vcpu.fd().get_msrs(&mut msrs))?;
        all.extend(msrs.as_slice().iter().take(count));
        if count < entries.len() {
            // KVM stops at the first register that it does not provide.
            list.remove(all.len());
        }
    }
    Ok(all)
}

/// Set as many as KVM takes at once. Returns how many are set, and the register that KVM refused,
/// if any.
fn set<'a>(
    vcpu: &Vcpu,
    entries: &'a [kvm_msr_entry],
) -> Result<(usize, Option<&'a kvm_msr_entry>)> {
    let part = entries.get(..MAX_AT_ONCE).unwrap_or(entries);
    let count = kvm("KVM_SET_MSRS", vcpu.fd().set_msrs(&wrap(part)?))?;
    Ok((count, part.get(count)))
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|e| bad("msrs", format!("{e:?}")))
}

/// Set the registers of a record.
///
/// # Errors
/// [`ErrorKind::Snapshot`] if KVM refuses a value that the register does not have already; if KVM
/// fails.
pub(super) fn apply(vcpu: &mut Vcpu, state: &[u8]) -> Result<()> {
    let entries = entries(state)?;
    set_all(vcpu, entries.into_iter())
}

/// Set only the registers of a record that count by themselves, for a guest in ring 3.
///
/// # Errors
/// As for [`apply`].
pub(super) fn apply_counting(vcpu: &mut Vcpu, state: &[u8]) -> Result<()> {
    let index = IA32_TSC.to_le_bytes();
    // Without decoding the others: this is most of what a reset does for the processor.
    let counting = state.chunks_exact(12).filter(|entry| entry.starts_with(&index));
    let counting: Vec<_> = counting.map(entries).collect::<Result<_>>()?;
    set_all(vcpu, counting.into_iter().flatten())
}

/// Index and value of each register of a record.
pub(super) fn entries(state: &[u8]) -> Result<Vec<(u32, u64)>> {
    let mut reader = Reader::new("msrs", state);
    let mut entries = Vec::with_capacity(state.len() / 12);
    while !reader.is_empty() {
        entries.push((reader.u32()?, reader.u64()?));
    }
    Ok(entries)
}

/// Whether these registers leave ring 3 alone. The one of SYSENTER has to be among them: what a
/// record does not have, stays as it was.
pub(super) fn are_quiet(entries: &[(u32, u64)]) -> bool {
    entries.iter().any(|(index, _)| *index == IA32_SYSENTER_CS)
        && entries.iter().all(|(index, value)| is_quiet(*index, *value))
}

/// Whether a register with this value has no effect on ring 3, or of ring 3, that other registers
/// would show.
fn is_quiet(index: u32, value: u64) -> bool {
    match index {
        // SYSENTER is refused if its segment is null.
        IA32_SYSENTER_CS => value & 0xfffc == 0,
        // Records of branches and traces, and counters of events.
        IA32_DEBUGCTL | 0x570 | 0x186..0x198 | 0x38d => value == 0,
        0xc001_0000..0xc001_0004 | 0xc001_0200..0xc001_0210 => value == 0,
        // What KVM and Hyper-V write to memory by themselves: clocks, stolen time, page faults.
        0x11 | 0x12 | 0x4b56_4d00..0x4b56_4d05 | 0x4000_0000..0x4000_0200 => value == 0,
        _ => true,
    }
}

/// A value of the time-stamp counter to set before this one, on the first vCPU.
///
/// If a counter is set to a value within a second of what the counter set last has by now, KVM
/// assumes that the two are to agree, and lets the counter continue from that one. So it would not
/// go back, but the counters of the other vCPUs shall agree with the first.
fn far_from(counter: u64) -> u64 {
    counter ^ 1 << 62
}

fn set_all(vcpu: &mut Vcpu, entries: impl Iterator<Item = (u32, u64)>) -> Result<()> {
    let known = &vcpu.constant_msrs;
    let has_first_counter = vcpu.id == 0;
    let entries: Vec<_> = entries
        .filter(|entry| !known.contains(entry))
        .flat_map(|(index, data)| {
            let is_counter = index == IA32_TSC && has_first_counter;
            let before = is_counter.then(|| (index, far_from(data)));
            // KVM takes 0 for a request to agree.
            before.into_iter().chain([(index, data.max(u64::from(is_counter)))])
        })
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .collect();
    let mut left = entries.as_slice();
    while !left.is_empty() {
        let (count, refused) = set(vcpu, left)?;
        if let Some(refused) = refused {
            check_refused(vcpu, refused)?;
        }
        left = left.get(count + usize::from(refused.is_some())..).unwrap_or(&[]);
    }
    let uses_clock =
        |entry: &kvm_msr_entry| KVM_SYSTEM_TIME.contains(&entry.index) && entry.data & 1 != 0;
    if entries.iter().any(uses_clock) {
        // Tells the guest's watchdogs that it was stopped. It fails, and does not matter, if the
        // guest has not set up the clock.
        let _ = vcpu.fd().kvmclock_ctrl();
    }
    vcpu.knows_of_pause = true;
    Ok(())
}

/// A register that has the value already does not need to be set.
fn check_refused(vcpu: &mut Vcpu, refused: &kvm_msr_entry) -> Result<()> {
    let mut now = wrap(&[kvm_msr_entry { index: refused.index, ..Default::default() }])?;
    let known = kvm("KVM_GET_MSRS", vcpu.fd().get_msrs(&mut now))?;
    let has = known == 1 && now.as_slice().iter().all(|entry| entry.data == refused.data);
    // A register that no KVM lists, and that only another implementation or processor has, means
    // nothing here.
    let is_of_other_kvm = known == 0 && unlisted().any(|index| index == refused.index);
    if !has && !is_of_other_kvm && (known == 1 || refused.data != 0) {
        let detail = format!("KVM refuses {:#x} for MSR {:#x}", refused.data, refused.index);
        return Err(Error::new(ErrorKind::Snapshot, "KVM_SET_MSRS", detail));
    }
    // Asked once: each refusal costs three calls.
    vcpu.constant_msrs.push((refused.index, refused.data));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_that_act_by_themselves_are_not_quiet() {
        for index in [0x174, 0x1d9, 0x186, 0x12, 0x4b56_4d01, 0x4b56_4d03, 0xc001_0000, 0x4000_0020]
        {
            assert!(is_quiet(index, 0) && !is_quiet(index, 0x40_0010), "{index:#x}");
        }
        assert!(is_quiet(0x174, 3), "a null segment");
        assert!(are_quiet(&[(0x174, 0), (0x10, 9)]) && !are_quiet(&[(0x10, 9)]));
        assert!(!are_quiet(&[(0x174, 0), (0x1d9, 1)]));
        assert!(is_quiet(0xc000_0102, 0x1000) && is_quiet(0x4b56_4d05, 1));
    }

    #[test]
    fn no_register_is_listed_twice() {
        let all: Vec<u32> = unlisted().collect();
        let mut once = all.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), all.len());
    }
}

//! The processor and KVM that a snapshot was taken on, and what of them another host lacks. Pure
//! data after one look at KVM.

use kvm_bindings::{KVM_CAP_SREGS2, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::cpuid::entries;
use super::msrs::unlisted;
use super::state::{Record, RecordKind, Records, bytes, from_bytes, get};
use crate::bytes::{Reader, bad};
use crate::cpu::{cpuid, xstate};
use crate::error::Result;
use crate::kvm::checked as kvm;
use crate::kvm::open_kvm;
use crate::process::OnceBox;

/// The KVM capabilities that a machine's state depends on.
const CAPABILITIES: [(u32, &str); 12] = [
    (0, "KVM_CAP_IRQCHIP"),
    (14, "KVM_CAP_MP_STATE"),
    (33, "KVM_CAP_PIT2"),
    (39, "KVM_CAP_ADJUST_CLOCK"),
    (41, "KVM_CAP_VCPU_EVENTS"),
    (50, "KVM_CAP_DEBUGREGS"),
    (55, "KVM_CAP_XSAVE"),
    (56, "KVM_CAP_XCRS"),
    (60, "KVM_CAP_TSC_CONTROL"),
    (61, "KVM_CAP_GET_TSC_KHZ"),
    (KVM_CAP_SREGS2, "KVM_CAP_SREGS2"),
    (kvm_bindings::KVM_CAP_XSAVE2, "KVM_CAP_XSAVE2"),
];
const TSC_CONTROL: u32 = 60;

/// The properties of a host that a guest's state depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// pyvmm's version.
    pub version: String,
    /// Number and value of each capability.
    pub capabilities: Vec<(u32, u32)>,
    /// The model-specific registers that KVM lists.
    pub msrs: Vec<u32>,
    /// KVM_GET_SUPPORTED_CPUID.
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

impl Host {
    /// This host.
    ///
    /// # Errors
    /// If KVM cannot be used.
    pub fn current() -> Result<&'static Self> {
        // Without and with the permission for AMX.
        static CURRENT: [OnceBox<Host>; 2] = [const { OnceBox::new() }; 2];
        let [without, with] = &CURRENT;
        let current = if xstate::is_permitted() { with } else { without };
        current.get_or_try_init(|| Self::of(&open_kvm()?))
    }

    fn of(fd: &Kvm) -> Result<Self> {
        let answer = |(number, _): &(u32, &str)| {
            let answer = fd.check_extension_raw(libc::c_ulong::from(*number));
            (*number, u32::try_from(answer).unwrap_or(0))
        };
        let msrs = kvm("KVM_GET_MSR_INDEX_LIST", fd.get_msr_index_list())?;
        let cpuid = kvm("KVM_GET_SUPPORTED_CPUID", fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))?;
        let mut cpuid = cpuid.as_slice().to_vec();
        cpuid.iter_mut().for_each(clear_processor_id);
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").into(),
            capabilities: CAPABILITIES.iter().map(answer).collect(),
            msrs: msrs.as_slice().to_vec(),
            cpuid,
        })
    }

    /// The processor's vendor.
    #[must_use]
    pub fn vendor(&self) -> String {
        cpuid::vendor(&self.cpuid)
    }

    /// Encode it for a record: each list follows its length, u32, little-endian.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut all = Vec::new();
        let length = |all: &mut Vec<u8>, length: usize| {
            all.extend(u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        };
        length(&mut all, self.version.len());
        all.extend(self.version.as_bytes());
        length(&mut all, self.capabilities.len());
        for (number, answer) in &self.capabilities {
            all.extend([number.to_le_bytes(), answer.to_le_bytes()].concat());
        }
        length(&mut all, self.msrs.len());
        self.msrs.iter().for_each(|msr| all.extend(msr.to_le_bytes()));
        length(&mut all, self.cpuid.len());
        self.cpuid.iter().for_each(|entry| all.extend(bytes(entry)));
        all
    }

    /// Decode it from a record.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Snapshot`] if the bytes are not those of a host.
    pub fn decode(record: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("host", record);
        let length = |reader: &mut Reader<'_>| {
            reader.u32().map(|length| usize::try_from(length).unwrap_or(usize::MAX))
        };
        let size = length(&mut reader)?;
        let version = String::from_utf8_lossy(reader.bytes(size)?).into_owned();
        let count = length(&mut reader)?;
        let pairs = reader.bytes(count.saturating_mul(8))?;
        let numbers = |bytes: &[u8]| -> Vec<u32> {
            let number = |chunk: &[u8]| chunk.try_into().map_or(0, u32::from_le_bytes);
            bytes.chunks_exact(4).map(number).collect()
        };
        let capabilities = numbers(pairs).chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        let count = length(&mut reader)?;
        let msrs = numbers(reader.bytes(count.saturating_mul(4))?);
        let (count, size) = (length(&mut reader)?, size_of::<kvm_cpuid_entry2>());
        let entries = reader.bytes(count.saturating_mul(size))?.chunks_exact(size);
        let cpuid: Result<Vec<_>> = entries.map(|entry| from_bytes("host", entry)).collect();
        reader.end()?;
        Ok(Self { version, capabilities, msrs, cpuid: cpuid? })
    }

    /// What this host lacks for the vCPUs of a snapshot that was taken on `there`, a line each.
    #[must_use]
    pub fn lacks(&self, there: &Self, vcpus: &[Records]) -> Vec<String> {
        if self == there {
            return Vec::new(); // the usual case
        }
        let mut lines = self.lacking_capabilities(there);
        let (ours, theirs) = (cpuid::vendor(&self.cpuid), cpuid::vendor(&there.cpuid));
        if ours != theirs {
            lines.push(format!("processor: {ours} here, {theirs} there"));
        }
        let seen: Vec<_> =
            (0..).zip(vcpus).map(|(number, vcpu)| guest_cpuid(number, vcpu)).collect();
        for name in cpuid::missing(&there.cpuid, &self.cpuid) {
            // A guest does not use what its template hides.
            let is_seen = |table: &Option<Vec<kvm_cpuid_entry2>>| {
                table.as_ref().is_none_or(|table| cpuid::has(table, name))
            };
            if seen.iter().any(is_seen) {
                lines.push(format!("cpuid: {name} is missing here"));
            }
        }
        for (index, value) in vcpus.iter().enumerate().flat_map(|(n, vcpu)| msrs(n, vcpu)) {
            let line = format!("msr: {index:#x} is missing here");
            // Registers that no KVM lists exist in every KVM.
            let is_here = self.msrs.contains(&index) || unlisted().any(|other| other == index);
            if value != 0 && !is_here && !lines.contains(&line) {
                lines.push(line);
            }
        }
        lines
    }

    fn lacking_capabilities(&self, there: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (number, theirs) in &there.capabilities {
            // Not part of the state: it is only needed, and then checked, if frequencies differ.
            if *number == TSC_CONTROL {
                continue;
            }
            let ours = self.capabilities.iter().find(|known| known.0 == *number);
            let ours = ours.map_or(0, |known| known.1);
            if ours < *theirs {
                let name = CAPABILITIES.iter().find(|known| known.0 == *number);
                let name = name.map_or_else(|| format!("capability {number}"), |n| n.1.to_owned());
                lines.push(format!("{name}: {ours} here, {theirs} there"));
            }
        }
        lines
    }
}

/// Clear the fields that depend on which of the host's processors answered.
fn clear_processor_id(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => entry.ebx &= 0x00ff_ffff,
        0xb | 0x1f => entry.edx = 0,
        0x8000_001e => entry.eax = 0,
        _ => {}
    }
}

/// What the guest sees on a vCPU; `None` if its state does not tell.
fn guest_cpuid(number: u16, records: &[Record]) -> Option<Vec<kvm_cpuid_entry2>> {
    entries(get(records, RecordKind::Cpuid, number)?).ok()
}

fn msrs(number: usize, records: &[Record]) -> Vec<(u32, u64)> {
    let number = u16::try_from(number).unwrap_or(u16::MAX);
    let mut reader = Reader::new("msrs", get(records, RecordKind::Msrs, number).unwrap_or(&[]));
    let mut all = Vec::new();
    while let (Ok(index), Ok(value)) = (reader.u32(), reader.u64()) {
        all.push((index, value));
    }
    all
}

/// Check that this host has everything that the snapshot needs.
///
/// # Errors
/// [`crate::error::ErrorKind::Snapshot`], with the differences, if it does not.
pub(super) fn check(vcpus: &[Records], there: &Host) -> Result<()> {
    let lacks = Host::current()?.lacks(there, vcpus);
    if lacks.is_empty() {
        return Ok(());
    }
    let detail = format!("it was taken on another machine: {}", lacks.join("; "));
    Err(bad("host", detail).hint("force=True loads it all the same"))
}

#[cfg(test)]
mod tests {
    use super::super::state::put;
    use super::*;
    use proptest::prelude::*;

    fn host() -> Option<&'static Host> {
        Host::current().ok()
    }

    #[test]
    fn a_host_comes_back_and_lacks_nothing_of_itself() {
        let Some(host) = host() else { return };
        let back = Host::decode(&host.encode()).unwrap();
        assert_eq!(&back, host);
        assert!(host.lacks(&back, &[]).is_empty());
    }

    #[test]
    fn what_another_host_has_more_is_listed() {
        let Some(host) = host() else { return };
        let mut there = host.clone();
        for entry in there.cpuid.iter_mut().filter(|e| (e.function, e.index) == (7, 0)) {
            entry.ecx |= 1 << 13; // tme, which KVM offers to no guest
        }
        there.capabilities.push((9999, 1));
        let expected = ["capability 9999: 0 here, 1 there", "cpuid: tme is missing here"];
        assert_eq!(host.lacks(&there, &[Vec::new()]), expected);
    }

    #[test]
    fn what_the_guest_does_not_see_is_not_lacking() {
        let Some(host) = host() else { return };
        let mut there = host.clone();
        for entry in there.cpuid.iter_mut().filter(|e| (e.function, e.index) == (7, 0)) {
            entry.ecx |= 1 << 13; // tme
        }
        let seen = |ecx| {
            let leaf = kvm_cpuid_entry2 { function: 7, ecx, ..Default::default() };
            let mut records = Records::new();
            put(&mut records, RecordKind::Cpuid, 0, bytes(&leaf));
            records
        };
        assert!(host.lacks(&there, &[seen(!(1 << 13))]).is_empty());
        assert_eq!(host.lacks(&there, &[seen(1 << 13)]), ["cpuid: tme is missing here"]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_host_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Host::decode(&bytes);
        }
    }
}

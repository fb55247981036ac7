//! One vCPU's state by KVM's ioctls, in the order that KVM needs. On whatever thread has the vCPU at rest.

use std::sync::OnceLock;

use kvm_bindings::{
    CpuId, KVM_CAP_SREGS2, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use super::state::{Kind, Reader, Record, Records, bad, get, put};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{RwLock, rank};
use crate::vcpu::Vcpu;
use crate::vm::open_kvm;

const KVMIO: u32 = 0xae;
ioctl_ior_nr!(kvm_get_sregs2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(kvm_set_sregs2, KVMIO, 0xcd, kvm_sregs2);
ioctl_ior_nr!(kvm_get_xsave2, KVMIO, 0xcf, kvm_xsave);

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Bit 0 says that the guest uses KVM's clock.
const KVM_SYSTEM_TIME: [u32; 2] = [0x12, 0x4b56_4d01];

/// What the state of a machine's vCPUs consists of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Classes {
    has_sregs2: bool,
    /// KVM_CAP_XSAVE2: how many bytes xsave has here.
    xsave_size: usize,
    has_lapic: bool,
}

impl Classes {
    pub(crate) fn of(vm: &VmFd, has_lapic: bool) -> Self {
        // The same for all machines of a process: nothing here asks for permission to use more of xsave.
        static ASKED: OnceLock<(usize, bool)> = OnceLock::new();
        let (xsave, has_sregs2) = *ASKED.get_or_init(|| {
            let xsave = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
            let sregs2 = vm.check_extension_raw(libc::c_ulong::from(KVM_CAP_SREGS2));
            (xsave, sregs2 > 0)
        });
        Self { has_sregs2, xsave_size: xsave.max(size_of::<kvm_xsave>()), has_lapic }
    }
}

/// The bytes of a structure of KVM's.
pub(super) fn bytes<T>(value: &T) -> &[u8] {
    // SAFETY: called for KVM's plain structures of integers, whose padding is spelled out as fields; borrowed for as
    // long as the value.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// A structure of KVM's from its bytes.
pub(super) fn plain<T: Default>(what: &str, bytes: &[u8]) -> Result<T> {
    if bytes.len() != size_of::<T>() {
        let detail = format!("{} bytes instead of {}", bytes.len(), size_of::<T>());
        return Err(bad(what, detail));
    }
    let mut value = T::default();
    // SAFETY: as many bytes as the structure has; every bit pattern is a value of KVM's plain structures.
    unsafe {
        std::ptr::copy_nonoverlapping(
            bytes.as_ptr(),
            std::ptr::from_mut(&mut value).cast(),
            size_of::<T>(),
        );
    }
    Ok(value)
}

pub(super) fn kvm<T>(at: &str, result: std::result::Result<T, kvm_ioctls::Error>) -> Result<T> {
    result.map_err(|e| Error::kvm(at, e))
}

fn done(at: &str, result: libc::c_int) -> Result<()> {
    if result < 0 { Err(Error::kvm(at, kvm_ioctls::Error::last())) } else { Ok(()) }
}

/// Everything KVM tells of a vCPU at rest, whose last access has been completed.
pub(crate) fn capture(vcpu: &Vcpu, number: u16, classes: Classes) -> Result<Records> {
    let (mut all, fd) = (Records::with_capacity(12), &vcpu.fd);
    let mut keep = |kind, bytes: &[u8]| put(&mut all, kind, number, bytes);
    let cpuid = kvm("KVM_GET_CPUID2", fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
    let entries: Vec<u8> =
        cpuid.as_slice().iter().flat_map(|entry| bytes(entry).to_vec()).collect();
    keep(Kind::Cpuid, &entries);
    keep(Kind::MpState, bytes(&kvm("KVM_GET_MP_STATE", fd.get_mp_state())?));
    keep(Kind::Regs, bytes(&vcpu.general()?));
    if classes.has_sregs2 {
        let mut sregs = kvm_sregs2::default();
        // SAFETY: KVM fills the structure it is given.
        done("KVM_GET_SREGS2", unsafe { ioctl_with_mut_ref(fd, kvm_get_sregs2(), &mut sregs) })?;
        keep(Kind::Sregs2, bytes(&sregs));
    } else {
        keep(Kind::Sregs, bytes(&kvm("KVM_GET_SREGS", fd.get_sregs())?));
    }
    keep(Kind::Xsave, &xsave(vcpu, classes)?);
    keep(Kind::Xcrs, bytes(&kvm("KVM_GET_XCRS", fd.get_xcrs())?));
    keep(Kind::DebugRegs, bytes(&kvm("KVM_GET_DEBUGREGS", fd.get_debug_regs())?));
    if classes.has_lapic {
        keep(Kind::Lapic, bytes(&kvm("KVM_GET_LAPIC", fd.get_lapic())?));
    }
    keep(Kind::Msrs, &msrs(vcpu)?);
    keep(Kind::Events, bytes(&kvm("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?));
    if let Ok(khz) = fd.get_tsc_khz() {
        keep(Kind::TscKhz, &khz.to_le_bytes());
    }
    Ok(all)
}

/// Memory that KVM may read or write as a whole xsave.
fn xsave_buffer(classes: Classes) -> Vec<kvm_xsave> {
    let parts = classes.xsave_size.div_ceil(size_of::<kvm_xsave>());
    std::iter::repeat_with(kvm_xsave::default).take(parts).collect()
}

fn xsave(vcpu: &Vcpu, classes: Classes) -> Result<Vec<u8>> {
    let mut buffer = xsave_buffer(classes);
    if classes.xsave_size > size_of::<kvm_xsave>() {
        // SAFETY: KVM writes as much as KVM_CAP_XSAVE2 said, which the buffer has.
        let result = unsafe { libc::ioctl(vcpu_fd(vcpu), kvm_get_xsave2(), buffer.as_mut_ptr()) };
        done("KVM_GET_XSAVE2", result)?;
    } else if let Some(first) = buffer.first_mut() {
        *first = kvm("KVM_GET_XSAVE", vcpu.fd.get_xsave())?;
    }
    let mut all: Vec<u8> = buffer.iter().flat_map(|part| bytes(part).to_vec()).collect();
    all.truncate(classes.xsave_size);
    Ok(all)
}

fn vcpu_fd(vcpu: &Vcpu) -> std::os::fd::RawFd {
    std::os::fd::AsRawFd::as_raw_fd(&vcpu.fd)
}

/// The registers that KVM lists and gives: learnt once.
static MSR_LIST: RwLock<Vec<u32>, rank::MsrList> = RwLock::new(Vec::new());

/// Index and value of each model-specific register that KVM lists and gives.
fn msrs(vcpu: &Vcpu) -> Result<Vec<u8>> {
    let mut list = MSR_LIST.read().clone();
    if list.is_empty() {
        let all = kvm("KVM_GET_MSR_INDEX_LIST", open_kvm()?.get_msr_index_list())?;
        list = all.as_slice().to_vec();
        // A deadline is one of the counter, which has to be set first.
        list.sort_by_key(|index| match *index {
            IA32_TSC => 0,
            IA32_TSC_DEADLINE => 2,
            _ => 1,
        });
    }
    let known = list.len();
    let mut found = Vec::with_capacity(12 * list.len());
    // KVM stops at one that it lists and does not give.
    let msrs = loop {
        let entries: Vec<kvm_msr_entry> = list
            .iter()
            .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
            .collect();
        let mut msrs = wrap(&entries)?;
        let count = kvm("KVM_GET_MSRS", vcpu.fd.get_msrs(&mut msrs))?;
        if count >= list.len() {
            break msrs;
        }
        list.remove(count);
    };
    if list.len() != known || MSR_LIST.read().is_empty() {
        *MSR_LIST.write() = list;
    }
    for entry in msrs.as_slice() {
        found.extend(entry.index.to_le_bytes());
        found.extend(entry.data.to_le_bytes());
    }
    Ok(found)
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|e| bad("msrs", format!("{e:?}")))
}

/// Set what a capture found. Before the vCPU has run, or else with the same CPUID.
///
/// # Errors
/// [`ErrorKind::Snapshot`] when something is missing or of the wrong size; when KVM refuses it.
pub(crate) fn apply(
    vcpu: &mut Vcpu,
    number: u16,
    records: &[Record],
    classes: Classes,
) -> Result<()> {
    let one = |kind: Kind| {
        let missing = || bad(kind.name(), format!("the state of vCPU {number} has none"));
        get(records, kind, number).ok_or_else(missing)
    };
    vcpu.forget_access();
    if !vcpu.has_run {
        set_cpuid(vcpu, one(Kind::Cpuid)?)?;
        if let Ok(khz) = one(Kind::TscKhz) {
            set_tsc_khz(vcpu, khz)?;
        }
    }
    let fd = &vcpu.fd;
    // Without a LAPIC a vCPU has no other.
    if classes.has_lapic {
        kvm(
            "KVM_SET_MP_STATE",
            fd.set_mp_state(plain::<kvm_mp_state>("mp_state", one(Kind::MpState)?)?),
        )?;
    }
    if let Some(sregs) = get(records, Kind::Sregs2, number).filter(|_| classes.has_sregs2) {
        let sregs: kvm_sregs2 = plain("sregs2", sregs)?;
        // SAFETY: KVM reads the structure it is given.
        done("KVM_SET_SREGS2", unsafe { ioctl_with_ref(fd, kvm_set_sregs2(), &sregs) })?;
    } else {
        let sregs: kvm_sregs = match get(records, Kind::Sregs2, number) {
            Some(sregs2) => plain("sregs", sregs2.get(..size_of::<kvm_sregs>()).unwrap_or(&[]))?,
            None => plain("sregs", one(Kind::Sregs)?)?,
        };
        kvm("KVM_SET_SREGS", fd.set_sregs(&sregs))?;
    }
    set_xsave(vcpu, one(Kind::Xsave)?, classes)?;
    kvm("KVM_SET_XCRS", fd.set_xcrs(&plain::<kvm_xcrs>("xcrs", one(Kind::Xcrs)?)?))?;
    let debug: kvm_debugregs = plain("debugregs", one(Kind::DebugRegs)?)?;
    kvm("KVM_SET_DEBUGREGS", fd.set_debug_regs(&debug))?;
    if classes.has_lapic {
        kvm("KVM_SET_LAPIC", fd.set_lapic(&plain::<kvm_lapic_state>("lapic", one(Kind::Lapic)?)?))?;
    }
    set_msrs(vcpu, one(Kind::Msrs)?)?;
    let events: kvm_vcpu_events = plain("events", one(Kind::Events)?)?;
    kvm("KVM_SET_VCPU_EVENTS", fd.set_vcpu_events(&events))?;
    // With the next entry: one call less.
    vcpu.enter_with(&plain("regs", one(Kind::Regs)?)?);
    Ok(())
}

/// What CPUID says is for good once a vCPU has run.
///
/// # Errors
/// [`ErrorKind::State`] when that is not what the state has.
pub(super) fn check_cpuid(vcpu: &mut Vcpu, number: u16, records: &[Record]) -> Result<()> {
    let Some(table) = get(records, Kind::Cpuid, number) else { return Ok(()) };
    if !vcpu.has_run || vcpu.known_cpuid.as_deref() == Some(table) {
        return Ok(());
    }
    let here = kvm("KVM_GET_CPUID2", vcpu.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
    let lasting = |table: &CpuId| table.as_slice().iter().map(lasting).collect::<Vec<_>>();
    if lasting(&here) != lasting(&cpuid(table)?) {
        let detail = format!("the snapshot has another CPUID than vCPU {number}, which has run");
        return Err(Error::new(ErrorKind::State, "reset", detail).hint("fork the snapshot"));
    }
    vcpu.known_cpuid = Some(table.to_vec());
    Ok(())
}

/// An entry without what follows the guest's registers: MONITOR, OSXSAVE, APIC, OSPKE, and the size of xsave.
fn lasting(entry: &kvm_cpuid_entry2) -> [u32; 6] {
    let kvm_cpuid_entry2 { function, index, eax, mut ebx, mut ecx, mut edx, .. } = *entry;
    match (function, index) {
        (1, _) => (ecx, edx) = (ecx & !(1 << 3 | 1 << 27), edx & !(1 << 9)),
        (7, 0) => ecx &= !(1 << 4),
        (0xd, 0 | 1) => ebx = 0,
        _ => {}
    }
    [function, index, eax, ebx, ecx, edx]
}

fn set_cpuid(vcpu: &Vcpu, table: &[u8]) -> Result<()> {
    kvm("KVM_SET_CPUID2", vcpu.fd.set_cpuid2(&cpuid(table)?))
}

/// The table of a record.
pub(super) fn cpuid(table: &[u8]) -> Result<CpuId> {
    let size = size_of::<kvm_cpuid_entry2>();
    let entries: Result<Vec<kvm_cpuid_entry2>> =
        table.chunks(size).map(|entry| plain("cpuid", entry)).collect();
    CpuId::from_entries(&entries?).map_err(|e| bad("cpuid", format!("{e:?}")))
}

/// Only where it is not so already: most KVMs cannot change it.
fn set_tsc_khz(vcpu: &Vcpu, khz: &[u8]) -> Result<()> {
    let khz = Reader::new("tsc_khz", khz).u32()?;
    match vcpu.fd.get_tsc_khz() {
        Ok(here) if here.abs_diff(khz) > here / 1000 => {
            kvm("KVM_SET_TSC_KHZ", vcpu.fd.set_tsc_khz(khz))
        }
        _ => Ok(()),
    }
}

fn set_xsave(vcpu: &Vcpu, state: &[u8], classes: Classes) -> Result<()> {
    let (least, most) = (size_of::<kvm_xsave>(), classes.xsave_size);
    if state.len() < least || state.len() > most.max(least) {
        return Err(bad("xsave", format!("{} bytes, where this KVM has {most}", state.len())));
    }
    let mut buffer = xsave_buffer(classes);
    // SAFETY: the buffer has at least `most` bytes, and every bit pattern is a value of it.
    unsafe {
        std::ptr::copy_nonoverlapping(state.as_ptr(), buffer.as_mut_ptr().cast(), state.len());
    }
    let Some(first) = buffer.first() else { return Ok(()) };
    // SAFETY: KVM reads as much as KVM_CAP_XSAVE2 says, which the buffer behind this reference has.
    kvm("KVM_SET_XSAVE", unsafe { vcpu.fd.set_xsave(first) })
}

fn set_msrs(vcpu: &Vcpu, state: &[u8]) -> Result<()> {
    let mut reader = Reader::new("msrs", state);
    let mut entries = Vec::with_capacity(state.len() / 12);
    while !reader.is_empty() {
        let (index, data) = (reader.u32()?, reader.u64()?);
        entries.push(kvm_msr_entry { index, data, ..Default::default() });
    }
    let mut left = entries.as_slice();
    while !left.is_empty() {
        let set = kvm("KVM_SET_MSRS", vcpu.fd.set_msrs(&wrap(left)?))?;
        let Some(refused) = left.get(set) else { break };
        // One that cannot be set and has the value already needs no setting.
        let mut now = wrap(&[kvm_msr_entry { index: refused.index, ..Default::default() }])?;
        let known = kvm("KVM_GET_MSRS", vcpu.fd.get_msrs(&mut now))?;
        let has = known == 1 && now.as_slice().iter().all(|entry| entry.data == refused.data);
        if !has && (known == 1 || refused.data != 0) {
            let detail = format!("KVM refuses {:#x} for MSR {:#x}", refused.data, refused.index);
            return Err(Error::new(ErrorKind::Snapshot, "KVM_SET_MSRS", detail));
        }
        left = left.get(set + 1..).unwrap_or(&[]);
    }
    let uses_clock =
        |entry: &kvm_msr_entry| KVM_SYSTEM_TIME.contains(&entry.index) && entry.data & 1 != 0;
    if entries.iter().any(uses_clock) {
        // Tells the guest's watchdogs that it was away. A guest that has not said where to put it is told nothing.
        let _ = vcpu.fd.kvmclock_ctrl();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_regs;
    use proptest::prelude::*;

    #[test]
    fn a_structure_comes_back_from_its_bytes_and_from_no_others() {
        let regs = kvm_regs { rip: 7, r15: 9, ..Default::default() };
        assert_eq!(plain::<kvm_regs>("regs", bytes(&regs)).unwrap(), regs);
        let error = plain::<kvm_regs>("regs", &[0; 3]).unwrap_err();
        assert_eq!((error.kind, error.at.as_str()), (ErrorKind::Snapshot, "regs"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_cpuid_table_panic(table in prop::collection::vec(any::<u8>(), 0..200)) {
            let whole = table.len() % size_of::<kvm_cpuid_entry2>() == 0;
            prop_assert_eq!(cpuid(&table).is_ok(), whole);
        }
    }
}

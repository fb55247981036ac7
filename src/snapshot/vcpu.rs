//! The state of one vCPU, read and set by ioctls in the order that KVM needs. On the thread that
//! has stopped the vCPU.

use kvm_bindings::{
    KVM_CAP_SREGS2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_sregs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};
use zerocopy::IntoBytes;

use super::state::{Record, RecordKind, Records, bytes, from_bytes, get, put};
use super::{cpuid, msrs};
use crate::bytes::{Reader, bad};
use crate::cpu::cpuid::of_vcpu;
use crate::error::{Error, ErrorKind, Result};
use crate::hop::hop;
use crate::kvm::checked as kvm;
use crate::process::OnceBox;
use crate::vcpu::Vcpu;
use crate::x86::{CR4_LA57, CR4_VMXE, EFER_SVME};

const KVMIO: u32 = 0xae;
ioctl_ior_nr!(kvm_get_sregs2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(kvm_set_sregs2, KVMIO, 0xcd, kvm_sregs2);
ioctl_ior_nr!(kvm_get_xsave2, KVMIO, 0xcf, kvm_xsave);

/// Which records the state of a machine's vCPUs consists of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VcpuStateFormat {
    has_sregs2: bool,
    /// KVM_CAP_XSAVE2: the size of xsave in bytes.
    xsave_size: usize,
    has_lapic: bool,
}

impl VcpuStateFormat {
    pub(crate) fn of(vm: &VmFd, has_lapic: bool) -> Self {
        // The same for all machines of a process: none can get permission for more of xsave once it
        // has created a vCPU.
        static CAPABILITIES: OnceBox<(usize, bool)> = OnceBox::new();
        let (xsave, has_sregs2) = *CAPABILITIES.get_or_init(|| {
            let xsave = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
            let sregs2 = vm.check_extension_raw(libc::c_ulong::from(KVM_CAP_SREGS2));
            (xsave, sregs2 > 0)
        });
        Self { has_sregs2, xsave_size: xsave.max(size_of::<kvm_xsave>()), has_lapic }
    }
}

/// `kvm_sregs2` as the words that it consists of. The structure has no padding, but also no traits
/// that would say so.
type Sregs2 = [u64; SREGS2_WORDS];
const SREGS2_WORDS: usize = size_of::<kvm_sregs2>() / size_of::<u64>();
const SREGS2_FLAGS: usize = std::mem::offset_of!(kvm_sregs2, flags) / size_of::<u64>();

fn ioctl_result(at: &str, result: libc::c_int) -> Result<()> {
    if result < 0 { Err(Error::kvm(at, kvm_ioctls::Error::last())) } else { Ok(()) }
}

/// Read everything that KVM reports of a stopped vCPU, whose last access has been completed.
pub(crate) fn capture(vcpu: &Vcpu, number: u16, format: VcpuStateFormat) -> Result<Records> {
    hop!();
    let (mut all, fd) = (Records::with_capacity(12), vcpu.fd());
    let mut keep = |kind, bytes: &[u8]| put(&mut all, kind, number, bytes);
    let cpuid = of_vcpu(fd)?;
    let entries: Vec<u8> = cpuid.iter().flat_map(|entry| bytes(entry).to_vec()).collect();
    keep(RecordKind::Cpuid, &entries);
    keep(RecordKind::MpState, bytes(&kvm("KVM_GET_MP_STATE", fd.get_mp_state())?));
    keep(RecordKind::Regs, bytes(&vcpu.general()?));
    if format.has_sregs2 {
        let mut words: Sregs2 = [0; SREGS2_WORDS];
        // SAFETY: KVM writes a `kvm_sregs2`, which has the size and alignment of these words.
        ioctl_result("KVM_GET_SREGS2", unsafe {
            ioctl_with_mut_ref(fd, kvm_get_sregs2(), &mut words)
        })?;
        let sregs = first_of_sregs2(bytes(&words))?;
        refuse_nesting(number, sregs.efer, sregs.cr4)?;
        keep(RecordKind::Sregs2, bytes(&words));
    } else {
        let sregs = kvm("KVM_GET_SREGS", fd.get_sregs())?;
        refuse_nesting(number, sregs.efer, sregs.cr4)?;
        keep(RecordKind::Sregs, bytes(&sregs));
    }
    keep(RecordKind::Xsave, &xsave(vcpu, format)?);
    keep(RecordKind::Xcrs, bytes(&kvm("KVM_GET_XCRS", fd.get_xcrs())?));
    keep(RecordKind::DebugRegs, bytes(&kvm("KVM_GET_DEBUGREGS", fd.get_debug_regs())?));
    if format.has_lapic {
        keep(RecordKind::Lapic, bytes(&kvm("KVM_GET_LAPIC", fd.get_lapic())?));
    }
    keep(RecordKind::Msrs, &msrs::capture(vcpu)?);
    keep(RecordKind::Events, bytes(&kvm("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?));
    if let Ok(khz) = fd.get_tsc_khz() {
        keep(RecordKind::TscKhz, &khz.to_le_bytes());
    }
    Ok(all)
}

/// The processor holds state for the guests of a guest that is itself a hypervisor, and no record
/// has it.
fn refuse_nesting(number: u16, efer: u64, cr4: u64) -> Result<()> {
    if efer & EFER_SVME == 0 && cr4 & CR4_VMXE == 0 {
        return Ok(());
    }
    let detail = format!("vCPU {number} has hardware virtualization switched on (SVM or VMX)");
    Err(Error::new(ErrorKind::State, "snapshot", detail)
        .hint("take the snapshot before the guest becomes a hypervisor"))
}

/// A buffer that KVM can read or write as a whole xsave.
fn xsave_buffer(format: VcpuStateFormat) -> Vec<kvm_xsave> {
    let parts = format.xsave_size.div_ceil(size_of::<kvm_xsave>());
    std::iter::repeat_with(kvm_xsave::default).take(parts).collect()
}

fn xsave(vcpu: &Vcpu, format: VcpuStateFormat) -> Result<Vec<u8>> {
    let mut buffer = xsave_buffer(format);
    if format.xsave_size > size_of::<kvm_xsave>() {
        // SAFETY: KVM writes as many bytes as KVM_CAP_XSAVE2 reports, and the buffer has them.
        let result =
            unsafe { ioctl_with_mut_ptr(vcpu.fd(), kvm_get_xsave2(), buffer.as_mut_ptr()) };
        ioctl_result("KVM_GET_XSAVE2", result)?;
    } else if let Some(first) = buffer.first_mut() {
        *first = kvm("KVM_GET_XSAVE", vcpu.fd().get_xsave())?;
    }
    let mut all = buffer.as_bytes().to_vec();
    all.truncate(format.xsave_size);
    Ok(all)
}

/// Set the state of a vCPU, which has not run yet or has the same CPUID. If it `has_stayed` in ring
/// 3 since it had this state, only what ring 3 can have changed is set.
///
/// # Errors
/// [`ErrorKind::Snapshot`] if a record is missing or has the wrong size; if KVM refuses it.
pub(crate) fn apply(
    vcpu: &mut Vcpu,
    number: u16,
    records: &[Record],
    format: VcpuStateFormat,
    has_stayed: bool,
) -> Result<()> {
    hop!();
    let one = |kind| required(records, kind, number);
    prepare(vcpu, number, records, format)?;
    let (special, events) = (
        SpecialRegisters::of(records, number, format)?,
        from_bytes("events", one(RecordKind::Events)?)?,
    );
    let is_at_entry =
        !format.has_lapic && special.can_be_last() && is_accepted(vcpu, &special, &events);
    if !is_at_entry {
        special.set(vcpu)?;
    }
    set_xsave(vcpu, one(RecordKind::Xsave)?, format)?;
    if has_stayed && is_at_entry {
        msrs::apply_counting(vcpu, one(RecordKind::Msrs)?)?;
    } else {
        set_for_ring_0(vcpu, number, records, format)?;
    }
    if is_at_entry {
        vcpu.set_state_at_entry(&special.sregs, &events);
    } else {
        kvm("KVM_SET_VCPU_EVENTS", vcpu.fd().set_vcpu_events(&events))?;
        vcpu.accepted_state = Some(Box::new((special.sregs, events)));
    }
    // Last, because it depends on whether the vCPU is in system management mode. Without a LAPIC a
    // vCPU has only one such state.
    if format.has_lapic {
        set_mp_state(vcpu, one(RecordKind::MpState)?)?;
    }
    // Set with the next entry, which saves a system call.
    vcpu.set_regs_at_entry(&from_bytes("regs", one(RecordKind::Regs)?)?);
    Ok(())
}

/// Set what only ring 0 can change.
fn set_for_ring_0(
    vcpu: &mut Vcpu,
    number: u16,
    records: &[Record],
    format: VcpuStateFormat,
) -> Result<()> {
    let one = |kind| required(records, kind, number);
    set_xcrs(vcpu, one(RecordKind::Xcrs)?)?;
    set_debug_registers(vcpu, one(RecordKind::DebugRegs)?)?;
    if format.has_lapic {
        set_lapic(vcpu, &from_bytes("lapic", one(RecordKind::Lapic)?)?)?;
    }
    msrs::apply(vcpu, one(RecordKind::Msrs)?)
}

fn required(records: &[Record], kind: RecordKind, number: u16) -> Result<&[u8]> {
    let missing = || bad(kind.name(), format!("the state of vCPU {number} has none"));
    get(records, kind, number).ok_or_else(missing)
}

/// What comes before the state: what KVM checks it against, and the end of what the vCPU has begun.
fn prepare(
    vcpu: &mut Vcpu,
    number: u16,
    records: &[Record],
    format: VcpuStateFormat,
) -> Result<()> {
    vcpu.forget_access();
    if !vcpu.has_run {
        cpuid::set(vcpu, required(records, RecordKind::Cpuid, number)?)?;
        get(records, RecordKind::TscKhz, number).map_or(Ok(()), |khz| set_tsc_khz(vcpu, khz))?;
    }
    if format.has_lapic {
        // Makes KVM process a pending INIT or SIPI, which would otherwise reach the new state.
        kvm("KVM_GET_MP_STATE", vcpu.fd().get_mp_state())?;
    }
    Ok(())
}

/// Whether KVM has taken these for this vCPU before, so that the next entry cannot fail with them.
fn is_accepted(vcpu: &Vcpu, special: &SpecialRegisters, events: &kvm_vcpu_events) -> bool {
    vcpu.accepted_state.as_deref().is_some_and(|accepted| *accepted == (special.sregs, *events))
}

fn set_mp_state(vcpu: &Vcpu, state: &[u8]) -> Result<()> {
    let state: kvm_mp_state = from_bytes("mp_state", state)?;
    kvm("KVM_SET_MP_STATE", vcpu.fd().set_mp_state(state))
}

fn set_debug_registers(vcpu: &Vcpu, state: &[u8]) -> Result<()> {
    let debug: kvm_debugregs = from_bytes("debugregs", state)?;
    kvm("KVM_SET_DEBUGREGS", vcpu.fd().set_debug_regs(&debug))
}

fn set_xcrs(vcpu: &Vcpu, state: &[u8]) -> Result<()> {
    let xcrs: kvm_xcrs = from_bytes("xcrs", state)?;
    // A processor without XSAVE has none, and KVM refuses an empty list.
    match xcrs.nr_xcrs {
        0 => Ok(()),
        _ => kvm("KVM_SET_XCRS", vcpu.fd().set_xcrs(&xcrs)),
    }
}

/// The special registers of a snapshot. They come before the LAPIC: its base is one of them, and
/// selects the format of its registers.
struct SpecialRegisters {
    sregs: kvm_sregs,
    /// As `kvm_sregs2`, if the snapshot and this KVM have it.
    words: Option<Sregs2>,
}

impl SpecialRegisters {
    fn of(records: &[Record], number: u16, format: VcpuStateFormat) -> Result<Self> {
        let Some(sregs2) = get(records, RecordKind::Sregs2, number) else {
            let sregs = get(records, RecordKind::Sregs, number).unwrap_or(&[]);
            return Ok(Self { sregs: from_bytes("sregs", sregs)?, words: None });
        };
        let words = format.has_sregs2.then(|| from_bytes("sregs2", sregs2)).transpose()?;
        Ok(Self { sregs: first_of_sregs2(sregs2)?, words })
    }

    /// Whether they can be set after everything else, as `kvm_sregs`: that has no page directory
    /// pointers, and 57-bit addresses in MSRs need CR4's bit first.
    fn can_be_last(&self) -> bool {
        let has_pointers =
            self.words.and_then(|words| words.get(SREGS2_FLAGS).copied()).unwrap_or(0) != 0;
        !has_pointers && self.sregs.cr4 & CR4_LA57 == 0
    }

    fn set(&self, vcpu: &Vcpu) -> Result<()> {
        let Some(words) = &self.words else { return vcpu.set_sregs(&self.sregs) };
        vcpu.set_special(&self.sregs, |fd| {
            // SAFETY: KVM reads a `kvm_sregs2`, which has the size and alignment of these words.
            ioctl_result("KVM_SET_SREGS2", unsafe { ioctl_with_ref(fd, kvm_set_sregs2(), words) })
        })
    }
}

/// The special registers in the state of a vCPU.
pub(super) fn special_of(records: &[Record], number: u16) -> Option<kvm_sregs> {
    match get(records, RecordKind::Sregs2, number) {
        Some(sregs2) => first_of_sregs2(sregs2).ok(),
        None => from_bytes("sregs", get(records, RecordKind::Sregs, number)?).ok(),
    }
}

/// The fields that both structures begin with: all except the interrupt bitmap, which the flags
/// replace.
fn first_of_sregs2(sregs2: &[u8]) -> Result<kvm_sregs> {
    let first: kvm_sregs =
        from_bytes("sregs", sregs2.get(..size_of::<kvm_sregs>()).unwrap_or(&[]))?;
    Ok(kvm_sregs { interrupt_bitmap: [0; 4], ..first })
}

/// Offsets of the LAPIC's timer: its vector and mode, and its initial count. Intel SDM volume 3,
/// 11.4.1.
const LVT_TIMER: usize = 0x320;
const TIMER_INITIAL_COUNT: usize = 0x380;
/// The bits of the mode.
const TIMER_MODE: u32 = 3 << 17;
const TIMER_MODE_DEADLINE: u32 = 2 << 17;

/// Set the LAPIC; twice if its timer counts, because KVM drops the count when the timer changes
/// from deadline mode.
fn set_lapic(vcpu: &Vcpu, lapic: &kvm_lapic_state) -> Result<()> {
    let word = |at: usize| {
        let bytes = lapic.regs.get(at..at + 4).and_then(|bytes| <[i8; 4]>::try_from(bytes).ok());
        bytes.map_or(0, |bytes| u32::from_le_bytes(bytes.map(i8::cast_unsigned)))
    };
    kvm("KVM_SET_LAPIC", vcpu.fd().set_lapic(lapic))?;
    let counts = word(LVT_TIMER) & TIMER_MODE != TIMER_MODE_DEADLINE;
    if counts && word(TIMER_INITIAL_COUNT) != 0 {
        kvm("KVM_SET_LAPIC", vcpu.fd().set_lapic(lapic))?;
    }
    Ok(())
}

/// Set the TSC frequency only if it differs: most hosts cannot change it.
fn set_tsc_khz(vcpu: &mut Vcpu, khz: &[u8]) -> Result<()> {
    // That of every new vCPU, asked for once per process; `None` if KVM does not tell.
    static HOST: OnceBox<Option<u32>> = OnceBox::new();
    let khz = Reader::new("tsc_khz", khz).u32()?;
    let host = || *HOST.get_or_init(|| vcpu.fd().get_tsc_khz().ok());
    match vcpu.tsc_khz.or_else(host) {
        Some(here) if here.abs_diff(khz) > here / 1000 => {
            kvm("KVM_SET_TSC_KHZ", vcpu.fd().set_tsc_khz(khz))?;
            vcpu.tsc_khz = Some(khz);
            Ok(())
        }
        _ => Ok(()),
    }
}

fn set_xsave(vcpu: &Vcpu, state: &[u8], format: VcpuStateFormat) -> Result<()> {
    let (least, most) = (size_of::<kvm_xsave>(), format.xsave_size);
    if state.len() < least || state.len() > most.max(least) {
        return Err(bad("xsave", format!("{} bytes, where this KVM has {most}", state.len())));
    }
    let mut buffer = xsave_buffer(format);
    buffer.as_mut_bytes().iter_mut().zip(state).for_each(|(byte, value)| *byte = *value);
    let Some(first) = buffer.first() else { return Ok(()) };
    // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 reports, and the buffer that starts with
    // this reference has them.
    kvm("KVM_SET_XSAVE", unsafe { vcpu.fd().set_xsave(first) })
}

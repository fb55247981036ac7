//! Instructions of newer processors: SYSENTER in 64-bit code, CLZERO, MOVDIR64B, RDRAND, RDSEED,
//! protection keys, and those that KVM gives to no guest, RDPRU among them, which are undefined
//! (Intel SDM volume 2, AMD APM volume 3).

use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::area::{component, get, in_use, put};
use super::cpu::{Cpu, Done, Flow, Stop, fault, fault_with, mask};
use super::xsave::{image, set_image};
use crate::x86::{ARITHMETIC, CF, CR4_CET, CR4_PKE, GP, IF, RF, UD, VM, ZF};
use kvm_bindings::kvm_segment;

const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
/// The component of PKRU in the extended state.
const PKRU: u32 = 9;

/// The instructions executed here, with their names.
const TABLE: [(Mnemonic, &str); 31] = [
    (Mnemonic::Sysenter, "sysenter"),
    (Mnemonic::Rdpru, "rdpru"),
    (Mnemonic::Clzero, "clzero"),
    (Mnemonic::Movdir64b, "movdir64b"),
    (Mnemonic::Rdrand, "rdrand"),
    (Mnemonic::Rdseed, "rdseed"),
    (Mnemonic::Rdpkru, "rdpkru"),
    (Mnemonic::Wrpkru, "wrpkru"),
    (Mnemonic::Xtest, "xtest"),
    (Mnemonic::Xend, "xend"),
    (Mnemonic::Umonitor, "umonitor"),
    (Mnemonic::Umwait, "umwait"),
    (Mnemonic::Tpause, "tpause"),
    (Mnemonic::Incsspd, "incsspd"),
    (Mnemonic::Incsspq, "incsspq"),
    (Mnemonic::Rstorssp, "rstorssp"),
    (Mnemonic::Saveprevssp, "saveprevssp"),
    (Mnemonic::Setssbsy, "setssbsy"),
    (Mnemonic::Clrssbsy, "clrssbsy"),
    (Mnemonic::Wrssd, "wrssd"),
    (Mnemonic::Wrssq, "wrssq"),
    (Mnemonic::Wrussd, "wrussd"),
    (Mnemonic::Wrussq, "wrussq"),
    (Mnemonic::Enqcmd, "enqcmd"),
    (Mnemonic::Enqcmds, "enqcmds"),
    (Mnemonic::Pconfig, "pconfig"),
    (Mnemonic::Getsec, "getsec"),
    (Mnemonic::Encls, "encls"),
    (Mnemonic::Enclu, "enclu"),
    (Mnemonic::Enclv, "enclv"),
    (Mnemonic::Hreset, "hreset"),
];

pub(super) fn name(mnemonic: Mnemonic) -> Option<&'static str> {
    super::cpu::named(&TABLE, mnemonic)
}

/// RTM, in EBX of leaf 7.
const RTM: u32 = 1 << 11;

impl Cpu<'_> {
    /// #UD if the guest has no transactions.
    fn need_transactions(&mut self) -> Done<()> {
        let [_, ebx, ..] = self.platform.cpuid(7).ok_or(Stop::Unknown)?;
        if ebx & RTM != 0 { Ok(()) } else { fault(UD) }
    }

    /// Whether the guest's processor is one of AMD or Hygon.
    fn is_amd(&mut self) -> Done<bool> {
        let [_, ebx, _, _] = self.platform.cpuid(0).ok_or(Stop::Unknown)?;
        Ok([*b"Auth", *b"Hygo"].contains(&ebx.to_le_bytes()))
    }
}

// Long because it has one arm for each instruction.
pub(super) fn execute(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    match i.mnemonic() {
        Mnemonic::Sysenter => return sysenter(cpu),
        Mnemonic::Clzero => clzero(cpu, i)?,
        Mnemonic::Movdir64b => move_line(cpu, i)?,
        Mnemonic::Rdrand | Mnemonic::Rdseed => random(cpu, i)?,
        Mnemonic::Rdpkru | Mnemonic::Wrpkru => protection_keys(cpu, i)?,
        // Outside a transaction, as always here.
        Mnemonic::Xtest => {
            cpu.need_transactions()?;
            cpu.regs.rflags = cpu.regs.rflags & !ARITHMETIC | ZF;
        }
        Mnemonic::Xend => {
            cpu.need_transactions()?;
            return fault_with(GP, 0);
        }
        // They may return at once.
        Mnemonic::Umonitor | Mnemonic::Umwait | Mnemonic::Tpause => {
            if i.mnemonic() != Mnemonic::Umonitor {
                cpu.regs.rflags &= !ARITHMETIC;
            }
        }
        // Shadow stacks are not supported.
        Mnemonic::Incsspd
        | Mnemonic::Incsspq
        | Mnemonic::Rstorssp
        | Mnemonic::Saveprevssp
        | Mnemonic::Setssbsy
        | Mnemonic::Clrssbsy
        | Mnemonic::Wrssd
        | Mnemonic::Wrssq
        | Mnemonic::Wrussd
        | Mnemonic::Wrussq
            if cpu.sregs.cr4 & CR4_CET != 0 =>
        {
            return Err(Stop::Unknown);
        }
        // KVM gives them to no guest.
        _ => return fault(UD),
    }
    Ok(Flow::Next)
}

/// SYSENTER in long mode, which KVM leaves to the processor. AMD's processors do not have it there.
fn sysenter(cpu: &mut Cpu<'_>) -> Done<Flow> {
    if !cpu.is_protected() {
        return fault_with(GP, 0);
    }
    if cpu.is_long() && cpu.is_amd()? {
        return fault(UD);
    }
    let selector = cpu.platform.msr(IA32_SYSENTER_CS).ok_or(Stop::Unknown)? & 0xfffc;
    if selector == 0 {
        return fault_with(GP, 0);
    }
    let width = if cpu.is_long() { 8 } else { 4 };
    let is_long = u8::from(cpu.is_long());
    let code = kvm_segment {
        selector: u16::try_from(selector).unwrap_or(0),
        limit: u32::MAX,
        type_: 11,
        present: 1,
        s: 1,
        g: 1,
        l: is_long,
        db: 1 - is_long,
        ..Default::default()
    };
    let stack_selector = code.selector.wrapping_add(8);
    cpu.sregs.cs = code;
    cpu.sregs.ss = kvm_segment { selector: stack_selector, type_: 3, l: 0, db: 1, ..code };
    let target = cpu.platform.msr(IA32_SYSENTER_EIP).ok_or(Stop::Unknown)?;
    let stack = cpu.platform.msr(IA32_SYSENTER_ESP).ok_or(Stop::Unknown)?;
    (cpu.regs.rip, cpu.regs.rsp) = (target & mask(width), stack & mask(width));
    cpu.regs.rflags &= !(VM | IF | RF);
    Ok(Flow::Jumped)
}

/// CLZERO: fill the cache line at RAX with zeros.
fn clzero(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let width = match i.code() {
        Code::Clzerow => 2,
        Code::Clzerod => 4,
        _ => 8,
    };
    let segment = match i.segment_prefix() {
        Register::None => Register::DS,
        segment => segment,
    };
    let offset = cpu.regs.rax & mask(width) & !63;
    write_line(cpu, segment, offset, &[0; 64])
}

fn write_line(cpu: &mut Cpu<'_>, segment: Register, offset: u64, line: &[u8; 64]) -> Done<()> {
    let linear = cpu.linear(segment, offset, line.len(), true)?;
    let access = super::access::Access::explicit(cpu.cpl(), true);
    cpu.write_linear(linear, line, access)
}

/// MOVDIR64B: copy 64 bytes to an aligned address in ES.
fn move_line(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let (offset, _) = cpu.register(i.op0_register())?;
    let mut line = [0; 64];
    cpu.read_operand(i, 1, &mut line)?;
    if cpu.linear(Register::ES, offset, line.len(), true)? % 64 != 0 {
        return fault_with(GP, 0);
    }
    write_line(cpu, Register::ES, offset, &line)
}

/// RDRAND and RDSEED, from the kernel's random numbers.
fn random(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let mut bytes = [0_u8; 8];
    // SAFETY: the kernel writes at most the 8 bytes of the array.
    let length = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    let is_filled = usize::try_from(length) == Ok(bytes.len());
    cpu.regs.rflags &= !ARITHMETIC;
    if is_filled {
        cpu.regs.rflags |= CF;
        return cpu.set_register(i.op0_register(), u64::from_le_bytes(bytes));
    }
    // The processor has no number, either, and the guest tries again.
    cpu.set_register(i.op0_register(), 0)
}

fn protection_keys(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let is_write = i.mnemonic() == Mnemonic::Wrpkru;
    if cpu.sregs.cr4 & CR4_PKE == 0 {
        return fault(UD);
    }
    if cpu.regs.rcx & mask(4) != 0 || is_write && cpu.regs.rdx & mask(4) != 0 {
        return fault_with(GP, 0);
    }
    if is_write {
        let mut image = image(cpu)?;
        let at = component(PKRU).ok_or(Stop::Unknown)?;
        put(&mut image, at, 4, cpu.regs.rax)?;
        return set_image(cpu, image, 1 << PKRU);
    }
    (cpu.regs.rax, cpu.regs.rdx) = (u64::from(cpu.protection_key_rights()?), 0);
    Ok(())
}

impl Cpu<'_> {
    /// PKRU.
    pub(super) fn protection_key_rights(&mut self) -> Done<u32> {
        let image = image(self)?;
        if in_use(&image)? >> PKRU & 1 == 0 {
            return Ok(0);
        }
        let at = component(PKRU).ok_or(Stop::Unknown)?;
        Ok(u32::try_from(get(&image, at, 4)?).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixup::cpu::Fault;
    use crate::fixup::testing::{Ram, protected, run};
    use kvm_bindings::{kvm_regs, kvm_sregs};

    fn long(ring: u8) -> kvm_sregs {
        let mut sregs = kvm_sregs { efer: 0x500, ..protected(ring) };
        (sregs.cs.l, sregs.cs.db) = (1, 0);
        sregs
    }

    fn vector<T>(result: Done<T>) -> Option<u8> {
        match result {
            Err(Stop::Fault(Fault { vector, .. })) => Some(vector),
            _ => None,
        }
    }

    #[test]
    fn transactions_need_their_feature() {
        let (xtest, xend) = ([0x0f, 0x01, 0xd6], [0x0f, 0x01, 0xd5]);
        let mut ram = Ram { cpuid: 0, ..Ram::new(0x4000) };
        let regs = kvm_regs::default();
        assert_eq!(vector(run(&mut ram, regs, long(0), &xtest)), Some(UD));
        ram.cpuid = RTM;
        let (after, _) = run(&mut ram, regs, long(0), &xtest).unwrap();
        assert_eq!(after.rflags & ARITHMETIC, ZF, "outside a transaction");
        assert_eq!(vector(run(&mut ram, regs, long(0), &xend)), Some(GP));
    }

    #[test]
    fn a_line_is_cleared_and_copied() {
        let mut ram = Ram::new(0x4000);
        ram.put(0x2000, &[0xa5; 256]);
        let regs = kvm_regs { rax: 0x2047, ..Default::default() };
        run(&mut ram, regs, long(0), &[0x0f, 0x01, 0xfc]).unwrap(); // clzero
        assert_eq!(ram.bytes[0x203f..0x2081].iter().filter(|byte| **byte == 0).count(), 64);
        let copy = [0x66, 0x0f, 0x38, 0xf8, 0x06];
        let regs = kvm_regs { rsi: 0x2001, rax: 0x3000, ..Default::default() };
        run(&mut ram, regs, long(0), &copy).unwrap();
        assert_eq!(ram.bytes[0x3000..0x3040], ram.bytes[0x2001..0x2041]);
        let odd = kvm_regs { rax: 0x3008, ..regs };
        assert_eq!(vector(run(&mut ram, odd, long(0), &copy)), Some(GP));
    }

    #[test]
    fn sysenter_enters_ring_0_unless_there_is_no_segment() {
        let mut ram = Ram::new(0x4000);
        let regs = kvm_regs { rflags: IF | 2, ..Default::default() };
        let (after, system) = run(&mut ram, regs, long(3), &[0x0f, 0x34]).unwrap();
        assert_eq!((after.rip, after.rsp, after.rflags), (0x176, 0x175, 2));
        assert_eq!(
            (system.cs.selector, system.cs.l, system.ss.selector, system.ss.dpl),
            (0x174, 1, 0x17c, 0)
        );
        ram.msr_mask = 0;
        assert_eq!(vector(run(&mut ram, regs, long(3), &[0x0f, 0x34])), Some(GP));
        let mut amd = Ram { cpuid: u32::from_le_bytes(*b"Auth"), ..Ram::new(0x4000) };
        assert_eq!(vector(run(&mut amd, regs, long(3), &[0x0f, 0x34])), Some(UD));
    }

    #[test]
    fn protection_keys_need_the_operating_system() {
        let (read, write) = ([0x0f, 0x01, 0xee], [0x0f, 0x01, 0xef]);
        let mut ram = Ram::new(0x4000);
        let regs = kvm_regs { rax: 0x5555_5554, ..Default::default() };
        assert_eq!(vector(run(&mut ram, regs, long(0), &read)), Some(UD));
        let sregs = kvm_sregs { cr4: CR4_PKE, ..long(0) };
        let with_rcx = kvm_regs { rcx: 1, ..regs };
        assert_eq!(vector(run(&mut ram, with_rcx, sregs, &read)), Some(GP));
        if component(PKRU).is_some() {
            run(&mut ram, regs, sregs, &write).unwrap();
            let empty = kvm_regs { rax: 0, rdx: 7, ..regs };
            let (after, _) = run(&mut ram, empty, sregs, &read).unwrap();
            assert_eq!((after.rax, after.rdx), (0x5555_5554, 0));
        }
    }

    #[test]
    fn random_numbers_set_the_carry_flag() {
        let mut ram = Ram::new(0x4000);
        let regs = kvm_regs { rflags: ARITHMETIC | 2, ..Default::default() };
        let (after, _) = run(&mut ram, regs, protected(0), &[0x0f, 0xc7, 0xf0]).unwrap();
        assert_eq!((after.rflags, after.rax >> 32), (CF | 2, 0));
    }

    #[test]
    fn no_guest_has_shadow_stacks_or_work_queues() {
        for code in [&[0xf3, 0x0f, 0xae, 0xe8][..], &[0xf2, 0x0f, 0x38, 0xf8, 0x06]] {
            let mut ram = Ram::new(0x4000);
            let regs = kvm_regs { rsi: 0x2000, ..Default::default() };
            assert_eq!(vector(run(&mut ram, regs, protected(0), code)), Some(UD));
        }
    }
}

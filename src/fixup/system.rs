//! System instructions: CLAC and STAC, the segment checks, the bases of FS and GS, the time stamp,
//! hints, CMPXCHG16B, INVPCID, and the reserved undefined opcodes (Intel SDM volume 2).

use iced_x86::{Instruction, Mnemonic};

use super::access::Access;
use super::cpu::{Cpu, Done, Flow, Stop, fault, fault_with, mask};
use super::descriptor::Descriptor;
use crate::x86::{AC, CR4_FSGSBASE, CR4_PCIDE, CR4_TSD, GP, UD, VM, ZF};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_AUX: u32 = 0xc000_0103;

/// The instructions executed here, with their names.
const TABLE: [(Mnemonic, &str); 26] = [
    (Mnemonic::Clac, "clac"),
    (Mnemonic::Stac, "stac"),
    (Mnemonic::Verr, "verr"),
    (Mnemonic::Verw, "verw"),
    (Mnemonic::Lar, "lar"),
    (Mnemonic::Lsl, "lsl"),
    (Mnemonic::Rdfsbase, "rdfsbase"),
    (Mnemonic::Rdgsbase, "rdgsbase"),
    (Mnemonic::Wrfsbase, "wrfsbase"),
    (Mnemonic::Wrgsbase, "wrgsbase"),
    (Mnemonic::Rdtscp, "rdtscp"),
    (Mnemonic::Rdpid, "rdpid"),
    (Mnemonic::Cmpxchg16b, "cmpxchg16b"),
    (Mnemonic::Invpcid, "invpcid"),
    (Mnemonic::Clwb, "clwb"),
    (Mnemonic::Clflushopt, "clflushopt"),
    (Mnemonic::Cldemote, "cldemote"),
    (Mnemonic::Rdsspd, "rdsspd"),
    (Mnemonic::Rdsspq, "rdsspq"),
    (Mnemonic::Monitor, "monitor"),
    (Mnemonic::Mwait, "mwait"),
    (Mnemonic::Pause, "pause"),
    (Mnemonic::Nop, "nop"),
    (Mnemonic::Ud0, "ud0"),
    (Mnemonic::Ud1, "ud1"),
    (Mnemonic::Ud2, "ud2"),
];

pub(super) fn name(mnemonic: Mnemonic) -> Option<&'static str> {
    TABLE.iter().find(|(known, _)| *known == mnemonic).map(|(_, name)| *name)
}

pub(super) fn execute(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    match i.mnemonic() {
        Mnemonic::Clac | Mnemonic::Stac => {
            // Undefined outside ring 0, also in virtual-8086 mode.
            if cpu.cpl() != 0 {
                return fault(UD);
            }
            cpu.regs.rflags &= !AC;
            cpu.regs.rflags |= if i.mnemonic() == Mnemonic::Stac { AC } else { 0 };
        }
        Mnemonic::Verr | Mnemonic::Verw | Mnemonic::Lar | Mnemonic::Lsl => inspect(cpu, i)?,
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            segment_base(cpu, i)?;
        }
        Mnemonic::Rdtscp => time_stamp(cpu)?,
        Mnemonic::Rdpid => {
            let value = cpu.platform.msr(IA32_TSC_AUX).ok_or(Stop::Unknown)?;
            cpu.set_register(i.op0_register(), value & mask(4))?;
        }
        Mnemonic::Cmpxchg16b => compare_exchange(cpu, i)?,
        Mnemonic::Invpcid => invalidate(cpu, i)?,
        Mnemonic::Clwb | Mnemonic::Clflushopt => cpu.read_operand(i, 0, &mut [0])?,
        // Hints. RDSSP does nothing without shadow stacks, which are not supported here.
        Mnemonic::Cldemote | Mnemonic::Rdsspd | Mnemonic::Rdsspq => {}
        Mnemonic::Pause | Mnemonic::Nop => {}
        // KVM also treats them as no-ops, if the guest has them.
        Mnemonic::Monitor | Mnemonic::Mwait if cpu.cpl() == 0 => {}
        Mnemonic::Monitor | Mnemonic::Mwait => return fault(UD),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => return fault(UD),
        _ => return Err(Stop::Unknown),
    }
    Ok(Flow::Next)
}

/// Whether LAR and LSL accept a type of system descriptor: TSSs and LDTs, and for LAR also gates
/// (Intel SDM volume 2).
fn is_inspectable(cpu: &Cpu<'_>, kind: u8, is_limit: bool) -> bool {
    match (cpu.is_long(), is_limit) {
        (true, true) => matches!(kind, 2 | 9 | 11),
        (true, false) => matches!(kind, 2 | 9 | 11 | 12),
        (false, true) => matches!(kind, 1 | 2 | 3 | 9 | 11),
        (false, false) => matches!(kind, 1..=5 | 9 | 11 | 12),
    }
}

/// VERR, VERW, LAR and LSL: ZF is set if the segment is accessible.
fn inspect(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    if !cpu.is_protected() || cpu.regs.rflags & VM != 0 {
        return fault(UD);
    }
    let is_check = matches!(i.mnemonic(), Mnemonic::Verr | Mnemonic::Verw);
    let selector = if i.op_kind(u32::from(!is_check)) == iced_x86::OpKind::Memory {
        let mut bytes = [0; 2];
        cpu.read_operand(i, u32::from(!is_check), &mut bytes)?;
        u16::from_le_bytes(bytes)
    } else {
        u16::try_from(cpu.load(i, u32::from(!is_check))?.0 & mask(2)).unwrap_or(0)
    };
    cpu.regs.rflags &= !ZF;
    if selector & !3 == 0 {
        return Ok(());
    }
    let Some(descriptor) = cpu.descriptor(selector)? else { return Ok(()) };
    if !is_reachable(cpu, i.mnemonic(), selector, &descriptor) {
        return Ok(());
    }
    match i.mnemonic() {
        Mnemonic::Lar => cpu.store(i, 0, descriptor.raw >> 32 & 0x00ff_ff00)?,
        Mnemonic::Lsl => cpu.store(i, 0, u64::from(descriptor.limit()))?,
        _ => {}
    }
    cpu.regs.rflags |= ZF;
    Ok(())
}

fn is_reachable(cpu: &Cpu<'_>, mnemonic: Mnemonic, selector: u16, d: &Descriptor) -> bool {
    let level = u16::from(cpu.cpl()).max(selector & 3);
    let has_privilege = d.is_conforming() || level <= u16::from(d.dpl());
    has_privilege
        && match mnemonic {
            Mnemonic::Verr => d.is_readable(),
            Mnemonic::Verw => d.is_writable_data(),
            _ => !d.is_system() || is_inspectable(cpu, d.kind(), mnemonic == Mnemonic::Lsl),
        }
}

fn segment_base(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    if !cpu.is_64_bit() || cpu.sregs.cr4 & CR4_FSGSBASE == 0 {
        return fault(UD);
    }
    let (value, size) = cpu.load(i, 0)?;
    let (is_fs, is_read) = match i.mnemonic() {
        Mnemonic::Rdfsbase => (true, true),
        Mnemonic::Rdgsbase => (false, true),
        Mnemonic::Wrfsbase => (true, false),
        _ => (false, false),
    };
    let is_canonical = cpu.is_canonical(value);
    let segment = if is_fs { &mut cpu.sregs.fs } else { &mut cpu.sregs.gs };
    if is_read {
        let base = segment.base & mask(size);
        return cpu.store(i, 0, base);
    }
    if !is_canonical {
        return fault_with(GP, 0);
    }
    segment.base = value;
    Ok(())
}

fn time_stamp(cpu: &mut Cpu<'_>) -> Done<()> {
    if cpu.cpl() != 0 && cpu.sregs.cr4 & CR4_TSD != 0 {
        return fault_with(GP, 0);
    }
    let time = cpu.platform.msr(IA32_TSC).ok_or(Stop::Unknown)?;
    let aux = cpu.platform.msr(IA32_TSC_AUX).ok_or(Stop::Unknown)?;
    (cpu.regs.rax, cpu.regs.rdx, cpu.regs.rcx) = (time & mask(4), time >> 32, aux & mask(4));
    Ok(())
}

fn compare_exchange(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let offset = cpu.offset(i, 0)?;
    let linear = cpu.linear(i.memory_segment(), offset, 16, true)?;
    if linear % 16 != 0 {
        return fault_with(GP, 0);
    }
    let address = cpu.walk(linear, Access::explicit(cpu.cpl(), true))?;
    let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let (old, new) = (pair(cpu.regs.rdx, cpu.regs.rax), pair(cpu.regs.rcx, cpu.regs.rbx));
    let found = cpu.platform.exchange(address, old, new).ok_or(Stop::Unknown)?;
    if found == old {
        cpu.regs.rflags |= ZF;
        return Ok(());
    }
    cpu.regs.rflags &= !ZF;
    cpu.regs.rax = u64::try_from(found & u128::from(u64::MAX)).unwrap_or(0);
    cpu.regs.rdx = u64::try_from(found >> 64).unwrap_or(0);
    Ok(())
}

/// INVPCID. Flushes all translations, as the manual permits.
fn invalidate(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    if cpu.cpl() != 0 {
        return fault_with(GP, 0);
    }
    let (kind, _) = cpu.load(i, 0)?;
    let mut bytes = [0; 16];
    cpu.read_operand(i, 1, &mut bytes)?;
    let whole = u128::from_le_bytes(bytes);
    let low = u64::try_from(whole & u128::from(u64::MAX)).unwrap_or(0);
    let address = u64::try_from(whole >> 64).unwrap_or(0);
    let has_pcid = cpu.sregs.cr4 & CR4_PCIDE != 0;
    let is_refused = match kind {
        0 => low >> 12 != 0 || low != 0 && !has_pcid || !cpu.is_canonical(address),
        1 => low >> 12 != 0 || low != 0 && !has_pcid,
        2 | 3 => low >> 12 != 0,
        _ => true,
    };
    if is_refused {
        return fault_with(GP, 0);
    }
    if cpu.platform.flush_translations() { Ok(()) } else { Err(Stop::Unknown) }
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

    fn undefined<T>(result: Done<T>) -> bool {
        matches!(result, Err(Stop::Fault(Fault { vector: UD, code: None, address: None })))
    }

    #[test]
    fn smap_is_opened_and_closed_by_ring_0_alone() {
        let mut ram = Ram::new(0x2000);
        let regs = kvm_regs { rflags: 2, ..Default::default() };
        let (after, _) = run(&mut ram, regs, protected(0), &[0x0f, 0x01, 0xcb]).unwrap();
        assert_eq!(after.rflags, 2 | AC);
        let (after, _) = run(&mut ram, after, protected(0), &[0x0f, 0x01, 0xca]).unwrap();
        assert_eq!(after.rflags, 2);
        assert!(undefined(run(&mut ram, regs, protected(3), &[0x0f, 0x01, 0xca])));
    }

    #[test]
    fn bases_of_fs_and_gs_need_the_operating_systems_leave() {
        let mut ram = Ram::new(0x2000);
        let regs = kvm_regs { rax: 0x1234_5678_9abc, ..Default::default() };
        let write_fs = [0xf3, 0x48, 0x0f, 0xae, 0xd0];
        assert!(undefined(run(&mut ram, regs, long(0), &write_fs)));
        let sregs = kvm_sregs { cr4: CR4_FSGSBASE, ..long(3) };
        let (_, after) = run(&mut ram, regs, sregs, &write_fs).unwrap();
        assert_eq!(after.fs.base, 0x1234_5678_9abc);
        let bad = kvm_regs { rax: 1 << 63, ..regs };
        let fault = Fault { vector: GP, code: Some(0), address: None };
        assert_eq!(run(&mut ram, bad, sregs, &write_fs).unwrap_err(), Stop::Fault(fault));
        let read_fs = [0xf3, 0x0f, 0xae, 0xc3]; // rdfsbase ebx
        let (after, _) = run(&mut ram, regs, after, &read_fs).unwrap();
        assert_eq!(after.rbx, 0x5678_9abc);
    }

    #[test]
    fn segments_are_looked_up_without_being_loaded() {
        let mut ram = Ram::new(0x4000);
        let entries = [0_u64, 0x00cf_9a00_0000_ffff, 0x00c0_f200_0000_000f, 0x0000_8900_0000_0067];
        for (n, entry) in entries.iter().enumerate() {
            ram.put(0x2000 + 8 * n, &entry.to_le_bytes());
        }
        let mut sregs = protected(0);
        (sregs.gdt.base, sregs.gdt.limit) = (0x2000, 31);
        let mut look = |code: &[u8], selector| {
            let regs = kvm_regs { rbx: selector, rax: 5, ..Default::default() };
            let (after, _) = run(&mut ram, regs, sregs, code).unwrap();
            (after.rflags & ZF != 0, after.rax)
        };
        let (verr, verw) = ([0x0f, 0x00, 0xe3], [0x0f, 0x00, 0xeb]);
        let (lar, lsl) = ([0x0f, 0x02, 0xc3], [0x0f, 0x03, 0xc3]);
        assert_eq!((look(&verr, 8).0, look(&verw, 8).0), (true, false));
        assert_eq!((look(&verw, 0x13).0, look(&verr, 0x0b).0), (true, false));
        assert_eq!(look(&lsl, 0x13), (true, 0xffff));
        assert_eq!(look(&lar, 0x18), (true, 0x8900));
        assert_eq!((look(&lsl, 0), look(&lar, 0x100)), ((false, 5), (false, 5)));
    }

    #[test]
    fn sixteen_bytes_are_exchanged_if_they_are_what_was_expected() {
        let mut ram = Ram::new(0x3000);
        ram.put(0x2000, &7_u128.to_le_bytes());
        let regs = kvm_regs { rsi: 0x2000, rax: 7, rbx: 1, rcx: 2, ..Default::default() };
        let code = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];
        let (after, _) = run(&mut ram, regs, long(0), &code).unwrap();
        assert_eq!((after.rflags & ZF, ram.u32(0x2000), ram.u32(0x2008)), (ZF, 1, 2));
        let (after, _) = run(&mut ram, regs, long(0), &code).unwrap();
        assert_eq!((after.rflags & ZF, after.rax, after.rdx), (0, 1, 2));
        let odd = kvm_regs { rsi: 0x2008, ..regs };
        let fault = Fault { vector: GP, code: Some(0), address: None };
        assert_eq!(run(&mut ram, odd, long(0), &code).unwrap_err(), Stop::Fault(fault));
    }

    #[test]
    fn translations_are_forgotten_by_descriptors_that_name_some() {
        let mut ram = Ram::new(0x3000);
        let code = [0x66, 0x0f, 0x38, 0x82, 0x06]; // invpcid rax, [rsi]
        let regs = kvm_regs { rsi: 0x2000, ..Default::default() };
        for (kind, pcid, is_allowed) in
            [(0, 0_u64, true), (3, 0, true), (1, 5, false), (4, 0, false), (2, 1 << 12, false)]
        {
            ram.put(0x2000, &pcid.to_le_bytes());
            let done = run(&mut ram, kvm_regs { rax: kind, ..regs }, long(0), &code);
            assert_eq!(done.is_ok(), is_allowed, "{kind} {pcid}");
        }
        assert!(run(&mut ram, regs, long(3), &code).is_err());
    }

    #[test]
    fn the_processors_number_comes_from_its_register() {
        let mut ram = Ram::new(0x2000);
        let (after, _) =
            run(&mut ram, kvm_regs::default(), long(0), &[0xf3, 0x0f, 0xc7, 0xf8]).unwrap();
        assert_eq!(after.rax, u64::from(IA32_TSC_AUX), "as the memory of these tests has it");
    }
}

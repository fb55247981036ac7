//! FWAIT, the x87 control instructions, EMMS and MXCSR (Intel SDM volume 1, chapters 8 and 10).

use iced_x86::{Instruction, Mnemonic};

use super::area::{CONTROL, MXCSR, SSE, X87, get, put};
use super::cpu::{Cpu, Done, Flow, Stop, fault};
use super::xsave::{check_mxcsr, image, set_image};
use crate::x86::{CR0_EM, CR0_MP, CR0_NE, CR0_TS, CR4_OSFXSR, MF, NM, UD};

const STATUS: usize = 2;
const TAGS: usize = 4;
/// An unmasked exception is pending.
const STATUS_SUMMARY: u64 = 1 << 7;

/// The instructions executed here, with their names.
const TABLE: [(Mnemonic, &str); 7] = [
    (Mnemonic::Wait, "fwait"),
    (Mnemonic::Fnclex, "fnclex"),
    (Mnemonic::Fnstsw, "fnstsw"),
    (Mnemonic::Fldcw, "fldcw"),
    (Mnemonic::Emms, "emms"),
    (Mnemonic::Ldmxcsr, "ldmxcsr"),
    (Mnemonic::Stmxcsr, "stmxcsr"),
];

pub(super) fn name(mnemonic: Mnemonic) -> Option<&'static str> {
    super::cpu::named(&TABLE, mnemonic)
}

pub(super) fn execute(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    match i.mnemonic() {
        Mnemonic::Wait => {
            if cpu.sregs.cr0 & CR0_MP != 0 && cpu.sregs.cr0 & CR0_TS != 0 {
                return fault(NM);
            }
            raise_pending(cpu)?;
        }
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr => mxcsr(cpu, i)?,
        _ => x87(cpu, i)?,
    }
    Ok(Flow::Next)
}

/// Raise #MF for a pending x87 exception. If CR0.NE is clear, it would be an external interrupt,
/// and the exit is reported instead.
fn raise_pending(cpu: &mut Cpu<'_>) -> Done<()> {
    if get(&image(cpu)?, STATUS, 2)? & STATUS_SUMMARY == 0 {
        return Ok(());
    }
    if cpu.sregs.cr0 & CR0_NE != 0 { fault(MF) } else { Err(Stop::Unknown) }
}

fn x87(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    if cpu.sregs.cr0 & (CR0_EM | CR0_TS) != 0 {
        let is_mmx = i.mnemonic() == Mnemonic::Emms;
        return fault(if is_mmx && cpu.sregs.cr0 & CR0_EM != 0 { UD } else { NM });
    }
    let mut image = image(cpu)?;
    match i.mnemonic() {
        Mnemonic::Fnstsw => {
            let status = get(&image, STATUS, 2)?;
            return match i.op_kind(0) {
                iced_x86::OpKind::Register => cpu.set_register(i.op0_register(), status),
                _ => cpu.write_operand(i, 0, &status.to_le_bytes()[..2]),
            };
        }
        // Exception flags, stack fault, summary and busy.
        Mnemonic::Fnclex => {
            let status = get(&image, STATUS, 2)? & 0x7f00;
            put(&mut image, STATUS, 2, status)?;
        }
        Mnemonic::Fldcw => {
            raise_pending(cpu)?;
            let mut word = [0; 2];
            cpu.read_operand(i, 0, &mut word)?;
            let control = u64::from(u16::from_le_bytes(word)) | 0x40;
            put(&mut image, CONTROL, 2, control)?;
            // An exception that is no longer masked is pending from now on.
            let status = get(&image, STATUS, 2)?;
            let is_waiting = status & !control & 0x3f != 0;
            let summary = if is_waiting { STATUS_SUMMARY | 1 << 15 } else { 0 };
            put(&mut image, STATUS, 2, status & !(STATUS_SUMMARY | 1 << 15) | summary)?;
        }
        _ => {
            raise_pending(cpu)?;
            put(&mut image, TAGS, 1, 0)?;
        }
    }
    set_image(cpu, image, X87)
}

fn mxcsr(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    if cpu.sregs.cr0 & CR0_EM != 0 || cpu.sregs.cr4 & CR4_OSFXSR == 0 {
        return fault(UD);
    }
    if cpu.sregs.cr0 & CR0_TS != 0 {
        return fault(NM);
    }
    let mut image = image(cpu)?;
    if i.mnemonic() == Mnemonic::Stmxcsr {
        let value = get(&image, MXCSR, 4)?.to_le_bytes();
        return cpu.write_operand(i, 0, &value[..4]);
    }
    let mut bytes = [0; 4];
    cpu.read_operand(i, 0, &mut bytes)?;
    let value = u64::from(u32::from_le_bytes(bytes));
    check_mxcsr(&image, value)?;
    put(&mut image, MXCSR, 4, value)?;
    set_image(cpu, image, SSE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixup::cpu::Fault;
    use crate::fixup::testing::{Ram, protected, run};
    use crate::x86::GP;
    use kvm_bindings::{kvm_regs, kvm_sregs};

    const FWAIT: [u8; 1] = [0x9b];

    fn vector(result: Done<(kvm_regs, kvm_sregs)>) -> Option<u8> {
        match result {
            Err(Stop::Fault(Fault { vector, .. })) => Some(vector),
            _ => None,
        }
    }

    fn machine(cr0: u64, status: u64) -> (Ram, kvm_sregs) {
        let mut ram = Ram::new(0x4000);
        put(&mut ram.xsave, STATUS, 2, status).unwrap();
        (ram, kvm_sregs { cr0: cr0 | 1, ..protected(0) })
    }

    #[test]
    fn fwait_raises_what_waits() {
        let regs = kvm_regs::default();
        for (cr0, status, expected) in [
            (CR0_NE, 0, None),
            (CR0_NE, STATUS_SUMMARY, Some(MF)),
            (CR0_NE | CR0_TS, 0, None),
            (CR0_NE | CR0_TS | CR0_MP, 0, Some(NM)),
            (CR0_NE | CR0_EM, 0, None),
        ] {
            let (mut ram, sregs) = machine(cr0, status);
            assert_eq!(
                vector(run(&mut ram, regs, sregs, &FWAIT)),
                expected,
                "{cr0:#x} {status:#x}"
            );
        }
        let (mut ram, sregs) = machine(0, STATUS_SUMMARY);
        assert_eq!(
            run(&mut ram, regs, sregs, &FWAIT).unwrap_err(),
            Stop::Unknown,
            "by interrupt 13"
        );
    }

    #[test]
    fn x87_and_mmx_need_their_unit() {
        let regs = kvm_regs::default();
        let (fnclex, emms) = ([0xdb, 0xe2], [0x0f, 0x77]);
        for (cr0, code, expected) in
            [(CR0_TS, fnclex, NM), (CR0_EM, fnclex, NM), (CR0_EM, emms, UD), (CR0_TS, emms, NM)]
        {
            let (mut ram, sregs) = machine(cr0, 0);
            assert_eq!(vector(run(&mut ram, regs, sregs, &code)), Some(expected));
        }
    }

    #[test]
    fn exceptions_are_cleared_and_unmasked() {
        let (mut ram, sregs) = machine(CR0_NE, 0xb8ff);
        let regs = kvm_regs { rsi: 0x2000, ..Default::default() };
        run(&mut ram, regs, sregs, &[0xdb, 0xe2]).unwrap();
        assert_eq!(get(&ram.xsave, STATUS, 2).unwrap(), 0x3800, "the top of the stack stays");
        put(&mut ram.xsave, STATUS, 2, 4).unwrap();
        ram.put(0x2000, &[0x3b, 0x03]);
        run(&mut ram, regs, sregs, &[0xd9, 0x2e]).unwrap(); // fldcw [esi]
        assert_eq!(vector(run(&mut ram, regs, sregs, &FWAIT)), Some(MF));
    }

    #[test]
    fn mxcsr_has_no_reserved_bits() {
        let (mut ram, sregs) = machine(CR0_NE, 0);
        let sregs = kvm_sregs { cr4: CR4_OSFXSR, ..sregs };
        let regs = kvm_regs { rsi: 0x2000, ..Default::default() };
        ram.put(0x2000, &0x1_1f80_u32.to_le_bytes());
        let load = [0x0f, 0xae, 0x16];
        assert_eq!(vector(run(&mut ram, regs, sregs, &load)), Some(GP));
        ram.put(0x2000, &0x1fa0_u32.to_le_bytes());
        run(&mut ram, regs, sregs, &load).unwrap();
        assert_eq!(get(&ram.xsave, MXCSR, 4).unwrap(), 0x1fa0);
        let (mut ram, sregs) = machine(CR0_NE, 0);
        assert_eq!(vector(run(&mut ram, regs, sregs, &load)), Some(UD), "CR4.OSFXSR");
    }
}

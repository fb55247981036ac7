//! Vector and floating-point instructions: x87, MMX, SSE, AVX, AVX-512, and the cryptography on
//! their registers. They run on the host's processor, with the guest's state (`native.rs`). Here
//! are the conditions of the architecture: what enables them, the memory operand, and exceptions
//! (Intel SDM volume 2, section 2.7, and volume 1, chapters 8 and 11).

use iced_x86::{EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind};

use super::area::{CONTROL, HEADER, MXCSR, SSE, get, in_use, put};
use super::cpu::{Cpu, Done, Flow, Stop, fault, fault_with};
use super::native::{OPERAND, Operands};
use super::rewrite::{encoded, rewritten};
use super::unit::{Unit, unit};
use super::xsave::image;
use crate::x86::{
    ARITHMETIC, CR0_EM, CR0_NE, CR0_TS, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_OSXSAVE, GP, MF, NM,
    RFLAGS_RESERVED, UD, VM, XM,
};

const STATUS: usize = 2;
/// The opcode and the addresses of the last x87 instruction.
const LAST: std::ops::Range<usize> = 6..24;
const CODE_AT: usize = 8;
const DATA_AT: usize = 16;
/// In MXCSR: the flags of exceptions, and their masks.
const FLAGS: u64 = 0x3f;
const MASKS: u64 = 0x1f80;
const INITIAL: u64 = MASKS;
/// The other bits of MXCSR: denormals are zeros, the rounding, and flush to zero.
const MODES: u64 = 0xe040;
/// In XCR0: what AVX and AVX-512 need.
const AVX: u64 = 6;
const AVX512: u64 = 0xe6;

pub(super) fn execute(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    let unit = unit(i).ok_or(Stop::Unknown)?;
    check_enabled(cpu, unit)?;
    let before = image(cpu)?;
    if matches!(unit, Unit::X87 | Unit::Mmx) {
        raise_pending(cpu, i, &before)?;
    }
    let memory = memory_operand(cpu, i)?;
    let (rewritten, registers) = rewritten(i)?;
    let mut operands = loaded(cpu, i, memory.as_ref(), &registers)?;
    let mut state = before.clone();
    let controls = get(&state, MXCSR, 4)?;
    put(&mut state, MXCSR, 4, controls & MODES | MASKS)?;
    let code = encoded(&rewritten)?;
    cpu.platform.native().ok_or(Stop::Unknown)?.run(&code, &mut state, &mut operands)?;
    let raised = get(&state, MXCSR, 4)? & FLAGS;
    if raised & !(controls >> 7) != 0 {
        return numeric_fault(cpu, before, controls | raised);
    }
    set_controls(&mut state, controls | raised)?;
    restore_addresses(cpu, i, unit, &before, &mut state)?;
    if let Some(memory) = memory.filter(|memory| memory.is_written) {
        let data = operands.memory.get(..memory.length).ok_or(Stop::Unknown)?;
        cpu.write_operand(i, memory.operand, data)?;
    }
    if !cpu.platform.set_xsave(&state) {
        return Err(Stop::Unknown);
    }
    for (value, number) in operands.registers.iter().zip(&registers) {
        *cpu.general(*number).ok_or(Stop::Unknown)? = *value;
    }
    cpu.regs.rflags = cpu.regs.rflags & !ARITHMETIC | operands.flags & ARITHMETIC;
    Ok(Flow::Next)
}

/// The operands of an instruction, before it.
fn loaded(
    cpu: &mut Cpu<'_>,
    i: &Instruction,
    memory: Option<&MemoryOperand>,
    registers: &[usize],
) -> Done<Operands> {
    let flags = cpu.regs.rflags & ARITHMETIC | RFLAGS_RESERVED;
    let mut operands = Operands { memory: [0; OPERAND], registers: [0; 5], flags };
    if let Some(memory) = memory {
        let data = operands.memory.get_mut(..memory.length).ok_or(Stop::Unknown)?;
        cpu.read_operand(i, memory.operand, data)?;
    }
    for (value, number) in operands.registers.iter_mut().zip(registers) {
        *value = *cpu.general(*number).ok_or(Stop::Unknown)?;
    }
    Ok(operands)
}

fn check_enabled(cpu: &mut Cpu<'_>, unit: Unit) -> Done<()> {
    let (cr0, cr4) = (cpu.sregs.cr0, cpu.sregs.cr4);
    let is_undefined = match unit {
        Unit::X87 => false,
        Unit::Mmx => cr0 & CR0_EM != 0,
        Unit::Sse => cr0 & CR0_EM != 0 || cr4 & CR4_OSFXSR == 0,
        Unit::Avx | Unit::Avx512 => {
            let needed = if unit == Unit::Avx { AVX } else { AVX512 };
            !cpu.is_protected()
                || cpu.regs.rflags & VM != 0
                || cr4 & CR4_OSXSAVE == 0
                || cpu.platform.xcr0().ok_or(Stop::Unknown)? & needed != needed
        }
    };
    if is_undefined {
        return fault(UD);
    }
    let is_closed = cr0 & CR0_TS != 0 || unit == Unit::X87 && cr0 & CR0_EM != 0;
    if is_closed { fault(NM) } else { Ok(()) }
}

/// Raise #MF for a pending x87 exception, unless the instruction does not wait for it. If CR0.NE is
/// clear, it would be an external interrupt, and the exit is reported instead.
fn raise_pending(cpu: &Cpu<'_>, i: &Instruction, state: &[u8]) -> Done<()> {
    let is_waiting = !matches!(
        i.mnemonic(),
        Mnemonic::Fninit
            | Mnemonic::Fnclex
            | Mnemonic::Fnstenv
            | Mnemonic::Fnsave
            | Mnemonic::Fnstsw
            | Mnemonic::Fnstcw
    );
    let is_pending = get(state, STATUS, 2)? & !get(state, CONTROL, 2)? & FLAGS != 0;
    match is_waiting && is_pending {
        true if cpu.sregs.cr0 & CR0_NE != 0 => fault(MF),
        true => Err(Stop::Unknown),
        false => Ok(()),
    }
}

/// Set MXCSR. KVM ignores it if no vector register is in use.
fn set_controls(state: &mut [u8], controls: u64) -> Done<()> {
    put(state, MXCSR, 4, controls)?;
    let used = in_use(state)?;
    put(state, HEADER, 8, if controls == INITIAL { used } else { used | SSE })
}

/// Raise the exception of an unmasked SIMD floating-point exception. Only MXCSR changes.
fn numeric_fault(cpu: &mut Cpu<'_>, mut state: Vec<u8>, controls: u64) -> Done<Flow> {
    set_controls(&mut state, controls)?;
    if !cpu.platform.set_xsave(&state) {
        return Err(Stop::Unknown);
    }
    fault(if cpu.sregs.cr4 & CR4_OSXMMEXCPT != 0 { XM } else { UD })
}

/// A memory operand.
struct MemoryOperand {
    operand: u32,
    length: usize,
    is_written: bool,
}

/// The memory operand, after the checks of its alignment and of the right to write it.
fn memory_operand(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Option<MemoryOperand>> {
    let mut found = None;
    for operand in 0..i.op_count() {
        match i.op_kind(operand) {
            OpKind::Memory => found = Some(operand),
            OpKind::Register
            | OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32 => {}
            // The address is in RDI.
            _ => return Err(Stop::Unknown),
        }
    }
    let Some(operand) = found else { return Ok(None) };
    let length = i.memory_size().size();
    // With many addresses (gather and scatter), or with none.
    if i.is_vsib() || length == 0 || length > OPERAND {
        return Err(Stop::Unknown);
    }
    let offset = cpu.offset(i, operand)?;
    let linear = cpu.linear(i.memory_segment(), offset, length, false)?;
    let is_aligned = usize::try_from(linear).is_ok_and(|at| at.is_multiple_of(length));
    if needs_alignment(i, length) && !is_aligned {
        return fault_with(GP, 0);
    }
    let access = InstructionInfoFactory::new().info(i).op_access(operand);
    let is_written = !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None);
    if is_written {
        cpu.check_write(i, operand, length)?;
    }
    Ok(Some(MemoryOperand { operand, length, is_written }))
}

fn needs_alignment(i: &Instruction, length: usize) -> bool {
    match i.encoding() {
        EncodingKind::Legacy => {
            length == 16
                && !matches!(
                    i.mnemonic(),
                    Mnemonic::Movups
                        | Mnemonic::Movupd
                        | Mnemonic::Movdqu
                        | Mnemonic::Lddqu
                        | Mnemonic::Pcmpestri
                        | Mnemonic::Pcmpestrm
                        | Mnemonic::Pcmpistri
                        | Mnemonic::Pcmpistrm
                )
        }
        _ => matches!(
            i.mnemonic(),
            Mnemonic::Vmovaps
                | Mnemonic::Vmovapd
                | Mnemonic::Vmovdqa
                | Mnemonic::Vmovdqa32
                | Mnemonic::Vmovdqa64
                | Mnemonic::Vmovntps
                | Mnemonic::Vmovntpd
                | Mnemonic::Vmovntdq
                | Mnemonic::Vmovntdqa
        ),
    }
}

/// Give the addresses of the last x87 instruction as the guest sees them. The processor has put
/// the host's there.
fn restore_addresses(
    cpu: &mut Cpu<'_>,
    i: &Instruction,
    unit: Unit,
    before: &[u8],
    state: &mut [u8],
) -> Done<()> {
    let is_changed = state.get(LAST) != before.get(LAST);
    let loads_them = matches!(i.mnemonic(), Mnemonic::Fldenv | Mnemonic::Frstor);
    let clears_them = matches!(i.mnemonic(), Mnemonic::Fninit | Mnemonic::Fnsave);
    if !is_changed || loads_them || clears_them {
        return Ok(());
    }
    for at in LAST {
        put(state, at, 1, get(before, at, 1)?)?;
    }
    if unit == Unit::X87 {
        put(state, CODE_AT, 8, cpu.regs.rip)?;
        if let Some(operand) = (0..i.op_count()).find(|n| i.op_kind(*n) == OpKind::Memory) {
            let offset = cpu.offset(i, operand)?;
            put(state, DATA_AT, 8, offset)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    //! Covers src/fixup/rewrite.rs, src/fixup/unit.rs.

    use super::*;
    use crate::debug::decode;
    use crate::fixup::cpu::Fault;
    use crate::fixup::testing::{Ram, protected, run};
    use crate::fixup::unit::is_vector;
    use kvm_bindings::{kvm_regs, kvm_sregs};
    use proptest::prelude::*;

    fn long() -> kvm_sregs {
        let cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
        let mut sregs = kvm_sregs { efer: 0x500, cr4, ..protected(0) };
        (sregs.cs.l, sregs.cs.db) = (1, 0);
        sregs
    }

    fn vector<T>(result: Done<T>) -> Option<u8> {
        match result {
            Err(Stop::Fault(Fault { vector, .. })) => Some(vector),
            _ => None,
        }
    }

    fn ram() -> Ram {
        let mut ram = Ram::new(0x4000);
        put(&mut ram.xsave, MXCSR, 4, 0x1f80).unwrap();
        put(&mut ram.xsave, CONTROL, 2, 0x37f).unwrap();
        ram
    }

    const ADDPS: [u8; 3] = [0x0f, 0x58, 0x06]; // addps xmm0, [rsi]
    const CVTTSD2SI: [u8; 4] = [0xf2, 0x0f, 0x2c, 0x06]; // cvttsd2si eax, [rsi]
    const FADD: [u8; 2] = [0xd8, 0x06]; // fadd dword [rsi]
    const DIVSS: [u8; 4] = [0xf3, 0x0f, 0x5e, 0xc1]; // divss xmm0, xmm1
    const PADDD: [u8; 3] = [0x0f, 0xfe, 0xc1]; // paddd mm0, mm1

    #[test]
    fn a_unit_that_is_off_is_a_fault() {
        let regs = kvm_regs { rsi: 0x2000, ..Default::default() };
        let cases: [(&[u8], u64, u64, u8); 9] = [
            (&CVTTSD2SI, CR0_TS, 0, NM),
            (&CVTTSD2SI, 0, CR4_OSFXSR, UD),
            (&ADDPS, CR0_TS, 0, NM),
            (&ADDPS, CR0_EM, 0, UD),
            (&ADDPS, 0, CR4_OSFXSR, UD),
            (&FADD, CR0_EM, 0, NM),
            (&FADD, CR0_TS, 0, NM),
            (&PADDD, CR0_EM, 0, UD),
            (&PADDD, CR0_TS, 0, NM),
        ];
        for (code, cr0, cr4, expected) in cases {
            let sregs = long();
            let sregs = kvm_sregs { cr0: sregs.cr0 | cr0, cr4: sregs.cr4 & !cr4, ..sregs };
            assert_eq!(vector(run(&mut ram(), regs, sregs, code)), Some(expected), "{code:x?}");
        }
        let vzeroall = [0xc5, 0xfc, 0x77];
        let closed = kvm_sregs { cr4: 0, ..long() };
        assert_eq!(vector(run(&mut ram(), regs, closed, &vzeroall)), Some(UD));
    }

    #[test]
    fn operands_of_sixteen_bytes_are_aligned() {
        let regs = kvm_regs { rsi: 0x2008, ..Default::default() };
        assert_eq!(vector(run(&mut ram(), regs, long(), &ADDPS)), Some(GP));
        assert!(run(&mut ram(), regs, long(), &[0x0f, 0x10, 0x06]).is_ok(), "movups");
    }

    #[test]
    fn an_unmasked_exception_changes_only_its_flag() {
        let mut ram = ram();
        put(&mut ram.xsave, MXCSR, 4, 0x1f80 & !(1 << 9)).unwrap();
        put(&mut ram.xsave, 160, 4, 0x3f80_0000).unwrap(); // 1.0 / 0.0
        put(&mut ram.xsave, 512, 8, 2).unwrap();
        let regs = kvm_regs::default();
        assert_eq!(vector(run(&mut ram, regs, long(), &DIVSS)), Some(XM));
        assert_eq!(get(&ram.xsave, 160, 8).unwrap(), 0x3f80_0000);
        assert_eq!(get(&ram.xsave, MXCSR, 4).unwrap() & 0x3f, 4);
        let sregs = kvm_sregs { cr4: CR4_OSFXSR, ..long() };
        assert_eq!(vector(run(&mut ram, regs, sregs, &DIVSS)), Some(UD), "CR4.OSXMMEXCPT");
    }

    #[test]
    fn a_pending_exception_of_x87_is_raised_by_the_next_that_waits() {
        let mut ram = ram();
        put(&mut ram.xsave, CONTROL, 2, 0x37b).unwrap();
        put(&mut ram.xsave, STATUS, 2, 0x8084).unwrap();
        put(&mut ram.xsave, 512, 8, 1).unwrap();
        let regs = kvm_regs { rsi: 0x2000, ..Default::default() };
        assert_eq!(vector(run(&mut ram, regs, long(), &FADD)), Some(MF));
        assert_eq!(vector(run(&mut ram, regs, long(), &PADDD)), Some(MF));
        assert!(run(&mut ram, regs, long(), &[0xdd, 0x36]).is_ok(), "fnsave [rsi]");
    }

    #[test]
    fn no_address_of_the_host_reaches_the_guest() {
        let mut ram = ram();
        let regs = kvm_regs { rsi: 0x2000, ..Default::default() };
        run(&mut ram, regs, long(), &FADD).unwrap();
        let (code, data) =
            (get(&ram.xsave, CODE_AT, 8).unwrap(), get(&ram.xsave, DATA_AT, 8).unwrap());
        assert!(code == 0x1000 && data == 0x2000 || (code, data) == (0, 0), "{code:#x} {data:#x}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8192))]
        #[test]
        fn no_vector_instruction_faults_on_the_host(
            start in prop_oneof![
                Just(vec![0x0f]), Just(vec![0x66, 0x0f]), Just(vec![0xf2, 0x0f]), Just(vec![0xf3, 0x0f]),
                Just(vec![0x0f, 0x38]), Just(vec![0x66, 0x0f, 0x38]), Just(vec![0x66, 0x0f, 0x3a]),
                Just(vec![0xc5]), Just(vec![0xc4, 0xe1]), Just(vec![0xc4, 0xe2]), Just(vec![0xc4, 0xe3]),
                Just(vec![0x62, 0xf1]), Just(vec![0x62, 0xf2]), Just(vec![0x62, 0xf3]), Just(vec![0x62]),
                (0xd8..=0xdf_u8).prop_map(|opcode| vec![opcode]),
            ],
            rest in any::<[u8; 12]>(),
            state in any::<[u64; 64]>(),
            is_long in any::<bool>(),
        ) {
            let bytes = [start, rest.to_vec()].concat();
            let sregs = if is_long { long() } else { kvm_sregs { cr4: long().cr4, ..protected(0) } };
            let Some(i) = decode(&bytes, if is_long { 64 } else { 32 }, 0x1000) else { return Ok(()) };
            if is_vector(&i) {
                let mut ram = ram();
                for (n, word) in state.iter().enumerate() {
                    put(&mut ram.xsave, 8 * n, 8, *word).unwrap();
                    put(&mut ram.xsave, 1024 + 8 * n, 8, *word).unwrap();
                }
                put(&mut ram.xsave, 512, 8, 0xe7).unwrap();
                let [a, b, c, d, ..] = state;
                let regs = kvm_regs {
                    rax: a % 0x3000, rbx: b % 0x3000, rcx: c, rdx: d % 0x3000, rsi: 0x2000, rflags: a,
                    ..Default::default()
                };
                let _ = run(&mut ram, regs, sregs, &bytes);
            }
        }
    }
}

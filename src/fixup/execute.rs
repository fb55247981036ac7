//! Executes one instruction: finds its fix-up, and steps over it. Runs on the vCPU's thread.

use iced_x86::{Code, Instruction, Mnemonic};

use super::cpu::{Cpu, Done, Fault, Flow, Stop, fault, mask};
use super::deliver::{STEP, Source};
use super::unit::is_vector;
use super::{bits, feature, legacy, system, transfer, vector, x87, xsave};
use crate::x86::{OF, RF, TF, UD};

/// What has become of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It has been executed, or its exception has been delivered. `is_step`: after it, the debug
    /// exception of a single step has been.
    Done { is_step: bool },
    /// KVM is to deliver this exception.
    Inject { fault: Fault, is_step: bool },
    /// Its exception cannot be delivered, nor can the double fault that this raises.
    Shutdown,
    /// There is no fix-up, and nothing has changed.
    Unknown,
}

/// Execute an instruction on a copy of the processor, and deliver the exception that it raises.
/// Writes to memory are complete when it returns.
pub(crate) fn execute(cpu: &mut Cpu<'_>, instruction: &Instruction) -> Outcome {
    let before = (cpu.regs, cpu.sregs);
    let is_stepped = cpu.regs.rflags & TF != 0;
    match perform(cpu, instruction) {
        Ok(flow) if is_stepped && flow != Flow::Entered => deliver(cpu, STEP, Source::Trap),
        Ok(_) => Outcome::Done { is_step: false },
        Err(stop) => {
            if !cpu.has_switched {
                (cpu.regs, cpu.sregs) = before;
            }
            match stop {
                Stop::Fault(fault) => deliver(cpu, fault, Source::Fault),
                Stop::Shutdown => Outcome::Shutdown,
                Stop::Unknown => Outcome::Unknown,
            }
        }
    }
}

/// Raise #UD at an instruction that does not exist.
pub(crate) fn undefined(cpu: &mut Cpu<'_>) -> Outcome {
    deliver(cpu, Fault { vector: UD, code: None, address: None }, Source::Fault)
}

fn deliver(cpu: &mut Cpu<'_>, fault: Fault, source: Source) -> Outcome {
    let before = (cpu.regs, cpu.sregs);
    let is_step = source == Source::Trap;
    let Err(stop) = cpu.raise(fault, source) else { return Outcome::Done { is_step } };
    (cpu.regs, cpu.sregs) = before;
    if stop == Stop::Shutdown {
        return Outcome::Shutdown;
    }
    cpu.sregs.cr2 = fault.address.unwrap_or(cpu.sregs.cr2);
    cpu.regs.rflags |= if is_step { 0 } else { RF };
    Outcome::Inject { fault, is_step }
}

/// Execute an instruction. If it stops, the registers are in no defined state.
pub(super) fn perform(cpu: &mut Cpu<'_>, instruction: &Instruction) -> Done<Flow> {
    if instruction.has_lock_prefix() && instruction.code() != Code::Cmpxchg16b_m128 {
        return fault(UD);
    }
    let next = instruction.next_ip() & mask(if cpu.is_64_bit() { 8 } else { 4 });
    let flow = match instruction.mnemonic() {
        Mnemonic::Int => cpu.interrupt(instruction.immediate8(), Source::Software, next)?,
        Mnemonic::Int3 => cpu.interrupt(3, Source::Software, next)?,
        Mnemonic::Int1 => cpu.interrupt(1, Source::Privileged, next)?,
        Mnemonic::Into if cpu.regs.rflags & OF != 0 => cpu.interrupt(4, Source::Software, next)?,
        Mnemonic::Into => Flow::Next,
        mnemonic if bits::name(mnemonic).is_some() => bits::execute(cpu, instruction)?,
        mnemonic if x87::name(mnemonic).is_some() => x87::execute(cpu, instruction)?,
        mnemonic if xsave::name(mnemonic).is_some() => xsave::execute(cpu, instruction)?,
        mnemonic if transfer::name(mnemonic).is_some() => transfer::execute(cpu, instruction)?,
        mnemonic if legacy::name(mnemonic).is_some() => legacy::execute(cpu, instruction)?,
        mnemonic if feature::name(mnemonic).is_some() => feature::execute(cpu, instruction)?,
        _ if is_vector(instruction) => vector::execute(cpu, instruction)?,
        _ => system::execute(cpu, instruction)?,
    };
    if flow == Flow::Next {
        cpu.regs.rip = next;
        cpu.regs.rflags &= !RF;
    }
    Ok(flow)
}

#[cfg(test)]
mod tests {
    //! Covers src/fixup/testing.rs.

    use super::*;
    use crate::debug::{bitness, decode};
    use crate::fixup::testing::{Ram, protected, run};
    use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
    use proptest::prelude::*;

    #[test]
    fn a_lock_prefix_where_none_may_be_is_undefined() {
        let mut ram = Ram::new(0x2000);
        let popcnt = [0xf0, 0xf3, 0x0f, 0xb8, 0x03];
        // The decoder already refuses it.
        assert_eq!(decode(&popcnt, 32, 0), None);
        let regs = kvm_regs::default();
        let popcnt = [0xf3, 0x0f, 0xb8, 0xc3];
        let (after, _) = run(&mut ram, kvm_regs { rbx: 7, ..regs }, protected(0), &popcnt).unwrap();
        assert_eq!((after.rax, after.rip), (3, 0x1004));
    }

    /// Two pages of pseudo-random bytes from a seed (xorshift).
    fn noise(seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        std::iter::repeat_with(next).take(0x400).flatten().collect()
    }

    /// Bytes that reach the fix-ups more often than uniformly random ones.
    fn code() -> impl Strategy<Value = Vec<u8>> {
        let prefix = proptest::collection::vec(
            prop_oneof![Just(0x66), Just(0xf2), Just(0xf3), Just(0x48), Just(0x67), Just(0xf0)],
            0..3,
        );
        let opcode = prop_oneof![
            Just(vec![0xcd]),
            Just(vec![0xcc]),
            Just(vec![0x0f]),
            Just(vec![0x0f, 0xae]),
            Just(vec![0x0f, 0xc7]),
            Just(vec![0x0f, 0xb8]),
            Just(vec![0x0f, 0x00]),
            Just(vec![0x0f, 0x01]),
            Just(vec![0x0f, 0x02]),
            Just(vec![0x0f, 0x03]),
            Just(vec![0x0f, 0x38]),
            Just(vec![0xc4, 0xe2]),
            Just(vec![0xc4, 0xe3]),
            Just(vec![0x9b]),
            (0xd8..=0xdf_u8).prop_map(|opcode| vec![opcode]),
            Just(vec![0xc5]),
            Just(vec![0x62]),
            Just(vec![0xcf]),
            Just(vec![0xcb]),
            Just(vec![0x9a]),
            Just(vec![0xff, 0x1d]),
            Just(Vec::new()),
        ];
        (prefix, opcode, proptest::collection::vec(any::<u8>(), 12))
            .prop_map(|(prefix, opcode, rest)| [prefix, opcode, rest].concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        #[test]
        fn no_bytes_registers_or_tables_make_it_panic(
            code in code(),
            general in any::<[u64; 8]>(),
            control in (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()),
            bases in any::<[u64; 4]>(),
            limits in any::<[u32; 4]>(),
            attributes in any::<[u8; 8]>(),
            seed in any::<u64>(),
            is_low in any::<bool>(),
        ) {
            let small = |value: u64| if is_low { value % 0x2000 } else { value };
            let [rax, rbx, rcx, rdx, rsi, rsp, rip, rflags] = general;
            let regs = kvm_regs {
                rax, rbx: small(rbx), rcx, rdx, rsi: small(rsi), rsp: small(rsp), rip: small(rip), rflags,
                ..Default::default()
            };
            let (cr0, cr3, cr4, efer) = control;
            let [t, dpl, l, db, present, unusable, s, tr] = attributes;
            let segment = kvm_segment {
                base: small(bases[0]), limit: limits[0], selector: 0x18, type_: t & 15, dpl: dpl & 3, l: l & 1,
                db: db & 1, present: present & 1, unusable: unusable & 1, s: s & 1, ..Default::default()
            };
            let mut sregs = kvm_sregs {
                cs: segment, ss: segment, ds: segment, fs: segment, gs: segment, es: segment, ldt: segment,
                tr: kvm_segment { base: small(bases[1]), limit: limits[1], type_: tr & 15, ..segment },
                cr0, cr3: small(cr3), cr4, efer,
                ..Default::default()
            };
            (sregs.gdt.base, sregs.idt.base) = (small(bases[2]), small(bases[3]));
            sregs.gdt.limit = u16::try_from(limits[2] & 0xffff).unwrap();
            sregs.idt.limit = u16::try_from(limits[3] & 0xffff).unwrap();
            let xsave = vec![rax.to_le_bytes()[0]; 4096];
            let mut ram = Ram { bytes: noise(seed), xsave, ..Ram::new(0) };
            if let Some(instruction) = decode(&code, bitness(&sregs), regs.rip) {
                let mut cpu = Cpu::new(regs, sregs, &mut ram);
                let _ = execute(&mut cpu, &instruction);
            }
        }
    }
}

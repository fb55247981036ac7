//! Instructions that KVM's emulator refuses, executed as the processor would. A fix-up works on a
//! copy of the registers and reaches the rest through `Platform`; `vcpu/fixup.rs` takes the result
//! or the fault when the instruction has ended. On the vCPU's thread.

mod access;
mod bits;
mod cpu;
mod descriptor;
mod interrupt;
mod sse;
mod stack;
mod system;
mod walk;
mod x87;
mod xsave;

use std::collections::BTreeMap;

use iced_x86::{Code, Instruction, Mnemonic};

pub(crate) use cpu::{Cpu, Done, Fault, Flow, Platform, RF, Stop, TF};

use crate::sync::{Mutex, rank};
use cpu::{OF, UD, fault, mask};

/// How often each instruction was executed here, by mnemonic. What a machine's vCPUs share.
#[derive(Debug, Default)]
pub struct Counts(Mutex<BTreeMap<&'static str, u64>, rank::FixupCounts>);

impl Counts {
    pub(crate) fn add(&self, mnemonic: Mnemonic) {
        *self.0.lock().entry(name(mnemonic)).or_default() += 1;
    }

    /// Reset all counts.
    pub(crate) fn clear(&self) {
        self.0.lock().clear();
    }

    /// The counts so far.
    #[must_use]
    pub fn all(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().clone()
    }
}

/// Execute an instruction on a copy of the processor. What it says of memory is done when it
/// returns.
pub(crate) fn execute(cpu: &mut Cpu<'_>, instruction: &Instruction) -> Done<Flow> {
    if instruction.has_lock_prefix() && instruction.code() != Code::Cmpxchg16b_m128 {
        return fault(UD);
    }
    let flow = match instruction.mnemonic() {
        Mnemonic::Int => cpu.interrupt(instruction.immediate8(), instruction.next_ip(), true)?,
        Mnemonic::Int3 => cpu.interrupt(3, instruction.next_ip(), true)?,
        Mnemonic::Int1 => cpu.interrupt(1, instruction.next_ip(), false)?,
        Mnemonic::Into if cpu.regs.rflags & OF != 0 => {
            cpu.interrupt(4, instruction.next_ip(), true)?
        }
        Mnemonic::Into => Flow::Next,
        mnemonic if bits::name(mnemonic).is_some() => bits::execute(cpu, instruction)?,
        mnemonic if sse::name(mnemonic).is_some() => sse::execute(cpu, instruction)?,
        mnemonic if x87::name(mnemonic).is_some() => x87::execute(cpu, instruction)?,
        mnemonic if xsave::name(mnemonic).is_some() => xsave::execute(cpu, instruction)?,
        _ => system::execute(cpu, instruction)?,
    };
    if flow == Flow::Next {
        let width = if cpu.is_64_bit() { 8 } else { 4 };
        cpu.regs.rip = instruction.next_ip() & mask(width);
        cpu.regs.rflags &= !RF;
    }
    Ok(flow)
}

/// The name of an instruction in a table of those that are executed.
fn named(table: &[(Mnemonic, &'static str)], mnemonic: Mnemonic) -> Option<&'static str> {
    table.iter().find(|(known, _)| *known == mnemonic).map(|(_, name)| *name)
}

/// The name of an instruction that has a fix-up, as its manual has it.
fn name(mnemonic: Mnemonic) -> &'static str {
    match mnemonic {
        Mnemonic::Int => "int",
        Mnemonic::Int1 => "int1",
        Mnemonic::Int3 => "int3",
        Mnemonic::Into => "into",
        other => [bits::name, sse::name, x87::name, xsave::name, system::name]
            .iter()
            .find_map(|name| name(other))
            .unwrap_or("other"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::debug::{bitness, decode};
    use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
    use proptest::prelude::*;

    /// Memory from address 0 on, and a little state.
    pub(crate) struct Ram {
        pub(crate) bytes: Vec<u8>,
        pub(crate) xsave: Vec<u8>,
    }

    impl Ram {
        pub(crate) fn new(size: usize) -> Self {
            Self { bytes: vec![0; size], xsave: vec![0; 4096] }
        }

        pub(crate) fn put(&mut self, at: usize, data: &[u8]) {
            self.bytes[at..at + data.len()].copy_from_slice(data);
        }

        pub(crate) fn u32(&self, at: usize) -> u32 {
            u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
        }

        fn range(&self, address: u64, length: usize) -> Option<std::ops::Range<usize>> {
            let start = usize::try_from(address).ok()?;
            let end = start.checked_add(length)?;
            (end <= self.bytes.len()).then_some(start..end)
        }
    }

    impl Platform for Ram {
        fn read(&mut self, address: u64, data: &mut [u8]) -> bool {
            let Some(range) = self.range(address, data.len()) else { return false };
            data.copy_from_slice(&self.bytes[range]);
            true
        }

        fn write(&mut self, address: u64, data: &[u8]) -> bool {
            let Some(range) = self.range(address, data.len()) else { return false };
            self.bytes[range].copy_from_slice(data);
            true
        }

        fn set_bits(&mut self, address: u64, size: u64, old: u64, bits: u64) -> bool {
            let size = usize::try_from(size).unwrap();
            let mut now = [0; 8];
            self.read(address, &mut now[..size])
                && u64::from_le_bytes(now) == old
                && self.write(address, &(old | bits).to_le_bytes()[..size])
        }

        fn msr(&mut self, index: u32) -> Option<u64> {
            (index != 0xda0).then_some(u64::from(index))
        }

        fn xcr0(&mut self) -> Option<u64> {
            Some(7)
        }

        fn xsave(&mut self) -> Option<Vec<u8>> {
            Some(self.xsave.clone())
        }

        fn set_xsave(&mut self, image: &[u8]) -> bool {
            self.xsave = image.to_vec();
            true
        }

        fn exchange(&mut self, address: u64, old: u128, new: u128) -> Option<u128> {
            let mut found = [0; 16];
            self.read(address, &mut found).then_some(())?;
            let found = u128::from_le_bytes(found);
            if found == old {
                self.write(address, &new.to_le_bytes()).then_some(())?;
            }
            Some(found)
        }

        fn flush_translations(&mut self) -> bool {
            true
        }
    }

    pub(crate) fn flat(dpl: u8, type_: u8, selector: u16) -> kvm_segment {
        kvm_segment {
            selector,
            limit: u32::MAX,
            type_,
            dpl,
            db: 1,
            present: 1,
            s: 1,
            ..Default::default()
        }
    }

    /// Protected mode of 32 bits without paging, in a ring.
    pub(crate) fn protected(ring: u8) -> kvm_sregs {
        let data = flat(ring, 3, 0x20 | u16::from(ring));
        kvm_sregs {
            cs: flat(ring, 11, 0x18 | u16::from(ring)),
            ss: data,
            ds: data,
            es: data,
            cr0: 0x33,
            ..Default::default()
        }
    }

    /// Execute some bytes at 0x1000; the registers after it.
    pub(crate) fn run(
        ram: &mut Ram,
        regs: kvm_regs,
        sregs: kvm_sregs,
        code: &[u8],
    ) -> Done<(kvm_regs, kvm_sregs)> {
        let regs = kvm_regs { rip: 0x1000, ..regs };
        let instruction = decode(code, bitness(&sregs), regs.rip).unwrap();
        let mut cpu = Cpu { regs, sregs, platform: ram };
        execute(&mut cpu, &instruction)?;
        Ok((cpu.regs, cpu.sregs))
    }

    #[test]
    fn a_lock_prefix_where_none_may_be_is_undefined() {
        let mut ram = Ram::new(0x2000);
        let popcnt = [0xf0, 0xf3, 0x0f, 0xb8, 0x03];
        // The decoder refuses it already.
        assert_eq!(decode(&popcnt, 32, 0), None);
        let regs = kvm_regs::default();
        let popcnt = [0xf3, 0x0f, 0xb8, 0xc3];
        let (after, _) = run(&mut ram, kvm_regs { rbx: 7, ..regs }, protected(0), &popcnt).unwrap();
        assert_eq!((after.rax, after.rip), (3, 0x1004));
    }

    #[test]
    fn counts_are_kept_by_name() {
        let counts = Counts::default();
        for mnemonic in
            [Mnemonic::Int3, Mnemonic::Int3, Mnemonic::Wait, Mnemonic::Popcnt, Mnemonic::Verw]
        {
            counts.add(mnemonic);
        }
        let all = counts.all();
        assert_eq!(all, BTreeMap::from([("int3", 2), ("fwait", 1), ("popcnt", 1), ("verw", 1)]));
    }

    /// Two pages of bytes that a seed decides (xorshift).
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

    /// Bytes that reach the fix-ups more often than any bytes do.
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
            Just(vec![0xd9]),
            Just(vec![0xdb]),
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
            let mut ram = Ram { bytes: noise(seed), xsave: vec![rax.to_le_bytes()[0]; 4096] };
            if let Some(instruction) = decode(&code, bitness(&sregs), regs.rip) {
                let mut cpu = Cpu { regs, sregs, platform: &mut ram };
                let _ = execute(&mut cpu, &instruction);
            }
        }
    }
}

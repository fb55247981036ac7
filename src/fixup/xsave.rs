//! XGETBV and the XSAVE family (Intel SDM volume 1, chapter 13). KVM provides the state in the
//! standard format of XSAVE. CPUID gives the position and length of each component.

use iced_x86::{Instruction, Mnemonic};

use super::area::{
    CONTROL, ComponentArea, HEADER, HEADER_END, MXCSR, MXCSR_MASK, SSE, X87, area_end, areas,
    compact_areas, get, in_use, put,
};
use super::cpu::{Cpu, Done, Flow, Stop, fault, fault_with, mask};
use crate::x86::{CR0_TS, CR4_OSXSAVE, GP, NM, UD};

const IA32_XSS: u32 = 0xda0;
const AVX: u64 = 4;
const COMPACT: u64 = 1 << 63;

/// The instructions executed here, with their names.
const TABLE: [(Mnemonic, &str); 13] = [
    (Mnemonic::Xgetbv, "xgetbv"),
    (Mnemonic::Xsave, "xsave"),
    (Mnemonic::Xsave64, "xsave64"),
    (Mnemonic::Xsaveopt, "xsaveopt"),
    (Mnemonic::Xsaveopt64, "xsaveopt64"),
    (Mnemonic::Xsavec, "xsavec"),
    (Mnemonic::Xsavec64, "xsavec64"),
    (Mnemonic::Xsaves, "xsaves"),
    (Mnemonic::Xsaves64, "xsaves64"),
    (Mnemonic::Xrstor, "xrstor"),
    (Mnemonic::Xrstor64, "xrstor64"),
    (Mnemonic::Xrstors, "xrstors"),
    (Mnemonic::Xrstors64, "xrstors64"),
];

pub(super) fn name(mnemonic: Mnemonic) -> Option<&'static str> {
    super::cpu::named(&TABLE, mnemonic)
}

pub(super) fn execute(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<Flow> {
    match i.mnemonic() {
        Mnemonic::Xgetbv => {
            check_xsave(cpu, false)?;
            let value = match cpu.regs.rcx & mask(4) {
                0 => cpu.platform.xcr0().ok_or(Stop::Unknown)?,
                // The components of XCR0 that are in use.
                1 => cpu.platform.xcr0().ok_or(Stop::Unknown)? & in_use(&image(cpu)?)?,
                _ => return fault_with(GP, 0),
            };
            (cpu.regs.rax, cpu.regs.rdx) = (value & mask(4), value >> 32);
        }
        Mnemonic::Xrstor | Mnemonic::Xrstor64 | Mnemonic::Xrstors | Mnemonic::Xrstors64 => {
            restore(cpu, i)?;
        }
        _ => save(cpu, i)?,
    }
    Ok(Flow::Next)
}

pub(super) fn image(cpu: &mut Cpu<'_>) -> Done<Vec<u8>> {
    cpu.platform.xsave().filter(|image| image.len() >= HEADER_END).ok_or(Stop::Unknown)
}

/// Set a changed image with these components.
pub(super) fn set_image(cpu: &mut Cpu<'_>, mut image: Vec<u8>, components: u64) -> Done<()> {
    let now = in_use(&image)? | components;
    put(&mut image, HEADER, 8, now)?;
    if cpu.platform.set_xsave(&image) { Ok(()) } else { Err(Stop::Unknown) }
}

pub(super) fn check_mxcsr(image: &[u8], value: u64) -> Done<()> {
    let allowed = match get(image, MXCSR_MASK, 4)? {
        0 => 0xffbf,
        mask => mask,
    };
    if value & !allowed != 0 { fault_with(GP, 0) } else { Ok(()) }
}

fn check_xsave(cpu: &Cpu<'_>, is_using: bool) -> Done<()> {
    if cpu.sregs.cr4 & CR4_OSXSAVE == 0 {
        return fault(UD);
    }
    if is_using && cpu.sregs.cr0 & CR0_TS != 0 { fault(NM) } else { Ok(()) }
}

/// The requested components, after the checks that saving and restoring share. `is_supervisor`:
/// whether supervisor state is included.
fn requested(cpu: &mut Cpu<'_>, i: &Instruction, is_supervisor: bool) -> Done<u64> {
    check_xsave(cpu, true)?;
    if is_supervisor {
        if cpu.cpl() != 0 {
            return fault_with(GP, 0);
        }
        if cpu.platform.msr(IA32_XSS).is_some_and(|xss| xss != 0) {
            return Err(Stop::Unknown);
        }
    }
    let offset = cpu.offset(i, 0)?;
    let linear = cpu.linear(i.memory_segment(), offset, 1, false)?;
    if linear % 64 != 0 {
        return fault_with(GP, 0);
    }
    let wanted = cpu.regs.rax & mask(4) | (cpu.regs.rdx & mask(4)) << 32;
    Ok(cpu.platform.xcr0().ok_or(Stop::Unknown)? & wanted)
}

fn is_wide(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Xsave64
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec64
            | Mnemonic::Xsaves64
            | Mnemonic::Xrstor64
            | Mnemonic::Xrstors64
    )
}

fn save(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let (is_compact, is_supervisor) = match i.mnemonic() {
        Mnemonic::Xsavec | Mnemonic::Xsavec64 => (true, false),
        Mnemonic::Xsaves | Mnemonic::Xsaves64 => (true, true),
        _ => (false, false),
    };
    let components = requested(cpu, i, is_supervisor)?;
    let image = image(cpu)?;
    let mut used = in_use(&image)?;
    if is_compact && get(&image, MXCSR, 4)? != 0x1f80 {
        used |= SSE;
    }
    let end = area_end(components, is_compact);
    // Memory of components that are not saved does not change.
    let mut area = vec![0; end];
    cpu.check_write(i, 0, end)?;
    cpu.read_operand(i, 0, &mut area)?;
    // Only XSAVE itself writes components that are in their initial state.
    let is_all = matches!(i.mnemonic(), Mnemonic::Xsave | Mnemonic::Xsave64);
    let written = if is_all { components } else { components & used };
    save_legacy(&mut area, &image, written, is_wide(i.mnemonic()))?;
    if components & (SSE | AVX) != 0 && !is_compact || written & SSE != 0 {
        put(&mut area, MXCSR, 8, get(&image, MXCSR, 8)?)?;
    }
    if is_compact {
        save_compact(&mut area, &image, components, used)?;
    } else {
        for place in areas(written) {
            copy(&mut area, place.offset, &image, place.offset, place.size)?;
        }
        let before = get(&area, HEADER, 8)?;
        put(&mut area, HEADER, 8, before & !components | used & components)?;
    }
    cpu.write_operand(i, 0, &area)
}

/// Write the components that are in use, and the header of the compact format.
fn save_compact(area: &mut [u8], image: &[u8], components: u64, used: u64) -> Done<()> {
    for (place, at) in compact_areas(components) {
        if used >> place.number & 1 != 0 {
            copy(area, at, image, place.offset, place.size)?;
        }
    }
    put(area, HEADER, 8, components & used)?;
    put(area, HEADER + 8, 8, components | COMPACT)?;
    area.get_mut(HEADER + 16..HEADER_END).ok_or(Stop::Unknown)?.fill(0);
    Ok(())
}

fn copy(to: &mut [u8], to_at: usize, from: &[u8], from_at: usize, size: usize) -> Done<()> {
    let from = from_at.checked_add(size).and_then(|end| from.get(from_at..end));
    let to = to_at.checked_add(size).and_then(|end| to.get_mut(to_at..end));
    match (to, from) {
        (Some(to), Some(from)) => to.copy_from_slice(from),
        _ => return Err(Stop::Unknown),
    }
    Ok(())
}

fn save_legacy(area: &mut [u8], image: &[u8], written: u64, is_wide: bool) -> Done<()> {
    if written & X87 != 0 {
        copy(area, 0, image, 0, MXCSR)?;
        copy(area, 32, image, 32, 128)?;
        if !is_wide {
            // The selectors, which current processors save as zero.
            put(area, 12, 4, 0)?;
            put(area, 20, 4, 0)?;
        }
    }
    if written & SSE != 0 {
        copy(area, 160, image, 160, 256)?;
    }
    Ok(())
}

fn restore(cpu: &mut Cpu<'_>, i: &Instruction) -> Done<()> {
    let is_supervisor = matches!(i.mnemonic(), Mnemonic::Xrstors | Mnemonic::Xrstors64);
    let components = requested(cpu, i, is_supervisor)?;
    let enabled = cpu.platform.xcr0().ok_or(Stop::Unknown)?;
    let mut area = vec![0; HEADER_END];
    cpu.read_operand(i, 0, &mut area)?;
    let (saved, format) = header(&area, enabled, is_supervisor)?;
    let is_compact = format & COMPACT != 0;
    let in_area = if is_compact { format & !COMPACT } else { components };
    area.resize(area_end(in_area, is_compact), 0);
    cpu.read_operand(i, 0, &mut area)?;
    let mut image = image(cpu)?;
    restore_legacy(&mut image, &area, components, saved, is_compact)?;
    let load =
        |image: &mut Vec<u8>, place: ComponentArea, at: usize| match saved >> place.number & 1 {
            0 => blank(image, place.offset, place.size),
            _ => copy(image, place.offset, &area, at, place.size),
        };
    if is_compact {
        for (place, at) in compact_areas(in_area).filter(|(p, _)| components >> p.number & 1 != 0) {
            load(&mut image, place, at)?;
        }
        // Components that are not in the area get their initial state.
        for place in areas(components & !in_area) {
            blank(&mut image, place.offset, place.size)?;
        }
    } else {
        for place in areas(components) {
            load(&mut image, place, place.offset)?;
        }
    }
    // Loaded components replace those in use; the others do not change.
    let used = in_use(&image)? & !components;
    put(&mut image, HEADER, 8, used)?;
    set_image(cpu, image, components)
}

/// The header of an area: its components and its format. Faults if the area cannot be restored.
fn header(area: &[u8], enabled: u64, is_supervisor: bool) -> Done<(u64, u64)> {
    let (saved, format) = (get(area, HEADER, 8)?, get(area, HEADER + 8, 8)?);
    let is_reserved_used =
        area.get(HEADER + 16..HEADER_END).is_none_or(|bytes| bytes.iter().any(|byte| *byte != 0));
    let is_wrong = match format & COMPACT != 0 {
        true => format & !COMPACT & !enabled != 0 || saved & !format != 0,
        false => saved & !enabled != 0 || format != 0 || is_supervisor,
    };
    if is_wrong || is_reserved_used { fault_with(GP, 0) } else { Ok((saved, format)) }
}

fn blank(image: &mut [u8], at: usize, size: usize) -> Done<()> {
    let end = at.checked_add(size).ok_or(Stop::Unknown)?;
    image.get_mut(at..end).ok_or(Stop::Unknown)?.fill(0);
    Ok(())
}

fn restore_legacy(
    image: &mut [u8],
    area: &[u8],
    components: u64,
    saved: u64,
    is_compact: bool,
) -> Done<()> {
    let is_loaded = |component: u64| saved & component != 0;
    let has_mxcsr = if is_compact { components & SSE } else { components & (SSE | AVX) } != 0;
    if has_mxcsr {
        let value = match is_compact && !is_loaded(SSE) {
            true => 0x1f80,
            false => get(area, MXCSR, 4)?,
        };
        check_mxcsr(image, value)?;
        put(image, MXCSR, 4, value)?;
    }
    if components & X87 != 0 {
        if is_loaded(X87) {
            copy(image, 0, area, 0, MXCSR)?;
            copy(image, 32, area, 32, 128)?;
        } else {
            blank(image, 0, MXCSR)?;
            blank(image, 32, 128)?;
            put(image, CONTROL, 2, 0x37f)?;
        }
    }
    if components & SSE != 0 {
        if is_loaded(SSE) {
            copy(image, 160, area, 160, 256)?;
        } else {
            blank(image, 160, 256)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixup::cpu::Fault;
    use crate::fixup::testing::{Ram, protected, run};
    use kvm_bindings::{kvm_regs, kvm_sregs};

    #[test]
    fn areas_that_cannot_be_restored_are_protection_faults() {
        let restore = [0x0f, 0xae, 0x2e]; // xrstor [esi]
        let regs = kvm_regs { rsi: 0x2000, rax: 7, ..Default::default() };
        let cases: [(usize, u64); 4] = [(512, 1 << 9), (520, 1), (528, 1), (520, COMPACT | 1 << 9)];
        for (at, value) in cases {
            let mut ram = Ram::new(0x4000);
            ram.put(0x2000 + at, &value.to_le_bytes());
            let sregs = kvm_sregs { cr4: CR4_OSXSAVE, ..protected(0) };
            assert_eq!(vector(run(&mut ram, regs, sregs, &restore)), Some(GP), "{at} {value:#x}");
        }
        let (mut ram, sregs) = (Ram::new(0x4000), protected(0));
        assert_eq!(vector(run(&mut ram, regs, sregs, &restore)), Some(UD), "CR4.OSXSAVE");
        let sregs = kvm_sregs { cr4: CR4_OSXSAVE, ..sregs };
        let odd = kvm_regs { rsi: 0x2020, ..regs };
        assert_eq!(vector(run(&mut ram, odd, sregs, &restore)), Some(GP), "alignment");
    }

    fn vector(result: Done<(kvm_regs, kvm_sregs)>) -> Option<u8> {
        match result {
            Err(Stop::Fault(Fault { vector, .. })) => Some(vector),
            _ => None,
        }
    }
}

//! The extended state as XSAVE lays it out in memory: its fields, and the place of each component
//! (Intel SDM volume 1, chapter 13). Pure data.

use std::sync::OnceLock;

use super::stop::{Done, Stop};

pub(super) const CONTROL: usize = 0;
pub(super) const MXCSR: usize = 24;
pub(super) const MXCSR_MASK: usize = 28;
pub(super) const HEADER: usize = 512;
pub(super) const HEADER_END: usize = 576;
pub(super) const X87: u64 = 1;
pub(super) const SSE: u64 = 2;

pub(super) fn get(image: &[u8], at: usize, size: usize) -> Done<u64> {
    let field = at.checked_add(size).and_then(|end| image.get(at..end)).ok_or(Stop::Unknown)?;
    let mut bytes = [0; 8];
    bytes.iter_mut().zip(field).for_each(|(to, from)| *to = *from);
    Ok(u64::from_le_bytes(bytes))
}

pub(super) fn put(image: &mut [u8], at: usize, size: usize, value: u64) -> Done<()> {
    let field = at.checked_add(size).and_then(|end| image.get_mut(at..end)).ok_or(Stop::Unknown)?;
    field.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    Ok(())
}

/// The components that are not in their initial state.
pub(super) fn in_use(image: &[u8]) -> Done<u64> {
    get(image, HEADER, 8)
}

/// The position and length of a component in the standard format, and whether it is aligned to 64
/// bytes in the compact one.
#[derive(Clone, Copy, Debug)]
pub(super) struct ComponentArea {
    pub(super) number: u32,
    pub(super) offset: usize,
    pub(super) size: usize,
    pub(super) is_aligned: bool,
}

/// The components from AVX on that are in `which`, as on this processor.
pub(super) fn areas(which: u64) -> impl Iterator<Item = ComponentArea> {
    // CPUID traps in a virtual machine.
    static AREAS: OnceLock<Vec<ComponentArea>> = OnceLock::new();
    let all = AREAS.get_or_init(|| (2..63).map(area).collect());
    all.iter().copied().filter(move |area| which >> area.number & 1 != 0)
}

fn area(number: u32) -> ComponentArea {
    let leaf = std::arch::x86_64::__cpuid_count(0xd, number);
    let to_usize = |value: u32| usize::try_from(value).unwrap_or(0);
    let (size, offset) = (to_usize(leaf.eax), to_usize(leaf.ebx));
    ComponentArea { number, offset, size, is_aligned: leaf.ecx & 2 != 0 }
}

/// The position of a component in the standard format. None if this processor does not have it.
pub(super) fn component(number: u32) -> Option<usize> {
    areas(1 << number).next().filter(|area| area.size > 0).map(|area| area.offset)
}

/// The same in the compact format, for an area with these components.
pub(super) fn compact_areas(which: u64) -> impl Iterator<Item = (ComponentArea, usize)> {
    areas(which).scan(HEADER_END, |next, place| {
        let at = if place.is_aligned { next.next_multiple_of(64) } else { *next };
        *next = at + place.size;
        Some((place, at))
    })
}

/// The end of an area with these components.
pub(super) fn area_end(components: u64, is_compact: bool) -> usize {
    let ends: Vec<usize> = if is_compact {
        compact_areas(components).map(|(place, at)| at + place.size).collect()
    } else {
        areas(components).map(|place| place.offset + place.size).collect()
    };
    ends.into_iter().max().unwrap_or(0).max(HEADER_END)
}

//! A slot's RAM as its machine uses it, and the two things a snapshot needs of it: freeze it without a copy, and
//! bring an image back. The caller keeps the guest at rest; host threads may write at any time.

use std::fs::File;
use std::sync::Arc;

use super::image::{Image, Layer, copy_to, memfd};
use super::pagemap::{self, Range};
use crate::error::Result;
use crate::vm::layout::PAGE;

/// More runs of changed pages than this are joined, with pages between them that have not changed: each run is one
/// mapping of every fork, and the kernel allows a process 65,530.
const MOST_RUNS: usize = 256;
/// A reset puts another mapping in place instead of copying this part of the memory, or more.
const REMAP_ABOVE: u64 = 4;
/// Resets in a row after which written pages that stay the same are given back,
const IDLE_RESETS: u32 = 8;
/// if there are more of them than this and than eight times those that change.
const IDLE_PAGES: u64 = 1024;

/// RAM at an address of this process.
#[derive(Debug)]
pub(crate) struct Ram {
    host: u64,
    size: u64,
    under: Under,
    idle_resets: u32,
}

/// What stands under the mapping.
#[derive(Debug)]
enum Under {
    /// A memfd that nobody else has, mapped shared.
    Own(Arc<File>),
    /// Private pages over an image.
    Copy {
        /// What is mapped.
        mapped: Image,
        /// What the pages are compared with: the last snapshot or reset.
        last: Image,
    },
}

impl Ram {
    /// RAM that is this memfd, mapped shared at `host`.
    pub(crate) fn own(host: u64, size: u64, file: Arc<File>) -> Self {
        Self { host, size, under: Under::Own(file), idle_resets: 0 }
    }

    /// RAM over a private mapping of an image.
    pub(crate) fn over(host: u64, image: Image) -> Self {
        let under = Under::Copy { mapped: image.clone(), last: image.clone() };
        Self { host, size: image.size(), under, idle_resets: 0 }
    }

    /// What it holds now, for good. The machine goes on with private copies of what it writes.
    ///
    /// # Errors
    /// When a descriptor, memory or a mapping is missing; the RAM holds what it held.
    pub(crate) fn freeze(&mut self) -> Result<Image> {
        match &mut self.under {
            Under::Own(file) => {
                let layer = Layer::of_memfd(Arc::clone(file));
                let image = Image::whole(self.size, Arc::clone(&layer));
                // SAFETY: the mapping is this RAM's. It is replaced in one step by the same bytes: an access from
                // another thread finds one or the other.
                unsafe { image.map_over(self.host)? };
                self.under = Under::Copy { mapped: image.clone(), last: image.clone() };
                layer.seal()?;
                Ok(image)
            }
            Under::Copy { mapped, last } => {
                let maybe = union(pagemap::written(self.host, self.size)?, mapped.differing(last));
                let found = compare(self.host, last, &maybe)?;
                if found.other.is_empty() {
                    return Ok(last.clone());
                }
                let changed = joined(found.other);
                let file = memfd(self.size)?;
                changed.iter().try_for_each(|range| copy_to(&file, self.host, *range))?;
                *last = last.overlaid(&changed, &Layer::sealed(file)?);
                Ok(last.clone())
            }
        }
    }

    /// Have it hold an image of its size again; the ranges that were changed for it.
    ///
    /// # Errors
    /// When memory or a mapping is missing: then it holds some of both. Another reset can still bring it back.
    pub(crate) fn reset(&mut self, image: &Image) -> Result<Vec<Range>> {
        image.check()?;
        let Under::Copy { mapped, last } = &mut self.under else {
            return self.replace(image, vec![(0, self.size)]);
        };
        let (written, elsewhere) =
            (pagemap::written(self.host, self.size)?, mapped.differing(image));
        if bytes(&elsewhere) > self.size / REMAP_ABOVE {
            return self.replace(image, union(written, elsewhere));
        }
        let maybe = union(written, elsewhere.clone());
        let found = compare(self.host, image, &maybe)?;
        let golden = image.mapping()?.as_ptr() as u64;
        found.other.iter().for_each(|range| copy(golden, self.host, *range));
        *last = image.clone();
        let (same, other) = (bytes(&found.same), bytes(&found.other));
        let is_idle = same > (IDLE_PAGES * PAGE).max(8 * other);
        self.idle_resets = if is_idle { self.idle_resets + 1 } else { 0 };
        if self.idle_resets > IDLE_RESETS && elsewhere.is_empty() {
            found.same.iter().for_each(|range| give_back(self.host, *range));
            self.idle_resets = 0;
        }
        Ok(found.other)
    }

    fn replace(&mut self, image: &Image, changed: Vec<Range>) -> Result<Vec<Range>> {
        // SAFETY: the mapping is this RAM's, and its bytes are to be those of the image.
        unsafe { image.map_over(self.host)? };
        self.under = Under::Copy { mapped: image.clone(), last: image.clone() };
        Ok(changed)
    }
}

/// What a comparison found: pages that are as in the image, and others.
struct Found {
    same: Vec<Range>,
    other: Vec<Range>,
}

fn compare(host: u64, image: &Image, ranges: &[Range]) -> Result<Found> {
    let (mut same, mut other) = (Vec::new(), Vec::new());
    if ranges.is_empty() {
        return Ok(Found { same, other });
    }
    let golden = image.mapping()?.as_ptr() as u64;
    for (start, end) in ranges {
        let mut at = *start;
        while at < *end {
            let page = (at, at + PAGE);
            pagemap::push(if is_same(golden, host, page) { &mut same } else { &mut other }, page);
            at += PAGE;
        }
    }
    Ok(Found { same, other })
}

fn pointer(base: u64, offset: u64) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(usize::try_from(base + offset).unwrap_or(0))
}

fn length(range: Range) -> usize {
    usize::try_from(range.1 - range.0).unwrap_or(0)
}

fn is_same(a: u64, b: u64, range: Range) -> bool {
    // SAFETY: both mappings have these bytes, as the callers' ranges lie in both. They are of no Rust object: a thread
    // that writes them meanwhile makes the answer old, not wrong.
    unsafe { libc::memcmp(pointer(a, range.0), pointer(b, range.0), length(range)) == 0 }
}

fn copy(from: u64, to: u64, range: Range) {
    // SAFETY: as above; two mappings, which do not overlap.
    unsafe { libc::memcpy(pointer(to, range.0), pointer(from, range.0), length(range)) };
}

/// Let the private copies go: the image's pages show again.
fn give_back(host: u64, range: Range) {
    // SAFETY: a part of the private mapping of this RAM, whose pages are as those under it. That a kernel refuses it
    // changes nothing.
    unsafe { libc::madvise(pointer(host, range.0), length(range), libc::MADV_DONTNEED) };
}

/// Bytes of these ranges.
pub(crate) fn bytes(ranges: &[Range]) -> u64 {
    ranges.iter().map(|(start, end)| end - start).sum()
}

/// The ranges of both lists, each of which is sorted and without overlap.
fn union(mut a: Vec<Range>, b: Vec<Range>) -> Vec<Range> {
    if b.is_empty() {
        return a;
    }
    a.extend(b);
    a.sort_unstable();
    let mut all: Vec<Range> = Vec::new();
    for range in a {
        match all.last_mut() {
            Some(last) if range.0 <= last.1 => last.1 = last.1.max(range.1),
            _ => all.push(range),
        }
    }
    all
}

/// At most [`MOST_RUNS`] runs that cover these.
pub(crate) fn joined(mut ranges: Vec<Range>) -> Vec<Range> {
    let mut gap = PAGE;
    while ranges.len() > MOST_RUNS {
        let mut fewer: Vec<Range> = Vec::new();
        for range in ranges {
            match fewer.last_mut() {
                Some(last) if range.0 - last.1 <= gap => last.1 = range.1,
                _ => fewer.push(range),
            }
        }
        (ranges, gap) = (fewer, gap * 2);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{FileOffset, MmapRegion};

    const PAGES: u64 = 64;

    /// RAM and its mapping.
    fn ram() -> (Ram, MmapRegion) {
        let file = FileOffset::new(memfd(PAGES * PAGE).unwrap(), 0);
        let memfd = Arc::clone(file.arc());
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let size = usize::try_from(PAGES * PAGE).unwrap();
        let mapping = MmapRegion::build(Some(file), size, access, libc::MAP_SHARED).unwrap();
        (Ram::own(mapping.as_ptr() as u64, PAGES * PAGE, memfd), mapping)
    }

    fn set(mapping: &MmapRegion, page: u64, value: u8) {
        let at = usize::try_from(page * PAGE).unwrap();
        // SAFETY: a byte of the mapping.
        unsafe { mapping.as_ptr().add(at).write_volatile(value) };
    }

    fn all(mapping: &MmapRegion) -> Vec<u8> {
        let at = |page: u64| usize::try_from(page * PAGE).unwrap();
        // SAFETY: bytes of the mapping.
        (0..PAGES).map(|page| unsafe { mapping.as_ptr().add(at(page)).read_volatile() }).collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(u64, u8),
        Freeze,
        Reset(usize),
        Fork(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..PAGES, 0u8..4).prop_map(|(page, value)| Step::Set(page, value)),
            1 => Just(Step::Freeze),
            1 => (0usize..8).prop_map(Step::Reset),
            1 => (0usize..8).prop_map(Step::Fork),
        ];
        prop::collection::vec(step, 1..60)
    }

    proptest! {
        #[test]
        fn snapshots_and_resets_agree_with_copies(steps in steps()) {
            let mut machines = vec![ram()];
            let mut images: Vec<(Image, Vec<u8>)> = Vec::new();
            for step in steps {
                let last = machines.len() - 1;
                match step {
                    Step::Set(page, value) => {
                        let at = usize::from(value) % machines.len();
                        set(&machines[at].1, page, value);
                    }
                    Step::Freeze => {
                        let held = all(&machines[last].1);
                        let image = machines[last].0.freeze().unwrap();
                        prop_assert_eq!(&all(&machines[last].1), &held);
                        images.push((image, held));
                    }
                    Step::Reset(which) => if let Some((image, held)) = images.get(which) {
                        let before = all(&machines[last].1);
                        let changed = bytes(&machines[last].0.reset(image).unwrap()) / PAGE;
                        prop_assert_eq!(&all(&machines[last].1), held);
                        let differ = before.iter().zip(held).filter(|(a, b)| a != b).count() as u64;
                        prop_assert!(changed >= differ);
                    },
                    Step::Fork(which) => if let Some((image, held)) = images.get(which) {
                        let mapping = image.map().unwrap();
                        prop_assert_eq!(&all(&mapping), held);
                        machines.push((Ram::over(mapping.as_ptr() as u64, image.clone()), mapping));
                    },
                }
            }
            for (image, held) in &images {
                prop_assert_eq!(&all(image.mapping().unwrap()), held, "an image never changes");
            }
        }

        #[test]
        fn joined_ranges_cover_all_and_are_few(pages in prop::collection::btree_set(0u64..100_000, 0..4000)) {
            let mut ranges = Vec::new();
            pages.iter().for_each(|page| pagemap::push(&mut ranges, (page * PAGE, (page + 1) * PAGE)));
            let fewer = joined(ranges.clone());
            prop_assert!(fewer.len() <= MOST_RUNS);
            let covers = |range: &Range| fewer.iter().any(|f| f.0 <= range.0 && range.1 <= f.1);
            prop_assert!(ranges.iter().all(covers));
        }
    }

    #[test]
    fn a_reset_copies_what_was_written_and_no_more() {
        let (mut ram, mapping) = ram();
        (0..PAGES).for_each(|page| set(&mapping, page, 9));
        let image = ram.freeze().unwrap();
        assert!(ram.reset(&image).unwrap().is_empty());
        [3, 4, 60].into_iter().for_each(|page| set(&mapping, page, 1));
        set(&mapping, 5, 9); // written, and the same
        let expected = [(3 * PAGE, 5 * PAGE), (60 * PAGE, 61 * PAGE)];
        assert_eq!(ram.reset(&image).unwrap(), expected);
        assert!(ram.reset(&image).unwrap().is_empty());
    }

    #[test]
    fn a_second_snapshot_stores_only_what_changed() {
        let (mut ram, mapping) = ram();
        (0..PAGES).for_each(|page| set(&mapping, page, 9));
        let first = ram.freeze().unwrap();
        set(&mapping, 7, 1);
        let second = ram.freeze().unwrap();
        assert_eq!(second.differing(&first), [(7 * PAGE, 8 * PAGE)]);
        assert_eq!(second.layers().iter().map(|layer| layer.allocated()).sum::<u64>(), 65 * PAGE);
        assert!(ram.freeze().unwrap().is(&second), "nothing has changed since");
    }
}

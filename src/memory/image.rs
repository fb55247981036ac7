//! The contents of a range of guest memory at a snapshot: runs of pages, each in an immutable
//! layer. Machines map them copy-on-write. Any thread.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::layer::Layer;
use super::mapping::{Mapping, part};
use super::ranges::{self, ByteRange};
use crate::error::{Error, ErrorKind, Result};
use crate::process::OnceBox;

/// A run of pages in one layer, or of zeros.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its place in the image.
    pub(crate) range: ByteRange,
    /// None for zeros.
    pub(crate) layer: Option<Arc<Layer>>,
    /// Its offset in the layer.
    pub(crate) offset: u64,
}

impl Run {
    /// The part of it that lies in a range.
    fn part(&self, (start, end): ByteRange) -> Option<Self> {
        let range = (self.range.0.max(start), self.range.1.min(end));
        let offset = self.offset + (range.0.saturating_sub(self.range.0));
        (range.0 < range.1).then(|| Self { range, layer: self.layer.clone(), offset })
    }

    /// Whether both show the same layer at the same offset.
    fn is_as(&self, other: &Self) -> bool {
        match (&self.layer, &other.layer) {
            (None, None) => true,
            (Some(a), Some(b)) => {
                Arc::ptr_eq(a, b)
                    && self.offset.wrapping_sub(self.range.0)
                        == other.offset.wrapping_sub(other.range.0)
            }
            _ => false,
        }
    }

    /// Map it at its place in a region: private pages over the layer's, or zeros.
    fn map_in(&self, region: &MmapRegion, access: libc::c_int) -> Result<()> {
        let place = part(region, self.range)?;
        let start = place.ptr_guard_mut();
        let (flags, fd, offset) = match &self.layer {
            Some(layer) => (FLAGS, layer.file().as_raw_fd(), self.offset),
            None => (FLAGS | libc::MAP_ANONYMOUS, -1, 0),
        };
        let offset = i64::try_from(offset).unwrap_or(i64::MAX);
        // SAFETY: the slice is part of a region of guest memory, or of one made for this image. No
        // Rust reference to its bytes exists, and `part` has checked that it ends within the
        // region, so no other mapping is replaced.
        let mapped =
            unsafe { libc::mmap(start.as_ptr().cast(), place.len(), access, flags, fd, offset) };
        if mapped == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            return Err(Error::os(ErrorKind::Memory, "mmap of a snapshot", &error));
        }
        Ok(())
    }
}

const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// The contents of one range of guest memory at a snapshot. Clones share them.
#[derive(Clone, Debug)]
pub struct Image(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    size: u64,
    /// By address, without gaps.
    runs: Vec<Run>,
    /// A mapping for comparing and copying, created at first use.
    mapping: OnceBox<MmapRegion>,
}

impl Image {
    /// An image of these runs, which cover `size` bytes from zero without gaps.
    pub(crate) fn new(size: u64, runs: Vec<Run>) -> Self {
        Self(Arc::new(Inner { size, runs, mapping: OnceBox::new() }))
    }

    /// An image whose pages are all in one layer, at the same offsets.
    pub(crate) fn whole(size: u64, layer: Arc<Layer>) -> Self {
        Self::new(size, vec![Run { range: (0, size), layer: Some(layer), offset: 0 }])
    }

    pub(crate) fn size(&self) -> u64 {
        self.0.size
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.0.runs
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The layers under it, each once.
    pub(crate) fn layers(&self) -> Vec<&Arc<Layer>> {
        let mut layers: Vec<&Arc<Layer>> = Vec::new();
        for layer in self.0.runs.iter().filter_map(|run| run.layer.as_ref()) {
            if !layers.iter().any(|known| Arc::ptr_eq(known, layer)) {
                layers.push(layer);
            }
        }
        layers
    }

    /// # Errors
    /// [`ErrorKind::Snapshot`] if a file behind it has been changed.
    pub(crate) fn check(&self) -> Result<()> {
        self.layers().into_iter().try_for_each(|layer| layer.check())
    }

    /// The runs of a part of it.
    pub(crate) fn parts(&self, range: ByteRange) -> impl Iterator<Item = Run> + '_ {
        let first = self.0.runs.partition_point(|run| run.range.1 <= range.0);
        self.0.runs.iter().skip(first).map_while(move |run| run.part(range))
    }

    /// The image with some ranges (sorted by address) replaced by another layer, at the same
    /// offsets.
    pub(crate) fn overlaid(&self, changed: &[ByteRange], layer: &Arc<Layer>) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        let mut at = 0;
        for range in changed {
            runs.extend(self.parts((at, range.0)));
            runs.push(Run { range: *range, layer: Some(Arc::clone(layer)), offset: range.0 });
            at = range.1;
        }
        runs.extend(self.parts((at, self.0.size)));
        Self::new(self.0.size, runs)
    }

    /// The ranges in which two images have different layers, so that their pages may differ.
    pub(crate) fn differing(&self, other: &Self) -> Vec<ByteRange> {
        let mut differing = Vec::new();
        if self.is(other) {
            return differing;
        }
        let (mut ours, mut theirs) =
            (self.0.runs.iter().peekable(), other.0.runs.iter().peekable());
        while let (Some(a), Some(b)) = (ours.peek(), theirs.peek()) {
            let range = (a.range.0.max(b.range.0), a.range.1.min(b.range.1));
            if range.0 < range.1 && !a.is_as(b) {
                ranges::push(&mut differing, range);
            }
            let (next_ours, next_theirs) = (a.range.1 <= range.1, b.range.1 <= range.1);
            if next_ours {
                ours.next();
            }
            if next_theirs {
                theirs.next();
            }
        }
        differing
    }

    /// A new private mapping of it, which shares every page until it is written.
    ///
    /// # Errors
    /// If the process is out of address space, or a file has been changed.
    pub(crate) fn map(&self) -> Result<MmapRegion> {
        self.map_with(READ_WRITE)
    }

    fn map_with(&self, access: libc::c_int) -> Result<MmapRegion> {
        self.check()?;
        let size = usize::try_from(self.0.size).unwrap_or(0);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let region = MmapRegion::build(None, size, access, flags)
            .map_err(|e| Error::new(ErrorKind::Memory, "memory", e.to_string()))?;
        // The new mapping is zeros already.
        self.0
            .runs
            .iter()
            .filter(|run| run.layer.is_some())
            .try_for_each(|run| run.map_in(&region, access))?;
        Ok(region)
    }

    /// Replace the pages under a mapping of guest memory with this image.
    ///
    /// # Errors
    /// If the mapping has another size. If the kernel refuses: any of the runs may have been
    /// replaced then.
    pub(crate) fn map_over(&self, mapping: &Mapping) -> Result<()> {
        if mapping.size() != self.0.size {
            let detail =
                format!("{:#x} bytes, but the snapshot has {:#x}", mapping.size(), self.0.size);
            return Err(Error::new(ErrorKind::State, "memory", detail));
        }
        self.0.runs.iter().try_for_each(|run| run.map_in(mapping.region(), READ_WRITE))
    }

    /// A read-only mapping of its bytes.
    ///
    /// # Errors
    /// As for `map`.
    pub(crate) fn mapping(&self) -> Result<&MmapRegion> {
        self.0.mapping.get_or_try_init(|| self.map_with(libc::PROT_READ))
    }

    /// The ranges that may hold anything other than zeros.
    pub(crate) fn data(&self) -> Vec<ByteRange> {
        let mut data = Vec::new();
        for run in &self.0.runs {
            let Some(layer) = &run.layer else { continue };
            let end = run.offset + (run.range.1 - run.range.0);
            let mut at = run.offset;
            while let Some((first, last)) = layer.next_data(at, end) {
                let shift = |offset: u64| offset - run.offset + run.range.0;
                ranges::push(&mut data, (shift(first), shift(last)));
                at = last;
            }
        }
        data
    }
}

/// A range of guest memory at a snapshot.
#[derive(Clone, Debug)]
pub struct MemoryRange {
    /// Guest-physical start.
    pub start: u64,
    /// Whether it is read-only for the guest.
    pub read_only: bool,
    /// Its contents.
    pub image: Image,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::memfd;
    use proptest::prelude::*;

    fn layer(size: u64, fill: u8) -> Arc<Layer> {
        let file = memfd(size).unwrap();
        file.write_all_at(&vec![fill; usize::try_from(size).unwrap()], 0).unwrap();
        Layer::sealed(file).unwrap()
    }

    fn bytes(image: &Image) -> Vec<u8> {
        let mapping = image.mapping().unwrap();
        let mut bytes = vec![0; mapping.size()];
        part(mapping, (0, mapping.size() as u64)).unwrap().copy_to(&mut bytes);
        bytes
    }

    #[test]
    fn holes_are_not_data() {
        let file = memfd(64 << 12).unwrap();
        file.write_all_at(&[1; 4096], 5 << 12).unwrap();
        let image = Image::whole(64 << 12, Layer::sealed(file).unwrap());
        assert_eq!(image.data(), [(5 << 12, 6 << 12)]);
    }

    proptest! {
        #[test]
        fn overlays_have_the_newest_layer_of_each_page(
            overlays in prop::collection::vec(prop::collection::btree_set(0u64..12, 0..8), 0..5),
        ) {
            let size = 12 << 12;
            let mut image = Image::new(size, vec![Run { range: (0, size), layer: None, offset: 0 }]);
            let mut expected = vec![0u8; 12];
            for (fill, pages) in (1u8..).zip(&overlays) {
                let layer = layer(size, fill);
                let mut changed = Vec::new();
                for page in pages {
                    ranges::push(&mut changed, (page << 12, (page + 1) << 12));
                    expected[usize::try_from(*page).unwrap()] = fill;
                }
                let next = image.overlaid(&changed, &layer);
                prop_assert_eq!(next.differing(&image), changed);
                image = next;
            }
            let found: Vec<u8> = bytes(&image).chunks(4096).map(|page| page[0]).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(image.runs().windows(2).all(|pair| pair[0].range.1 == pair[1].range.0));
        }
    }
}

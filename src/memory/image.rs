//! What a range of guest memory held at a snapshot: runs of pages, each in a layer that nobody can
//! change any more. A machine maps them copy-on-write. Any thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::mapping::{Mapping, part};
use super::pagemap::ByteRange;
use crate::error::{Error, ErrorKind, Result};
use crate::process::Learnt;

/// Pages that no longer change: a sealed memfd, or a snapshot's file.
#[derive(Debug)]
pub struct Layer {
    file: Arc<File>,
    /// For a file, what says that it is as it was: device, inode, size, mtime in nanoseconds.
    stamp: Option<[i128; 4]>,
}

impl Layer {
    /// A memfd, to be sealed as soon as nobody maps it for writing.
    pub(crate) fn of_memfd(file: Arc<File>) -> Arc<Self> {
        Arc::new(Self { file, stamp: None })
    }

    /// A memfd that nobody maps.
    ///
    /// # Errors
    /// When it refuses its seals.
    pub(crate) fn sealed(file: File) -> Result<Arc<Self>> {
        let layer = Self::of_memfd(Arc::new(file));
        if layer.seal()? {
            return Ok(layer);
        }
        Err(os("F_ADD_SEALS", &io::Error::from_raw_os_error(libc::EBUSY)))
    }

    /// Refuse every change of a memfd from now on. False: somebody else maps it so that it can be
    /// written, or the kernel writes into its pages; it is not to be relied on then.
    ///
    /// # Errors
    /// When it refuses its seals for another reason.
    pub(crate) fn seal(&self) -> Result<bool> {
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
        // SAFETY: no pointers.
        let sealed = unsafe {
            libc::fcntl(self.file.as_raw_fd(), libc::F_ADD_SEALS, seals | libc::F_SEAL_SEAL)
        };
        let error = io::Error::last_os_error();
        match (sealed, error.raw_os_error()) {
            (0.., _) => Ok(true),
            (_, Some(libc::EBUSY)) => Ok(false),
            _ => Err(os("F_ADD_SEALS", &error)),
        }
    }

    /// A file that is to stay as it is: [`Self::check`] tells when it did not.
    pub(crate) fn of_file(file: File) -> Result<Arc<Self>> {
        let stamp = Some(stamp(&file)?);
        Ok(Arc::new(Self { file: Arc::new(file), stamp }))
    }

    /// # Errors
    /// [`ErrorKind::Snapshot`] when the file behind it has been changed.
    pub(crate) fn check(&self) -> Result<()> {
        if self.stamp.is_none_or(|known| stamp(&self.file).is_ok_and(|now| now == known)) {
            return Ok(());
        }
        let detail = "the snapshot's file has been written since it was loaded";
        Err(Error::new(ErrorKind::Snapshot, "file", detail)
            .hint("replace such a file by a new one of the same name, or load it with copy=True"))
    }

    /// Bytes that it takes, of memory or of the disk.
    pub(crate) fn allocated(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// Whether it is in memory, not in a file.
    pub(crate) fn is_memory(&self) -> bool {
        self.stamp.is_none()
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

fn stamp(file: &File) -> Result<[i128; 4]> {
    let m = file.metadata().map_err(|e| os("fstat", &e))?;
    let mtime = i128::from(m.mtime()) * 1_000_000_000 + i128::from(m.mtime_nsec());
    Ok([i128::from(m.dev()), i128::from(m.ino()), i128::from(m.size()), mtime])
}

fn os(at: &str, error: &io::Error) -> Error {
    Error::os(ErrorKind::Memory, at, error)
}

/// Memory that is nobody else's, of this size, all zeros and nothing allocated.
///
/// # Errors
/// When there is no descriptor or no memory left.
pub(crate) fn memfd(size: u64) -> Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a name that ends in zero, and flags.
    let fd = unsafe { libc::memfd_create(c"pyvmm".as_ptr(), flags) };
    if fd < 0 {
        return Err(os("memfd_create", &io::Error::last_os_error()));
    }
    // SAFETY: a descriptor that is ours alone.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(|e| os("ftruncate of a memfd", &e))?;
    Ok(file)
}

/// Pages in one layer, or of zeros.
#[derive(Clone, Debug)]
pub struct Run {
    /// Bytes from the start of the range, and the first behind the run.
    pub(crate) range: ByteRange,
    /// None for zeros.
    pub(crate) layer: Option<Arc<Layer>>,
    /// Where it starts in the layer.
    pub(crate) offset: u64,
}

impl Run {
    /// The part of it inside a range.
    fn part(&self, (start, end): ByteRange) -> Option<Self> {
        let range = (self.range.0.max(start), self.range.1.min(end));
        let offset = self.offset + (range.0.saturating_sub(self.range.0));
        (range.0 < range.1).then(|| Self { range, layer: self.layer.clone(), offset })
    }

    /// Whether both have the same page at the same place, in the same layer.
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

    /// Map it in its place of a region: private pages over the layer's, or zeros.
    fn map_in(&self, region: &MmapRegion, access: libc::c_int) -> Result<()> {
        let place = part(region, self.range)?;
        let start = place.ptr_guard_mut();
        let (flags, fd, offset) = match &self.layer {
            Some(layer) => (FLAGS, layer.file.as_raw_fd(), self.offset),
            None => (FLAGS | libc::MAP_ANONYMOUS, -1, 0),
        };
        let offset = i64::try_from(offset).unwrap_or(i64::MAX);
        // SAFETY: a part of a region of guest memory, or of one that was made for this image.
        // Nobody holds a Rust reference to its bytes, and its end is where the region's is: nothing
        // else is mapped over.
        let mapped =
            unsafe { libc::mmap(start.as_ptr().cast(), place.len(), access, flags, fd, offset) };
        if mapped == libc::MAP_FAILED {
            return Err(os("mmap of a snapshot", &io::Error::last_os_error()));
        }
        Ok(())
    }
}

const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// One range of guest memory, as it was. Cloning it copies nothing.
#[derive(Clone, Debug)]
pub struct Image(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    size: u64,
    /// By address, without a gap.
    runs: Vec<Run>,
    /// For comparing and copying, made when it is first needed.
    mapping: Learnt<MmapRegion>,
}

impl Image {
    /// An image of these runs, which cover `size` bytes from zero without a gap.
    pub(crate) fn new(size: u64, runs: Vec<Run>) -> Self {
        Self(Arc::new(Inner { size, runs, mapping: Learnt::unknown() }))
    }

    /// An image that one layer holds, page by page.
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
    /// [`ErrorKind::Snapshot`] when a file behind it has been changed.
    pub(crate) fn check(&self) -> Result<()> {
        self.layers().into_iter().try_for_each(|layer| layer.check())
    }

    /// The runs of a part of it.
    pub(crate) fn parts(&self, range: ByteRange) -> impl Iterator<Item = Run> + '_ {
        let first = self.0.runs.partition_point(|run| run.range.1 <= range.0);
        self.0.runs.iter().skip(first).map_while(move |run| run.part(range))
    }

    /// The image with some ranges (by address) in another layer, which has each page where the
    /// image has it.
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

    /// The ranges in which the two images have other layers: there their pages may differ.
    pub(crate) fn differing(&self, other: &Self) -> Vec<ByteRange> {
        let mut ranges = Vec::new();
        if self.is(other) {
            return ranges;
        }
        let (mut ours, mut theirs) =
            (self.0.runs.iter().peekable(), other.0.runs.iter().peekable());
        while let (Some(a), Some(b)) = (ours.peek(), theirs.peek()) {
            let range = (a.range.0.max(b.range.0), a.range.1.min(b.range.1));
            if range.0 < range.1 && !a.is_as(b) {
                super::pagemap::push(&mut ranges, range);
            }
            let (next_ours, next_theirs) = (a.range.1 <= range.1, b.range.1 <= range.1);
            if next_ours {
                ours.next();
            }
            if next_theirs {
                theirs.next();
            }
        }
        ranges
    }

    /// A new private mapping of it, which shares every page that nobody writes.
    ///
    /// # Errors
    /// When there is no address space left, or a file has been changed.
    pub(crate) fn map(&self) -> Result<MmapRegion> {
        self.map_with(READ_WRITE)
    }

    fn map_with(&self, access: libc::c_int) -> Result<MmapRegion> {
        self.check()?;
        let size = usize::try_from(self.0.size).unwrap_or(0);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let region = MmapRegion::build(None, size, access, flags)
            .map_err(|e| Error::new(ErrorKind::Memory, "memory", e.to_string()))?;
        // What was just mapped is zeros already.
        self.0
            .runs
            .iter()
            .filter(|run| run.layer.is_some())
            .try_for_each(|run| run.map_in(&region, access))?;
        Ok(region)
    }

    /// Put it in the place of what a mapping of guest memory holds.
    ///
    /// # Errors
    /// When the mapping has another size, or the kernel refuses: then each run has been replaced or
    /// not.
    pub(crate) fn map_over(&self, mapping: &Mapping) -> Result<()> {
        if mapping.size() != self.0.size {
            let detail =
                format!("{:#x} bytes, the snapshot has {:#x}", mapping.size(), self.0.size);
            return Err(Error::new(ErrorKind::State, "memory", detail));
        }
        self.0.runs.iter().try_for_each(|run| run.map_in(mapping.region(), READ_WRITE))
    }

    /// Its bytes, for reading.
    ///
    /// # Errors
    /// As for `map`.
    pub(crate) fn mapping(&self) -> Result<&MmapRegion> {
        self.0.mapping.get_or(|| self.map_with(libc::PROT_READ))
    }

    /// The ranges that may hold anything but zeros.
    pub(crate) fn data(&self) -> Vec<ByteRange> {
        let mut ranges = Vec::new();
        for run in &self.0.runs {
            let Some(layer) = &run.layer else { continue };
            let behind = run.offset + (run.range.1 - run.range.0);
            let mut at = run.offset;
            while let Some((start, end)) = next_data(layer.file(), at, behind) {
                let shift = |offset: u64| offset - run.offset + run.range.0;
                super::pagemap::push(&mut ranges, (shift(start), shift(end)));
                at = end;
            }
        }
        ranges
    }
}

/// The next part of a file that is no hole, in whole pages.
fn next_data(file: &File, at: u64, behind: u64) -> Option<ByteRange> {
    let seek = |from: u64, whence| {
        let from = i64::try_from(from).ok()?;
        // SAFETY: no pointers. The position is used by nobody: all else names its offsets.
        u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), from, whence) }).ok()
    };
    if at >= behind {
        return None;
    }
    let start = seek(at, libc::SEEK_DATA)? & !4095;
    let end = seek(start.max(at), libc::SEEK_HOLE).unwrap_or(behind).next_multiple_of(4096);
    (start < behind).then(|| (start.max(at), end.min(behind)))
}

/// Copy a range of guest memory to the same place in a memfd.
pub(crate) fn copy_to(file: &File, region: &MmapRegion, range: ByteRange) -> Result<()> {
    let mut done = 0;
    while range.0 + done < range.1 {
        let piece = part(region, (range.0 + done, range.1))?;
        let start = piece.ptr_guard();
        let offset = i64::try_from(range.0 + done).unwrap_or(i64::MAX);
        // SAFETY: the kernel reads the slice's bytes, which a host thread may change at the same
        // time: any are right.
        let written =
            unsafe { libc::pwrite(file.as_raw_fd(), start.as_ptr().cast(), piece.len(), offset) };
        match u64::try_from(written) {
            Ok(0) => return Err(os("write to a memfd", &io::ErrorKind::WriteZero.into())),
            Ok(written) => done += written,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(os("write to a memfd", &error));
                }
            }
        }
    }
    Ok(())
}

/// One range of guest memory at a snapshot.
#[derive(Clone, Debug)]
pub struct MemoryRange {
    /// Guest-physical start.
    pub start: u64,
    /// The guest cannot write it.
    pub read_only: bool,
    /// What it held.
    pub image: Image,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
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
    fn a_layer_cannot_be_changed() {
        let layer = layer(4096, 1);
        assert!(layer.file().write_all_at(&[2], 0).is_err());
        assert!(layer.file().set_len(0).is_err());
        let offset = vm_memory::FileOffset::new(layer.file().try_clone().unwrap(), 0);
        assert!(<MmapRegion>::build(Some(offset), 4096, READ_WRITE, libc::MAP_SHARED).is_err());
    }

    #[test]
    fn a_file_that_was_written_is_noticed() {
        let path = std::env::temp_dir().join(format!("pyvmm-layer-{}", std::process::id()));
        std::fs::write(&path, [1; 4096]).unwrap();
        let layer = Layer::of_file(File::open(&path).unwrap()).unwrap();
        layer.check().unwrap();
        std::fs::write(&path, [2; 8192]).unwrap();
        assert_eq!(layer.check().unwrap_err().kind, ErrorKind::Snapshot);
        std::fs::remove_file(&path).unwrap();
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
                let mut ranges = Vec::new();
                for page in pages {
                    super::super::pagemap::push(&mut ranges, (page << 12, (page + 1) << 12));
                    expected[usize::try_from(*page).unwrap()] = fill;
                }
                let next = image.overlaid(&ranges, &layer);
                prop_assert_eq!(next.differing(&image), ranges);
                image = next;
            }
            let found: Vec<u8> = bytes(&image).chunks(4096).map(|page| page[0]).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(image.runs().windows(2).all(|pair| pair[0].range.1 == pair[1].range.0));
        }
    }
}

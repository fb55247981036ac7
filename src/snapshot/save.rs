//! Writing a snapshot's file: beside the old one, synced, and put in its place in one step. Whatever fails, and whenever
//! the process is killed, the old file stays whole and nothing is left behind.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::file::{HEADER, Header, MOST_STATE, OF_BASE};
use super::host::Host;
use super::image::Image;
use super::pagemap::{self, Range};
use super::ram::{bytes, joined};
use super::state::{Kind, Record};
use super::{Snapshot, new_id};
use crate::error::{Error, ErrorKind, Result};
use crate::vm::layout::PAGE;

/// Written at a time.
const CHUNK: u64 = 1 << 20;

impl Snapshot {
    /// Write it to a file. With a base only the pages that differ from the base's are written, and loading needs the
    /// base. `progress` is told how many bytes of how many have been written; its error ends the writing.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the file cannot be written, [`ErrorKind::Snapshot`] when the base is of another machine or
    /// the devices' state is larger than a file may have; what
    /// `progress` returns. A file of that name is as before then.
    pub fn save<E: From<Error>>(
        &self,
        path: &Path,
        base: Option<&Self>,
        mut progress: impl FnMut(u64, u64) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let plans = self.plans(base)?;
        let total = plans.iter().map(|plan| bytes(&plan.stored)).sum();
        let state = self.encode(&plans)?;
        if state.len() as u64 > MOST_STATE {
            let detail = format!("{} bytes, where a file has {MOST_STATE} at most", state.len());
            return Err(Error::new(ErrorKind::Snapshot, "state", detail).into());
        }
        let pages = (HEADER as u64 + state.len() as u64).next_multiple_of(PAGE);
        let new = NewFile::beside(path)?;
        let (mut at, mut crc) = (pages, crc32fast::Hasher::new());
        for plan in &plans {
            let mapping = plan.image.mapping()?;
            for (start, end) in &plan.stored {
                for first in (*start..*end).step_by(1 << 20) {
                    let last = (first + CHUNK).min(*end);
                    let piece = slice(mapping, (first, last));
                    crc.update(piece);
                    new.write(piece, at)?;
                    at += last - first;
                    progress(at - pages, total)?;
                }
            }
        }
        let header = Header {
            file_length: at,
            state_length: state.len() as u64,
            pages,
            state_crc: crc32fast::hash(&state),
            pages_crc: crc.finalize(),
            id: self.id,
            base: base.map_or([0; 16], |base| base.id),
        };
        new.write(&state, HEADER as u64)?;
        new.write(&header.encode(), 0)?;
        // A state that ends before its page does, and no page behind it: the file has that length all the same.
        new.set_length(at)?;
        Ok(new.replace(path)?)
    }

    fn plans(&self, base: Option<&Self>) -> Result<Vec<Plan>> {
        self.ranges.iter().try_for_each(|range| range.image.check())?;
        let of_base = |range: &super::Range| {
            let Some(base) = base else { return Ok(None) };
            let size = range.image.size();
            let same = |r: &&super::Range| (r.start, r.image.size()) == (range.start, size);
            let found = base.ranges.iter().find(same).map(|range| range.image.clone());
            let detail = "its memory is not that of this snapshot";
            found.map(Some).ok_or_else(|| Error::new(ErrorKind::Snapshot, "base", detail))
        };
        self.ranges.iter().map(|range| Plan::of(&range.image, of_base(range)?.as_ref())).collect()
    }

    /// The records, with where each page will be.
    fn encode(&self, plans: &[Plan]) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut put = |kind: Kind, number: u16, bytes: &[u8]| {
            all.extend((kind as u16).to_le_bytes());
            all.extend(number.to_le_bytes());
            all.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            all.extend(bytes);
        };
        put(Kind::Shape, 0, &self.shape.encode());
        let host = match &self.host {
            Some(host) => host,
            None => Host::here()?,
        };
        put(Kind::Host, 0, &host.encode());
        let records = self.vcpus.iter().flatten().chain(&self.chips);
        records.for_each(|Record { kind, number, bytes }| put(*kind, *number, bytes));
        self.devices.iter().for_each(|device| put(Kind::Device, 0, &device.encode()));
        let mut place = 0;
        for (range, plan) in self.ranges.iter().zip(plans) {
            let mut bytes = Vec::new();
            bytes.extend(range.start.to_le_bytes());
            bytes.extend(range.image.size().to_le_bytes());
            bytes.extend(u64::from(range.read_only).to_le_bytes());
            for (run, is_stored) in plan.runs() {
                let at = if is_stored { place } else { OF_BASE };
                [run.0, run.1 - run.0, at].iter().for_each(|n| bytes.extend(n.to_le_bytes()));
                place += if is_stored { run.1 - run.0 } else { 0 };
            }
            put(Kind::Range, 0, &bytes);
        }
        Ok(all)
    }
}

/// Which pages of a range a file holds, and which it takes of its base. All others are zeros.
struct Plan {
    image: Image,
    stored: Vec<Range>,
    of_base: Vec<Range>,
}

impl Plan {
    fn of(image: &Image, base: Option<&Image>) -> Result<Self> {
        let (ours, theirs) = (image.mapping()?, base.map(Image::mapping).transpose()?);
        let candidates = base.map_or_else(|| image.data(), |base| image.differing(base));
        let mut stored: Vec<Range> = Vec::new();
        let mut zeros: Vec<Range> = Vec::new();
        for (start, end) in candidates {
            for at in (start..end).step_by(4096) {
                let page = (at, at + PAGE);
                let bytes = slice(ours, page);
                if theirs.is_some_and(|theirs| slice(theirs, page) == bytes) {
                    continue;
                }
                let is_zero = is_zero(bytes);
                pagemap::push(if is_zero { &mut zeros } else { &mut stored }, page);
            }
        }
        let stored = joined(stored);
        let mut of_base = Vec::new();
        if base.is_some() {
            let mut other: Vec<Range> = stored.iter().chain(&zeros).copied().collect();
            other.sort_unstable();
            let mut at = 0;
            for (start, end) in other {
                if at < start {
                    of_base.push((at, start));
                }
                at = at.max(end);
            }
            if at < image.size() {
                of_base.push((at, image.size()));
            }
        }
        Ok(Self { image: image.clone(), stored, of_base })
    }

    /// All runs by address, and whether the file has them.
    fn runs(&self) -> Vec<(Range, bool)> {
        let stored = self.stored.iter().map(|run| (*run, true));
        let mut all: Vec<_> = stored.chain(self.of_base.iter().map(|run| (*run, false))).collect();
        all.sort_unstable();
        all
    }
}

fn slice(mapping: &vm_memory::MmapRegion, range: Range) -> &[u8] {
    let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    let (start, length) = (index(range.0), index(range.1 - range.0));
    debug_assert!(start + length <= mapping.size());
    // SAFETY: the callers' ranges lie in the image and so in its mapping, which lives as long as the slice, is mapped for
    // reading only, and whose layers are sealed. A file that is changed against the rule gives other bytes.
    unsafe { std::slice::from_raw_parts(mapping.as_ptr().add(start), length) }
}

fn is_zero(page: &[u8]) -> bool {
    let (head, words, tail) = {
        // SAFETY: any bytes are a valid u128.
        unsafe { page.align_to::<u128>() }
    };
    words.iter().all(|word| *word == 0) && head.iter().chain(tail).all(|byte| *byte == 0)
}

/// A file without a name, or where the file system cannot have such, with a name of its own.
struct NewFile {
    file: File,
    directory: PathBuf,
    /// To be removed unless it has got its final name.
    name: Option<PathBuf>,
}

impl NewFile {
    fn beside(path: &Path) -> Result<Self> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = parent.unwrap_or(Path::new(".")).to_owned();
        let nameless = OpenOptions::new()
            .write(true)
            .mode(0o666)
            .custom_flags(libc::O_TMPFILE)
            .open(&directory);
        match nameless {
            Ok(file) => Ok(Self { file, directory, name: None }),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                let name = other_name(&directory, path)?;
                let file = OpenOptions::new().write(true).create_new(true).open(&name);
                let file = file.map_err(|e| failed(&name, &e))?;
                Ok(Self { file, directory, name: Some(name) })
            }
            Err(e) => Err(failed(path, &e)),
        }
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(|e| failed(&self.directory, &e))
    }

    fn set_length(&self, length: u64) -> Result<()> {
        self.file.set_len(length).map_err(|e| failed(&self.directory, &e))
    }

    /// Bring it to the disk and give it its name.
    fn replace(mut self, path: &Path) -> Result<()> {
        self.file.sync_all().map_err(|e| failed(path, &e))?;
        if self.name.is_none() {
            let name = other_name(&self.directory, path)?;
            link(&self.file, &name).map_err(|e| failed(&name, &e))?;
            self.name = Some(name);
        }
        if let Some(name) = &self.name {
            std::fs::rename(name, path).map_err(|e| failed(path, &e))?;
        }
        self.name = None;
        // The name too is to be there after a crash. Some file systems cannot sync a directory: theirs is the risk.
        let _ = File::open(&self.directory).and_then(|directory| directory.sync_all());
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = std::fs::remove_file(name);
        }
    }
}

/// A name beside `path` that nobody uses.
fn other_name(directory: &Path, path: &Path) -> Result<PathBuf> {
    if path.file_name().is_none() {
        let detail = format!("{} names no file", path.display());
        return Err(Error::new(ErrorKind::Io, "snapshot", detail));
    }
    let random: String = new_id()?.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    // Short: `path`'s own may have all the length that a name can have.
    Ok(directory.join(format!(".pyvmm-{random}.part")))
}

/// Give a nameless file a name.
fn link(file: &File, name: &Path) -> io::Result<()> {
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let to = CString::new(name.as_os_str().as_bytes())?;
    let (here, follow) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: two paths that end in zero and live through the call.
    let result = unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), follow) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    let mut failed = Error::os(ErrorKind::Io, "snapshot", error);
    failed.detail = format!("{}: {}", path.display(), failed.detail);
    failed
}

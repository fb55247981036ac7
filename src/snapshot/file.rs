//! Reading a snapshot's file, byte by byte as docs/snapshot-format.md has it. Whatever a file
//! holds, the answer is a snapshot or an error: nothing is believed before it has been checked,
//! nothing larger than the file is allocated.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::host::{self, Host};
use super::state::{Device, Kind, Record, Records};
use super::{MemoryRange, Snapshot};
use crate::bytes::{Reader, bad};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::PAGE;
use crate::memory::ranges::{self, ByteRange};
use crate::memory::{Image, Layer, Run, host_memory, memfd};
use crate::vm::Shape;

pub(super) const MAGIC: [u8; 8] = *b"pyvmmsnp";
pub(super) const VERSION: u32 = 1;
/// Bytes of the header; the state follows.
pub(super) const HEADER: usize = 128;
/// Where the header's own checksum stands.
pub(super) const HEADER_CRC: usize = 12;
/// In a run's place in the file: the pages are those of the base.
pub(super) const OF_BASE: u64 = u64::MAX;
/// More than this no state has: 254 vCPUs with AMX and a million runs of pages.
pub(super) const MOST_STATE: u64 = 1 << 28;

/// What a file says of itself at its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole file.
    pub file_length: u64,
    /// Bytes of the state behind the header.
    pub state_length: u64,
    /// Where the pages begin.
    pub pages: u64,
    /// CRC-32 of the state.
    pub state_crc: u32,
    /// CRC-32 of the pages.
    pub pages_crc: u32,
    /// The snapshot's id.
    pub id: [u8; 16],
    /// The id of the snapshot whose pages it needs; zeros for none.
    pub base: [u8; 16],
}

impl Header {
    /// Its 128 bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, field: &[u8]| {
            bytes.iter_mut().skip(at).zip(field).for_each(|(byte, value)| *byte = *value);
        };
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &self.file_length.to_le_bytes());
        put(24, &self.state_length.to_le_bytes());
        put(32, &self.pages.to_le_bytes());
        put(40, &self.state_crc.to_le_bytes());
        put(44, &self.pages_crc.to_le_bytes());
        put(48, &self.id);
        put(64, &self.base);
        let crc = crc32fast::hash(&bytes).to_le_bytes();
        bytes.iter_mut().skip(HEADER_CRC).zip(crc).for_each(|(byte, value)| *byte = value);
        bytes
    }

    /// From the bytes of a file of this length.
    ///
    /// # Errors
    /// [`ErrorKind::Snapshot`] when they are not the header of such a file.
    pub fn decode(bytes: &[u8; HEADER], length: u64) -> Result<Self> {
        let mut reader = Reader::new("header", bytes);
        if reader.take::<8>()? != MAGIC {
            return Err(bad("file", "it is no snapshot of pyvmm"));
        }
        let version = reader.u32()?;
        if version != VERSION {
            let detail = format!("it has version {version} of the format, this pyvmm {VERSION}");
            return Err(bad("version", detail));
        }
        let crc = reader.u32()?;
        let mut without = *bytes;
        without.iter_mut().skip(HEADER_CRC).take(4).for_each(|byte| *byte = 0);
        if crc32fast::hash(&without) != crc {
            return Err(damaged("header"));
        }
        let header = Self {
            file_length: reader.u64()?,
            state_length: reader.u64()?,
            pages: reader.u64()?,
            state_crc: reader.u32()?,
            pages_crc: reader.u32()?,
            id: reader.take()?,
            base: reader.take()?,
        };
        let state_end = header.state_length.checked_add(HEADER as u64);
        let is_whole = header.file_length == length
            && header.pages.is_multiple_of(PAGE)
            && state_end.is_some_and(|end| end <= header.pages && header.pages - end < PAGE)
            && header.pages <= length
            && header.state_length <= MOST_STATE
            && reader.rest().iter().all(|byte| *byte == 0);
        if is_whole {
            Ok(header)
        } else {
            Err(bad("file", "it is not whole, or longer than it was"))
        }
    }
}

fn damaged(at: &str) -> Error {
    bad(at, "its checksum is wrong: the file is damaged")
}

fn io_error(path: &Path, error: &io::Error) -> Error {
    let mut failed = Error::os(ErrorKind::Io, "snapshot", error);
    failed.detail = format!("{}: {}", path.display(), failed.detail);
    failed
}

/// How a file is loaded.
#[derive(Debug, Default)]
pub struct Load<'a> {
    /// The snapshot whose pages it needs, if it needs one.
    pub base: Option<&'a Snapshot>,
    /// Load it although this host lacks something of the one it was taken on.
    pub force: bool,
    /// Copy its pages into memory: then nothing that happens to the file matters.
    pub copy: bool,
    /// Read all pages and check their checksum.
    pub verify: bool,
}

/// A snapshot from its file, whose pages are mapped when they are needed. As it is, it takes the
/// same time for any size.
///
/// # Errors
/// [`ErrorKind::Snapshot`] when the file is damaged, of another version, of another machine, or
/// needs another base; [`ErrorKind::Io`] when it cannot be read.
pub fn load(path: &Path, how: &Load<'_>) -> Result<Snapshot> {
    let layer = Layer::of_file(open(path)?)?;
    let file = layer.file();
    let (header, state) = read_state(file, path)?;
    if how.verify || how.copy {
        check_pages(file, &header, path)?;
    }
    let pages = match how.copy {
        true => Pages::copied(file, &header, path)?,
        false => Pages::of(Arc::clone(&layer), &header),
    };
    let snapshot = parse(&state, &header, &pages, how.base)?;
    if let (false, Some(there)) = (how.force, &snapshot.host) {
        host::check(&snapshot, there)?;
    }
    Ok(snapshot)
}

/// What a file holds: its header, and the records behind it.
///
/// # Errors
/// As for [`load`], but for what is wrong in a record.
pub fn inspect(path: &Path) -> Result<(Header, Records)> {
    let file = open(path)?;
    let (header, state) = read_state(&file, path)?;
    let mut records = Records::new();
    each_record(&state, |kind, number, bytes| {
        records.push(Record { kind, number, bytes: bytes.to_vec() });
        Ok(())
    })?;
    Ok((header, records))
}

fn open(path: &Path) -> Result<File> {
    // Before it is opened, which devices may notice; and behind that, in case it has changed.
    if path.metadata().map_err(|e| io_error(path, &e))?.is_file() {
        // A pipe of that name would have the opener wait for a writer.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let file = file.map_err(|e| io_error(path, &e))?;
        if file.metadata().map_err(|e| io_error(path, &e))?.is_file() {
            return Ok(file);
        }
    }
    Err(bad("file", format!("{} is no regular file", path.display())))
}

/// The header, and the state whose checksum is right.
fn read_state(file: &File, path: &Path) -> Result<(Header, Vec<u8>)> {
    let length = file.metadata().map_err(|e| io_error(path, &e))?.len();
    let read = |bytes: &mut [u8], at| file.read_exact_at(bytes, at).map_err(|e| io_error(path, &e));
    if length < HEADER as u64 {
        return Err(bad("file", "it is too short for a snapshot"));
    }
    let mut bytes = [0; HEADER];
    read(&mut bytes, 0)?;
    let header = Header::decode(&bytes, length)?;
    // At most as long as the file, by the header's check.
    let mut state = vec![0; usize::try_from(header.pages).unwrap_or(HEADER).saturating_sub(HEADER)];
    read(&mut state, HEADER as u64)?;
    let padding =
        state.split_off(usize::try_from(header.state_length).unwrap_or(0).min(state.len()));
    if crc32fast::hash(&state) != header.state_crc || padding.iter().any(|byte| *byte != 0) {
        return Err(damaged("state"));
    }
    Ok((header, state))
}

/// Call `look` with each record's kind, number and bytes.
fn each_record<'a>(
    state: &'a [u8],
    mut look: impl FnMut(Kind, u16, &'a [u8]) -> Result<()>,
) -> Result<()> {
    let mut reader = Reader::new("state", state);
    while !reader.is_empty() {
        let (number, of, length) = (reader.u16()?, reader.u16()?, reader.u32()?);
        let bytes = reader.bytes(usize::try_from(length).unwrap_or(usize::MAX))?;
        let Some(kind) = Kind::of(number) else {
            return Err(bad(
                "state",
                format!("it has a record of kind {number:#x}, not known here"),
            ));
        };
        look(kind, of, bytes)?;
    }
    Ok(())
}

/// Call `piece` with all pages of a file, some at a time.
fn each_piece(
    file: &File,
    header: &Header,
    path: &Path,
    mut piece: impl FnMut(&[u8], u64) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = header.pages;
    while at < header.file_length {
        let most = usize::try_from(header.file_length - at).unwrap_or(usize::MAX).min(buffer.len());
        let part = buffer.get_mut(..most).unwrap_or(&mut []);
        file.read_exact_at(part, at).map_err(|e| io_error(path, &e))?;
        piece(part, at - header.pages)?;
        at += most as u64;
    }
    Ok(())
}

fn check_pages(file: &File, header: &Header, path: &Path) -> Result<()> {
    let mut hasher = crc32fast::Hasher::new();
    each_piece(file, header, path, |part, _| {
        hasher.update(part);
        Ok(())
    })?;
    if hasher.finalize() == header.pages_crc { Ok(()) } else { Err(damaged("pages")) }
}

/// The pages of a file, and where they stand in the layer.
struct Pages {
    layer: Arc<Layer>,
    first: u64,
    length: u64,
}

impl Pages {
    fn of(layer: Arc<Layer>, header: &Header) -> Self {
        Self { layer, first: header.pages, length: header.file_length - header.pages }
    }

    fn copied(file: &File, header: &Header, path: &Path) -> Result<Self> {
        let length = header.file_length - header.pages;
        let copy = memfd(length.next_multiple_of(PAGE).max(PAGE))?;
        each_piece(file, header, path, |part, at| {
            copy.write_all_at(part, at).map_err(|e| Error::os(ErrorKind::Memory, "memfd", &e))
        })?;
        Ok(Self { layer: Layer::sealed(copy)?, first: 0, length })
    }
}

fn parse(
    state: &[u8],
    header: &Header,
    pages: &Pages,
    base: Option<&Snapshot>,
) -> Result<Snapshot> {
    let base = check_base(header, base)?;
    let (mut shape, mut host, mut chips) = (None, None, Vec::new());
    let (mut vcpus, mut devices, mut ranges) = (Vec::<Records>::new(), Vec::new(), Vec::new());
    each_record(state, |kind, of, bytes| {
        let record = || Record { kind, number: of, bytes: bytes.to_vec() };
        match kind {
            Kind::Shape => shape = Some(Shape::decode(bytes)?),
            Kind::Host => host = Some(Host::decode(bytes)?),
            Kind::Device => devices.push(Device::decode(bytes)?),
            Kind::Range => ranges.push(range(bytes, pages, base)?),
            Kind::Clock | Kind::Pit | Kind::Irqchip => chips.push(record()),
            _ => {
                if usize::from(of) == vcpus.len() {
                    vcpus.push(Vec::new());
                }
                let records = vcpus.get_mut(usize::from(of));
                records.ok_or_else(|| bad("state", "its vCPUs are not in order"))?.push(record());
            }
        }
        Ok(())
    })?;
    let shape = shape.ok_or_else(|| bad("shape", "it has none"))?;
    if vcpus.len() != usize::from(shape.vcpus) {
        return Err(bad("state", "it has not the state of each vCPU"));
    }
    check_ranges(&ranges)?;
    Ok(Snapshot { id: header.id, shape, chips, vcpus, devices, ranges, host })
}

/// The base, if one is needed.
fn check_base<'a>(header: &Header, base: Option<&'a Snapshot>) -> Result<Option<&'a Snapshot>> {
    if header.base == [0; 16] {
        return Ok(None);
    }
    let hex = |id: [u8; 16]| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match base {
        Some(base) if base.id == header.base => Ok(Some(base)),
        Some(base) => {
            let detail = format!("it needs {}, this is {}", hex(header.base), hex(base.id));
            Err(bad("base", detail))
        }
        None => Err(bad("base", format!("it needs the snapshot {}", hex(header.base)))
            .hint("load(path, base=...)")),
    }
}

/// Start, bytes, and whether it is read-only, of a range of memory.
///
/// # Errors
/// [`ErrorKind::Snapshot`] when the record is too short.
pub fn described(range: &[u8]) -> Result<(u64, u64, bool)> {
    let mut reader = Reader::new("range", range);
    let (start, size, read_only) = (reader.u64()?, reader.u64()?, reader.u64()?);
    Ok((start, size, read_only != 0))
}

fn range(bytes: &[u8], pages: &Pages, base: Option<&Snapshot>) -> Result<MemoryRange> {
    let mut reader = Reader::new("range", bytes);
    let (start, size) = (reader.u64()?, reader.u64()?);
    let [read_only, zeros @ ..] = reader.take::<8>()?;
    let is_whole = |value: u64| value.is_multiple_of(PAGE);
    let fits = size > 0 && is_whole(size) && is_whole(start) && start.checked_add(size).is_some();
    if !fits || size > host_memory() || read_only > 1 || zeros != [0; 7] {
        return Err(bad("range", format!("{size:#x} bytes at {start:#x} are no memory here")));
    }
    let of_base = base.and_then(|base| {
        base.ranges.iter().find(|range| (range.start, range.image.size()) == (start, size))
    });
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    while !reader.is_empty() {
        let (first, length, place) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let end = first.checked_add(length).filter(|end| *end <= size && is_whole(*end));
        let Some(end) = end.filter(|_| first >= at && length > 0 && is_whole(first)) else {
            return Err(bad("range", "its runs of pages are not in order"));
        };
        zeros_up_to(&mut runs, at, first);
        if place == OF_BASE {
            let image = &of_base.ok_or_else(|| bad("base", "it has not that memory"))?.image;
            runs.extend(image.parts((first, end)));
        } else {
            let fits = is_whole(place)
                && place.checked_add(length).is_some_and(|behind| behind <= pages.length);
            if !fits {
                return Err(bad("range", "a run of pages is not in the file"));
            }
            let (layer, offset) = (Some(Arc::clone(&pages.layer)), pages.first + place);
            runs.push(Run { range: (first, end), layer, offset });
        }
        at = end;
    }
    zeros_up_to(&mut runs, at, size);
    Ok(MemoryRange { start, read_only: read_only == 1, image: Image::new(size, runs) })
}

fn zeros_up_to(runs: &mut Vec<Run>, at: u64, first: u64) {
    if at < first {
        runs.push(Run { range: (at, first), layer: None, offset: 0 });
    }
}

fn check_ranges(ranges: &[MemoryRange]) -> Result<()> {
    let mut behind = 0;
    let mut all: Vec<ByteRange> = Vec::new();
    for range in ranges {
        // Checked to fit when it was read.
        let end = range.start + range.image.size();
        if range.start < behind {
            return Err(bad("range", "memory overlaps, or is not in order"));
        }
        all.push((range.start, end));
        behind = end;
    }
    if ranges::size(&all) > host_memory() {
        return Err(bad("range", "it is more memory than this host has"));
    }
    Ok(())
}

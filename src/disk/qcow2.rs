//! qcow2 images, by imago: with the images that they are based on, or as an overlay over any other
//! backend. What an image says is checked first, and a request that makes imago panic ends as an
//! error. Any thread.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::format::PreallocateMode;
use imago::qcow2::Qcow2 as Image;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, ShallowMapping,
};

use super::backend::{Backend, read_only};
use super::extents::{Extent, Extents, WINDOW};
use super::header::{self, Header, MOST_HEADER};
use super::raw::Raw;
use super::slices::{self, Slice};
use super::storage::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{RwLock, rank};

/// How many images may be based on each other.
const MOST_IMAGES: usize = 8;

type Access = FormatAccess<Store>;

/// See the module.
#[derive(Debug)]
pub(super) struct Qcow2 {
    image: Access,
    /// The image's file, for requests within known extents.
    file: Store,
    extents: Extents,
    is_read_only: bool,
    /// Whether it is over a backend that may call the program.
    may_block: bool,
    /// A discard excludes other requests. None over another backend: no lock is held there.
    discards: Option<RwLock<(), rank::DiskImage>>,
    /// Whether imago has panicked, and the image is not to be used any more.
    is_broken: AtomicBool,
}

impl Qcow2 {
    /// Open an image, and those that it is based on.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the image is damaged, needs what is not supported, or names a base
    /// that it may not; [`ErrorKind::Io`] if a file cannot be read.
    pub(super) fn open(path: &Path, is_written: bool) -> Result<Self> {
        let (image, file) = open_images(path, is_written, 1)?;
        Ok(Self::of(image, file, !is_written, Some(RwLock::new(())), false))
    }

    /// An overlay in a file over another backend. The file is created if there is none.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub(super) fn over(path: &Path, base: Arc<dyn Backend>, name: Option<&Path>) -> Result<Self> {
        let size = base.size().map_err(|e| Error::os(ErrorKind::Io, path.to_string_lossy(), &e))?;
        let may_block = base.may_block();
        let below = imago::raw::Raw::builder(Store::new(base));
        let below = below.open(DenyImplicitOpenGate::default());
        let below = FormatAccess::new(below.map_err(|e| damaged(path, &e.to_string()))?);
        let (image, file) = if path.exists() {
            let file = Raw::open(path, true)?;
            check_base(path, &checked(&file, true)?, name)?;
            let file: Arc<dyn Backend> = Arc::new(file);
            (open_image(path, Arc::clone(&file), true, Some(below))?, file)
        } else {
            let file: Arc<dyn Backend> = Arc::new(Raw::create(path)?);
            let made = create(path, Arc::clone(&file), (size, name), below);
            (made.inspect_err(|_| drop(std::fs::remove_file(path)))?, file)
        };
        Ok(Self::of(image, file, false, None, may_block))
    }

    fn of(
        image: Access,
        file: Arc<dyn Backend>,
        is_read_only: bool,
        discards: Option<RwLock<(), rank::DiskImage>>,
        may_block: bool,
    ) -> Self {
        Self {
            image,
            file: Store::new(file),
            extents: Extents::default(),
            is_read_only,
            may_block,
            discards,
            is_broken: AtomicBool::new(false),
        }
    }

    /// Where a range of the disk is in the file, if it is there in one piece, and requests may go
    /// there at once: with writes, a range whose clusters this image alone has.
    fn place(&self, offset: u64, length: u64) -> io::Result<Option<u64>> {
        let ticket = match self.extents.place(offset, length) {
            Ok(at) => return Ok(Some(at)),
            Err(ticket) => ticket,
        };
        let (mapping, size) = self.image.get_shallow_mapping(offset, WINDOW - offset % WINDOW)?;
        let ShallowMapping::Raw { storage, offset: at, writable, .. } = mapping else {
            return Ok(None);
        };
        // A cluster that others have, too, moves once it is written.
        if !Arc::ptr_eq(&storage.backend, &self.file.backend) || !(writable || self.is_read_only) {
            return Ok(None);
        }
        let extent = Extent { start: offset, end: offset.saturating_add(size), at };
        self.extents.add(ticket, extent);
        Ok(extent.place(offset, length))
    }

    /// Make a change after which clusters may be elsewhere.
    fn moving<T>(&self, change: impl FnOnce() -> T) -> T {
        self.extents.forget();
        let result = change();
        self.extents.forget();
        result
    }

    /// Call imago. After a panic, the image is not used any more.
    fn guarded<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        // Relaxed: the state that a panic left is protected by imago's locks.
        if self.is_broken.load(Ordering::Relaxed) {
            return Err(io::Error::other("the image is damaged"));
        }
        guarded(call).unwrap_or_else(|| {
            self.is_broken.store(true, Ordering::Relaxed);
            Err(io::Error::other("the image is damaged"))
        })
    }

    fn shared<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _shared = self.discards.as_ref().map(RwLock::read);
        self.guarded(call)
    }

    fn for_writing(&self) -> io::Result<()> {
        if self.is_read_only { Err(read_only()) } else { Ok(()) }
    }
}

/// None if it panics.
fn guarded<T>(call: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(call)).ok()
}

fn damaged(path: &Path, detail: &str) -> Error {
    Error::new(ErrorKind::Config, path.to_string_lossy(), format!("this qcow2 image: {detail}"))
}

fn checked_header(file: &Raw) -> Result<Header> {
    let path = file.path();
    let os = |error: io::Error| Error::os(ErrorKind::Io, path.to_string_lossy(), &error);
    let size = file.size().map_err(os)?;
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX).min(MOST_HEADER)];
    file.read_at(0, &slices::of_bytes_mut(&mut bytes)).map_err(os)?;
    header::check(&bytes, size).map_err(|detail| damaged(path, &detail))
}

/// The header of an image that is written, after a check of the reference counts as well.
fn checked(file: &Raw, is_written: bool) -> Result<Header> {
    let header = checked_header(file)?;
    if is_written {
        let path = file.path();
        let os = |error: io::Error| Error::os(ErrorKind::Io, path.to_string_lossy(), &error);
        let size = file.size().map_err(os)?;
        let (at, length) = header.references;
        let length = length.min(size.saturating_sub(at));
        let mut table = vec![0; usize::try_from(length).unwrap_or(0)];
        file.read_at(at, &slices::of_bytes_mut(&mut table)).map_err(os)?;
        header::check_references(&table, header.cluster, size)
            .map_err(|detail| damaged(path, &detail))?;
    }
    Ok(header)
}

/// An overlay that names its base is used over that base only.
fn check_base(path: &Path, header: &Header, name: Option<&Path>) -> Result<()> {
    let (Some((named, _)), Some(name)) = (&header.backing, name) else { return Ok(()) };
    let folder = path.parent().unwrap_or(Path::new(""));
    let is_same = match (folder.join(named).canonicalize(), name.canonicalize()) {
        (Ok(named), Ok(name)) => named == name,
        _ => false,
    };
    if is_same { Ok(()) } else { Err(damaged(path, &format!("it is an overlay over {named}"))) }
}

/// Open an image and its bases. `depth` counts them.
fn open_images(path: &Path, is_written: bool, depth: usize) -> Result<(Access, Arc<dyn Backend>)> {
    let file = Raw::open(path, is_written)?;
    let header = checked(&file, is_written)?;
    let file: Arc<dyn Backend> = Arc::new(file);
    let Some((name, format)) = header.backing else {
        return Ok((open_image(path, Arc::clone(&file), is_written, None)?, file));
    };
    if depth == MOST_IMAGES {
        return Err(damaged(path, "more than 8 images are based on each other"));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let base = folder.join(&name);
    if !header::is_plain(&name) || !is_below(&base, folder) {
        let detail = format!("its base {name:?} is not a file below its own folder");
        return Err(damaged(path, &detail).hint("`qemu-img rebase -u -b NAME -F FORMAT` names it"));
    }
    let base = match format.as_str() {
        "qcow2" => open_images(&base, false, depth + 1)?.0,
        "raw" => {
            let store = Store::new(Arc::new(Raw::open(&base, false)?));
            let raw = imago::raw::Raw::builder(store).open(DenyImplicitOpenGate::default());
            FormatAccess::new(raw.map_err(|e| damaged(path, &e.to_string()))?)
        }
        other => return Err(damaged(path, &format!("its base has the format {other:?}"))),
    };
    Ok((open_image(path, Arc::clone(&file), is_written, Some(base))?, file))
}

/// Whether a path leads to a place below a folder, also behind symbolic links.
fn is_below(path: &Path, folder: &Path) -> bool {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    match (path.canonicalize(), folder.canonicalize()) {
        (Ok(path), Ok(folder)) => path.starts_with(folder),
        // To open it says what is wrong.
        _ => true,
    }
}

fn open_image(
    path: &Path,
    file: Arc<dyn Backend>,
    is_written: bool,
    base: Option<Access>,
) -> Result<Access> {
    let builder = Image::<Store>::builder(Store::new(file));
    let builder = builder.write(is_written).backing(base);
    let opened = guarded(|| builder.open(DenyImplicitOpenGate::default()));
    match opened {
        Some(Ok(image)) => Ok(FormatAccess::new(image)),
        Some(Err(error)) => Err(damaged(path, &error.to_string())),
        None => Err(damaged(path, "it is damaged")),
    }
}

fn create(
    path: &Path,
    file: Arc<dyn Backend>,
    (size, name): (u64, Option<&Path>),
    base: Access,
) -> Result<Access> {
    let mut builder = Image::<Store>::create_builder(Store::new(file)).size(size);
    if let Some(name) = name.and_then(|name| name.canonicalize().ok()) {
        builder = builder.backing(name.to_string_lossy().into_owned(), "raw".into());
    }
    let open = |image| Ok(Image::<Store>::builder(image).write(true).backing(Some(base)));
    let made = builder.create_open(DenyImplicitOpenGate::default(), open);
    made.map(FormatAccess::new).map_err(|error| damaged(path, &error.to_string()))
}

impl Backend for Qcow2 {
    fn size(&self) -> io::Result<u64> {
        Ok(self.image.size())
    }

    fn read_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        let length = slices::length(buffers);
        self.shared(|| {
            if let Some(at) = self.place(offset, length)? {
                return self.file.read(at, buffers);
            }
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
            self.image.read(bytes.as_mut_slice(), offset)?;
            slices::fill(buffers, 0, &bytes);
            Ok(())
        })
    }

    fn write_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        self.for_writing()?;
        self.shared(|| match self.place(offset, slices::length(buffers))? {
            Some(at) => self.file.backend.write_at(at, buffers),
            None => self.image.write(slices::to_vec(buffers).as_slice(), offset),
        })
    }

    fn flush(&self) -> io::Result<()> {
        if self.is_read_only {
            return Ok(());
        }
        self.shared(|| self.image.flush().and_then(|()| self.image.sync()))
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write_zeroes(offset, length, true)
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        self.for_writing()?;
        let Some(discards) = self.discards.as_ref().filter(|_| may_unmap) else {
            return self.moving(|| self.shared(|| self.image.write_zeroes(offset, length)));
        };
        let _alone = discards.write();
        let discard = || {
            // SAFETY: no other request is in progress, because each holds this lock, and what is
            // kept of a mapping beyond a request is forgotten.
            unsafe { self.image.discard_to_zero_unsafe(offset, length) }
        };
        self.moving(|| self.guarded(discard))
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        self.for_writing()?;
        if size < self.image.size() {
            let text = "a qcow2 image can only grow";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        self.shared(|| self.image.resize_grow(size, PreallocateMode::None))
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn may_block(&self) -> bool {
        self.may_block
    }
}

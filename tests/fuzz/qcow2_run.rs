//! Opens an image, reads and writes it, and opens it again. A request may fail.

use std::path::{Path, PathBuf};

use pyvmm::disk::{Contents, Disk, Format, Layer, of_bytes, of_bytes_mut, open};
use pyvmm::error::ErrorKind;
use vmm_sys_util::tempdir::TempDir;

use super::chance::Chance;

/// The files that images may be based on, in a folder.
pub(crate) struct Folder(TempDir);

/// What images came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    pub(crate) images: u64,
    pub(crate) opened: u64,
    pub(crate) requests: u64,
    pub(crate) failed: u64,
}

impl Folder {
    /// With this image as a base.
    pub(crate) fn new(base: &[u8]) -> Self {
        // In memory, if there is such a folder: flushes would wait for the disk.
        let shared = Path::new("/dev/shm");
        let place = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        let folder = Self(TempDir::new_with_prefix(place.join("pyvmm-fuzz-")).unwrap());
        std::fs::create_dir_all(folder.path("images")).unwrap();
        std::fs::write(folder.path("secret"), "a secret of the host").unwrap();
        std::fs::write(folder.path("images/base"), vec![b'b'; 1 << 16]).unwrap();
        std::fs::write(folder.path("images/base.qcow2"), base).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.as_path().join(name)
    }
}

/// Open an image that may come from anybody.
fn open_image(path: &Path, layer: &Layer, is_read_only: bool) -> Result<Option<Disk>, String> {
    match open(Contents::File(path.to_owned(), Format::Qcow2), layer, is_read_only) {
        Ok(disk) => Ok(Some(disk)),
        Err(error) if matches!(error.kind, ErrorKind::Config | ErrorKind::Io) => Ok(None),
        Err(error) => Err(format!("{:?} is no error of an image: {error}", error.kind)),
    }
}

fn place(size: u64, chance: &mut Chance) -> (u64, usize) {
    let length = [1, 512, 4096, 0x1_0001][chance.below(4)];
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let at = match chance.below(4) {
        0 => 0,
        1 => chance.below(1 << 17),
        2 => chance.below(size),
        _ => size.saturating_sub(length),
    };
    (at as u64, length)
}

/// A request. Returns whether it succeeded.
fn request(disk: &Disk, chance: &mut Chance) -> Result<bool, String> {
    let (at, length) = place(disk.size(), chance);
    let Ok(session) = disk.session() else { return Ok(false) };
    let mut bytes = vec![0x55; length];
    let done = match chance.below(10) {
        0..=3 => session.read_at(at, &of_bytes_mut(&mut bytes)),
        4..=6 => session.write_at(at, &of_bytes(&bytes)),
        7 => session.discard(at, length as u64 * 8),
        8 => session.write_zeroes(at, length as u64, chance.below(2) == 0),
        _ => session.flush(),
    };
    if bytes.windows(20).any(|found| found == b"a secret of the host") {
        return Err("the image shows another file".into());
    }
    Ok(done.is_ok())
}

/// Make requests that follow from the bytes of the image. An error is a finding.
pub(crate) fn run(image: &[u8], folder: &Folder) -> Result<Count, String> {
    let path = folder.path("images/it.qcow2");
    let mut chance = Chance(u64::from(crc32fast::hash(image)) | 1);
    let mut count = Count { images: 1, ..Count::default() };
    let over = folder.path("images/over.qcow2");
    for (layer, is_read_only, requests) in [
        (Layer::None, true, 6),
        (Layer::Memory, false, 6),
        (Layer::File(over.clone()), false, 6),
        (Layer::None, false, 24),
    ] {
        std::fs::write(&path, image).unwrap();
        let _ = std::fs::remove_file(&over);
        let Some(disk) = open_image(&path, &layer, is_read_only)? else { continue };
        count.opened += 1;
        for _ in 0..requests {
            count.requests += 1;
            count.failed += u64::from(!request(&disk, &mut chance)?);
        }
        if chance.below(4) == 0 {
            let _ = disk.resize(disk.size().saturating_add(0x1_0000));
        }
        drop(disk);
        if layer == Layer::None
            && !is_read_only
            && let Some(disk) = open_image(&path, &layer, false)?
        {
            request(&disk, &mut chance)?;
        }
    }
    let secret = std::fs::read(folder.path("secret")).unwrap();
    let base = std::fs::read(folder.path("images/base")).unwrap();
    if secret != b"a secret of the host" || base != vec![b'b'; 1 << 16] {
        return Err("the image has changed another file".into());
    }
    Ok(count)
}

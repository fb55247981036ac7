//! From a description of a disk to the disk: opens files, and puts overlays over them. Runs on the
//! thread that builds the machine.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::backend::Backend;
use super::bytes::Bytes;
use super::disk::Disk;
use super::header::MAGIC;
use super::overlay::Overlay;
use super::qcow2::Qcow2;
use super::raw::Raw;
use super::slices;
use crate::error::{Error, ErrorKind, Result};

/// The format of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// qcow2 if the file's name ends in ".qcow2", else raw. The contents do not decide: a guest
    /// could write into a raw disk what makes it an image of another file. A raw disk that begins
    /// like an image is refused.
    #[default]
    Auto,
    /// The bytes of the disk.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// What a disk contains at first.
#[derive(Clone, Debug)]
pub enum Contents {
    /// A file.
    File(PathBuf, Format),
    /// These bytes.
    Bytes(Vec<u8>),
    /// An object of the program.
    Backend(Arc<dyn Backend>),
}

/// What takes the writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Layer {
    /// The contents themselves; for bytes, memory.
    #[default]
    None,
    /// Memory: they are gone at the end.
    Memory,
    /// A qcow2 image in this file, which is created if it does not exist.
    File(PathBuf),
}

/// Open a disk.
///
/// # Errors
/// [`ErrorKind::Config`] if an image is damaged or in use; [`ErrorKind::Io`] if a file cannot be
/// opened.
pub fn open(contents: Contents, layer: &Layer, is_read_only: bool) -> Result<Disk> {
    let is_written = *layer == Layer::None && !is_read_only;
    let name = match &contents {
        Contents::File(path, _) => Some(path.clone()),
        _ => None,
    };
    let (base, is_raw): (Arc<dyn Backend>, bool) = match contents {
        Contents::File(path, format) => open_file(&path, format, is_written)?,
        Contents::Bytes(bytes) => (Arc::new(Bytes::new(bytes)), false),
        Contents::Backend(backend) => (backend, false),
    };
    let is_constant = base.is_volatile() && base.is_read_only();
    let backend: Arc<dyn Backend> = match layer {
        Layer::None if is_constant && !is_read_only => Arc::new(Overlay::new(base)),
        Layer::None => base,
        Layer::Memory => Arc::new(Overlay::new(base)),
        Layer::File(path) => Arc::new(Qcow2::over(path, base, name.as_deref().filter(|_| is_raw))?),
    };
    Disk::new(backend, is_read_only).map_err(|error| os(name.as_deref(), &error))
}

fn os(path: Option<&Path>, error: &io::Error) -> Error {
    let at = path.map_or_else(|| "disk".into(), |path| path.to_string_lossy().into_owned());
    Error::os(ErrorKind::Io, at, error)
}

/// Open a file, and say whether it is a raw one.
fn open_file(path: &Path, format: Format, is_written: bool) -> Result<(Arc<dyn Backend>, bool)> {
    let is_named_so = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("qcow2"));
    if format == Format::Qcow2 || (format == Format::Auto && is_named_so) {
        return Ok((Arc::new(Qcow2::open(path, is_written)?), false));
    }
    let raw = Raw::open(path, is_written)?;
    let mut start = [0; 4];
    let is_image = raw.read_at(0, &slices::of_bytes_mut(&mut start)).is_ok() && start == MAGIC;
    if format == Format::Auto && is_image {
        let detail = "it begins like a qcow2 image, and its name does not end in .qcow2";
        let error = Error::new(ErrorKind::Config, path.to_string_lossy(), detail);
        return Err(error.hint("say which it is: format=\"qcow2\" or format=\"raw\""));
    }
    Ok((Arc::new(raw), true))
}

#[cfg(test)]
mod tests {
    //! Covers src/disk/qcow2.rs, src/disk/storage.rs.

    use super::*;
    use crate::disk::{of_bytes, of_bytes_mut};
    use proptest::prelude::*;
    use vmm_sys_util::tempdir::TempDir;

    const SIZE: usize = 1 << 20;

    fn folder() -> TempDir {
        TempDir::new_with_prefix(std::env::temp_dir().join("disk")).unwrap()
    }

    fn read(disk: &Disk, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0x55; length];
        disk.session().unwrap().read_at(offset, &of_bytes_mut(&mut bytes)).unwrap();
        bytes
    }

    /// A raw file, and an image over it that another program has made relative to it.
    fn images(folder: &TempDir) -> (PathBuf, PathBuf) {
        let (base, top) = (folder.as_path().join("base"), folder.as_path().join("top.qcow2"));
        std::fs::write(&base, vec![7; SIZE]).unwrap();
        let layer = Layer::File(top.clone());
        let disk = open(Contents::File(base.clone(), Format::Raw), &layer, false).unwrap();
        disk.session().unwrap().write_at(SIZE as u64 - 100, &of_bytes(&[1; 100])).unwrap();
        disk.session().unwrap().flush().unwrap();
        (base, top)
    }

    fn refusal(contents: Contents, layer: &Layer) -> String {
        let error = open(contents, layer, false).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Config), "{error:?}");
        error.to_string()
    }

    #[test]
    fn an_overlay_in_a_file_is_continued() {
        let folder = folder();
        let (base, top) = images(&folder);
        let layer = Layer::File(top);
        let disk = open(Contents::File(base.clone(), Format::Auto), &layer, false).unwrap();
        assert_eq!(read(&disk, SIZE as u64 - 101, 101), [[7].as_slice(), &[1; 100]].concat());
        disk.session().unwrap().discard(0, 1 << 16).unwrap();
        disk.session().unwrap().write_zeroes(1 << 16, 10, false).unwrap();
        disk.resize(2 << 20).unwrap();
        assert_eq!(read(&disk, 0, (1 << 16) + 11).iter().filter(|b| **b == 7).count(), 1);
        assert_eq!(read(&disk, 1 << 20, 5), [0; 5]);
        assert!(std::fs::read(&base).unwrap().iter().all(|byte| *byte == 7));
        assert_eq!(disk.resize(5).unwrap_err().kind(), io::ErrorKind::Unsupported);
        drop(disk);
        let other = folder.as_path().join("other");
        std::fs::write(&other, vec![7; SIZE]).unwrap();
        let text = refusal(Contents::File(other, Format::Raw), &layer);
        assert!(text.contains("it is an overlay over"), "{text}");
        let bytes = Contents::Bytes(vec![3; SIZE]);
        let over_bytes = Layer::File(folder.as_path().join("over"));
        let disk = open(bytes.clone(), &over_bytes, false).unwrap();
        disk.session().unwrap().write_at(5, &of_bytes(&[4])).unwrap();
        drop(disk);
        let disk = open(bytes, &over_bytes, false).unwrap();
        assert_eq!(read(&disk, 4, 3), [3, 4, 3]);
    }

    /// Put another name of the base into an image, and another format of five bytes.
    fn rename(top: &Path, from: &str, to: &str, format: Option<&[u8; 5]>) -> Contents {
        let mut bytes = std::fs::read(top).unwrap();
        let find = |what: &[u8]| bytes.windows(what.len()).position(|window| window == what);
        let (at, extension) = (find(from.as_bytes()).unwrap(), find(&[0xe2, 0x79, 0x2a, 0xca]));
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes[16..20].copy_from_slice(&u32::try_from(to.len()).unwrap().to_be_bytes());
        if let Some(format) = format {
            let at = extension.unwrap() + 4;
            bytes[at..at + 9].copy_from_slice(&[&[0, 0, 0, 5], format.as_slice()].concat());
        }
        std::fs::write(top, bytes).unwrap();
        Contents::File(top.to_owned(), Format::Qcow2)
    }

    #[test]
    fn an_image_opens_its_base_below_its_folder_only() {
        let folder = folder();
        let (base, top) = images(&folder);
        // The overlay names its base by an absolute path, which is not for an image from anywhere.
        let text = refusal(Contents::File(top.clone(), Format::Auto), &Layer::None);
        assert!(text.contains("below its own folder") && text.contains("rebase"), "{text}");
        let long = base.canonicalize().unwrap();
        let contents = rename(&top, long.to_str().unwrap(), "base", None);
        let disk = open(contents.clone(), &Layer::None, false).unwrap();
        assert_eq!(read(&disk, SIZE as u64 - 101, 101), [[7].as_slice(), &[1; 100]].concat());
        disk.session().unwrap().write_at(0, &of_bytes(&[8; 4])).unwrap();
        assert_eq!(read(&disk, 0, 5), [8, 8, 8, 8, 7]);
        disk.session().unwrap().discard(0, SIZE as u64).unwrap();
        assert_eq!(read(&disk, 0, SIZE), vec![0; SIZE]);
        drop(disk);
        let reader = open(contents, &Layer::None, true).unwrap();
        assert!(reader.is_read_only() && reader.session().unwrap().flush().is_ok());
        drop(reader);
        std::os::unix::fs::symlink("/etc/passwd", folder.as_path().join("link")).unwrap();
        for (from, to) in [("base", "link"), ("link", "../x")] {
            let text = refusal(rename(&top, from, to, None), &Layer::None);
            assert!(text.contains("below its own folder"), "{text}");
        }
        // A circle of images.
        let circle = rename(&top, "../x", "top.qcow2", Some(b"qcow2"));
        let error = open(circle, &Layer::None, true).unwrap_err();
        assert!(error.detail.contains("more than 8"), "{error}");
    }

    #[test]
    fn a_raw_file_is_not_taken_for_an_image() {
        let folder = folder();
        let path = folder.as_path().join("raw");
        std::fs::write(&path, [MAGIC.as_slice(), &[0; 508]].concat()).unwrap();
        let text = refusal(Contents::File(path.clone(), Format::Auto), &Layer::None);
        assert!(text.contains("format=\"raw\""), "{text}");
        let disk = open(Contents::File(path.clone(), Format::Raw), &Layer::Memory, false).unwrap();
        disk.session().unwrap().write_at(0, &of_bytes(&[1])).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[0], MAGIC[0]);
        drop(disk);
        let text = refusal(Contents::File(path, Format::Qcow2), &Layer::None);
        assert!(text.contains("too short") || text.contains("clusters"), "{text}");
    }

    #[test]
    fn bytes_take_writes_in_memory() {
        let disk = open(Contents::Bytes(vec![1; 4096]), &Layer::None, false).unwrap();
        disk.session().unwrap().write_at(1, &of_bytes(&[2])).unwrap();
        assert_eq!(read(&disk, 0, 3), [1, 2, 1]);
        let disk = open(Contents::Bytes(vec![1; 4096]), &Layer::None, true).unwrap();
        assert!(disk.session().unwrap().write_at(1, &of_bytes(&[2])).is_err());
    }

    /// Requests on an image: where, how many bytes, and what.
    fn requests() -> impl Strategy<Value = Vec<(usize, usize, u8)>> {
        let at = prop_oneof![0..SIZE, (0..SIZE >> 16).prop_map(|cluster| cluster << 16)];
        let length = prop_oneof![1usize..9000, (1usize..5).prop_map(|clusters| clusters << 16)];
        prop::collection::vec((at, length, 0u8..8), 1..40)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        // Long because the requests, what each does to the model, and the check are in one place.
        #[test]
        fn an_image_reads_as_bytes_would(requests in requests(), is_over in any::<bool>()) {
            let folder = folder();
            let path = folder.as_path().join("it.qcow2");
            let layer = Layer::File(path.clone());
            let base = Contents::Bytes(vec![5; SIZE]);
            let mut model = vec![5; SIZE];
            let mut disk = open(base.clone(), &layer, false).unwrap();
            if !is_over {
                disk.session().unwrap().write_at(0, &of_bytes(&model)).unwrap();
                disk.session().unwrap().flush().unwrap();
                drop(disk);
                disk = open(Contents::File(path.clone(), Format::Qcow2), &Layer::None, false).unwrap();
            }
            for (number, (at, length, kind)) in (1u8..).zip(requests) {
                let end = (at + length).min(SIZE);
                let (offset, length) = (at as u64, (end - at) as u64);
                let session = disk.session().unwrap();
                match kind {
                    0..3 => {
                        let bytes = vec![number; end - at];
                        session.write_at(offset, &of_bytes(&bytes)).unwrap();
                        model[at..end].copy_from_slice(&bytes);
                    }
                    3..6 => prop_assert_eq!(&read(&disk, offset, end - at), &model[at..end]),
                    _ => {
                        session.write_zeroes(offset, length, kind == 6).unwrap();
                        model[at..end].fill(0);
                    }
                }
            }
            prop_assert_eq!(&read(&disk, 0, SIZE), &model);
            disk.session().unwrap().flush().unwrap();
            drop(disk);
            let again = if is_over {
                open(base, &layer, false)
            } else {
                open(Contents::File(path, Format::Qcow2), &Layer::None, true)
            };
            prop_assert_eq!(&read(&again.unwrap(), 0, SIZE), &model);
        }

        #[test]
        fn a_damaged_image_is_refused_or_fails_its_requests(
            changes in prop::collection::vec((0usize..0x6_0000, any::<u8>()), 1..40),
        ) {
            let folder = folder();
            let path = folder.as_path().join("it.qcow2");
            let layer = Layer::File(path.clone());
            let disk = open(Contents::Bytes(vec![5; SIZE]), &layer, false).unwrap();
            disk.session().unwrap().write_at(0, &of_bytes(&vec![6; 1 << 17])).unwrap();
            disk.session().unwrap().flush().unwrap();
            drop(disk);
            let mut bytes = std::fs::read(&path).unwrap();
            for (at, value) in changes {
                // Most of them in the tables.
                let at = if at.is_multiple_of(2) { at } else { (at % 0x400) + ((at / 0x400 % 6) << 16) };
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            std::fs::write(&path, bytes).unwrap();
            if let Ok(disk) = open(Contents::File(path, Format::Qcow2), &Layer::None, false) {
                let mut bytes = vec![0; 4096];
                for start in (0..disk.size().min(SIZE as u64)).step_by(4096) {
                    let _ = disk.session().unwrap().read_at(start, &of_bytes_mut(&mut bytes));
                    let _ = disk.session().unwrap().write_at(start, &of_bytes(&bytes));
                }
                let _ = disk.session().unwrap().discard(0, 1 << 17);
                let _ = disk.session().unwrap().flush();
            }
        }
    }
}

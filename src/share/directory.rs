//! The directory that is shared, and how: opened once, when the machine is built.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::entry::Entry;
use super::system;
use super::wire::{Answer, Errno, Name};
use crate::error::{Error, ErrorKind, Result};

/// How a directory is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether the guest cannot change anything.
    pub read_only: bool,
    /// The user and group that the guest sees as the owner of every file. None for the host's.
    pub owner: Option<(u32, u32)>,
}

/// See the module.
#[derive(Debug)]
pub struct Directory {
    pub(super) root: Entry,
    /// /proc/self/fd.
    pub(super) proc: OwnedFd,
    /// The device of the root.
    pub(super) device: u64,
    pub(super) options: Options,
}

impl Directory {
    /// Open a directory.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if it is not there or is no directory, or if this host has no openat2
    /// or no /proc.
    pub fn open(path: &Path, options: Options) -> Result<Self> {
        let failed = |Errno(number): Errno| {
            let error = std::io::Error::from_raw_os_error(number);
            Error::os(ErrorKind::Config, format!("shares: {}", path.display()), &error)
        };
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| Error::new(ErrorKind::Config, "shares", "a path has a NUL in it"))?;
        let fd = system::open_path(&name, libc::O_PATH | libc::O_DIRECTORY).map_err(failed)?;
        system::open_beneath(&fd, c".", libc::O_PATH, 0).map_err(|Errno(number)| {
            let error = std::io::Error::from_raw_os_error(number);
            Error::os(ErrorKind::Config, "shares: openat2", &error).hint("Linux 5.6 has it")
        })?;
        let root = Entry::new(fd).map_err(failed)?;
        let device = root.stat().map_err(failed)?.st_dev;
        Ok(Self { root, proc: own_descriptors()?, device, options })
    }

    /// Refuse a change of a directory that is shared for reading.
    pub(super) fn check_writable(&self) -> Answer<()> {
        if self.options.read_only { Err(Errno(libc::EROFS)) } else { Ok(()) }
    }

    /// Where a file is now: the names from the root on. None if it has no name in the share any
    /// more.
    pub(super) fn names_of(&self, entry: &Entry) -> Option<Vec<Vec<u8>>> {
        let root = system::path(&self.proc, &self.root.fd).ok()?;
        let path = system::path(&self.proc, &entry.fd).ok()?;
        let below = path.strip_prefix(root.strip_suffix(b"/").unwrap_or(&root))?;
        if !below.is_empty() && !below.starts_with(b"/") {
            return None;
        }
        let parts = below.split(|byte| *byte == b'/').filter(|part| !part.is_empty());
        let names: Vec<_> = parts.map(<[u8]>::to_vec).collect();
        // The path was only text: it may be another file's now.
        let found = self.walk(names.iter().map(Vec::as_slice)).ok()?;
        entry.is(&found.stat().ok()?).then_some(names)
    }

    /// Walk from the root.
    pub(super) fn walk<'a>(&self, names: impl Iterator<Item = &'a [u8]>) -> Answer<Entry> {
        let mut entry = self.root.clone();
        for name in names {
            entry = entry.walk(&Name::new(name)?)?;
        }
        Ok(entry)
    }

    /// The directory that a file is in, and its name there.
    pub(super) fn place_of(&self, entry: &Entry) -> Answer<(Entry, Name)> {
        let names = self.names_of(entry).ok_or(Errno(libc::ESTALE))?;
        let (name, parents) = names.split_last().ok_or(Errno(libc::EBUSY))?;
        let (parent, name) = (self.walk(parents.iter().map(Vec::as_slice))?, Name::new(name)?);
        let there = system::stat_at(parent.directory()?, name.as_c_str())?;
        if entry.is(&there) { Ok((parent, name)) } else { Err(Errno(libc::ESTALE)) }
    }
}

/// /proc/self/fd, by which descriptors are opened again.
fn own_descriptors() -> Result<OwnedFd> {
    const PROC_SUPER_MAGIC: i64 = 0x9fa0;
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    system::open_path(c"/proc/self/fd", flags)
        .ok()
        .filter(|fd| system::stat_fs(fd).is_ok_and(|stat| stat.f_type == PROC_SUPER_MAGIC))
        .ok_or_else(|| Error::new(ErrorKind::Config, "shares", "a share needs /proc"))
}

#[cfg(test)]
mod tests {
    use super::super::client::Folder;
    use super::*;

    #[test]
    fn what_is_no_directory_is_refused() {
        let folder = Folder::new();
        folder.write("file", b"");
        for path in ["missing", "file"] {
            let error = Directory::open(&folder.path(path), Options::default()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Config);
            assert!(error.at.contains(path), "{error}");
        }
    }

    #[test]
    fn a_file_that_moves_is_found_where_it_is() {
        let folder = Folder::new();
        std::fs::create_dir_all(folder.path("a/b")).unwrap();
        folder.write("a/b/file (deleted)", b"");
        let shared = Directory::open(&folder.path(""), Options::default()).unwrap();
        let names = [&b"a"[..], b"b", b"file (deleted)"];
        let entry = shared.walk(names.into_iter()).unwrap();
        assert_eq!(shared.names_of(&entry).unwrap(), names);
        std::fs::rename(folder.path("a/b"), folder.path("c")).unwrap();
        assert_eq!(shared.names_of(&entry).unwrap(), [&b"c"[..], b"file (deleted)"]);
        assert_eq!(shared.names_of(&shared.root).unwrap(), Vec::<Vec<u8>>::new());
        assert_eq!(shared.place_of(&shared.root).map(drop), Err(Errno(libc::EBUSY)));
        std::fs::remove_file(folder.path("c/file (deleted)")).unwrap();
        assert_eq!(shared.names_of(&entry), None);
        assert_eq!(shared.place_of(&entry).map(drop), Err(Errno(libc::ESTALE)));
    }
}

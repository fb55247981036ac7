//! Replaces a file atomically: a new file is written beside it, synced and renamed. If anything
//! fails, or the process is killed, the old file stays complete and nothing is left behind. On the
//! caller's thread, which may wait for the disk.
//!
//! Only regular files are replaced. A symbolic link stays, and its target is replaced.

use std::ffi::CString;
use std::fs::{File, FileType, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown,
};
use std::path::{Path, PathBuf};

use super::snapshot::new_id;
use crate::error::{Error, ErrorKind, Result};

/// How many links the kernel follows.
const MAX_LINKS: usize = 40;
/// The set-ID and sticky bits, and the group's permissions.
const SPECIAL_BITS: u32 = 0o7000;
const GROUP_BITS: u32 = 0o070;

/// A new file without a name, or with a temporary one if the file system needs it.
pub(super) struct NewFile {
    file: File,
    /// Its final path.
    path: PathBuf,
    directory: PathBuf,
    /// Its temporary path, which is removed unless the file gets its final one.
    name: Option<PathBuf>,
}

impl NewFile {
    /// Create a file that will replace the one at this path, with its mode and owner.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the path is not a regular file or is not writable, or no file can be
    /// created beside it.
    pub(super) fn to_replace(path: &Path) -> Result<Self> {
        let (path, replaced) = resolved(path)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = parent.unwrap_or(Path::new(".")).to_owned();
        let mode = if replaced.is_some() { 0o600 } else { 0o666 };
        let nameless = OpenOptions::new()
            .write(true)
            .mode(mode)
            .custom_flags(libc::O_TMPFILE)
            .open(&directory);
        let new = match nameless {
            Ok(file) => Self { file, path, directory, name: None },
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                let name = other_name(&directory, &path)?;
                let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&name);
                let file = file.map_err(|e| failed(&name, &e))?;
                Self { file, path, directory, name: Some(name) }
            }
            Err(e) => return Err(failed(&path, &e)),
        };
        if let Some(replaced) = replaced {
            new.take_over(&replaced).map_err(|e| failed(&new.path, &e))?;
        }
        Ok(new)
    }

    /// Take over the owner and the mode of the replaced file. If the owner cannot be changed, a
    /// different group gets no permissions.
    fn take_over(&self, replaced: &Metadata) -> io::Result<()> {
        let (user, group) = (replaced.uid(), replaced.gid());
        let own = self.file.metadata()?;
        if (own.uid(), own.gid()) != (user, group)
            && fchown(&self.file, Some(user), Some(group)).is_err()
        {
            // The owner may still change it to one of its own groups.
            let _ = fchown(&self.file, None, Some(group));
        }
        let own = self.file.metadata()?;
        let mut mode = replaced.mode() & 0o7777;
        if own.uid() != user {
            mode &= !SPECIAL_BITS;
        }
        if own.gid() != group {
            mode &= !(SPECIAL_BITS | GROUP_BITS);
        }
        self.file.set_permissions(Permissions::from_mode(mode))
    }

    pub(super) fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(|e| failed(&self.directory, &e))
    }

    pub(super) fn set_length(&self, length: u64) -> Result<()> {
        self.file.set_len(length).map_err(|e| failed(&self.directory, &e))
    }

    /// Sync it and give it its final name.
    pub(super) fn replace(mut self) -> Result<()> {
        self.file.sync_all().map_err(|e| failed(&self.path, &e))?;
        if self.name.is_none() {
            let name = other_name(&self.directory, &self.path)?;
            link(&self.file, &name).map_err(|e| failed(&name, &e))?;
            self.name = Some(name);
        }
        if let Some(name) = &self.name {
            // The path may have changed since it was checked.
            if let Ok(found) = self.path.symlink_metadata() {
                check_replaceable(&self.path, &found)?;
            }
            std::fs::rename(name, &self.path).map_err(|e| failed(&self.path, &e))?;
        }
        self.name = None;
        // Makes the name survive a crash too. Some file systems cannot sync a directory, and
        // failing there does not matter.
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

/// The target of a path, with its metadata if it exists.
fn resolved(path: &Path) -> Result<(PathBuf, Option<Metadata>)> {
    match path.metadata() {
        Ok(found) => {
            check_replaceable(path, &found)?;
            let real = path.canonicalize().map_err(|e| failed(path, &e))?;
            let same = |other: &Metadata| (other.dev(), other.ino()) == (found.dev(), found.ino());
            if !real.symlink_metadata().is_ok_and(|other| same(&other)) {
                return Err(refused(path, "a file without a name, which nothing can replace"));
            }
            check_writable(&real)?;
            Ok((real, Some(found)))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok((end_of_links(path)?, None)),
        Err(e) => Err(failed(path, &e)),
    }
}

/// The target of a dangling link.
fn end_of_links(path: &Path) -> Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        let Ok(next) = path.read_link() else { return Ok(path) };
        path = path.parent().unwrap_or(Path::new("")).join(next);
    }
    Err(failed(&path, &io::Error::from_raw_os_error(libc::ELOOP)))
}

fn check_replaceable(path: &Path, found: &Metadata) -> Result<()> {
    if found.is_file() {
        return Ok(());
    }
    let what = kind_of(found.file_type());
    Err(refused(path, &format!("{what}, and only a regular file is replaced")))
}

fn kind_of(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        "no regular file"
    }
}

/// A write-protected file is not replaced.
fn check_writable(path: &Path) -> Result<()> {
    let name = c_string(path).map_err(|e| failed(path, &e))?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    let result =
        unsafe { libc::faccessat(libc::AT_FDCWD, name.as_ptr(), libc::W_OK, libc::AT_EACCESS) };
    if result == 0 { Ok(()) } else { Err(failed(path, &io::Error::last_os_error())) }
}

/// An unused name beside `path`.
fn other_name(directory: &Path, path: &Path) -> Result<PathBuf> {
    if path.file_name().is_none() {
        return Err(refused(path, "no name of a file"));
    }
    let random: String = new_id()?.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    // A short name, because that of `path` may have the maximum length.
    Ok(directory.join(format!(".pyvmm-{random}.part")))
}

/// Give a file without a name a name.
fn link(file: &File, name: &Path) -> io::Result<()> {
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let to = c_string(name)?;
    let (here, follow) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: both paths are NUL-terminated and outlive the call.
    let result = unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), follow) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn c_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn refused(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Io, "snapshot", format!("{}: {why}", path.display()))
}

fn failed(path: &Path, error: &io::Error) -> Error {
    let mut failed = Error::os(ErrorKind::Io, "snapshot", error);
    failed.detail = format!("{}: {}", path.display(), failed.detail);
    failed
}

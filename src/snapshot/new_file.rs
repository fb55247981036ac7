//! A file that takes the place of another in one step: written beside it, synced, and renamed.
//! Whatever fails, and whenever the process is killed, the old file stays whole and nothing is left
//! behind.
//!
//! Only a regular file, or nothing, is replaced. A symbolic link stays: what it leads to is
//! replaced.

use std::ffi::CString;
use std::fs::{File, FileType, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown,
};
use std::path::{Path, PathBuf};

use super::new_id;
use crate::error::{Error, ErrorKind, Result};

/// The kernel follows so many links.
const MOST_LINKS: usize = 40;
/// Set-user-ID and the like, and what a group may do.
const SPECIAL_BITS: u32 = 0o7000;
const GROUP_BITS: u32 = 0o070;

/// A file without a name, or where the file system cannot have such, with a name of its own.
pub(super) struct NewFile {
    file: File,
    /// What it is to be called.
    path: PathBuf,
    directory: PathBuf,
    /// To be removed unless it has got its final name.
    name: Option<PathBuf>,
}

impl NewFile {
    /// One that will stand where this path leads to, with the mode and the owner of the file that
    /// stands there.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when something stands there that is no regular file, or that this process
    /// may not write, and when no file can be made beside it.
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

    /// Have the owner and the mode of the file that it replaces. Where the owner cannot be given
    /// away, a group that is not the old one gets nothing.
    fn take_over(&self, replaced: &Metadata) -> io::Result<()> {
        let (user, group) = (replaced.uid(), replaced.gid());
        let own = self.file.metadata()?;
        if (own.uid(), own.gid()) != (user, group)
            && fchown(&self.file, Some(user), Some(group)).is_err()
        {
            // The owner may still give it to one of its own groups.
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

    /// Bring it to the disk and give it its name.
    pub(super) fn replace(mut self) -> Result<()> {
        self.file.sync_all().map_err(|e| failed(&self.path, &e))?;
        if self.name.is_none() {
            let name = other_name(&self.directory, &self.path)?;
            link(&self.file, &name).map_err(|e| failed(&name, &e))?;
            self.name = Some(name);
        }
        if let Some(name) = &self.name {
            // It may have changed while this was written.
            if let Ok(found) = self.path.symlink_metadata() {
                check_replaceable(&self.path, &found)?;
            }
            std::fs::rename(name, &self.path).map_err(|e| failed(&self.path, &e))?;
        }
        self.name = None;
        // The name too is to be there after a crash. Some file systems cannot sync a directory:
        // theirs is the risk.
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

/// Where a path leads to, with what stands there, if anything does.
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

/// Where a link leads to that leads to nothing.
fn end_of_links(path: &Path) -> Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
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

/// A file that is protected against writing is not replaced either.
fn check_writable(path: &Path) -> Result<()> {
    let name = c_string(path).map_err(|e| failed(path, &e))?;
    // SAFETY: a path that ends in zero and lives through the call.
    let result =
        unsafe { libc::faccessat(libc::AT_FDCWD, name.as_ptr(), libc::W_OK, libc::AT_EACCESS) };
    if result == 0 { Ok(()) } else { Err(failed(path, &io::Error::last_os_error())) }
}

/// A name beside `path` that nobody uses.
fn other_name(directory: &Path, path: &Path) -> Result<PathBuf> {
    if path.file_name().is_none() {
        return Err(refused(path, "no name of a file"));
    }
    let random: String = new_id()?.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    // Short: `path`'s own may have all the length that a name can have.
    Ok(directory.join(format!(".pyvmm-{random}.part")))
}

/// Give a nameless file a name.
fn link(file: &File, name: &Path) -> io::Result<()> {
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let to = c_string(name)?;
    let (here, follow) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: two paths that end in zero and live through the call.
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

//! Locks an image against a second writer, in this process or another, by an open file description
//! lock. It ends with the last descriptor of the file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Lock a whole file: for its only user if it is written, else for all who read it.
///
/// # Errors
/// `WouldBlock` if somebody else uses it. A file system without such locks gives none, and no
/// error.
pub(super) fn lock(file: &File, is_written: bool) -> io::Result<()> {
    let kind = if is_written { libc::F_WRLCK } else { libc::F_RDLCK };
    // SAFETY: all-zero bytes are a valid `flock`: the whole file, from its start.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).unwrap_or_default();
    // SAFETY: the descriptor is open, and the kernel only reads the structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(file.as_path()).unwrap();
        let (one, two, three) = (open(), open(), open());
        lock(&one, false).unwrap();
        lock(&two, false).unwrap();
        assert_eq!(lock(&three, true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop((one, two));
        lock(&three, true).unwrap();
        assert_eq!(lock(&open(), false).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}

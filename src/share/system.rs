//! The system calls of the share, by descriptors and single names. A name is never resolved beyond
//! its directory, and no symlink is followed. Any thread.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::wire::{Answer, Errno};

/// How every name is resolved.
const BENEATH: u64 =
    libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_SYMLINKS;
/// Never the process's terminal, and no wait for a lease or a fifo.
const ALWAYS: i32 = libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK;
const EMPTY: &CStr = c"";

pub(super) fn check(result: i32) -> Answer<i32> {
    if result < 0 { Err(Errno::last()) } else { Ok(result) }
}

fn checked_size(result: isize) -> Answer<usize> {
    usize::try_from(result).map_err(|_| Errno::last())
}

/// # Safety
/// `fd` is a descriptor that nothing else owns.
unsafe fn owned(fd: i32) -> OwnedFd {
    // SAFETY: as the caller says.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Open an entry of a directory.
pub(super) fn open_beneath(
    directory: &OwnedFd,
    name: &CStr,
    flags: i32,
    mode: u32,
) -> Answer<OwnedFd> {
    // SAFETY: all zeroes are a valid value of this struct of integers.
    let mut how: libc::open_how = unsafe { MaybeUninit::zeroed().assume_init() };
    how.flags = u64::from((flags | libc::O_CLOEXEC | libc::O_NOFOLLOW).cast_unsigned());
    if flags & libc::O_PATH == 0 {
        how.flags |= u64::from(ALWAYS.cast_unsigned());
        how.mode = u64::from(mode);
    }
    how.resolve = BENEATH;
    // SAFETY: the name ends with NUL, and the struct is of the size that is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            directory.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    let fd = i32::try_from(result).map_err(|_| Errno(libc::EBADF)).and_then(check)?;
    // SAFETY: it was just opened.
    Ok(unsafe { owned(fd) })
}

/// Open a path of the program.
pub(super) fn open_path(path: &CStr, flags: i32) -> Answer<OwnedFd> {
    // SAFETY: the path ends with NUL.
    let fd = check(unsafe { libc::open(path.as_ptr(), flags | ALWAYS) })?;
    // SAFETY: it was just opened.
    Ok(unsafe { owned(fd) })
}

/// The name of a descriptor in `/proc/self/fd`.
fn number(fd: &OwnedFd) -> Answer<CString> {
    CString::new(fd.as_raw_fd().to_string()).map_err(|_| Errno(libc::EINVAL))
}

/// Open the file that a descriptor is of, by `proc`, which is /proc/self/fd.
pub(super) fn reopen(proc: &OwnedFd, fd: &OwnedFd, flags: i32) -> Answer<OwnedFd> {
    let (name, flags) = (number(fd)?, flags & !libc::O_NOFOLLOW | ALWAYS);
    // SAFETY: the name ends with NUL.
    let fd = check(unsafe { libc::openat(proc.as_raw_fd(), name.as_ptr(), flags) })?;
    // SAFETY: it was just opened.
    Ok(unsafe { owned(fd) })
}

/// The path of the file that a descriptor is of.
pub(super) fn path(proc: &OwnedFd, fd: &OwnedFd) -> Answer<Vec<u8>> {
    read_link_at(proc, &number(fd)?)
}

fn read_link_at(directory: &OwnedFd, name: &CStr) -> Answer<Vec<u8>> {
    let mut target = vec![0_u8; 4096];
    // SAFETY: the name ends with NUL, and the buffer has this length.
    let length = checked_size(unsafe {
        libc::readlinkat(
            directory.as_raw_fd(),
            name.as_ptr(),
            target.as_mut_ptr().cast(),
            target.len(),
        )
    })?;
    target.truncate(length);
    Ok(target)
}

/// The target of the symlink that a descriptor is of.
pub(super) fn read_link(fd: &OwnedFd) -> Answer<Vec<u8>> {
    read_link_at(fd, EMPTY)
}

/// The attributes of an entry of a directory.
pub(super) fn stat_at(directory: &OwnedFd, name: &CStr) -> Answer<libc::stat> {
    let mut stat = MaybeUninit::<libc::stat>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the name ends with NUL, and the struct is writable.
    check(unsafe {
        libc::fstatat(directory.as_raw_fd(), name.as_ptr(), stat.as_mut_ptr(), flags)
    })?;
    // SAFETY: the kernel has filled it, and all zeroes are valid too.
    Ok(unsafe { stat.assume_init() })
}

/// The attributes of the file that a descriptor is of.
pub(super) fn stat(fd: &OwnedFd) -> Answer<libc::stat> {
    stat_at(fd, EMPTY)
}

/// The attributes of the file system that a descriptor is on.
pub(super) fn stat_fs(fd: &OwnedFd) -> Answer<libc::statfs> {
    let mut stat = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the struct is writable.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: the kernel has filled it, and all zeroes are valid too.
    Ok(unsafe { stat.assume_init() })
}

/// Set the permissions of the file that a descriptor is of.
pub(super) fn set_mode(proc: &OwnedFd, fd: &OwnedFd, mode: u32) -> Answer<()> {
    let name = number(fd)?;
    // SAFETY: the name ends with NUL.
    check(unsafe { libc::fchmodat(proc.as_raw_fd(), name.as_ptr(), mode, 0) }).map(drop)
}

/// Set the owner of the file that a descriptor is of; None leaves it.
pub(super) fn set_owner(fd: &OwnedFd, uid: Option<u32>, gid: Option<u32>) -> Answer<()> {
    let (uid, gid) = (uid.unwrap_or(u32::MAX), gid.unwrap_or(u32::MAX));
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the empty name ends with NUL.
    check(unsafe { libc::fchownat(fd.as_raw_fd(), EMPTY.as_ptr(), uid, gid, flags) }).map(drop)
}

/// Set the times of access and of modification of the file that a descriptor is of.
pub(super) fn set_times(proc: &OwnedFd, fd: &OwnedFd, times: [libc::timespec; 2]) -> Answer<()> {
    let name = number(fd)?;
    // SAFETY: the name ends with NUL, and there are two times.
    check(unsafe { libc::utimensat(proc.as_raw_fd(), name.as_ptr(), times.as_ptr(), 0) }).map(drop)
}

/// Set the size of a file that is open for writing.
pub(super) fn set_size(fd: &OwnedFd, size: u64) -> Answer<()> {
    let size = i64::try_from(size).map_err(|_| Errno(libc::EFBIG))?;
    // SAFETY: it has only numbers.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), size) }).map(drop)
}

/// Make a directory.
pub(super) fn make_directory(directory: &OwnedFd, name: &CStr, mode: u32) -> Answer<()> {
    // SAFETY: the name ends with NUL.
    check(unsafe { libc::mkdirat(directory.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

/// Make a symlink.
pub(super) fn make_symlink(directory: &OwnedFd, name: &CStr, target: &CStr) -> Answer<()> {
    // SAFETY: both strings end with NUL.
    check(unsafe { libc::symlinkat(target.as_ptr(), directory.as_raw_fd(), name.as_ptr()) })
        .map(drop)
}

/// Make another name for the file that a descriptor is of.
pub(super) fn make_link(
    proc: &OwnedFd,
    fd: &OwnedFd,
    directory: &OwnedFd,
    name: &CStr,
) -> Answer<()> {
    let (from, to) = (number(fd)?, directory.as_raw_fd());
    // The link that is followed is that of /proc, to the file itself.
    let flags = libc::AT_SYMLINK_FOLLOW;
    // SAFETY: both names end with NUL.
    check(unsafe { libc::linkat(proc.as_raw_fd(), from.as_ptr(), to, name.as_ptr(), flags) })
        .map(drop)
}

/// Remove an entry of a directory.
pub(super) fn unlink(directory: &OwnedFd, name: &CStr, is_directory: bool) -> Answer<()> {
    let flags = if is_directory { libc::AT_REMOVEDIR } else { 0 };
    // SAFETY: the name ends with NUL.
    check(unsafe { libc::unlinkat(directory.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}

/// Rename an entry of a directory.
pub(super) fn rename(from: &OwnedFd, old: &CStr, to: &OwnedFd, new: &CStr) -> Answer<()> {
    // SAFETY: both names end with NUL.
    check(unsafe { libc::renameat(from.as_raw_fd(), old.as_ptr(), to.as_raw_fd(), new.as_ptr()) })
        .map(drop)
}

fn position(offset: u64) -> Answer<i64> {
    i64::try_from(offset).map_err(|_| Errno(libc::EINVAL))
}

/// Read from a file.
pub(super) fn read(fd: &OwnedFd, into: &mut [u8], offset: u64) -> Answer<usize> {
    let at = position(offset)?;
    // SAFETY: the pointer and length are those of the slice.
    checked_size(unsafe { libc::pread(fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), at) })
}

/// Write to a file.
pub(super) fn write(fd: &OwnedFd, from: &[u8], offset: u64) -> Answer<usize> {
    let at = position(offset)?;
    // SAFETY: the pointer and length are those of the slice.
    checked_size(unsafe { libc::pwrite(fd.as_raw_fd(), from.as_ptr().cast(), from.len(), at) })
}

/// Read the entries of a directory from a position on, as getdents64 writes them.
pub(super) fn read_directory(fd: &OwnedFd, into: &mut [u8], offset: u64) -> Answer<usize> {
    let at = position(offset)?;
    // SAFETY: it has only numbers.
    if unsafe { libc::lseek(fd.as_raw_fd(), at, libc::SEEK_SET) } < 0 {
        return Err(Errno::last());
    }
    // SAFETY: the pointer and length are those of the slice.
    let result = unsafe {
        libc::syscall(libc::SYS_getdents64, fd.as_raw_fd(), into.as_mut_ptr(), into.len())
    };
    usize::try_from(result).map_err(|_| Errno::last())
}

/// Wait until a file is on its medium.
pub(super) fn sync(fd: &OwnedFd, data_only: bool) -> Answer<()> {
    let fd = fd.as_raw_fd();
    // SAFETY: it has only numbers.
    check(unsafe { if data_only { libc::fdatasync(fd) } else { libc::fsync(fd) } }).map(drop)
}

/// Set or query a lock of an open file, which other open files of the host respect.
pub(super) fn lock(fd: &OwnedFd, command: i32, lock: &mut libc::flock) -> Answer<()> {
    // SAFETY: both commands that are used take this struct.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut *lock) }).map(drop)
}

/// The number of descriptors that the process may have.
pub(super) fn descriptor_limit() -> usize {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct is writable.
    let _ = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_lead_out_of_its_directory() {
        let directory = open_path(c"/proc/self", libc::O_PATH | libc::O_DIRECTORY).unwrap();
        let open = |name: &CStr| open_beneath(&directory, name, libc::O_PATH, 0).map(drop);
        assert_eq!(open(c".."), Err(Errno(libc::EXDEV)));
        assert_eq!(open(c"/"), Err(Errno(libc::EXDEV)));
        assert_eq!(open(c"cwd/."), Err(Errno(libc::ELOOP)));
        assert_eq!(open(c"status"), Ok(()));
    }

    #[test]
    fn a_symlink_is_opened_itself() {
        let directory = open_path(c"/proc/self", libc::O_PATH | libc::O_DIRECTORY).unwrap();
        let link = open_beneath(&directory, c"cwd", libc::O_PATH, 0).unwrap();
        assert_eq!(stat(&link).unwrap().st_mode & libc::S_IFMT, libc::S_IFLNK);
        let here = std::env::current_dir().unwrap();
        assert_eq!(read_link(&link).unwrap(), here.as_os_str().as_encoded_bytes());
        let open = open_beneath(&directory, c"cwd", libc::O_RDONLY, 0).map(drop);
        assert_eq!(open, Err(Errno(libc::ELOOP)));
    }
}

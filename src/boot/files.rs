//! Reads the files that a machine starts with, without waiting for a writer that never comes.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

/// How long to wait for the writer of a FIFO.
const WRITER_COMES: Duration = Duration::from_millis(500);
/// How often a wait checks for an interruption.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
const CHUNK: usize = 1 << 20;
/// File systems of the kernel itself, whose files are not for copying: `f_type` of `statfs`.
const KERNEL_FILES: &[i64] = &[
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x7363_6673, // securityfs
    0xcafe_4a11, // bpf
];

/// See the module.
pub(super) struct Files<'a> {
    /// The size of guest memory. Larger files are refused, and endless ones are not read further.
    pub(super) most: u64,
    pub(super) interrupted: &'a dyn Fn() -> Result<()>,
}

impl Files<'_> {
    /// Read a whole file of at most `most` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Boot`], with `at` as the place, if it cannot be read, is too large, or is a
    /// FIFO without a writer; what `interrupted` returns.
    pub(super) fn read(&self, path: &Path, at: &str, most: u64) -> Result<Vec<u8>> {
        self.read_within(path, at, most)?.ok_or_else(|| {
            let detail = format!("{}: larger than guest memory", path.display());
            Error::new(ErrorKind::Boot, at, detail)
        })
    }

    /// The same, and None if it is too large.
    pub(super) fn read_within(&self, path: &Path, at: &str, most: u64) -> Result<Option<Vec<u8>>> {
        let failed = |e: io::Error| {
            let mut error = Error::os(ErrorKind::Boot, at, &e);
            error.detail = format!("{}: {}", path.display(), error.detail);
            error
        };
        let refused = |why| Error::new(ErrorKind::Boot, at, format!("{}: {why}", path.display()));
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let mut file = opened.map_err(failed)?;
        let is_fifo = file.metadata().map_err(failed)?.file_type().is_fifo();
        let began = Instant::now();
        let mut bytes = Vec::new();
        loop {
            // One byte more than fits, to detect an endless file such as a device.
            let left = most.saturating_add(1).saturating_sub(bytes.len() as u64);
            let count = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
            match read_some(&mut file, &mut bytes, count) {
                Ok(0) if bytes.is_empty() && is_fifo => {
                    if began.elapsed() >= WRITER_COMES {
                        return Err(refused("a FIFO without a writer"));
                    }
                    (self.interrupted)()?;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(0) => return Ok(Some(bytes)),
                Ok(_) if bytes.len() as u64 > most => return Ok(None),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (self.interrupted)()?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait(&file);
                    (self.interrupted)()?;
                }
                Err(e) => return Err(failed(e)),
            }
        }
    }
}

fn read_some(file: &mut File, bytes: &mut Vec<u8>, count: usize) -> io::Result<usize> {
    let length = bytes.len();
    bytes.resize(length + count, 0);
    let result = file.read(bytes.get_mut(length..).unwrap_or(&mut []));
    bytes.truncate(length + *result.as_ref().unwrap_or(&0));
    result
}

/// Wait until the file is readable, a slice of time has passed, or a signal arrives.
fn wait(file: &File) {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let milliseconds = i32::try_from(POLL_INTERVAL.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one pollfd that lives through the call.
    unsafe { libc::poll(&raw mut poll, 1, milliseconds) };
}

/// Whether a directory is on a file system of the kernel such as proc, which stays empty in the
/// archive: a root file system in use has them mounted.
pub(super) fn is_of_the_kernel(path: &Path) -> bool {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else { return false };
    let mut found = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the name ends in a zero byte, and the struct lives through the call.
    if unsafe { libc::statfs(name.as_ptr(), found.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: zeros are a valid value of the struct, and the call has filled it.
    let found = unsafe { found.assume_init() };
    KERNEL_FILES.contains(&found.f_type)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::path::PathBuf;

    fn read(path: &Path, interrupted: &dyn Fn() -> Result<()>) -> Result<Vec<u8>> {
        Files { most: 1 << 20, interrupted }.read(path, "boot.kernel", 1 << 20)
    }

    fn fifo(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("pyvmm-{name}-{}", std::process::id()));
        let text = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path ends in a zero byte.
        assert_eq!(unsafe { libc::mkfifo(text.as_ptr(), 0o600) }, 0);
        path
    }

    #[test]
    fn a_fifo_is_read_to_the_end_of_its_writers() {
        let path = fifo("written");
        let name = path.clone();
        let writer = std::thread::spawn(move || {
            let mut fifo = OpenOptions::new().write(true).open(name).unwrap();
            fifo.write_all(&[7; 100_000]).unwrap();
        });
        assert_eq!(read(&path, &|| Ok(())).unwrap(), [7; 100_000]);
        writer.join().unwrap();
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_fifo_without_a_writer_and_an_endless_file_are_refused() {
        let path = fifo("alone");
        assert!(read(&path, &|| Ok(())).unwrap_err().detail.ends_with("without a writer"));
        std::fs::remove_file(path).unwrap();
        let endless = read(Path::new("/dev/zero"), &|| Ok(())).unwrap_err();
        assert!(endless.detail.ends_with("larger than guest memory"));
        assert_eq!(read(Path::new("/"), &|| Ok(())).unwrap_err().errno, Some(libc::EISDIR));
    }

    #[test]
    fn a_wait_for_a_silent_writer_can_be_interrupted() {
        let path = fifo("silent");
        let both = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let stop = || Err(Error::new(ErrorKind::State, "test", "interrupted"));
        assert_eq!(read(&path, &stop).unwrap_err().detail, "interrupted");
        drop(both);
        std::fs::remove_file(path).unwrap();
    }
}

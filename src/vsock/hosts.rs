//! What the guest can connect to: listeners of the program by port, and unix sockets in the file
//! system. And the unix socket by which programs connect to the guest. On the loop's thread.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::socket::{HostSocket, LONGEST_PATH};
use crate::error::{Error, ErrorKind, Result};
use crate::process::ProcessTag;

const KEY: &str = "vsock.uds_path";

/// See the module.
#[derive(Debug)]
pub(super) struct Hosts {
    /// Sockets without a name that listen. `O_PATH` descriptors, so that they end with the
    /// program's own.
    listeners: HashMap<u32, OwnedFd>,
    pub(super) unix: Option<UnixSocket>,
}

impl Hosts {
    pub(super) fn new(unix: Option<UnixSocket>) -> Self {
        Self { listeners: HashMap::new(), unix }
    }

    /// Connect to what listens on a port.
    pub(super) fn connect(&mut self, port: u32) -> Option<HostSocket> {
        if let Some(listener) = self.listeners.get(&port) {
            let path = PathBuf::from(format!("/proc/self/fd/{}", listener.as_raw_fd()));
            match HostSocket::connect(&path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    // The program has closed it without a word.
                    self.listeners.remove(&port);
                }
                connected => return connected.ok(),
            }
        }
        HostSocket::connect(&self.unix.as_ref()?.of_port(port)).ok()
    }

    /// # Errors
    /// `AddrInUse` if something listens on the port.
    pub(super) fn listen(&mut self, port: u32, listener: OwnedFd) -> io::Result<()> {
        if self.listeners.contains_key(&port) {
            return Err(io::Error::from_raw_os_error(libc::EADDRINUSE));
        }
        self.listeners.insert(port, listener);
        Ok(())
    }

    pub(super) fn unlisten(&mut self, port: u32) {
        self.listeners.remove(&port);
    }
}

/// A listening unix socket with a name, which its end removes.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and number of its inode.
    inode: (u64, u64),
    process_tag: ProcessTag,
    /// Whether an event loop watches it.
    pub(super) is_watched: bool,
}

impl UnixSocket {
    /// Listen on a path. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the path cannot be used.
    pub fn bind(path: &Path) -> Result<Self> {
        let failed =
            |e: &io::Error| Error::os(ErrorKind::Config, format!("{KEY}: {}", path.display()), e);
        let path_of_all = std::path::absolute(path).map_err(|e| failed(&e))?;
        // With "_" and the largest port.
        if path_of_all.as_os_str().len() + 11 > LONGEST_PATH {
            let detail = format!("{} is longer than 96 bytes", path_of_all.display());
            return Err(Error::new(ErrorKind::Config, KEY, detail));
        }
        remove_stale(&path_of_all);
        let listener = UnixListener::bind(&path_of_all).map_err(|e| failed(&e))?;
        listener.set_nonblocking(true).map_err(|e| failed(&e))?;
        let inode = inode(&path_of_all).map_err(|e| failed(&e))?;
        let process_tag = ProcessTag::current();
        Ok(Self { listener, path: path_of_all, inode, process_tag, is_watched: false })
    }

    fn of_port(&self, port: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }

    /// The next program that connects.
    ///
    /// # Errors
    /// Those of accept(2): `WouldBlock` if there is none.
    pub(super) fn accept(&self) -> io::Result<HostSocket> {
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: no address is asked for; the result is checked.
        let fd = unsafe { libc::accept4(self.as_raw_fd(), address, length, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made, and that nobody else has.
        Ok(HostSocket::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

impl AsRawFd for UnixSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let is_ours = !self.process_tag.is_forked_child()
            && inode(&self.path).is_ok_and(|inode| inode == self.inode);
        if is_ours {
            // Fails if the program may not write to the folder any more.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Remove a socket whose process has ended without removing it.
fn remove_stale(path: &Path) {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let refused = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && HostSocket::connect(path).is_err_and(refused) {
        // If it fails, so does the bind.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn a_path_is_bound_once_and_removed_at_the_end() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("v");
        let socket = UnixSocket::bind(&path).unwrap();
        let error = UnixSocket::bind(&path).unwrap_err();
        assert_eq!((error.kind, error.errno), (ErrorKind::Config, Some(libc::EADDRINUSE)));
        assert!(socket.accept().is_ok(), "the look whether it is stale");
        assert!(socket.accept().is_err());
        let _client = HostSocket::connect(&path).unwrap();
        assert!(socket.accept().is_ok());
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("v");
        drop(UnixListener::bind(&path).unwrap());
        let socket = UnixSocket::bind(&path).unwrap();
        // Another has taken the name.
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"x").unwrap();
        drop(socket);
        assert_eq!(fs::read(&path).unwrap(), b"x");
        assert!(UnixSocket::bind(&path).is_err());
        let long = folder.as_path().join("v".repeat(100));
        assert!(UnixSocket::bind(&long).unwrap_err().detail.contains("longer"));
    }

    #[test]
    fn a_port_is_the_programs_or_a_socket_beside_the_path() {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.as_path().join(name);
        let mut hosts = Hosts::new(Some(UnixSocket::bind(&at("v")).unwrap()));
        assert!(hosts.connect(5).is_none());
        let beside = UnixListener::bind(at("v_5")).unwrap();
        assert!(hosts.connect(5).is_some());
        let own = UnixListener::bind(at("own")).unwrap();
        let listener =
            fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(at("own")).unwrap();
        fs::remove_file(at("own")).unwrap();
        hosts.listen(5, listener.into()).unwrap();
        let again = fs::File::open("/dev/null").unwrap().into();
        assert_eq!(hosts.listen(5, again).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        beside.accept().unwrap();
        assert!(hosts.connect(5).is_some());
        own.accept().unwrap();
        drop(own);
        assert!(hosts.connect(5).is_some(), "the one beside the path");
        beside.accept().unwrap();
        hosts.unlisten(5);
        drop(beside);
        assert!(hosts.connect(5).is_none());
    }

    use std::os::unix::fs::OpenOptionsExt;
}

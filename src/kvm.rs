//! Opens and checks /dev/kvm. An error says what to do.

use std::io;

use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::error::{Error, ErrorKind, Result};
use crate::process::OnceBox;

/// KVM's API has been at this version since 2007.
const API_VERSION: i32 = 12;

/// Open /dev/kvm and check that pyvmm can use it.
///
/// # Errors
/// [`ErrorKind::Unavailable`], with a hint, if it is missing, forbidden, or lacks a capability
/// that pyvmm needs.
pub fn open_kvm() -> Result<Kvm> {
    static CHECKED: OnceBox<()> = OnceBox::new();
    let kvm = Kvm::new().map_err(|e| unavailable(e.errno()))?;
    CHECKED.get_or_try_init(|| check(&kvm))?;
    Ok(kvm)
}

fn check(kvm: &Kvm) -> Result<()> {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let detail = format!("KVM's API version is {version}, not {API_VERSION}");
        return Err(Error::new(ErrorKind::Unavailable, "/dev/kvm", detail));
    }
    if !kvm.check_extension(Cap::ImmediateExit) {
        let detail = "this KVM has no KVM_CAP_IMMEDIATE_EXIT";
        return Err(
            Error::new(ErrorKind::Unavailable, "/dev/kvm", detail).hint("use Linux 4.13 or newer")
        );
    }
    Ok(())
}

/// # Errors
/// [`ErrorKind::Kvm`] if KVM refuses it.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            // Any signal to this thread interrupts the call, which has changed nothing then.
            Err(error) if error.errno() == libc::EINTR => {}
            other => break checked("KVM_CREATE_VM", other),
        }
    }
}

/// Whether KVM_RUN may be called from another thread than last time without a wait: before Linux
/// 6.13 the caller waits for an RCU grace period, which takes milliseconds.
pub(crate) fn moves_vcpus_quickly() -> bool {
    static QUICKLY: OnceBox<bool> = OnceBox::new();
    *QUICKLY.get_or_init(|| {
        std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .is_ok_and(|release| version(&release) >= Some((6, 13)))
    })
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

/// How many vCPUs a machine may have, numbered from 0. The same for all machines of a process.
pub(crate) fn max_vcpus(kvm: &Kvm) -> usize {
    static MAX: OnceBox<usize> = OnceBox::new();
    *MAX.get_or_init(|| kvm.get_max_vcpus().min(kvm.get_max_vcpu_id()))
}

fn unavailable(errno: i32) -> Error {
    let hint = match errno {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => {
            "enable virtualization in the firmware, or nested virtualization in a guest, then: sudo modprobe \
             kvm_intel || sudo modprobe kvm_amd"
        }
        libc::EACCES | libc::EPERM => "type: sudo usermod -aG kvm $USER, and log in again",
        _ => "run: pyvmm doctor",
    };
    Error::os(ErrorKind::Unavailable, "/dev/kvm", &io::Error::from_raw_os_error(errno)).hint(hint)
}

/// Check the result of an ioctl. An error names the ioctl.
///
/// # Errors
/// [`ErrorKind::Kvm`] if it failed.
pub(crate) fn checked<T>(
    ioctl: &str,
    result: std::result::Result<T, kvm_ioctls::Error>,
) -> Result<T> {
    result.map_err(|e| Error::kvm(ioctl, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        assert_eq!(version("6.1.0-42-amd64"), Some((6, 1)));
        assert!(version("6.13.0-rc1\n") >= Some((6, 13)) && version("7.0") > Some((6, 13)));
        assert_eq!(version("unknown"), None);
    }

    #[test]
    fn each_cause_has_its_hint() {
        assert!(unavailable(libc::EACCES).hint.unwrap().contains("usermod"));
        assert!(unavailable(libc::ENOENT).hint.unwrap().contains("modprobe"));
        assert_eq!(unavailable(libc::EIO).kind, ErrorKind::Unavailable);
    }
}

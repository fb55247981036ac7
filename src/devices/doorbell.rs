//! Writes of the guest that the kernel turns into the signal of an eventfd. Any thread.

use vmm_sys_util::eventfd::EventFd;

/// A machine's side of an ioeventfd.
pub trait Doorbell: Send + Sync + std::fmt::Debug {
    /// Have the kernel signal an eventfd for each write of this value, four bytes at this address,
    /// instead of an exit. If that is impossible, the writes exit as before.
    fn connect(&self, event: &EventFd, address: u64, value: u32);
}

//! Single model-specific registers of a vCPU.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::vcpu::Vcpu;
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::checked as kvm;

impl Vcpu {
    /// Read a model-specific register.
    ///
    /// # Errors
    /// If KVM does not know it.
    pub fn msr(&self, index: u32) -> Result<u64> {
        msr_of(self.fd(), index)
    }

    /// Set a model-specific register.
    ///
    /// # Errors
    /// If KVM does not know it or refuses the value.
    pub fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        match kvm("KVM_SET_MSRS", self.fd().set_msrs(&one_msr(index, value)?))? {
            1 => Ok(()),
            _ => {
                let detail = format!("KVM does not know it, or refuses {value:#x}");
                Err(Error::new(ErrorKind::Kvm, format!("MSR {index:#x}"), detail))
            }
        }
    }
}

/// Read a model-specific register of a vCPU.
pub(super) fn msr_of(fd: &VcpuFd, index: u32) -> Result<u64> {
    let mut msrs = one_msr(index, 0)?;
    let found = kvm("KVM_GET_MSRS", fd.get_msrs(&mut msrs))?;
    match msrs.as_slice() {
        [entry] if found == 1 => Ok(entry.data),
        _ => Err(Error::new(ErrorKind::Kvm, format!("MSR {index:#x}"), "KVM does not know it")),
    }
}

fn one_msr(index: u32, data: u64) -> Result<Msrs> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
        .map_err(|e| Error::new(ErrorKind::Kvm, "msrs", format!("{e:?}")))
}

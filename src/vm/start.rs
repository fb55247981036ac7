//! Creates the vCPUs of a bare machine, and sets the registers of a first run. On the caller's
//! thread, while the vCPUs are at rest.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};

use super::KvmVm;
use crate::cpu::{CpuMode, Start, regs};
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::ExitHandler;
use crate::vcpu::{self, Vcpu, VcpuHandle, VmRunState};

impl<EH: ExitHandler + Send + Sync + 'static> KvmVm<EH> {
    /// Add a vCPU as KVM creates it: at the reset vector, with an empty CPUID.
    ///
    /// # Errors
    /// If the machine has run, a vCPU with this number exists, or KVM refuses it.
    pub fn create_vcpu(&self, id: u64) -> Result<Arc<VcpuHandle>> {
        self.check_process()?;
        self.vcpus.add(|| {
            if self.state() != VmRunState::Created {
                let detail = "the machine has run: it keeps its vCPUs";
                return Err(Error::new(ErrorKind::State, "create_vcpu", detail));
            }
            let fd = self.create_vcpu_fd(id)?;
            vcpu::create(id, fd, Arc::clone(&self.router), self.memory.clone())
        })
    }

    /// Set the registers with which a first run starts, so that they can be read and changed before
    /// it.
    ///
    /// # Errors
    /// If KVM refuses the registers.
    pub fn prepare(&self, address: u64) -> Result<()> {
        self.check_process()?;
        if self.is_prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        self.vcpus.each(|handle| {
            // Another thread may have prepared or started them since.
            if self.is_prepared.load(Ordering::Acquire) {
                return Ok(());
            }
            handle.with_vcpu(|vcpu| self.set_start_state(vcpu, address))
        })?;
        self.set_prepared();
        Ok(())
    }

    /// The address to which a run from `address` has to set the vCPUs; `None` if they have been set
    /// to it already.
    #[must_use]
    pub fn first_address(&self, address: u64) -> Option<u64> {
        (!self.is_prepared.load(Ordering::Acquire)).then_some(address)
    }

    /// Set the registers of a first start.
    pub(super) fn set_start_state(&self, vcpu: &mut Vcpu, address: u64) -> Result<()> {
        vcpu.has_page_registers = false;
        let start = Start { entry: address, ..self.start };
        if start.mode == CpuMode::Reset || start.mode.starts_one() && vcpu.id != 0 {
            return Ok(()); // it is at the reset vector, or waits for INIT and SIPI
        }
        let mut sregs = vcpu.fd().get_sregs().map_err(|e| Error::kvm("KVM_GET_SREGS", e))?;
        regs::set_start_sregs(&mut sregs, start.mode, address);
        vcpu.set_sregs(&sregs)?;
        vcpu.fd()
            .set_regs(&regs::start_regs(&start, vcpu.id))
            .map_err(|e| Error::kvm("KVM_SET_REGS", e))?;
        if self.irqchip && vcpu.id != 0 {
            let state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            vcpu.fd().set_mp_state(state).map_err(|e| Error::kvm("KVM_SET_MP_STATE", e))?;
        }
        Ok(())
    }
}

impl<EH: ExitHandler> KvmVm<EH> {
    /// Note that the vCPUs have their initial registers.
    pub(super) fn set_prepared(&self) {
        // Release: a thread that finds it set finds the registers.
        self.is_prepared.store(true, Ordering::Release);
    }
}

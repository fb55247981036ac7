//! A `KvmVm` as a snapshot needs it: made by its shape alone, held still as a whole, and brought
//! back to life.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::VmFd;

use super::shape::Shape;
use super::vcpus::Vcpus;
use super::{KvmVm, create_irqchip, create_vm, switch_fixups_on};
use crate::cpu::CpuMode;
use crate::error::{Error, ErrorKind, Result};
use crate::exit_handler::{Exit, ExitHandler, Outcome};
use crate::hop::hop;
use crate::kvm::open_kvm;
use crate::memory::GuestMemory;
use crate::process::ProcessTag;
use crate::sync::{MappedMutexGuard, Mutex, MutexGuard, rank};
use crate::vcpu::{self, ExitRouter, RunState, Vcpu, VcpuThread, VmRunState};

impl<EH: ExitHandler + Send + Sync + 'static> KvmVm<EH> {
    /// A machine of this shape, whose vCPUs have no CPUID and no registers yet.
    ///
    /// # Errors
    /// When KVM refuses a part.
    pub(crate) fn of_shape(
        shape: &Shape,
        memory: GuestMemory,
        router: &Arc<ExitRouter>,
        exit_handler: EH,
    ) -> Result<Self> {
        hop!();
        let kvm = open_kvm()?;
        let most = kvm.get_max_vcpus();
        if usize::from(shape.vcpus) > most {
            let detail = format!("{} is more than this KVM's {most}", shape.vcpus);
            return Err(Error::new(ErrorKind::Snapshot, "vcpus", detail));
        }
        let fd = create_vm(&kvm)?;
        create_irqchip(&fd, shape.irqchip, shape.pit)?;
        memory.kvm_slots().attach(&fd)?;
        let vcpu = |id| {
            let vcpu = fd.create_vcpu(id).map_err(|e| Error::kvm("KVM_CREATE_VCPU", e))?;
            VcpuThread::new(id, vcpu, Arc::clone(router), memory.clone())
        };
        let vcpus: Result<Vec<VcpuThread>> = (0..u64::from(shape.vcpus)).map(vcpu).collect();
        let (vcpus, fixups) = (vcpus?, Arc::default());
        if shape.fixups {
            switch_fixups_on(&fd, &vcpus, &fixups)?;
        }
        let shared =
            vcpu::Shared { exit_handler, run_state: RunState::default(), exit: Mutex::new(None) };
        Ok(Self {
            vcpus: Vcpus::new(vcpus),
            fd,
            memory,
            shared: Arc::new(shared),
            mode: CpuMode::Real16,
            code: None,
            irqchip: shape.irqchip,
            pit: shape.pit,
            lines: Mutex::default(),
            fixups,
            has_fixups: shape.fixups,
            // The snapshot sets its registers.
            is_prepared: AtomicBool::new(true),
            process_tag: ProcessTag::current(),
        })
    }
}

impl<EH: ExitHandler> KvmVm<EH> {
    /// Whether it has an in-kernel interrupt controller, a PIT, and fix-ups.
    pub(crate) fn chips(&self) -> (bool, bool, bool) {
        (self.irqchip, self.pit, self.has_fixups)
    }

    /// The interrupt lines that the host holds high, which nobody changes meanwhile.
    pub(crate) fn lines(&self) -> MutexGuard<'_, u32, rank::IrqLines> {
        self.lines.lock()
    }

    /// Hold every vCPU at rest while `act` looks at all of the machine, or changes it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when one is running; what `act` returns.
    pub(crate) fn at_rest<T>(
        &self,
        act: impl FnOnce(&VmFd, &mut [MappedMutexGuard<'_, Vcpu, rank::Vcpu>]) -> Result<T>,
    ) -> Result<T> {
        hop!();
        self.check_process()?;
        self.vcpus.at_rest(|vcpus| act(&self.fd, vcpus))
    }

    /// Complete all that the vCPUs' last exits began. They are at rest, or on their way there. If
    /// that ends the guest, the machine's state says so.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when one is running, or its exit is not answered yet.
    pub(crate) fn complete_pending_io(&self) -> Result<()> {
        for handle in self.handles() {
            match handle.complete_pending_io()? {
                Outcome::End(exit) if self.state() != VmRunState::Exiting => {
                    self.shared.vcpu_ended(Exit { vcpu: Some(handle.id()), ..exit });
                }
                Outcome::Stop => drop(self.shared.exit_handler.kick()),
                _ => {}
            }
        }
        Ok(())
    }

    /// The machine is as it was before its first run.
    pub(crate) fn renew(&self) {
        self.shared.run_state.renew();
    }

    /// The vCPUs have other registers: the guest has not ended, and starts where they say.
    pub(crate) fn revive(&self) {
        // Release: whoever finds it prepared finds the registers.
        self.is_prepared.store(true, Ordering::Release);
        *self.shared.exit.lock() = None;
        self.shared.run_state.revive();
    }
}

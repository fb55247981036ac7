//! Reports to hooks how an exit was answered, before the guest continues. `run.rs` answers the
//! exits. On the vCPU's thread.

use super::answer::{Answer, AnsweredBy, Noted};
use super::exit::{Data, VcpuExit};
use super::handle::VcpuHandle;
use super::router;
use super::vcpu::Vcpu;
use crate::devices::Device;
use crate::exit_handler::Outcome;

/// Report the answer to the hooks of its kind. Returns the outcome, which a hook may have changed
/// to a stop.
#[cold]
pub(super) fn report(
    vcpu: &mut Vcpu,
    handle: &VcpuHandle,
    exit: &VcpuExit,
    by: AnsweredBy,
    outcome: Outcome,
) -> Outcome {
    let Noted { device, written } = vcpu.noted.take().map_or_else(Noted::default, |noted| *noted);
    let by = if device.is_some() { AnsweredBy::Device } else { by };
    let mut answer = Answer {
        by,
        data: data(vcpu, exit, by, written),
        device: device.as_deref().map(Device::name),
        ends_run: matches!(outcome, Outcome::Stop | Outcome::End(_)),
    };
    // The copy is taken out, because the hooks may look at the vCPU.
    let (id, mut copy) = (vcpu.id, std::mem::take(&mut vcpu.cache.hooks));
    let hooks = vcpu.router.hooks(&mut copy);
    let is_stopped =
        handle.with_host_access(vcpu, || router::report_answer(hooks, id, exit, &mut answer));
    vcpu.cache.hooks = copy;
    if is_stopped && matches!(outcome, Outcome::Continue | Outcome::Wait) {
        return Outcome::Stop;
    }
    outcome
}

/// What the guest reads is what KVM will take from the run page.
fn data(vcpu: &Vcpu, exit: &VcpuExit, by: AnsweredBy, written: Option<Data>) -> Option<Data> {
    match exit {
        _ if by == AnsweredBy::Retry => None,
        _ if exit.is_read() => vcpu.page.answered(),
        VcpuExit::IoOut { data, .. } | VcpuExit::MmioWrite { data, .. } => {
            Some(written.unwrap_or_else(|| data.clone()))
        }
        VcpuExit::Wrmsr { value, .. } => Some(Data::from_slice(&value.to_le_bytes())),
        _ => None,
    }
}

//! Passes a guest's access to the device on its bus, and the answer back. On the vCPU's thread.

use std::sync::Arc;
use std::time::Instant;

use super::exit::Data;
use super::handle::VcpuHandle;
use super::string_io;
use super::vcpu::Vcpu;
use crate::devices::{Access, Device};
use crate::exit_handler::Outcome;
use crate::hop::hop;
use crate::trace::{self, Value};

/// `IN` and `INS`: `count` elements of `size` bytes from one port.
pub(super) fn port_in(
    vcpu: &mut Vcpu,
    handle: &VcpuHandle,
    port: u16,
    size: usize,
    count: usize,
) -> Outcome {
    read(vcpu, handle, (Access::Pio, u64::from(port)), size, count)
}

/// `OUT` and `OUTS`.
pub(super) fn port_out(
    vcpu: &mut Vcpu,
    handle: &VcpuHandle,
    port: u16,
    size: usize,
    data: &[u8],
) -> Outcome {
    hop!();
    let place = (Access::Pio, u64::from(port));
    reach(vcpu, handle, place, size, false, |vcpu, handle, device, offset| {
        if !device.coalesces_outs() {
            return call_device(vcpu, handle, device, |device| write(device, offset, data, size));
        }
        match string_io::coalesce(vcpu, port, size, data) {
            Some(all) => {
                if let Some(noted) = &mut vcpu.noted {
                    noted.written = Some(Data::from_slice(&all));
                }
                call_device(vcpu, handle, device, |device| device.write_many(offset, &all, size))
            }
            None => call_device(vcpu, handle, device, |device| write(device, offset, data, size)),
        }
    })
}

/// A read of a memory-mapped device.
pub(super) fn mmio_read(
    vcpu: &mut Vcpu,
    handle: &VcpuHandle,
    address: u64,
    length: usize,
) -> Outcome {
    read(vcpu, handle, (Access::Mmio, address), length, 1)
}

/// A write to one.
pub(super) fn mmio_write(
    vcpu: &mut Vcpu,
    handle: &VcpuHandle,
    address: u64,
    data: &[u8],
) -> Outcome {
    let place = (Access::Mmio, address);
    reach(vcpu, handle, place, data.len(), false, |vcpu, handle, device, offset| {
        call_device(vcpu, handle, device, |device| device.write(offset, data))
    })
}

fn read(
    vcpu: &mut Vcpu,
    handle: &VcpuHandle,
    place: (Access, u64),
    size: usize,
    count: usize,
) -> Outcome {
    // On a PC, a bus that no device drives reads as all one bits.
    let mut one = [0xff; 8];
    let mut many;
    let data = match one.get_mut(..size) {
        Some(data) if count == 1 => data,
        _ => {
            many = Data::from_elem(0xff, size.saturating_mul(count));
            many.as_mut_slice()
        }
    };
    let outcome = reach(vcpu, handle, place, size, true, |vcpu, handle, device, offset| {
        call_device(vcpu, handle, device, |device| match count {
            1 => device.read(offset, data),
            _ => device.read_many(offset, data, size),
        })
    });
    vcpu.page.answer(data);
    outcome
}

fn write(device: &dyn Device, offset: u64, data: &[u8], size: usize) -> Outcome {
    if data.len() == size {
        device.write(offset, data)
    } else {
        device.write_many(offset, data, size)
    }
}

/// Find the device of an access and `call` it, or count the access as unanswered.
/// [`Outcome::Wait`] if the device calls the program, and this thread does not.
fn reach(
    vcpu: &mut Vcpu,
    handle: &VcpuHandle,
    (bus, address): (Access, u64),
    size: usize,
    is_read: bool,
    call: impl FnOnce(&mut Vcpu, &VcpuHandle, &dyn Device, u64) -> Outcome,
) -> Outcome {
    // The copy is taken out, because the device may look at the vCPU.
    let mut copy = std::mem::take(vcpu.cache.bus(bus));
    let outcome = match vcpu.router.buses.bus(bus).find(&mut copy, address, size) {
        Some((device, _)) if vcpu.calls_nobody && device.may_block() => Outcome::Wait,
        Some((device, offset)) => {
            if let Some(noted) = &mut vcpu.noted {
                noted.device = Some(Arc::clone(device));
            }
            let began = vcpu.is_recorded.then(Instant::now);
            let outcome = call(vcpu, handle, &**device, offset);
            if let Some(began) = began {
                record_call(&**device, (bus, address), size, is_read, began);
            }
            waits(vcpu, device, outcome)
        }
        None => {
            vcpu.router.buses.count_unanswered(bus, address, is_read);
            Outcome::Continue
        }
    };
    *vcpu.cache.bus(bus) = copy;
    outcome
}

/// Record the call of a device in a trace.
#[cold]
fn record_call(
    device: &dyn Device,
    (bus, address): (Access, u64),
    size: usize,
    is_read: bool,
    began: Instant,
) {
    let values = [
        ("bus", Value::Text(if bus == Access::Pio { "pio" } else { "mmio" })),
        ("access", Value::Text(if is_read { "read" } else { "write" })),
        ("address", Value::Hex(address)),
        ("size", Value::Number(size as u64)),
    ];
    trace::record("device", device.name(), (began, Instant::now()), &values);
}

/// If the outcome is to wait, note the device that the vCPU waits for before its next entry.
fn waits(vcpu: &mut Vcpu, device: &Arc<dyn Device>, outcome: Outcome) -> Outcome {
    if outcome != Outcome::Wait {
        return outcome;
    }
    vcpu.waits_for = Some(Arc::clone(device));
    Outcome::Continue
}

/// Call a device. If it calls Python code, that code has access to the vCPU during the call.
fn call_device(
    vcpu: &mut Vcpu,
    handle: &VcpuHandle,
    device: &dyn Device,
    call: impl FnOnce(&dyn Device) -> Outcome,
) -> Outcome {
    if device.may_block() { handle.with_host_access(vcpu, || call(device)) } else { call(device) }
}

//! An access of the guest's on its way to a device and back. On the vCPU's thread.

use std::sync::Arc;
use std::time::Instant;

use super::cell::Cell;
use super::exit::Data;
use super::registers::Vcpu;
use super::string_io;
use crate::devices::{Access, Device};
use crate::exit_handler::Outcome;
use crate::trace::{self, Value};

/// `IN` and `INS`: `count` elements of `size` bytes from one port.
pub(super) fn port_in(
    vcpu: &mut Vcpu,
    cell: &Cell,
    port: u16,
    size: usize,
    count: usize,
) -> Outcome {
    read(vcpu, cell, (Access::Pio, u64::from(port)), size, count)
}

/// `OUT` and `OUTS`.
pub(super) fn port_out(
    vcpu: &mut Vcpu,
    cell: &Cell,
    port: u16,
    size: usize,
    data: &[u8],
) -> Outcome {
    let place = (Access::Pio, u64::from(port));
    reach(vcpu, cell, place, size, false, |vcpu, cell, device, offset| {
        if !device.gathers() {
            return lent(vcpu, cell, device, |device| write(device, offset, data, size));
        }
        match string_io::gather(vcpu, port, size, data) {
            Some(all) => lent(vcpu, cell, device, |device| device.write_many(offset, &all, size)),
            None => lent(vcpu, cell, device, |device| write(device, offset, data, size)),
        }
    })
}

/// A read of a memory-mapped device.
pub(super) fn mmio_read(vcpu: &mut Vcpu, cell: &Cell, address: u64, length: usize) -> Outcome {
    read(vcpu, cell, (Access::Mmio, address), length, 1)
}

/// A write to one.
pub(super) fn mmio_write(vcpu: &mut Vcpu, cell: &Cell, address: u64, data: &[u8]) -> Outcome {
    let place = (Access::Mmio, address);
    reach(vcpu, cell, place, data.len(), false, |vcpu, cell, device, offset| {
        lent(vcpu, cell, device, |device| device.write(offset, data))
    })
}

fn read(vcpu: &mut Vcpu, cell: &Cell, place: (Access, u64), size: usize, count: usize) -> Outcome {
    // All ones is what a PC's bus gives where no device drives it.
    let mut data = Data::from_elem(0xff, size.saturating_mul(count));
    let outcome = reach(vcpu, cell, place, size, true, |vcpu, cell, device, offset| {
        lent(vcpu, cell, device, |device| match count {
            1 => device.read(offset, &mut data),
            _ => device.read_many(offset, &mut data, size),
        })
    });
    vcpu.page.answer(&data);
    outcome
}

fn write(device: &dyn Device, offset: u64, data: &[u8], size: usize) -> Outcome {
    if data.len() == size {
        device.write(offset, data)
    } else {
        device.write_many(offset, data, size)
    }
}

/// Find the device of an access, or count that there is none.
fn reach(
    vcpu: &mut Vcpu,
    cell: &Cell,
    (bus, address): (Access, u64),
    size: usize,
    is_read: bool,
    call: impl FnOnce(&mut Vcpu, &Cell, &dyn Device, u64) -> Outcome,
) -> Outcome {
    let buses = &vcpu.dispatch.buses;
    match buses.bus(bus).find(address, size) {
        Some((device, offset)) if vcpu.is_recorded => {
            let began = Instant::now();
            let outcome = call(vcpu, cell, &*device, offset);
            let bus = if bus == Access::Pio { "pio" } else { "mmio" };
            let access = if is_read { "read" } else { "write" };
            let values = [
                ("bus", Value::Text(bus)),
                ("access", Value::Text(access)),
                ("address", Value::Hex(address)),
                ("size", Value::Number(size as u64)),
            ];
            trace::record("device", device.name(), (began, Instant::now()), &values);
            waits(vcpu, device, outcome)
        }
        Some((device, offset)) => {
            let outcome = call(vcpu, cell, &*device, offset);
            waits(vcpu, device, outcome)
        }
        None => {
            buses.count_unanswered(bus, address, is_read);
            Outcome::Continue
        }
    }
}

/// Note the device that the vCPU waits for before it enters its guest again.
fn waits(vcpu: &mut Vcpu, device: Arc<dyn Device>, outcome: Outcome) -> Outcome {
    if outcome != Outcome::Wait {
        return outcome;
    }
    vcpu.waits_for = Some(device);
    Outcome::Continue
}

/// Call a device, and where that calls the program's code, lend the vCPU meanwhile.
fn lent(
    vcpu: &mut Vcpu,
    cell: &Cell,
    device: &dyn Device,
    call: impl FnOnce(&dyn Device) -> Outcome,
) -> Outcome {
    if device.calls_out() { cell.lend(vcpu, || call(device)) } else { call(device) }
}

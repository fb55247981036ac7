//! Rewrites an instruction so that it can run on the host: with another memory operand, and other
//! general registers.

use iced_x86::{Encoder, Instruction, OpKind, Register};

use super::stop::{Done, Stop};

/// The instruction with its memory operand at RDI and with general registers that `native.rs`
/// loads, and the numbers of the guest's registers for them.
pub(super) fn rewritten(i: &Instruction) -> Done<(Instruction, Vec<usize>)> {
    let mut new = *i;
    // RAX, RCX and RDX keep their places: some instructions imply them.
    let mut numbers = vec![0, 1, 2];
    for operand in 0..i.op_count() {
        match i.op_kind(operand) {
            OpKind::Memory => {
                new.set_segment_prefix(Register::None);
                new.set_memory_base(Register::RDI);
                new.set_memory_index(Register::None);
                new.set_memory_index_scale(1);
                new.set_memory_displacement64(0);
                new.set_memory_displ_size(0);
            }
            OpKind::Register if i.op_register(operand).is_gpr() => {
                let register = i.op_register(operand);
                let full = register.full_register() as usize - Register::RAX as usize;
                let known = numbers.iter().position(|known| *known == full);
                let place = known.unwrap_or(numbers.len());
                if known.is_none() {
                    numbers.push(full);
                }
                new.set_op_register(operand, sized(register, place)?);
            }
            _ => {}
        }
    }
    Ok((new, numbers))
}

/// The register that `native.rs` loads at a place, in the size of another.
fn sized(like: Register, place: usize) -> Done<Register> {
    let sizes: [&[Register; 5]; 3] = [
        &[Register::AX, Register::CX, Register::DX, Register::R8W, Register::R9W],
        &[Register::EAX, Register::ECX, Register::EDX, Register::R8D, Register::R9D],
        &[Register::RAX, Register::RCX, Register::RDX, Register::R8, Register::R9],
    ];
    let [words, doubles, quads] = sizes;
    let registers = match like.size() {
        2 => words,
        4 => doubles,
        8 => quads,
        _ => return Err(Stop::Unknown),
    };
    registers.get(place).copied().ok_or(Stop::Unknown)
}

pub(super) fn encoded(instruction: &Instruction) -> Done<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, 0).map_err(|_| Stop::Unknown)?;
    Ok(encoder.take_buffer())
}

//! Changes inputs for virtio devices at random.

use super::chance::Chance;
use super::virtio_input::{Input, KINDS, STEPS, Step};

const MOST_STEPS: usize = 64;
const MOST_BYTES: usize = 4096;
/// The registers, and some places between and beyond them.
const REGISTERS: [u64; 32] = [
    0, 4, 8, 0xc, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80,
    0x84, 0x90, 0x94, 0xa0, 0xa4, 0xb0, 0xbc, 0xc0, 0xfc, 0x100, 0x104, 0x108, 0x120, 0x3fc, 0xfff,
];
const USUAL: [u64; 24] = [
    0,
    1,
    2,
    4,
    7,
    8,
    16,
    0x3f,
    0x40,
    0xff,
    0x100,
    0x1ff,
    0x200,
    0xfff,
    0x1000,
    0xffff,
    0x1_0000,
    0x11_0000,
    0x1f_fff0,
    0x20_0000,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

impl Chance {
    fn value(&mut self) -> u64 {
        match self.below(4) {
            0 => self.below(5) as u64,
            1 => self.below(1 << 21) as u64,
            2 => 1 << self.below(64),
            _ => USUAL[self.below(USUAL.len())].wrapping_add(self.below(3) as u64).wrapping_sub(1),
        }
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let value = self.byte();
        let is_same = self.below(2) == 0;
        (0..self.below(most)).map(|_| if is_same { value } else { self.byte() }).collect()
    }

    fn step(&mut self) -> Step {
        let (name, count) = STEPS[self.below(STEPS.len())];
        let mut numbers: Vec<u64> = (0..count).map(|_| self.value()).collect();
        let mut pieces = Vec::new();
        match name {
            "read" | "write" => {
                numbers[0] = REGISTERS[self.below(REGISTERS.len())];
                let mut value = self.value().to_le_bytes().to_vec();
                value.truncate([4, 4, 4, 1, 2, 8, 3][self.below(7)]);
                pieces.push(value);
            }
            "descriptor" => {
                numbers[0] = self.below(4) as u64;
                numbers[1] = self.below(8) as u64;
                // A table of descriptors, in memory's beginning or in the buffers.
                numbers[2] = [self.value(), 0x11_0000, 0x1_0000][self.below(3)];
                numbers[3] = [self.value(), 16, 64][self.below(3)];
                numbers[4] = self.below(8) as u64;
                numbers[5] = self.below(8) as u64;
            }
            "head" | "request" | "indirect" | "notify" | "rush" | "available" => {
                numbers[0] = self.below(5) as u64;
                pieces.extend((0..self.below(3)).map(|_| self.bytes(64)));
            }
            "memory" | "host" => pieces.push(self.bytes(100)),
            "snapshot" => numbers.extend((0..2 * self.below(3)).map(|_| self.below(300) as u64)),
            _ => {}
        }
        Step { name, numbers, pieces }
    }
}

/// Change some bytes.
fn change_bytes(bytes: &mut Vec<u8>, chance: &mut Chance) {
    let at = chance.below(bytes.len());
    let rest = bytes.len() - at;
    match chance.below(7) {
        _ if rest == 0 => *bytes = chance.bytes(64),
        0 => bytes[at] ^= 1 << chance.below(8),
        1 => bytes[at] = chance.byte(),
        2 | 3 => {
            let size = [1, 2, 4, 8][chance.below(4)].min(rest);
            let value = chance.value();
            bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
        4 => bytes.truncate(at),
        5 => drop(bytes.splice(at..at, chance.bytes(16))),
        _ => {
            let most = [16, 16, 2048][chance.below(3)];
            bytes.extend(chance.bytes(most));
        }
    }
    bytes.truncate(MOST_BYTES);
}

fn change_step(step: &mut Step, chance: &mut Chance) {
    let (number, piece) = (chance.below(step.numbers.len()), chance.below(step.pieces.len()));
    match chance.below(8) {
        0..=2 => {
            if let Some(number) = step.numbers.get_mut(number) {
                *number = match chance.below(4) {
                    0 => number.wrapping_add(1),
                    1 => number.wrapping_sub(1),
                    2 => *number ^ 1 << chance.below(64),
                    _ => chance.value(),
                };
            }
        }
        3..=5 => match step.pieces.get_mut(piece) {
            Some(piece) => change_bytes(piece, chance),
            None => step.pieces.push(chance.bytes(32)),
        },
        6 if number < step.numbers.len() => drop(step.numbers.remove(number)),
        _ => step.numbers.push(chance.value()),
    }
    step.numbers.truncate(64);
}

/// Change an input, with parts of another.
pub(crate) fn change(input: &mut Input, other: &Input, chance: &mut Chance) {
    for _ in 0..=chance.below(5) {
        let (at, count) = (chance.below(input.steps.len()), input.steps.len());
        match chance.below(12) {
            _ if count == 0 => input.steps.push(chance.step()),
            0 => drop(input.steps.remove(at)),
            1 => {
                let step = input.steps[at].clone();
                let times = 1 + chance.below(3);
                input.steps.splice(at..at, std::iter::repeat_n(step, times));
            }
            2 => {
                let with = chance.below(count);
                input.steps.swap(at, with);
            }
            3 => {
                let from = chance.below(other.steps.len());
                let piece: Vec<Step> =
                    other.steps[from..].iter().take(1 + chance.below(8)).cloned().collect();
                input.steps.splice(at..at, piece);
            }
            4..=6 => {
                let step = chance.step();
                input.steps.insert(at, step);
            }
            // Registers and rings are the same for every device.
            7 if chance.below(20) == 0 => input.kind = KINDS[chance.below(KINDS.len())],
            _ => change_step(&mut input.steps[at], chance),
        }
    }
    input.steps.truncate(MOST_STEPS);
}

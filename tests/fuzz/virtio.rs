//! `make fuzz`: drivers that do what virtio forbids, and requests to each device that nobody makes,
//! by changes at random to those of the corpus. A panic, a loop that spins, a chain that is not
//! given back, and a write outside of what was offered to the device are findings. See
//! campaign.rs for the arguments.

// A program for tests: what it cannot do it says by a panic.
#![allow(clippy::expect_used, clippy::panic, clippy::print_stdout, clippy::unwrap_used)]

mod allocations;
mod campaign;
mod chance;
mod corpus;
mod coverage;
mod panics;
mod virtio_change;
mod virtio_host;
mod virtio_input;
mod virtio_memory;
mod virtio_run;

use std::collections::BTreeMap;

use campaign::Target;
use chance::Chance;
use virtio_input::Input;
use virtio_memory::Room;
use virtio_run::Count;

struct Devices {
    room: Room,
    counts: BTreeMap<&'static str, Count>,
}

impl Target for Devices {
    type Input = Input;
    const NAME: &'static str = "virtio";
    /// What this program compares memory with is 2 MiB, and so is a qcow2 image's check.
    const MAX_ALLOCATION: usize = 8 << 20;

    fn parse(&self, bytes: &[u8]) -> Input {
        Input::parse(bytes)
    }

    fn print(&self, input: &Input) -> Vec<u8> {
        input.print()
    }

    fn change(&self, input: &mut Input, other: &Input, chance: &mut Chance) {
        virtio_change::change(input, other, chance);
    }

    fn run(&mut self, input: &Input) -> Result<(), String> {
        let found = virtio_run::run(input, &mut self.room)?;
        let count = self.counts.entry(input.kind).or_default();
        count.inputs += found.inputs;
        count.steps += found.steps;
        count.chains += found.chains;
        count.resets += found.resets;
        Ok(())
    }

    fn report(&self) -> Vec<String> {
        let line = |(kind, count): (&&str, &Count)| {
            let Count { inputs, steps, chains, resets } = count;
            format!(
                "{kind}: {inputs} inputs, {steps} steps, {chains} chains, {resets} need a reset"
            )
        };
        let caught = format!("{} panics of imago caught", panics::take_caught());
        self.counts.iter().map(line).chain([caught]).collect()
    }
}

fn main() {
    let room = Room::new(virtio_host::image());
    campaign::run(&mut Devices { room, counts: BTreeMap::new() });
}

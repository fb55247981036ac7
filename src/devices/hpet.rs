//! The main counter of an HPET, without interrupts: its timers cannot be used. vCPU threads access
//! it.

use std::time::Instant;

use super::Device;
use crate::bytes::Reader;
use crate::error::Result;
use crate::exit_handler::Outcome;
use crate::sync::{Mutex, rank};

/// Registers, each of eight bytes.
const CAPABILITIES: u64 = 0x00;
const CONFIGURATION: u64 = 0x10;
const COUNTER: u64 = 0xf0;
const ENABLED: u8 = 1;

const PERIOD_NS: u64 = 10;
/// Revision 1, one timer, a counter of 64 bits, and the period in femtoseconds.
const CAPABILITY_BITS: u64 = ((PERIOD_NS * 1_000_000) << 32) | (0x8086 << 16) | (1 << 13) | 1;

#[derive(Debug, Default)]
struct State {
    configuration: u8,
    /// The counter while it stands, or when it was started.
    counter: u64,
    started: Option<Instant>,
}

impl State {
    fn counter(&self) -> u64 {
        let passed = self.started.map_or(0, |since| since.elapsed().as_nanos());
        let ticks = passed / u128::from(PERIOD_NS);
        self.counter.wrapping_add(u64::try_from(ticks).unwrap_or(u64::MAX))
    }

    fn set(&mut self, configuration: u8, counter: u64) {
        let is_on = configuration & ENABLED != 0;
        (self.configuration, self.counter) = (configuration & 0b11, counter);
        self.started = is_on.then(Instant::now);
    }

    fn register(&self, at: u64) -> u64 {
        match at {
            CAPABILITIES => CAPABILITY_BITS,
            CONFIGURATION => u64::from(self.configuration),
            COUNTER => self.counter(),
            _ => 0,
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Hpet(Mutex<State, rank::Hpet>);

impl Device for Hpet {
    fn name(&self) -> &str {
        "hpet"
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Outcome {
        let state = self.0.lock();
        let (mut at, mut register) = (offset & !7, state.register(offset & !7).to_le_bytes());
        for (offset, byte) in (offset..).zip(data) {
            if offset & !7 != at {
                at = offset & !7;
                register = state.register(at).to_le_bytes();
            }
            let within = usize::try_from(offset & 7).unwrap_or(0);
            *byte = register.get(within).copied().unwrap_or(0);
        }
        Outcome::Continue
    }

    /// The counter can be set while it stands.
    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let mut state = self.0.lock();
        for (offset, byte) in (offset..).zip(data) {
            let counter = state.counter();
            if offset == CONFIGURATION {
                state.set(*byte, counter);
            } else if offset & !7 == COUNTER && state.started.is_none() {
                let shift = (offset & 7) * 8;
                state.counter = counter & !(0xff << shift) | u64::from(*byte) << shift;
            }
        }
        Outcome::Continue
    }

    /// The configuration, and the counter.
    fn save(&self) -> Result<Vec<u8>> {
        let state = self.0.lock();
        Ok([&[state.configuration][..], &state.counter().to_le_bytes()].concat())
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let mut reader = Reader::new("hpet", state);
        let [configuration] = reader.take()?;
        let counter = reader.u64()?;
        reader.end()?;
        self.0.lock().set(configuration, counter);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(hpet: &Hpet, offset: u64) -> u64 {
        let mut data = [0; 8];
        hpet.read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    #[test]
    fn the_counter_counts_while_it_is_enabled() {
        let hpet = Hpet::default();
        assert_eq!(read(&hpet, CAPABILITIES) >> 32, 10_000_000);
        assert_eq!(read(&hpet, COUNTER), 0);
        hpet.write(COUNTER, &(1_u64 << 40).to_le_bytes());
        assert_eq!(read(&hpet, COUNTER), 1 << 40);
        hpet.write(CONFIGURATION, &[1]);
        let first = read(&hpet, COUNTER);
        while read(&hpet, COUNTER) == first {}
        let other = Hpet::default();
        other.restore(&hpet.save().unwrap()).unwrap();
        assert!(read(&other, COUNTER) > first);
        hpet.write(CONFIGURATION, &[0]);
        assert_eq!(read(&hpet, COUNTER), read(&hpet, COUNTER));
        assert!(other.restore(&[0; 8]).is_err());
    }

    proptest! {
        #[test]
        fn no_accesses_panic(accesses in prop::collection::vec((any::<bool>(), 0u64..0x400, any::<[u8; 8]>()), 0..40)) {
            let hpet = Hpet::default();
            for (is_write, offset, mut data) in accesses {
                if is_write { hpet.write(offset, &data); } else { hpet.read(offset, &mut data); }
            }
        }
    }
}

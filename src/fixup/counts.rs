//! Counts of the instructions executed by fix-ups. Shared by the vCPUs of a machine; usable on any
//! thread.

use std::collections::BTreeMap;

use iced_x86::Mnemonic;

use super::{bits, feature, legacy, system, transfer, x87, xsave};
use crate::sync::{Mutex, rank};

/// Counts of the executed instructions, by mnemonic. Shared by the vCPUs of a machine.
#[derive(Debug, Default)]
pub struct Counts(Mutex<BTreeMap<Mnemonic, u64>, rank::FixupCounts>);

impl Counts {
    pub(crate) fn add(&self, executed: &[Mnemonic]) {
        let mut counts = self.0.lock();
        for mnemonic in executed {
            *counts.entry(*mnemonic).or_default() += 1;
        }
    }

    /// Reset all counts.
    pub(crate) fn clear(&self) {
        self.0.lock().clear();
    }

    /// The counts so far.
    #[must_use]
    pub fn all(&self) -> BTreeMap<String, u64> {
        let mut named = BTreeMap::new();
        for (mnemonic, count) in &*self.0.lock() {
            *named.entry(name(*mnemonic)).or_default() += count;
        }
        named
    }
}

/// The name of an instruction, as in the manual.
fn name(mnemonic: Mnemonic) -> String {
    let known = [
        bits::name,
        x87::name,
        xsave::name,
        transfer::name,
        legacy::name,
        feature::name,
        system::name,
    ]
    .iter()
    .find_map(|name| name(mnemonic));
    known.map_or_else(|| format!("{mnemonic:?}").to_lowercase(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_kept_by_name() {
        let counts = Counts::default();
        counts.add(&[Mnemonic::Int3, Mnemonic::Wait, Mnemonic::Popcnt]);
        counts.add(&[Mnemonic::Int3, Mnemonic::Verw]);
        let all = counts.all();
        assert_eq!(
            all,
            BTreeMap::from(
                [("int3", 2), ("fwait", 1), ("popcnt", 1), ("verw", 1)]
                    .map(|(name, count)| (name.to_owned(), count))
            )
        );
    }
}

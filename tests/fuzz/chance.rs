//! The choices of the fuzzers of this folder.

/// xorshift64*: the same numbers for the same seed. The seed is not zero.
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    /// A number from zero, below this.
    pub(crate) fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
        usize::try_from(number).unwrap() % most.max(1)
    }
}

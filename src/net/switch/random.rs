//! The random numbers of a link's decisions: functions of the network's seed, the link, and the
//! number of the frame, so that they can be repeated. Pure data.

/// The state from which the numbers of one frame are drawn, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Draws(u64);

/// The increment of SplitMix64.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64: each bit of the result depends on all bits of the number.
fn mix(number: u64) -> u64 {
    let mixed = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

impl Draws {
    /// The numbers of a frame. They differ if any of `coordinates` does.
    pub(super) fn new(seed: u64, coordinates: &[u64]) -> Self {
        let add = |state: u64, number: &u64| mix(state.wrapping_add(STEP) ^ mix(*number));
        Self(coordinates.iter().fold(mix(seed), add))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// A number from 0 to 1, without 1.
    pub(super) fn fraction(&mut self) -> f64 {
        // 53 bits, which a float holds exactly.
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Whether something of this probability happens.
    pub(super) fn happens(&mut self, probability: f64) -> bool {
        self.fraction() < probability
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_functions_of_the_seed_and_the_coordinates() {
        let first = |seed, at: &[u64]| Draws::new(seed, at).next();
        assert_eq!(first(1, &[2, 3]), first(1, &[2, 3]));
        let others = [first(1, &[3, 2]), first(2, &[2, 3]), first(1, &[2, 4]), first(1, &[2])];
        assert!(!others.contains(&first(1, &[2, 3])));
    }

    #[test]
    fn a_probability_is_met_about_as_often_as_it_says() {
        let count = |probability| {
            (0..10_000).filter(|frame| Draws::new(7, &[*frame]).happens(probability)).count()
        };
        assert_eq!((count(0.0), count(1.0)), (0, 10_000));
        assert!((2_700..3_300).contains(&count(0.3)), "{}", count(0.3));
    }
}

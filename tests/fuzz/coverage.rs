//! The code that inputs reach, in a program that is compiled with counters of LLVM's
//! SanitizerCoverage. Without them, no input reaches new code.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::chance::Chance;

static COUNTERS: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static COUNTERS_LENGTH: AtomicUsize = AtomicUsize::new(0);

/// Called before `main`, in a build with `-sanitizer-coverage-inline-8bit-counters`.
///
/// # Safety
/// Only the code that the compiler generates calls it, with the bounds of its counters.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, stop: *mut u8) {
    COUNTERS.store(start, Ordering::Relaxed);
    COUNTERS_LENGTH.store(stop as usize - start as usize, Ordering::Relaxed);
}

/// The code that has been reached, as one byte for each edge.
pub(crate) struct Coverage(Vec<u8>);

impl Coverage {
    pub(crate) fn new() -> Self {
        Self(vec![0; COUNTERS_LENGTH.load(Ordering::Relaxed)])
    }

    /// Forget the last run.
    pub(crate) fn clear(&self) {
        // SAFETY: the counters are a section of the program, and no other thread runs its code.
        unsafe { std::ptr::write_bytes(COUNTERS.load(Ordering::Relaxed), 0, self.0.len()) };
    }

    /// Whether the last run reached an edge for the first time, or more often than ever. The
    /// threads that it started have ended.
    pub(crate) fn is_new(&mut self) -> bool {
        let mut is_new = false;
        let counters = COUNTERS.load(Ordering::Relaxed);
        for (n, seen) in self.0.iter_mut().enumerate() {
            // SAFETY: as above; `n` is below their number.
            let count = unsafe { counters.add(n).read_volatile() };
            let class = 8 - u8::try_from(count.leading_zeros()).unwrap();
            if class > *seen {
                *seen = class;
                is_new = true;
            }
        }
        is_new
    }

    pub(crate) fn edges(&self) -> usize {
        self.0.iter().filter(|seen| **seen > 0).count()
    }
}

/// An input to change: half of the time, one of those that reached new code lately.
pub(crate) fn pick<'a, T>(corpus: &'a [T], chance: &mut Chance) -> &'a T {
    let from = if chance.below(2) == 0 { corpus.len().saturating_sub(64) } else { 0 };
    &corpus[from + chance.below(corpus.len() - from)]
}

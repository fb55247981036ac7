//! Lines to a machine's interrupt controllers, as devices see them. Driven by any thread.

use std::sync::Arc;

use crate::sync::{Mutex, rank};

/// A line to a machine's interrupt controllers.
pub trait InterruptLine: Send + Sync + std::fmt::Debug {
    /// Set its level. A rising edge is pending when this returns, so the guest receives it before
    /// it can end. An irqfd does not guarantee this, because the kernel injects from a work queue.
    fn set(&self, is_high: bool);
}

/// A line that several devices drive: it is high while one of them is. Each rise of one of them is
/// an edge, and so is the end of one while another stays high, because an edge-triggered controller
/// may have merged the two. A level-triggered one interrupts until all have been served.
#[derive(Debug)]
pub(crate) struct SharedLine {
    line: Box<dyn InterruptLine>,
    /// How many devices drive it high.
    drivers: Mutex<usize, rank::DeviceLines>,
}

impl SharedLine {
    pub(crate) fn new(line: Box<dyn InterruptLine>) -> Arc<Self> {
        Arc::new(Self { line, drivers: Mutex::default() })
    }
}

/// A device's end of a line, which may be shared. `None`: the machine has no interrupt controller.
#[derive(Debug, Default)]
pub(crate) struct LineEnd {
    shared: Option<Arc<SharedLine>>,
    is_high: bool,
}

impl LineEnd {
    pub(crate) fn new(shared: Option<Arc<SharedLine>>) -> Self {
        Self { shared, is_high: false }
    }

    /// Drive it. `has_risen`: it has been low since the last call, if only briefly.
    pub(crate) fn drive(&mut self, is_high: bool, has_risen: bool) {
        let rises = is_high && (has_risen || !self.is_high);
        if self.is_high == is_high && !rises {
            return;
        }
        if let Some(shared) = &self.shared {
            let mut drivers = shared.drivers.lock();
            let was_high = *drivers > 0;
            *drivers = *drivers + usize::from(is_high) - usize::from(self.is_high);
            if was_high {
                shared.line.set(false);
            }
            if *drivers > 0 {
                shared.line.set(true);
            }
        }
        self.is_high = is_high;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The levels that a line was set to.
    #[derive(Debug, Default)]
    pub(in crate::devices) struct Levels(Arc<Mutex<Vec<bool>, rank::Test>>);

    impl InterruptLine for Levels {
        fn set(&self, is_high: bool) {
            self.0.lock().push(is_high);
        }
    }

    impl Levels {
        pub(in crate::devices) fn line(&self) -> Arc<SharedLine> {
            SharedLine::new(Box::new(Self(Arc::clone(&self.0))))
        }

        pub(in crate::devices) fn rises(&self) -> usize {
            self.0.lock().iter().filter(|is_high| **is_high).count()
        }

        pub(in crate::devices) fn is_high(&self) -> bool {
            self.0.lock().last().copied().unwrap_or(false)
        }
    }

    proptest! {
        #[test]
        fn it_is_high_while_a_device_is_and_every_rise_is_an_edge(
            steps in prop::collection::vec((0usize..3, any::<bool>(), any::<bool>()), 0..40)
        ) {
            let levels = Levels::default();
            let line = levels.line();
            let mut ends: Vec<_> =
                (0..3).map(|_| LineEnd::new(Some(Arc::clone(&line)))).collect();
            let mut model = [false; 3];
            for (which, is_high, has_risen) in steps {
                let before = levels.rises();
                let rises = is_high && (has_risen || !model[which]);
                let falls = !is_high && model[which];
                let others = (0..3).any(|other| other != which && model[other]);
                let is_edge = rises || falls && others;
                ends[which].drive(is_high, has_risen);
                model[which] = is_high;
                prop_assert_eq!(levels.rises() - before, usize::from(is_edge));
                prop_assert_eq!(levels.is_high(), model.contains(&true));
                let set = levels.0.lock().clone();
                prop_assert!(set.windows(2).all(|pair| pair[0] != pair[1]), "edges only: {set:?}");
            }
        }
    }
}

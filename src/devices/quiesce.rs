//! Quiesces devices: they stop changing what the guest sees from a loop, a timer or another thread
//! until they are resumed. Runs on the thread that quiesces the machine.

use std::sync::Arc;

use super::bus::{Buses, Device};
use crate::error::Result;

/// Quiesced devices. They are resumed when this is dropped.
#[derive(Debug, Default)]
pub struct QuiescedDevices(Vec<Arc<dyn Device>>);

impl QuiescedDevices {
    /// Quiesce every device of the buses that acts by itself. Called with no lock held, because a
    /// device may call the program.
    ///
    /// # Errors
    /// The error of a device. The devices before it have been resumed.
    pub fn new(buses: &Buses) -> Result<Self> {
        let mut quiesced = Self::default();
        for device in buses.pio.acting().into_iter().chain(buses.mmio.acting()) {
            device.quiesce()?;
            quiesced.0.push(device);
        }
        Ok(quiesced)
    }

    /// In a forked child the devices belong to the parent.
    pub(crate) fn forget(mut self) {
        self.0.clear();
    }
}

impl Drop for QuiescedDevices {
    fn drop(&mut self) {
        self.0.iter().rev().for_each(|device| device.resume());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::exit_handler::Outcome;
    use crate::sync::{Mutex, rank};

    #[derive(Debug)]
    struct Half {
        name: &'static str,
        calls: Arc<Mutex<Vec<String>, rank::Test>>,
        refuses: bool,
    }

    impl Device for Half {
        fn read(&self, _offset: u64, _data: &mut [u8]) -> Outcome {
            Outcome::Continue
        }
        fn write(&self, _offset: u64, _data: &[u8]) -> Outcome {
            Outcome::Continue
        }
        fn acts_by_itself(&self) -> bool {
            true
        }
        fn quiesce(&self) -> Result<()> {
            if self.refuses {
                return Err(Error::new(ErrorKind::State, self.name, "it cannot"));
            }
            self.calls.lock().push(format!("{} rests", self.name));
            Ok(())
        }
        fn resume(&self) {
            self.calls.lock().push(format!("{} goes on", self.name));
        }
    }

    #[test]
    fn devices_go_on_in_reverse_order_also_after_a_refusal() {
        let calls: Arc<Mutex<Vec<String>, rank::Test>> = Arc::default();
        let half = |name, refuses| Arc::new(Half { name, calls: Arc::clone(&calls), refuses });
        let buses = Buses::default();
        buses.pio.add(0x10, 1, half("first", false));
        buses.mmio.add(0x1000, 1, half("second", false));
        drop(QuiescedDevices::new(&buses).unwrap());
        let all = ["first rests", "second rests", "second goes on", "first goes on"];
        assert_eq!(std::mem::take(&mut *calls.lock()), all);
        buses.mmio.add(0x2000, 1, half("third", true));
        assert_eq!(QuiescedDevices::new(&buses).unwrap_err().at, "third");
        assert_eq!(*calls.lock(), all);
    }
}

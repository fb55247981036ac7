//! A port as what is behind a machine's network device. Frames go from guest to guest as they are,
//! with checksums and long segments left to the receiver. Runs on the thread of the machine's loop.

use std::any::Any;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::network::Port;
use crate::error::{Error, ErrorKind, Result};
use crate::net::{Frame, NetBackend, Offloads, Watched};

/// The only user of a port.
#[derive(Debug)]
pub struct PortBackend {
    port: Arc<Port>,
}

impl PortBackend {
    /// Take a port for a machine.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if another machine has it, [`ErrorKind::Closed`] if it is closed.
    pub fn new(port: Arc<Port>) -> Result<Self> {
        if port.is_closed() {
            return Err(Error::closed("port"));
        }
        if !port.claim(true) {
            let detail = format!("another machine uses the port {:?}", port.name());
            return Err(Error::new(ErrorKind::State, "port", detail));
        }
        Ok(Self { port })
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> &Arc<Port> {
        &self.port
    }
}

impl Drop for PortBackend {
    fn drop(&mut self) {
        self.port.claim(false);
    }
}

impl NetBackend for PortBackend {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true, ecn: true }
    }

    fn watched(&self) -> Watched {
        let none: RawFd = -1;
        Watched { receive: self.port.as_raw_fd(), send: none }
    }

    fn send(&self, frames: &[Frame<'_>]) -> usize {
        self.port.send_all(frames);
        frames.len()
    }

    fn receive(&self, budget: usize, into: &mut dyn FnMut(Frame<'_>) -> bool) {
        for _ in 0..budget {
            let Some(parcel) = self.port.pop() else { return };
            if !into(Frame { bytes: &parcel.bytes, offload: parcel.offload }) {
                return self.port.put_back(parcel);
            }
        }
    }

    fn failure(&self) -> Option<String> {
        let name = self.port.name();
        self.port.is_closed().then(|| format!("the port {name:?} of the network is closed"))
    }

    fn dropped(&self) -> u64 {
        self.port.counts().map_or(0, |counts| counts.dropped())
    }

    fn reset(&self) {
        self.port.clear();
    }

    fn describe(&self) -> String {
        format!("network port {}", self.port.name())
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::switch::{Network, QueueLimit};
    use crate::net::{Checksum, Offload, Segmentation};

    fn port(network: &Arc<Network>) -> Arc<Port> {
        network.port(None, QueueLimit::default()).unwrap()
    }

    fn take(backend: &PortBackend) -> Vec<(Vec<u8>, Offload)> {
        let mut taken = Vec::new();
        backend.receive(100, &mut |frame| {
            taken.push((frame.bytes.to_vec(), frame.offload));
            true
        });
        taken
    }

    fn to_all(payload: &[u8]) -> Vec<u8> {
        [&[0xff; 12][..], &[0x88, 0xb5], payload].concat()
    }

    #[test]
    fn frames_pass_between_machines_as_they_are_and_are_completed_for_programs() {
        let network = Network::new(1);
        let program = port(&network);
        let [one, other] = [0, 1].map(|_| PortBackend::new(port(&network)).unwrap());
        assert!(one.offloads().checksum && one.offloads().tso4);
        let offload =
            Offload { checksum: Some(Checksum { start: 14, offset: 2 }), ..Offload::default() };
        let bytes = to_all(&[0x12, 0x34, 0, 0]);
        assert_eq!(one.send(&[Frame { bytes: &bytes, offload }]), 1);
        assert_eq!(take(&other), [(bytes, offload)]);
        let complete = to_all(&[0x12, 0x34, 0xed, 0xcb]);
        assert_eq!(program.receive().as_deref(), Some(&complete[..]));
        let how = Segmentation { is_v6: false, size: 9, header_length: 15, has_ecn: false };
        let offload = Offload { segmentation: Some(how), ..offload };
        one.send(&[Frame { bytes: &complete, offload }]);
        assert!(program.receive().is_none(), "is no TCP segment, and cannot be cut");
        assert_eq!(program.counts().unwrap().received.discarded, 1);
        assert_eq!((take(&other).len(), other.dropped()), (1, 0));
    }

    #[test]
    fn a_frame_for_which_the_guest_has_no_room_comes_again_first() {
        let network = Network::new(1);
        let program = port(&network);
        let machine = PortBackend::new(port(&network)).unwrap();
        (1..=3).for_each(|byte| program.send(&to_all(&[byte])));
        let mut room = 1;
        machine.receive(100, &mut |_| {
            room -= 1;
            room == 0
        });
        let left: Vec<_> = take(&machine).into_iter().map(|(bytes, _)| bytes[14]).collect();
        assert_eq!(left, [2, 3]);
        assert_eq!(machine.port().counts().unwrap().received.received, 3);
        program.send(&to_all(&[4]));
        machine.reset();
        assert!(take(&machine).is_empty());
        assert_eq!(machine.dropped(), 1);
    }

    #[test]
    fn a_port_has_one_machine() {
        let network = Network::new(1);
        let machine = PortBackend::new(port(&network)).unwrap();
        let again = PortBackend::new(Arc::clone(machine.port()));
        assert_eq!(again.unwrap_err().kind, ErrorKind::State);
        assert!(machine.port().is_claimed() && machine.failure().is_none());
        let shared = Arc::clone(machine.port());
        assert_eq!(shared.id(), 0);
        drop(machine);
        let machine = PortBackend::new(shared).unwrap();
        machine.port().close();
        assert!(machine.failure().unwrap().contains("is closed"));
        assert_eq!(machine.describe(), "network port port0");
        assert_eq!(machine.watched().send, -1);
        let closed = PortBackend::new(Arc::clone(machine.port()));
        assert_eq!(closed.unwrap_err().kind, ErrorKind::Closed);
    }
}

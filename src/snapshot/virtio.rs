//! What a snapshot has of a virtio device besides its state, which is that of a device on the bus:
//! what is needed to make a device like it. Parsed from untrusted bytes.

use crate::bytes::{Reader, bad};
use crate::error::Result;
use crate::virtio::{Frozen, Place};

/// See the module.
#[derive(Clone, Debug)]
pub struct VirtioDeviceState {
    /// Its name, such as "disk0".
    pub name: String,
    /// Its device type.
    pub device_type: u32,
    /// Its registers and its interrupt line.
    pub place: Place,
    /// What it was configured with.
    pub spec: Vec<u8>,
    /// What forks continue from; a file does not have it.
    pub frozen: Option<Frozen>,
}

const NO_LINE: u32 = u32::MAX;

impl VirtioDeviceState {
    /// Encode it for a record.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.device_type.to_le_bytes().to_vec();
        bytes.extend(self.place.base.to_le_bytes());
        bytes.extend(self.place.line.unwrap_or(NO_LINE).to_le_bytes());
        bytes.extend(u32::try_from(self.name.len()).unwrap_or(0).to_le_bytes());
        bytes.extend(self.name.as_bytes());
        bytes.extend(&self.spec);
        bytes
    }

    /// Decode it from a record.
    ///
    /// # Errors
    /// [`ErrorKind::Snapshot`](crate::error::ErrorKind::Snapshot) if the record is damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("virtio device", bytes);
        let (device_type, base) = (reader.u32()?, reader.u64()?);
        let line = Some(reader.u32()?).filter(|line| *line != NO_LINE);
        let length = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
        let name = String::from_utf8(reader.bytes(length)?.to_vec())
            .map_err(|_| bad("virtio device", "its name is not text"))?;
        let place = Place { base, line };
        if !place.is_possible() {
            return Err(bad(&name, format!("no device is at {base:#x} with line {line:?}")));
        }
        Ok(Self { name, device_type, place, spec: reader.rest().to_vec(), frozen: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_device_comes_back_without_what_is_frozen() {
        for line in [None, Some(5)] {
            let place = Place { base: crate::layout::VIRTIO, line };
            let (name, spec) = ("disk0".to_owned(), vec![1, 2]);
            let state = VirtioDeviceState { name, device_type: 2, place, spec, frozen: None };
            let again = VirtioDeviceState::decode(&state.encode()).unwrap();
            assert_eq!((again.name.as_str(), again.device_type), ("disk0", 2));
            assert_eq!((again.place, again.spec), (place, vec![1, 2]));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = VirtioDeviceState::decode(&bytes);
        }
    }
}

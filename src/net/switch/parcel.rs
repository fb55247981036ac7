//! A frame on its way, shared by all ports that get it, with what it leaves to its receiver. Pure
//! data.

use std::ops::Deref;
use std::sync::Arc;

use crate::net::{Frame, Offload, offload};

#[derive(Clone, Debug)]
pub(super) struct Parcel {
    pub(super) bytes: Arc<[u8]>,
    pub(super) offload: Offload,
}

impl Parcel {
    pub(super) fn new(frame: &Frame<'_>) -> Self {
        Self { bytes: Arc::from(frame.bytes), offload: frame.offload }
    }

    pub(super) fn frame(&self) -> Frame<'_> {
        Frame { bytes: &self.bytes, offload: self.offload }
    }

    /// Whether a checksum or more is missing.
    pub(super) fn is_incomplete(&self) -> bool {
        self.offload.checksum.is_some() || self.offload.segmentation.is_some()
    }

    /// The same frame with all that it leaves to its receiver: several if it has to be cut, none if
    /// that is impossible.
    pub(super) fn completed(&self) -> Vec<Self> {
        let mut parts = Vec::new();
        offload::finish(
            &self.frame(),
            |_| false,
            &mut Vec::new(),
            |part| {
                parts.push(Self { bytes: Arc::from(part.bytes), offload: Offload::NONE });
            },
        );
        parts
    }
}

impl Deref for Parcel {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
impl From<&[u8]> for Parcel {
    fn from(bytes: &[u8]) -> Self {
        Self::new(&Frame::complete(bytes))
    }
}

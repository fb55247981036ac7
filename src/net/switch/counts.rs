//! The limit of a port's queue, and the counts of its frames. Pure data.

/// The most that is on its way to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimit {
    /// Frames.
    pub frames: usize,
    /// Bytes of all frames.
    pub bytes: usize,
}

impl Default for QueueLimit {
    fn default() -> Self {
        Self { frames: 4096, bytes: 16 << 20 }
    }
}

/// What has become of the frames to a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReceivedCounts {
    /// Frames for this port, and those for all.
    pub addressed: u64,
    /// Frames that were added as copies.
    pub duplicated: u64,
    /// Frames that the reader has taken.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that the next one overtook, or was to overtake.
    pub reordered: u64,
    /// Frames lost by chance.
    pub lost: u64,
    /// Frames that would have waited too long for bandwidth.
    pub over_bandwidth: u64,
    /// Frames from the other side of a partition.
    pub partitioned: u64,
    /// Frames dropped because the queue was full.
    pub overflowed: u64,
    /// Frames dropped because the port was closed, or its machine was closed or reset, and those
    /// that cannot be completed for a program.
    pub discarded: u64,
    /// Frames on their way.
    pub queued: u64,
}

/// What has become of the frames that a port has sent, before they go to other ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SentCounts {
    /// Frames that the port has sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames lost by chance.
    pub lost: u64,
    /// Frames that would have waited too long for bandwidth.
    pub over_bandwidth: u64,
    /// Frames that are too short or too long.
    pub malformed: u64,
    /// Frames for which there was no other port.
    pub unclaimed: u64,
    /// Frames that went to at least one other port.
    pub forwarded: u64,
}

/// What has become of the frames of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounts {
    /// Of the frames that it has sent.
    pub sent: SentCounts,
    /// Of the frames to it.
    pub received: ReceivedCounts,
}

impl PortCounts {
    /// All frames that did not arrive and will not.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        let SentCounts { lost, over_bandwidth, malformed, unclaimed, .. } = self.sent;
        let ReceivedCounts { overflowed, discarded, partitioned, .. } = self.received;
        let ours = lost + over_bandwidth + malformed + unclaimed;
        ours + self.received.lost
            + self.received.over_bandwidth
            + overflowed
            + discarded
            + partitioned
    }
}

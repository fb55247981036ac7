//! The virtio devices of a machine. Each kind has its own file or struct here. Pure data.

/// The entropy device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RngConfig {
    /// A seed, for tests that must repeat. None for the kernel's generator.
    pub seed: Option<u64>,
}

/// A virtio device.
#[derive(Debug)]
pub enum VirtioConfig {
    /// The entropy device.
    Rng(RngConfig),
}

impl VirtioConfig {
    /// The name of the kind, and whether a machine may have several.
    fn kind(&self) -> (&'static str, bool) {
        match self {
            Self::Rng(_) => ("rng", false),
        }
    }

    /// The names of devices, such as "disk0", "disk1" and "rng".
    #[must_use]
    pub fn names(all: &[Self]) -> Vec<String> {
        let name = |(at, config): (usize, &Self)| {
            let (kind, is_numbered) = config.kind();
            let before = all.iter().take(at).filter(|other| other.kind().0 == kind).count();
            if is_numbered { format!("{kind}{before}") } else { kind.to_owned() }
        };
        all.iter().enumerate().map(name).collect()
    }
}

//! The virtio devices of a machine. Each kind has its own file or struct here. Pure data.

use std::time::Duration;

use super::console::ConsoleConfig;
use super::custom::CustomConfig;
use super::disk::DiskConfig;
use super::net::NetConfig;
use super::share::ShareConfig;
use super::vsock::VsockConfig;

/// The entropy device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RngConfig {
    /// A seed, for tests that must repeat. None for the kernel's generator.
    pub seed: Option<u64>,
}

/// The memory balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// How much memory the guest is to give, in MiB.
    pub target_mib: u32,
    /// Whether a guest that runs out of memory may take pages back.
    pub deflate_on_oom: bool,
    /// Whether the guest reports free pages.
    pub reporting: bool,
    /// How often the guest sends statistics; None for never.
    pub statistics: Option<Duration>,
}

/// A virtio device.
#[derive(Debug)]
pub enum VirtioConfig {
    /// A disk.
    Disk(DiskConfig),
    /// A network device.
    Net(NetConfig),
    /// The entropy device.
    Rng(RngConfig),
    /// The console device.
    Console(ConsoleConfig),
    /// A device whose work the program does.
    Custom(CustomConfig),
    /// The memory balloon.
    Balloon(BalloonConfig),
    /// A directory of the host.
    Share(ShareConfig),
    /// The socket device.
    Vsock(VsockConfig),
}

impl VirtioConfig {
    /// The name of the kind, and whether a machine may have several.
    fn kind(&self) -> (&'static str, bool) {
        match self {
            Self::Disk(_) => ("disk", true),
            Self::Net(_) => ("net", true),
            Self::Rng(_) => ("rng", false),
            Self::Console(_) => ("console", false),
            Self::Custom(_) => ("virtio", true),
            Self::Balloon(_) => ("balloon", false),
            Self::Share(_) => ("share", true),
            Self::Vsock(_) => ("vsock", false),
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

//! The console device. Pure data.

use std::path::PathBuf;

/// A port of the console device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsolePort {
    /// Its name, which Linux shows in /sys/class/virtio-ports.
    pub name: String,
    /// A unix socket where the host connects to it. None means by the program only.
    pub path: Option<PathBuf>,
}

/// The console device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Its ports, from 1 to 16. The first is a console.
    pub ports: Vec<ConsolePort>,
    /// The size of the console: columns and rows.
    pub size: (u16, u16),
}

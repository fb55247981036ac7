//! The configuration of a machine as plain structs, and its validation.
//! There is no I/O and no KVM here, so a valid configuration may still be refused by the machine.

mod boot;
mod console;
mod custom;
mod disk;
mod machine;
mod net;
mod platform;
mod share;
mod virtio;
mod vsock;

pub use boot::{
    Boot, Code, ElfBoot, FirmwareBoot, FlatBoot, KernelBoot, KernelProtocol, LinuxBoot,
    LinuxProtocol, Module,
};
pub use console::{ConsoleConfig, ConsolePort};
pub use custom::{CustomConfig, CustomProgram};
pub use disk::{DiskConfig, RateLimits};
pub use machine::{MemoryConfig, SerialConfig, SerialInput, SerialOutput, VmmConfig};
pub use net::NetConfig;
pub use platform::{ExitPort, PcPart, PcParts, Platform, PlatformConfig};
pub use share::ShareConfig;
pub use virtio::{BalloonConfig, RngConfig, VirtioConfig};
pub use vsock::VsockConfig;

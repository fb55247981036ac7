//! A virtio device whose work the program does. Pure data, and the program's side as a trait.

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use crate::error::Result;

/// The program's side of such a device. The loop's thread gives it the queues; see the binding.
pub trait CustomProgram: Send + Sync + Debug {
    /// The driver writes the configuration space. On a vCPU's thread. Returns whether it succeeded;
    /// the loop raises what went wrong.
    fn write_config(&self, offset: u64, data: &[u8]) -> bool;

    /// A snapshot is going to be restored. On the thread that does it.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if the program fails.
    fn reset(&self) -> Result<()>;

    /// Its state for a snapshot. On any thread.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if it cannot be saved.
    fn save(&self) -> Result<Vec<u8>>;

    /// Restore what `save` returned.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::State`] if it cannot be restored.
    fn restore(&self, state: &[u8]) -> Result<()>;

    /// The program's side itself, for the binding.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

/// Such a device.
#[derive(Clone, Debug)]
pub struct CustomConfig {
    /// The device type.
    pub device_type: u32,
    /// The feature bits that it offers, without those of queues and transport.
    pub features: u64,
    /// The maximum sizes of its queues, each a power of two.
    pub queues: Vec<u16>,
    /// The configuration space at first.
    pub space: Vec<u8>,
    /// The program's side.
    pub program: Arc<dyn CustomProgram>,
}

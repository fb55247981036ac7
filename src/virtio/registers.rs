//! The registers and status bits of virtio over MMIO (virtio 1.2, 4.2.2 and 2.1). Pure data.

/// "virt", little-endian.
pub(super) const MAGIC: u32 = 0x7472_6976;
/// The version of a device that is not legacy.
pub(super) const VERSION: u32 = 2;
/// "PYVM", little-endian.
pub(super) const VENDOR: u32 = 0x4d56_5950;

pub(super) const MAGIC_VALUE: u64 = 0x000;
pub(super) const VERSION_NUMBER: u64 = 0x004;
pub(super) const DEVICE_ID: u64 = 0x008;
pub(super) const VENDOR_ID: u64 = 0x00c;
pub(super) const DEVICE_FEATURES: u64 = 0x010;
pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
pub(super) const DRIVER_FEATURES: u64 = 0x020;
pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
pub(super) const QUEUE_SEL: u64 = 0x030;
pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
pub(super) const QUEUE_NUM: u64 = 0x038;
pub(super) const QUEUE_READY: u64 = 0x044;
pub(super) const QUEUE_NOTIFY: u64 = 0x050;
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
pub(super) const INTERRUPT_ACK: u64 = 0x064;
pub(super) const STATUS: u64 = 0x070;
pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
pub(super) const CONFIG: u64 = 0x100;

/// The device status field.
pub(super) mod status {
    pub(in super::super) const ACKNOWLEDGE: u8 = 1;
    pub(in super::super) const DRIVER: u8 = 2;
    pub(in super::super) const DRIVER_OK: u8 = 4;
    pub(in super::super) const FEATURES_OK: u8 = 8;
    pub(in super::super) const NEEDS_RESET: u8 = 0x40;
    pub(in super::super) const FAILED: u8 = 0x80;
    /// The bits that a driver may set.
    pub(in super::super) const OF_DRIVER: u8 =
        ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// The reasons of an interrupt.
pub(super) const USED_BUFFER: u32 = 1;
pub(super) const CONFIGURATION_CHANGE: u32 = 2;

/// Features of the transport and the queues.
pub(super) const INDIRECT_DESC: u64 = 1 << 28;
pub(super) const EVENT_IDX: u64 = 1 << 29;
pub(super) const VERSION_1: u64 = 1 << 32;
/// Those that every device offers.
pub(super) const TRANSPORT_FEATURES: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;

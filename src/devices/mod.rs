//! The buses and the devices that a PC needs to boot. A device answers accesses, and has its own
//! state and locks; `vcpu` handles the exits. Devices are called on the thread of the vCPU that
//! exited. The code that reads and writes streams runs on the loop's thread.

mod acpi_pm;
mod backlog;
mod bus;
mod debug_exit;
mod doorbell;
mod fw_cfg;
mod history;
mod hpet;
mod i8042;
mod i8042_state;
mod keyboard;
mod line;
mod open;
mod output_watch;
mod pci;
mod platform;
mod pvpanic;
mod quiesce;
mod reset_ports;
mod rtc;
mod rtc_cells;
mod rtc_flags;
mod rtc_state;
mod rtc_time;
mod rtc_timer;
mod serial;
mod serial_device;
mod serial_kind;
mod speaker;
mod streams;
mod text_stop;
mod uart;
mod uart_bits;
mod uart_modem;
mod uart_receiver;
mod uart_state;
mod vga;

pub use acpi_pm::AcpiPm;
pub use backlog::Chunk;
pub(crate) use bus::BusCache;
pub use bus::{Access, Bus, Buses, Device, Unanswered, each};
pub use debug_exit::DebugExit;
pub use doorbell::Doorbell;
pub(crate) use fw_cfg::check_names;
pub use history::News;
pub use line::InterruptLine;
pub use open::{Direction, duplicate, input_file};
pub use output_watch::OutputWatch;
pub(crate) use platform::{Attached, MachineFacts, Streams, attach, claim, claim_range};
pub use pvpanic::Pvpanic;
pub use quiesce::QuiescedDevices;
pub use reset_ports::ResetRegister;
pub use serial::Serial;
pub use vga::{ScreenView, Vga};

//! How Linux learns of virtio devices on the MMIO transport: by ACPI, or by parameters on its
//! command line if it has none. Pure data.

use crate::layout;
use crate::virtio::Place;

/// A message of every kernel that has ACPI.
const ACPI_MESSAGE: &[u8] = b"ACPI BIOS Error";

/// Whether a kernel, as it is once it is unpacked, has ACPI.
pub(super) fn has_acpi(kernel: &[u8]) -> bool {
    memchr::memmem::find(kernel, ACPI_MESSAGE).is_some()
}

/// The command line with the devices, if the kernel does not find them by ACPI. They come first:
/// what follows "--" belongs to init.
pub(super) fn command_line(
    cmdline: &str,
    places: &[Place],
    uses_acpi: impl FnOnce() -> bool,
) -> String {
    let is_off = || cmdline.split_ascii_whitespace().any(|word| word == "acpi=off");
    // To find out takes a search of the whole kernel.
    if places.is_empty() || (!is_off() && uses_acpi()) {
        return cmdline.to_owned();
    }
    let size = layout::VIRTIO_SIZE >> 10;
    let device = |place: &Place| {
        let line = place.line?;
        Some(format!("virtio_mmio.device={size}K@{:#x}:{line}", place.base))
    };
    let mut words: Vec<String> = places.iter().filter_map(device).collect();
    if !cmdline.is_empty() {
        words.push(cmdline.to_owned());
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_to_a_kernel_without_acpi() {
        let places = [
            Place { base: 0xfeb0_0000, line: Some(5) },
            Place { base: 0xfeb0_1000, line: None },
            Place { base: 0xfeb0_2000, line: Some(10) },
        ];
        let both = "virtio_mmio.device=4K@0xfeb00000:5 virtio_mmio.device=4K@0xfeb02000:10";
        assert_eq!(command_line("a -- b", &places, || false), format!("{both} a -- b"));
        assert_eq!(command_line("", &places, || false), both);
        assert_eq!(command_line("a", &places, || true), "a");
        assert_eq!(command_line("acpi=off", &places, || true), format!("{both} acpi=off"));
        assert_eq!(command_line("a", &[], || false), "a");
    }

    #[test]
    fn acpi_is_found_in_a_kernel() {
        assert!(has_acpi(b"... \x013ACPI BIOS Error (bug): ..."));
        assert!(!has_acpi(b"..."));
    }
}

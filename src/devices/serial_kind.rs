//! The kinds of ports that print, and their names.

use crate::error::Error;

/// What the guest sees of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SerialKind {
    /// The registers of a UART, with this name.
    Uart(&'static str),
    /// A single register that prints what is written, as Bochs and QEMU have it for firmware.
    DebugPort,
}

impl SerialKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Uart(name) => name,
            Self::DebugPort => "debug_port",
        }
    }

    /// An error of a stream, with the key of this port instead of COM1's.
    pub(super) fn keyed(self, error: Error) -> Error {
        let at = match (self, error.at.strip_prefix("serial.")) {
            (Self::Uart("COM1"), _) | (_, None) => return error,
            (Self::Uart(name), Some(stream)) => format!("{}.{stream}", name.to_lowercase()),
            (Self::DebugPort, Some(stream)) => format!("debugcon.{stream}"),
        };
        Error { at, ..error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn an_error_names_the_port() {
        let at = |kind: SerialKind, at: &str| kind.keyed(Error::new(ErrorKind::Io, at, "")).at;
        assert_eq!(at(SerialKind::Uart("COM1"), "serial.output"), "serial.output");
        assert_eq!(at(SerialKind::Uart("COM3"), "serial.input"), "com3.input");
        assert_eq!(at(SerialKind::DebugPort, "serial.output"), "debugcon.output");
        assert_eq!(at(SerialKind::DebugPort, "eventfd"), "eventfd");
        assert_eq!(
            (SerialKind::Uart("COM2").name(), SerialKind::DebugPort.name()),
            ("COM2", "debug_port")
        );
    }
}

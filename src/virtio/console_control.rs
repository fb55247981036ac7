//! The control messages of a console with several ports (virtio 1.2, 5.3.6.2). On the loop's
//! thread.

use std::collections::VecDeque;
use std::io::Write;

use super::access::QueueAccess;
use super::buffers::{ChainReader, ChainWriter};
use super::console_port::Port;
use crate::bytes::Reader;
use crate::error::Result;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// A driver that asks without end, and takes no answers, gets no more than these.
const MOST: usize = 1024;

/// A message of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message(Vec<u8>);

impl Message {
    fn new(port: u32, event: u16, value: u16) -> Self {
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        Self(bytes)
    }

    fn with(mut self, more: &[u8]) -> Self {
        self.0.extend(more);
        self
    }

    /// The host has connected to a port, or disconnected.
    pub(super) fn open(port: u32, is_open: bool) -> Self {
        Self::new(port, PORT_OPEN, u16::from(is_open))
    }

    /// The console has this size.
    pub(super) fn resize(columns: u16, rows: u16) -> Self {
        Self::new(0, RESIZE, 0).with(&[columns.to_le_bytes(), rows.to_le_bytes()].concat())
    }
}

/// The messages that the driver has not taken yet.
#[derive(Debug, Default)]
pub(super) struct Control(VecDeque<Message>);

impl Control {
    pub(super) fn push(&mut self, message: Message) {
        if self.0.len() < MOST {
            self.0.push_back(message);
        }
    }

    /// Send what the driver has buffers for. A message that does not fit into one is cut off.
    pub(super) fn send(&mut self, access: &QueueAccess<'_>, queue: usize) {
        while !self.0.is_empty()
            && let Some(chain) = access.pop(queue)
        {
            let mut writer = ChainWriter::new(access, &chain);
            let message = self.0.pop_front();
            message.iter().for_each(|message| drop(writer.write_all(&message.0)));
            let written = writer.written();
            access.complete(chain, written);
        }
    }

    /// Take the driver's messages.
    pub(super) fn take(
        &mut self,
        access: &QueueAccess<'_>,
        queue: usize,
        ports: &mut [Port],
        size: (u16, u16),
    ) {
        while let Some(chain) = access.pop(queue) {
            let bytes: Option<[u8; 8]> = ChainReader::new(access, &chain).take();
            access.complete(chain, 0);
            let Some([a, b, c, d, event_low, event_high, low, high]) = bytes else { continue };
            let number = u32::from_le_bytes([a, b, c, d]);
            let is_on = u16::from_le_bytes([low, high]) != 0;
            self.answer(u16::from_le_bytes([event_low, event_high]), number, is_on, ports, size);
        }
    }

    fn answer(
        &mut self,
        event: u16,
        number: u32,
        is_on: bool,
        ports: &mut [Port],
        size: (u16, u16),
    ) {
        if event == DEVICE_READY && is_on {
            (0..).zip(ports).for_each(|(id, _)| self.push(Message::new(id, DEVICE_ADD, 1)));
            return;
        }
        let port = usize::try_from(number).ok().and_then(|number| ports.get_mut(number));
        let Some(port) = port else { return };
        match event {
            PORT_READY if is_on => {
                if number == 0 {
                    self.push(Message::new(0, CONSOLE_PORT, 1));
                    self.push(Message::resize(size.0, size.1));
                }
                self.push(Message::new(number, PORT_NAME, 1).with(port.name.as_bytes()));
                if port.is_connected() {
                    self.push(Message::open(number, true));
                }
                port.has_driver = true;
            }
            PORT_OPEN => port.is_open = is_on,
            _ => {}
        }
    }

    pub(super) fn save(&self, bytes: &mut Vec<u8>) {
        bytes.extend(u16::try_from(self.0.len()).unwrap_or(0).to_le_bytes());
        for Message(message) in &self.0 {
            bytes.extend(u16::try_from(message.len()).unwrap_or(0).to_le_bytes());
            bytes.extend(message);
        }
    }

    pub(super) fn restore(reader: &mut Reader<'_>) -> Result<Self> {
        let mut all = VecDeque::new();
        for _ in 0..reader.u16()? {
            let length = usize::from(reader.u16()?);
            all.push_back(Message(reader.bytes(length)?.to_vec()));
        }
        Ok(Self(all))
    }
}

#[cfg(test)]
mod tests {
    //! Covers src/virtio/console.rs, src/virtio/console_port.rs, src/config/console.rs.

    use std::io::{Read, Write};

    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::super::console::Console;
    use super::super::device::VirtioDevice;
    use super::super::mock::{MockDriver, readable, writable};
    use crate::config::{ConsoleConfig, ConsolePort};
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    const AT: u64 = MockDriver::BUFFERS;

    fn console(names: &[&str]) -> (Arc<Console>, MockDriver) {
        let port = |name: &&str| ConsolePort { name: (*name).to_owned(), path: None };
        let ports = names.iter().map(port).collect();
        let console = Arc::new(Console::new(ConsoleConfig { ports, size: (80, 25) }).unwrap());
        let driver = MockDriver::new(Arc::clone(&console) as _, 4).unwrap();
        (console, driver)
    }

    fn turn(driver: &MockDriver) {
        while driver.turn(0).unwrap() > 0 {}
    }

    fn write(driver: &mut MockDriver, queue: u32, bytes: &[u8]) {
        driver.memory.write(AT, bytes).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        assert_eq!(driver.exchange(queue, &[readable(AT, length)]), Some(0));
    }

    /// What the device has written into a buffer that was added before.
    fn read(driver: &mut MockDriver, queue: usize) -> Option<Vec<u8>> {
        turn(driver);
        let (_, length) = driver.used(queue)?;
        let mut bytes = vec![0; length as usize];
        driver.memory.read(AT + 0x1000 * (1 + queue as u64), &mut bytes).unwrap();
        Some(bytes)
    }

    fn want(driver: &mut MockDriver, queue: u32) {
        let at = AT + 0x1000 * (1 + u64::from(queue));
        driver.add(queue as usize, &[writable(at, 64)]).unwrap();
        driver.notify(queue);
    }

    fn stream(console: &Console, name: &str) -> UnixStream {
        UnixStream::from(console.connect(name).unwrap())
    }

    #[test]
    fn a_console_without_ports_talks_both_ways() {
        let (console, mut driver) = console(&["con"]);
        driver.start(0);
        write(&mut driver, 1, b"before");
        let mut host = stream(&console, "con");
        turn(&driver);
        write(&mut driver, 1, b" and after");
        let mut found = [0; 16];
        host.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"before and after");
        host.write_all(b"input").unwrap();
        want(&mut driver, 0);
        assert_eq!(read(&mut driver, 0).unwrap(), b"input");
        assert_eq!(console.connect("con").unwrap_err().kind, ErrorKind::State);
        drop(host);
        want(&mut driver, 0);
        turn(&driver);
        drop(stream(&console, "con"));
    }

    #[test]
    fn ports_are_announced_with_their_names_and_open_when_the_host_connects() {
        let (console, mut driver) = console(&["con", "org.example"]);
        assert_eq!(driver.start(3), 15);
        let message = |id: u32, event: u16, value: u16| {
            [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
        };
        write(&mut driver, 3, &message(0, 0, 1));
        for id in 0..2 {
            want(&mut driver, 2);
            assert_eq!(read(&mut driver, 2).unwrap(), message(id, 1, 1));
        }
        write(&mut driver, 3, &message(1, 3, 1));
        want(&mut driver, 2);
        assert_eq!(
            read(&mut driver, 2).unwrap(),
            [message(1, 7, 1), b"org.example".to_vec()].concat()
        );
        let mut host = stream(&console, "org.example");
        want(&mut driver, 2);
        assert_eq!(read(&mut driver, 2).unwrap(), message(1, 6, 1));
        host.write_all(b"x").unwrap();
        want(&mut driver, 4);
        assert_eq!(read(&mut driver, 4), None, "the guest has not opened it");
        write(&mut driver, 3, &message(1, 6, 1));
        assert_eq!(read(&mut driver, 4).unwrap(), b"x");
        console.resize(100, 40);
        want(&mut driver, 2);
        let resized = [message(0, 5, 0), vec![100, 0, 40, 0]].concat();
        assert_eq!(read(&mut driver, 2).unwrap(), resized);
        let mut size = [0; 8];
        driver.config(0, &mut size);
        assert_eq!(size, [100, 0, 40, 0, 2, 0, 0, 0]);
        drop(host);
        want(&mut driver, 4);
        want(&mut driver, 2);
        assert_eq!(read(&mut driver, 2).unwrap(), message(1, 6, 0));
    }

    #[test]
    fn a_host_that_does_not_read_holds_the_chain_and_nothing_is_lost() {
        let (console, mut driver) = console(&["con"]);
        driver.start(0);
        let mut host = stream(&console, "con");
        turn(&driver);
        let data: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        driver.memory.write(AT, &data).unwrap();
        driver.add(1, &[readable(AT, 1 << 20)]).unwrap();
        driver.notify(1);
        turn(&driver);
        assert_eq!(driver.used(1), None);
        let mut found = vec![0; 1 << 20];
        let mut done = 0;
        while done < found.len() {
            done += host.read(&mut found[done..]).unwrap();
            turn(&driver);
        }
        assert_eq!(found, data);
        assert!(driver.used(1).is_some());
    }

    #[test]
    fn without_a_reader_the_newest_output_is_kept() {
        let (console, mut driver) = console(&["con"]);
        driver.start(0);
        for byte in 0..3u8 {
            driver.memory.write(AT, &vec![byte; 1 << 20]).unwrap();
            assert_eq!(driver.exchange(1, &[readable(AT, 1 << 20)]), Some(0));
        }
        let mut host = stream(&console, "con");
        turn(&driver);
        let mut first = [9; 1];
        host.read_exact(&mut first).unwrap();
        assert_eq!(first, [2]);
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..12), 0..30),
        ) {
            let (_, mut driver) = console(&["con", "other"]);
            driver.start(3);
            for message in messages {
                driver.memory.write(AT, &message).unwrap();
                let length = u32::try_from(message.len()).unwrap();
                driver.exchange(3, &[readable(AT, length.max(1))]);
            }
        }

        #[test]
        fn no_state_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let (console, _driver) = console(&["con", "other"]);
            let _ = console.restore(&bytes);
            let _ = Console::from_spec(&bytes);
        }
    }
}

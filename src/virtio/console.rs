//! The console device (virtio 1.2, 5.3): ports between the guest and streams of the host, the first
//! of them a console. On the loop's thread; any thread connects to a port.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::access::QueueAccess;
use super::console_control::{Control, Message};
use super::console_port::Port;
use super::device::{VirtioDevice, read_space};
use super::queues::Queues;
use crate::bytes::{Reader, bad};
use crate::config::{ConsoleConfig, ConsolePort};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, rank};

// Feature bits.
const SIZE: u64 = 1 << 0;
const MULTIPORT: u64 = 1 << 1;

/// The queues of the control messages: those of the device, and those of the driver.
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
/// The most ports of a device.
pub(super) const MAX_PORTS: usize = 16;
const QUEUE_SIZES: [u16; 2 * MAX_PORTS + 2] = [64; 2 * MAX_PORTS + 2];

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    ControlReceive,
    ControlTransmit,
}

fn role(queue: usize) -> Role {
    let port = (queue / 2).saturating_sub(1);
    match queue {
        CONTROL_RECEIVE => Role::ControlReceive,
        CONTROL_TRANSMIT => Role::ControlTransmit,
        _ if queue.is_multiple_of(2) => Role::Receive(port),
        _ => Role::Transmit(port),
    }
}

fn queue_of(port: usize) -> usize {
    if port == 0 { 0 } else { 2 * port + 2 }
}

#[derive(Debug)]
struct State {
    ports: Vec<Port>,
    control: Control,
    /// Columns and rows.
    size: (u16, u16),
    queues: Option<Arc<Queues>>,
    has_ports: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Console {
    config: ConsoleConfig,
    /// Has the loop look for new connections and messages.
    wake: EventFd,
    state: Mutex<State, rank::VirtioDevice>,
}

impl Console {
    /// A console with the ports of the configuration. Their sockets listen from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if there are too many ports, two have the same name, or a socket
    /// cannot be bound.
    pub fn new(config: ConsoleConfig) -> Result<Self> {
        check(&config.ports)?;
        let wake = EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| Error::os(ErrorKind::Event, "eventfd", &e))?;
        let ports = config.ports.iter().map(Port::new).collect::<Result<_>>()?;
        let (control, size) = (Control::default(), config.size);
        let state = State { ports, control, size, queues: None, has_ports: false };
        Ok(Self { config, wake, state: Mutex::new(state) })
    }

    pub(super) fn from_spec(spec: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("console", spec);
        let size = (reader.u16()?, reader.u16()?);
        let mut ports = Vec::new();
        for _ in 0..reader.u16()? {
            let length = usize::from(reader.u16()?);
            let name = String::from_utf8(reader.bytes(length)?.to_vec())
                .map_err(|_| bad("console", "the name of a port is not text"))?;
            // A fork does not have the socket of the original.
            ports.push(ConsolePort { name, path: None });
        }
        reader.end()?;
        Self::new(ConsoleConfig { ports, size })
    }

    /// The names of the ports.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.config.ports.iter().map(|port| port.name.clone()).collect()
    }

    /// Connect to a port. Returns the host's end of a stream, which first has what the guest wrote
    /// before.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if there is no such port; [`ErrorKind::State`] if it is connected.
    pub fn connect(&self, name: &str) -> Result<OwnedFd> {
        let failed = |e: std::io::Error| Error::os(ErrorKind::Io, "console", &e);
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let mut state = self.state.lock();
        let Some(port) = state.ports.iter_mut().find(|port| port.name == name) else {
            let detail = format!("there is no port {name:?}; there are {:?}", self.names());
            return Err(Error::new(ErrorKind::Config, "console", detail));
        };
        if !port.offer(ours) {
            let detail = format!("port {name:?} is connected already");
            return Err(
                Error::new(ErrorKind::State, "console", detail).hint("close the other end first")
            );
        }
        drop(state);
        self.wake();
        Ok(theirs.into())
    }

    fn wake(&self) {
        // Fails only if the counter is full: the loop is awake then.
        let _ = self.wake.write(1);
    }

    /// Change the size of the console.
    pub fn resize(&self, columns: u16, rows: u16) {
        {
            // A snapshot has both the size and the interrupt, or neither.
            let mut state = self.state.lock();
            state.size = (columns, rows);
            if state.has_ports {
                state.control.push(Message::resize(columns, rows));
            }
            state.queues.iter().for_each(|queues| queues.config_changed());
        }
        self.wake();
    }

    /// Everything that can be done now.
    fn serve(&self, queues: &Arc<Queues>, ops: &mut EventOps<'_>) {
        let mut state = self.state.lock();
        let State { ports, control, .. } = &mut *state;
        for (number, port) in (0..).zip(ports.iter_mut()) {
            if let Some(is_open) = port.accept(ops) {
                control.push(Message::open(number, is_open));
            }
        }
        let Some(access) = queues.access() else {
            return ports.iter_mut().for_each(|port| port.rest(ops));
        };
        for (at, port) in ports.iter_mut().enumerate() {
            port.send(&access, queue_of(at) + 1, ops);
            if port.receive(&access, queue_of(at), ops) {
                control.push(Message::open(u32::try_from(at).unwrap_or(0), false));
            }
        }
        if state.has_ports {
            state.control.send(&access, CONTROL_RECEIVE);
        }
    }

    fn take_control(&self, access: &QueueAccess<'_>) {
        let mut state = self.state.lock();
        let State { ports, control, size, .. } = &mut *state;
        control.take(access, CONTROL_TRANSMIT, ports, *size);
    }
}

fn check(ports: &[ConsolePort]) -> Result<()> {
    let refused = |detail: String| Err(Error::new(ErrorKind::Config, "console.ports", detail));
    if ports.is_empty() || ports.len() > MAX_PORTS {
        return refused(format!("{} ports are not from 1 to {MAX_PORTS}", ports.len()));
    }
    for (at, port) in ports.iter().enumerate() {
        if port.name.is_empty() || port.name.len() > 64 || port.name.contains(['\0', '/']) {
            return refused(format!(
                "{:?} is no name of 1 to 64 bytes without / and NUL",
                port.name
            ));
        }
        if ports.iter().take(at).any(|other| other.name == port.name) {
            return refused(format!("two ports are named {:?}", port.name));
        }
    }
    Ok(())
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        SIZE | MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES.get(..2 * self.config.ports.len() + 2).unwrap_or(&QUEUE_SIZES)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.state.lock().size;
        let ports = u32::try_from(self.config.ports.len()).unwrap_or(0);
        let mut config = [columns.to_le_bytes(), rows.to_le_bytes()].concat();
        config.extend(ports.to_le_bytes());
        read_space(&config, offset, data);
    }

    fn activate(&self, queues: &Arc<Queues>, features: u64) {
        let mut state = self.state.lock();
        state.queues = Some(Arc::clone(queues));
        state.has_ports = features & MULTIPORT != 0;
    }

    fn reset(&self) {
        let mut state = self.state.lock();
        (state.queues, state.has_ports) = (None, false);
        state.control = Control::default();
        state.ports.iter_mut().for_each(Port::reset);
    }

    fn init(&self, ops: &mut EventOps<'_>) {
        // Fails only without memory: nobody can connect then.
        let _ = ops.add(Events::new(&self.wake, EventSet::IN));
        self.state.lock().ports.iter().for_each(|port| port.init(ops));
    }

    fn process_queue(&self, queues: &Arc<Queues>, queue: usize, ops: &mut EventOps<'_>) {
        if role(queue) == Role::ControlTransmit
            && let Some(access) = queues.access()
        {
            self.take_control(&access);
        }
        self.serve(queues, ops);
    }

    fn process_event(&self, queues: &Arc<Queues>, _events: Events, ops: &mut EventOps<'_>) {
        // Fails if it was another descriptor that was ready.
        let _ = self.wake.read();
        self.serve(queues, ops);
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = self.state.lock();
        let mut bytes = [state.size.0.to_le_bytes(), state.size.1.to_le_bytes()].concat();
        bytes.push(u8::from(state.has_ports));
        state.ports.iter().for_each(|port| port.save(&mut bytes));
        state.control.save(&mut bytes);
        Ok(bytes)
    }

    fn restore(&self, saved: &[u8]) -> Result<()> {
        let mut reader = Reader::new("console", saved);
        let mut state = self.state.lock();
        state.size = (reader.u16()?, reader.u16()?);
        let [has_ports] = reader.take()?;
        state.has_ports = has_ports != 0;
        for port in &mut state.ports {
            port.restore(&mut reader)?;
        }
        state.control = Control::restore(&mut reader)?;
        // What the original's driver believes to be open is not, in a fork.
        let State { ports, control, .. } = &mut *state;
        for (number, port) in (0..).zip(ports) {
            if !port.is_connected() {
                control.push(Message::open(number, false));
            }
        }
        reader.end()
    }

    fn spec(&self) -> Vec<u8> {
        let size = self.state.lock().size;
        let mut bytes = [size.0.to_le_bytes(), size.1.to_le_bytes()].concat();
        let length = |length: usize| u16::try_from(length).unwrap_or(0).to_le_bytes();
        bytes.extend(length(self.config.ports.len()));
        for port in &self.config.ports {
            bytes.extend(length(port.name.len()));
            bytes.extend(port.name.as_bytes());
        }
        bytes
    }

    fn close(&self) {
        let mut state = self.state.lock();
        state.queues = None;
        state.ports.iter_mut().for_each(Port::close);
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

//! A user network for Python: `UserNetwork`, and the conversion of its configuration, `UserNet`.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::config_part::{bad, unlike};
use super::ending::import;
use crate::net::user::{Forward, Ports, Protocol, Rule, UserBackend, UserNetConfig};
use crate::net::{Frame, NetBackend};

/// As many frames come from one call of `receive`.
const BUDGET: usize = 1024;

/// As `pyvmm.user_net.resolved` returns it.
type Resolved = (
    (String, u8, String, String),
    (bool, Option<String>, Option<String>, u16),
    Vec<(String, String, u16)>,
    (Option<Vec<(Option<String>, String, u8, u16, u16)>>, bool, bool),
    (usize, usize),
);

/// The network of a configuration, a `UserNet`. `key` is where errors are.
///
/// # Errors
/// `ConfigError` if the configuration is not valid, `OSError` if a port cannot be listened at.
fn backend(object: &Bound<'_, PyAny>, key: &str) -> PyResult<Arc<UserBackend>> {
    let config = config(object, key)?;
    Ok(object.py().detach(|| UserBackend::new(config)).map(Arc::new)?)
}

/// Convert a `UserNet`. `key` is where errors are.
///
/// # Errors
/// `ConfigError` if it is not valid.
pub(super) fn config(object: &Bound<'_, PyAny>, key: &str) -> PyResult<UserNetConfig> {
    let module = import(object.py(), "pyvmm.user_net")?;
    if !object.is_instance(&module.getattr("UserNet")?)? {
        return Err(bad(key, unlike(object, "a UserNet")));
    }
    let resolved: Resolved = module.call_method1("resolved", (object, key))?.extract()?;
    converted(resolved, key)
}

fn converted(from: Resolved, key: &str) -> PyResult<UserNetConfig> {
    let ((gateway, prefix, guest, dns), (relay_dns, resolver, hostname, mtu), ..) = &from;
    let (.., forwards, (allow, host_loopback, ask), (max_connections, max_flows)) = &from;
    let forward = |(protocol, host, guest_port): &(String, String, u16)| {
        let protocol = protocol_of(protocol);
        Ok(Forward { protocol, host: endpoint(host, key)?, guest_port: *guest_port })
    };
    let rule =
        |(protocol, network, prefix, first, last): &(Option<String>, String, u8, u16, u16)| {
            let protocol = protocol.as_deref().map(protocol_of);
            let (ports, network) = (Ports { first: *first, last: *last }, address(network, key)?);
            Ok(Rule { protocol, network, prefix: *prefix, ports })
        };
    Ok(UserNetConfig {
        gateway: address(gateway, key)?,
        prefix: *prefix,
        guest: address(guest, key)?,
        dns: address(dns, key)?,
        relay_dns: *relay_dns,
        resolver: resolver.as_deref().map(|text| endpoint(text, key)).transpose()?,
        hostname: hostname.clone(),
        mtu: *mtu,
        forwards: forwards.iter().map(forward).collect::<PyResult<_>>()?,
        allow: allow
            .as_ref()
            .map(|rules| rules.iter().map(rule).collect::<PyResult<_>>())
            .transpose()?,
        host_loopback: *host_loopback,
        ask: *ask,
        max_connections: *max_connections,
        max_flows: *max_flows,
    })
}

fn protocol_of(name: &str) -> Protocol {
    if name == "udp" { Protocol::Udp } else { Protocol::Tcp }
}

fn address(text: &str, key: &str) -> PyResult<Ipv4Addr> {
    text.parse().map_err(|_| bad(key, format!("{text} is no IPv4 address")))
}

fn endpoint(text: &str, key: &str) -> PyResult<SocketAddr> {
    text.parse().map_err(|_| bad(key, format!("{text} is no address with a port")))
}

/// A user network: the gateway that a `UserNet` configures. docs/user-net.md describes it.
///
/// It takes and gives Ethernet frames on its own: a program that has a loop calls `receive` when
/// the file descriptor is readable, and after `send`.
///
/// Args:
///     config: a `UserNet`; None means the default.
///
/// Raises:
///     ConfigError: a value cannot be used.
///     OSError: a port cannot be listened at.
#[pyclass(frozen, weakref, name = "UserNetwork", module = "pyvmm")]
#[derive(Debug)]
pub struct PyUserNetwork(Arc<UserBackend>);

impl PyUserNetwork {
    /// The object for a network behind a device.
    pub(super) fn over(backend: Arc<UserBackend>) -> Self {
        Self(backend)
    }
}

#[pymethods]
impl PyUserNetwork {
    #[new]
    #[pyo3(signature = (config = None))]
    fn new(py: Python<'_>, config: Option<Bound<'_, PyAny>>) -> PyResult<Self> {
        let config = match config {
            Some(config) => config,
            None => import(py, "pyvmm.user_net")?.getattr("UserNet")?.call0()?,
        };
        Ok(Self(backend(&config, "user")?))
    }

    /// The ports of the host that lead to the guest: (protocol, address, port, guest port) of each.
    ///
    /// The ports are those that the host has chosen if 0 was configured, and in a fork.
    #[getter]
    fn forwards(&self, py: Python<'_>) -> Vec<(&'static str, String, u16, u16)> {
        let describe = |forward: Forward| {
            let (address, port) = (forward.host.ip().to_string(), forward.host.port());
            (forward.protocol.name(), address, port, forward.guest_port)
        };
        py.detach(|| self.0.forwards()).into_iter().map(describe).collect()
    }

    /// The number of TCP connections.
    #[getter]
    fn connections(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.counts()).0
    }

    /// The number of UDP flows: pairs of an endpoint of the guest and a destination.
    #[getter]
    fn flows(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.counts()).1
    }

    /// The number of frames that were dropped because the guest did not take them.
    #[getter]
    fn dropped(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.0.dropped())
    }

    /// Take a frame of the guest, from its Ethernet header on.
    fn send(&self, py: Python<'_>, frame: &[u8]) {
        py.detach(|| self.0.send(&[Frame::complete(frame)]));
    }

    /// The frames for the guest that have come. The list is empty if there are none.
    fn receive<'py>(&self, py: Python<'py>) -> Vec<Bound<'py, PyBytes>> {
        let mut frames = Vec::new();
        py.detach(|| {
            self.0.receive(BUDGET, &mut |frame| {
                frames.push(frame.bytes.to_vec());
                true
            });
        });
        frames.iter().map(|frame| PyBytes::new(py, frame)).collect()
    }

    /// A file descriptor that is readable when `receive` has something to do. Do not read it.
    fn fileno(&self) -> RawFd {
        self.0.watched().receive
    }

    /// A file descriptor that is readable while `take_questions` has something. Do not read it.
    #[getter]
    fn questions_fd(&self) -> RawFd {
        self.0.asked()
    }

    /// The questions to the policy, each to be answered: (number, protocol, address, port).
    fn take_questions(&self, py: Python<'_>) -> Vec<(u64, &'static str, String, u16)> {
        let questions = py.detach(|| self.0.take_questions());
        let describe = |question: crate::net::user::Question| {
            let address = question.address.to_string();
            (question.id, question.protocol.name(), address, question.port)
        };
        questions.into_iter().map(describe).collect()
    }

    /// Answer a question by its number.
    fn answer(&self, py: Python<'_>, number: u64, is_allowed: bool) {
        py.detach(|| self.0.answer(number, is_allowed));
    }

    /// End all connections with a reset.
    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.0.reset());
    }

    /// End all connections and stop listening. Frames are dropped from then on.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("UserNetwork({})", py.detach(|| self.0.describe()))
    }
}

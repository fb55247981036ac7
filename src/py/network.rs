//! `Network` for Python: makes ports, sets what is between them, and copies the whole.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::network_conditions::{Change, to_python};
use super::network_port::{PyNetworkPort, recording};
use super::owned::Owned;
use crate::error::Result;
use crate::net::switch::{FrozenNetwork, Network, Port, QueueLimit};

/// A network inside the process: a switch that joins machines and programs.
///
/// Each machine and each port may be used on a thread of its own. `port` connects a program,
/// and `Net(network)` in a configuration a machine.
///
/// Args:
///     seed: decides which frames are lost, duplicated, reordered and delayed by how much.
///         docs/network.md says what can be repeated with it.
#[pyclass(frozen, weakref, eq, hash, name = "Network", module = "pyvmm")]
#[derive(Debug)]
pub struct PyNetwork(Owned<Arc<Network>>);

/// For `pyvmm.network`: a network at one instant.
#[pyclass(frozen, name = "_FrozenNetwork", module = "pyvmm")]
#[derive(Debug)]
pub struct PyFrozenNetwork(Owned<FrozenNetwork>);

impl PartialEq for PyNetwork {
    fn eq(&self, other: &Self) -> bool {
        let networks = (self.0.known(), other.0.known());
        matches!(networks, (Some(one), Some(other)) if Arc::ptr_eq(one, other))
    }
}

impl std::hash::Hash for PyNetwork {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.known().map(Arc::as_ptr).hash(state);
    }
}

impl PyNetwork {
    pub(super) fn over(network: Arc<Network>) -> Self {
        Self(Owned::new("network", network))
    }

    pub(super) fn core(&self) -> Result<&Arc<Network>> {
        self.0.get()
    }
}

/// Ports, and the objects that have them.
struct Group<'py>(Vec<Bound<'py, PyNetworkPort>>);

impl Group<'_> {
    fn ports(&self) -> Result<Vec<&Port>> {
        self.0.iter().map(|port| port.get().core().map(Arc::as_ref)).collect()
    }
}

/// The groups of a partition.
fn groups<'py>(groups: &Bound<'py, PyTuple>) -> PyResult<Vec<Group<'py>>> {
    let group = |group: Bound<'py, PyAny>| {
        if group.is_instance_of::<PyNetworkPort>() {
            return Err(PyTypeError::new_err("a group is a list of ports"));
        }
        let port = |port: PyResult<Bound<'py, PyAny>>| Ok(port?.cast_into::<PyNetworkPort>()?);
        Ok(Group(group.try_iter()?.map(port).collect::<PyResult<_>>()?))
    };
    groups.iter().map(group).collect()
}

#[pymethods]
impl PyNetwork {
    #[new]
    #[pyo3(signature = (*, seed = 0))]
    fn new(seed: u64) -> Self {
        Self::over(Network::new(seed))
    }

    /// The seed.
    #[getter]
    fn seed(&self) -> PyResult<u64> {
        Ok(self.core()?.seed())
    }

    /// Make a port.
    ///
    /// Args:
    ///     name: for `stats` and messages; None for its number, such as "port0".
    ///     queue: how many frames on their way to the port are kept, at most. Others are dropped,
    ///         and counted as `overflowed`. All of them together have at most 16 MiB.
    ///
    /// Raises:
    ///     ConfigError: the network has a port of this name, or the queue has no room for a frame.
    #[pyo3(signature = (name = None, *, queue = 4096))]
    fn port(&self, py: Python<'_>, name: Option<String>, queue: usize) -> PyResult<PyNetworkPort> {
        let (network, limit) =
            (self.core()?, QueueLimit { frames: queue, ..QueueLimit::default() });
        Ok(PyNetworkPort::over(py.detach(|| network.port(name, limit))?))
    }

    /// The ports that are open, in the order in which they were made.
    #[getter]
    fn ports(&self, py: Python<'_>) -> PyResult<Vec<PyNetworkPort>> {
        let network = self.core()?;
        let ports = py.detach(|| network.ports());
        Ok(ports.into_iter().map(PyNetworkPort::over).collect())
    }

    /// Change the conditions of the frames between two ports, in addition to those of the ports.
    ///
    /// Args:
    ///     one: a port.
    ///     other: another port.
    ///     one_way: change only those of the frames from `one` to `other`.
    ///     delay: as for `NetworkPort.set`.
    ///     jitter: as for `NetworkPort.set`.
    ///     loss: as for `NetworkPort.set`.
    ///     duplicate: as for `NetworkPort.set`.
    ///     reorder: as for `NetworkPort.set`.
    ///     bandwidth: as for `NetworkPort.set`.
    ///     backlog: as for `NetworkPort.set`.
    ///
    /// Raises:
    ///     ConfigError: a value is out of range, or a port is of another network.
    ///     ClosedError: a port is closed.
    #[pyo3(
        signature = (one, other, *, one_way = false, **conditions),
        text_signature = "($self, one, other, *, one_way=False, delay=None, jitter=None, loss=None, \
                          duplicate=None, reorder=None, bandwidth=None, backlog=None)"
    )]
    fn set_link(
        &self,
        py: Python<'_>,
        one: &PyNetworkPort,
        other: &PyNetworkPort,
        one_way: bool,
        conditions: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let (network, one, other) = (self.core()?, one.core()?, other.core()?);
        let change = Change::from_python(conditions)?;
        let set = |from, to| network.set_link(from, to, |conditions| change.apply(conditions));
        Ok(py.detach(|| {
            set(one, other)?;
            if one_way { Ok(()) } else { set(other, one) }
        })?)
    }

    /// The conditions that `set_link` has set for the frames from `one` to `other`.
    ///
    /// Raises:
    ///     ConfigError: a port is of another network.
    fn link<'py>(
        &self,
        py: Python<'py>,
        one: &PyNetworkPort,
        other: &PyNetworkPort,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (network, one, other) = (self.core()?, one.core()?, other.core()?);
        let (conditions, _) = py.detach(|| network.link(one, other))?;
        to_python(py, &conditions)
    }

    /// Whether a partition separates two ports.
    ///
    /// Raises:
    ///     ConfigError: a port is of another network.
    fn is_partitioned(
        &self,
        py: Python<'_>,
        one: &PyNetworkPort,
        other: &PyNetworkPort,
    ) -> PyResult<bool> {
        let (network, one, other) = (self.core()?, one.core()?, other.core()?);
        Ok(py.detach(|| network.link(one, other))?.1)
    }

    /// Separate groups of ports: no frame goes from a port of one group to a port of another.
    ///
    /// Frames between them that have not arrived yet are dropped. Ports in no group still reach all
    /// others. A second partition adds to the first.
    ///
    /// Args:
    ///     groups: two or more lists of ports.
    ///
    /// Raises:
    ///     ConfigError: a port is in two groups, or of another network. Nothing is changed.
    ///     ClosedError: a port is closed.
    #[pyo3(signature = (*groups))]
    fn partition(&self, py: Python<'_>, groups: &Bound<'_, PyTuple>) -> PyResult<()> {
        if groups.len() < 2 {
            return Err(PyValueError::new_err("a partition has at least two groups"));
        }
        let (network, groups) = (self.core()?, self::groups(groups)?);
        let groups = groups.iter().map(Group::ports).collect::<Result<Vec<_>>>()?;
        Ok(py.detach(|| network.partition(&groups))?)
    }

    /// Join groups of ports that a partition has separated; without groups, all ports.
    ///
    /// Raises:
    ///     ConfigError: a port is in two groups, or of another network.
    ///     ClosedError: a port is closed.
    #[pyo3(signature = (*groups))]
    fn heal(&self, py: Python<'_>, groups: &Bound<'_, PyTuple>) -> PyResult<()> {
        let network = self.core()?;
        if groups.is_empty() {
            py.detach(|| network.heal());
            return Ok(());
        }
        let groups = self::groups(groups)?;
        let groups = groups.iter().map(Group::ports).collect::<Result<Vec<_>>>()?;
        Ok(py.detach(|| network.join(&groups))?)
    }

    /// Record every frame that is sent into a new pcap file, once, and also if it is lost later.
    ///
    /// None ends the recording, as does another path.
    ///
    /// Raises:
    ///     StreamError: the file cannot be written.
    fn capture(&self, py: Python<'_>, path: Option<PathBuf>) -> PyResult<()> {
        let network = self.core()?;
        Ok(py.detach(|| network.capture(recording(path)?))?)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match self.core() {
            Ok(network) => {
                let ports = py.detach(|| network.ports().len());
                format!("Network(seed={}, ports={ports})", network.seed())
            }
            Err(_) => "Network(unreachable)".into(),
        }
    }
}

#[pymethods]
impl PyFrozenNetwork {
    /// A network that continues from here, and its ports by their numbers, in order.
    fn thaw(&self, py: Python<'_>) -> PyResult<(PyNetwork, Vec<(u32, PyNetworkPort)>)> {
        let frozen = self.0.get()?;
        let (network, ports) = py.detach(|| Network::thaw(frozen))?;
        let ports = ports.into_iter().map(|port| (port.id(), PyNetworkPort::over(port)));
        Ok((PyNetwork::over(network), ports.collect()))
    }
}

impl PyFrozenNetwork {
    pub(super) fn over(frozen: FrozenNetwork) -> Self {
        Self(Owned::new("network", frozen))
    }
}

#[pymethods]
impl PyNetworkPort {
    /// The network.
    #[getter]
    fn network(&self) -> PyResult<PyNetwork> {
        Ok(PyNetwork::over(Arc::clone(self.core()?.network())))
    }
}

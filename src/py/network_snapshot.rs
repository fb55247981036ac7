//! Copies of a `Network` with its machines, for `pyvmm.network`.

use std::sync::Arc;

use pyo3::prelude::*;

use super::ending::import;
use super::interrupt;
use super::network::{PyFrozenNetwork, PyNetwork};
use super::network_port::PyNetworkPort;
use super::snapshot::PySnapshot;
use super::vmm::PyVmm;
use crate::error::{Error, ErrorKind, Result};
use crate::net::switch::{Network, Port, PortBackend};
use crate::virtio::{Attached, Net};
use crate::vmm::Vmm;

/// The name of a device, and the number of the port that it is connected to.
type Place = (String, u32);

fn port_of(attached: &Attached) -> Option<Arc<Port>> {
    let backend =
        attached.transport.device_as::<Net>()?.backend().as_any().downcast::<PortBackend>().ok()?;
    Some(Arc::clone(backend.port()))
}

/// The devices of a machine that are connected to a network.
fn places(vmm: &Vmm, network: &Arc<Network>) -> Result<Vec<Place>> {
    let place = |attached: &Attached| {
        let port = port_of(attached).filter(|port| Arc::ptr_eq(port.network(), network))?;
        Some((attached.name().to_owned(), port.id()))
    };
    Ok(vmm.virtio()?.iter().filter_map(place).collect())
}

#[pymethods]
impl PyNetwork {
    /// Capture machines of this network, and the network itself, at one instant.
    ///
    /// All machines are held still meanwhile. The frames on their way are captured with the
    /// network: in each copy, every frame arrives once. Frames between programs do not stop.
    ///
    /// Args:
    ///     machines: the machines. Other machines of the network are not in its copies; their ports
    ///         are.
    ///     timeout: how many seconds may pass until all machines are still; None means no limit.
    ///
    /// Raises:
    ///     ValueError: no machine is given, or one twice.
    ///     StateError: a machine is closed, cannot be captured, or is not connected to the network.
    ///     WaitTimeoutError: a callback of a machine did not return in time.
    #[pyo3(signature = (machines, timeout = None))]
    fn snapshot<'py>(
        slf: &Bound<'py, Self>,
        machines: &Bound<'py, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        import(slf.py(), "pyvmm.network")?.call_method1("snapshot", (slf, machines, timeout))
    }

    /// For `pyvmm.network`: the snapshots of machines, the network at the same instant, and where
    /// each machine is connected.
    fn _capture(
        &self,
        py: Python<'_>,
        machines: Vec<Py<PyVmm>>,
        timeout: Option<f64>,
    ) -> PyResult<(Vec<PySnapshot>, PyFrozenNetwork, Vec<Vec<Place>>)> {
        let network = self.core()?;
        let cores = machines.iter().map(|vmm| vmm.get().vmm()).collect::<Result<Vec<_>>>()?;
        let cores: Vec<&Vmm> = cores.into_iter().map(Arc::as_ref).collect();
        let places: Vec<_> = cores.iter().map(|vmm| places(vmm, network)).collect::<Result<_>>()?;
        if places.iter().any(Vec::is_empty) {
            let detail = "a machine is not connected to this network";
            return Err(Error::new(ErrorKind::State, "machines", detail).into());
        }
        let (snapshots, frozen) = interrupt::limited(py, timeout, |limit| {
            Vmm::snapshot_together(&cores, limit, || network.freeze())
        })?;
        let own = |(core, vmm): (_, &Py<PyVmm>)| {
            Ok::<_, PyErr>(PySnapshot::of(core, vmm.get().origin()?.config.clone_ref(py)))
        };
        let snapshots = snapshots.into_iter().zip(&machines).map(own).collect::<PyResult<_>>()?;
        Ok((snapshots, PyFrozenNetwork::over(frozen), places))
    }

    /// For `pyvmm.network`: connect a device of a fork to a port.
    #[staticmethod]
    fn _connect(py: Python<'_>, vmm: &PyVmm, device: &str, port: &PyNetworkPort) -> PyResult<()> {
        let (vmm, port) = (vmm.core()?, port.core()?);
        let attached = vmm.virtio()?;
        let found = attached.iter().find(|attached| attached.name() == device);
        let found = found.and_then(|attached| attached.transport.device_as::<Net>());
        let net = found.ok_or_else(|| Error::closed("machine"))?;
        Ok(py.detach(|| {
            let backend = PortBackend::new(Arc::clone(port))?;
            net.connect(Arc::new(backend));
            Ok::<_, Error>(())
        })?)
    }
}

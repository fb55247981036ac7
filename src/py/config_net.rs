//! Converts the Python configuration of network devices, and their backends.

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;

use super::config_part::{Part, bad, unlike};
use super::descriptor::os_error;
use super::ending::import;
use super::frame_queue::PyFrameQueue;
use super::network::PyNetwork;
use super::network_port::PyNetworkPort;
use super::user_net;
use crate::config::NetConfig;
use crate::net::{NetBackend, NetSource, Peer};

/// A path and -1, or host and port.
type Place = (String, i32);

/// The network device of this number.
pub(super) fn net(part: &Part<'_>, number: usize) -> PyResult<NetConfig> {
    let py = part.object.py();
    let module = import(py, "pyvmm.nets")?;
    let key = format!("nets[{number}]");
    let resolved = module.call_method1(intern!(py, "resolved"), (&part.object, &key))?;
    let (kind, value, mac): (String, Bound<'_, PyAny>, Option<[u8; 6]>) = resolved.extract()?;
    let mtu: Option<u16> = part.get(intern!(py, "mtu"), "a number from 68 to 65535, or None")?;
    if mtu.is_some_and(|mtu| mtu < 68) {
        return Err(bad(format!("{key}.mtu"), "it is smaller than 68"));
    }
    let source = source(&kind, &value, &format!("{key}.backend"))?;
    Ok(NetConfig { source, number, mac, mtu })
}

/// The backend of an object of the program's.
pub(super) fn backend(object: &Bound<'_, PyAny>) -> PyResult<Arc<dyn NetBackend>> {
    let py = object.py();
    let found = import(py, "pyvmm.nets")?.call_method1(intern!(py, "source"), (object,))?;
    let (kind, value): (String, Bound<'_, PyAny>) = found.extract()?;
    let source = source(&kind, &value, "backend")?;
    Ok(py.detach(|| source.open())?)
}

fn source(kind: &str, value: &Bound<'_, PyAny>, at: &str) -> PyResult<NetSource> {
    Ok(match kind {
        "tap" => NetSource::Tap(value.extract()?),
        "tap_fd" => NetSource::TapFd(duplicate(value, at)?),
        "stream_fd" => NetSource::StreamFd(duplicate(value, at)?),
        "datagram_fd" => NetSource::DatagramFd(duplicate(value, at)?),
        "stream" => {
            let (place, _): (Place, Option<Place>) = value.extract()?;
            NetSource::Stream(peer(place))
        }
        "datagram" => {
            let (place, own): (Place, Option<Place>) = value.extract()?;
            NetSource::Datagram(own.map(peer), peer(place))
        }
        _ => made(value, at)?,
    })
}

/// An object that is a backend, or has one.
fn made(object: &Bound<'_, PyAny>, at: &str) -> PyResult<NetSource> {
    if let Ok(queue) = object.cast::<PyFrameQueue>() {
        return Ok(NetSource::Made(Arc::clone(&queue.get().0) as _));
    }
    if let Ok(port) = object.cast::<PyNetworkPort>() {
        return Ok(NetSource::Port(Arc::clone(port.get().core()?)));
    }
    if let Ok(network) = object.cast::<PyNetwork>() {
        return Ok(NetSource::Network(Arc::clone(network.get().core()?)));
    }
    let class = import(object.py(), "pyvmm.user_net")?.getattr(intern!(object.py(), "UserNet"))?;
    if object.is_instance(&class)? {
        return Ok(NetSource::User(Box::new(user_net::config(object, at)?)));
    }
    let needed = "a UserNet, Tap, StreamSocket, DatagramSocket, PythonNet, NetworkPort, Network or \
                  text";
    Err(bad(at, unlike(object, needed)))
}

fn peer((host, port): Place) -> Peer {
    match u16::try_from(port) {
        Ok(port) => Peer::Address(host, port),
        Err(_) => Peer::Path(host.into()),
    }
}

fn duplicate(number: &Bound<'_, PyAny>, at: &str) -> PyResult<OwnedFd> {
    let number: RawFd = number.extract()?;
    if number < 0 {
        return Err(bad(at, format!("{number} is not a file descriptor")));
    }
    // SAFETY: borrowed for the call only, which fails if the number is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned().map_err(|error| os_error(&error))
}

//! The queues of a virtio device in Python, and their chains. From any thread.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};

use super::enter::try_attach;
use super::gil_cell::GilCell;
use super::owned::Owned;
use crate::error::{Error, ErrorKind};
use crate::virtio::{Chain, Custom, Queues};

/// A device that the program serves.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) queues: Arc<Queues>,
    pub(super) custom: Arc<Custom>,
}

/// A queue of a virtio device in Python. An iteration takes the chains that are available now.
#[pyclass(frozen, weakref, name = "Virtqueue", module = "pyvmm")]
#[derive(Debug)]
pub struct PyVirtqueue {
    pub(super) served: Owned<Served>,
    pub(super) number: usize,
}

#[pymethods]
impl PyVirtqueue {
    /// Its number.
    #[getter]
    fn index(&self) -> usize {
        self.number
    }

    /// Take the next chain, or return None if there is none, or the machine is paused.
    ///
    /// Raises:
    ///     StateError: in a forked child.
    fn pop(&self) -> PyResult<Option<PyDescriptorChain>> {
        let served = self.served.get()?;
        let popped = served.queues.access().and_then(|access| access.pop(self.number));
        let Some(chain) = popped else { return Ok(None) };
        let lengths = (chain.readable_len(), chain.writable_len());
        let state = GilCell::new(ChainState { chain: Some(chain), read: 0, data: Vec::new() });
        let taken = TakenChain { served: served.clone(), state };
        Ok(Some(PyDescriptorChain { taken: Owned::new("chain", taken), lengths }))
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self) -> PyResult<Option<PyDescriptorChain>> {
        self.pop()
    }

    fn __repr__(&self) -> String {
        let name = self.served.peek().map_or("unreachable", |served| served.queues.name());
        format!("Virtqueue({name}, {})", self.number)
    }
}

#[derive(Debug)]
struct ChainState {
    /// None once it is completed.
    chain: Option<Chain>,
    read: u64,
    data: Vec<u8>,
}

#[derive(Debug)]
struct TakenChain {
    served: Served,
    state: GilCell<ChainState>,
}

impl TakenChain {
    fn complete(&self, py: Python<'_>) {
        let taken = self.state.with(py, |state| {
            state.chain.take().map(|chain| (chain, std::mem::take(&mut state.data)))
        });
        if let Some((chain, data)) = taken {
            py.detach(|| self.served.custom.complete(&self.served.queues, chain, data));
        }
    }
}

/// A descriptor chain: buffers of the driver that the device reads, then those that it writes.
///
/// `complete` gives it back to the driver; at the latest, the end of the object does. From any
/// thread, also after `process` has returned. If the driver has reset the device meanwhile, the
/// chain is void: `read` raises StateError, and `complete` does nothing.
#[pyclass(frozen, weakref, name = "DescriptorChain", module = "pyvmm")]
#[derive(Debug)]
pub struct PyDescriptorChain {
    taken: Owned<TakenChain>,
    /// Readable and writable bytes.
    lengths: (u64, u64),
}

fn completed() -> Error {
    Error::new(ErrorKind::State, "chain", "it has been completed")
}

#[pymethods]
impl PyDescriptorChain {
    /// How many bytes the device can read.
    #[getter]
    fn readable(&self) -> u64 {
        self.lengths.0
    }

    /// How many bytes the device can write.
    #[getter]
    fn writable(&self) -> u64 {
        self.lengths.1
    }

    /// Read the next bytes, at most `size`, or all that are left.
    ///
    /// Raises:
    ///     StateError: the chain is completed, or void.
    #[pyo3(signature = (size = -1, /), text_signature = "($self, size=-1, /)")]
    fn read<'py>(&self, py: Python<'py>, size: i64) -> PyResult<Bound<'py, PyBytes>> {
        let most = u64::try_from(size).unwrap_or(u64::MAX);
        let TakenChain { served: Served { queues, .. }, state } = self.taken.get()?;
        let epoch = queues.epoch();
        let pieces = state.with(py, |state| {
            let chain = state.chain.as_ref().ok_or_else(completed)?;
            if chain.epoch() != epoch {
                let detail = "the driver has reset the device";
                return Err(Error::new(ErrorKind::State, "chain", detail));
            }
            let pieces = pieces(chain, state.read, most);
            state.read += pieces.iter().map(|(_, length)| *length as u64).sum::<u64>();
            Ok(pieces)
        })?;
        let total = pieces.iter().map(|(_, length)| length).sum();
        PyBytes::new_with(py, total, |bytes| {
            let mut rest = bytes;
            for (address, length) in pieces {
                let (piece, more) = rest.split_at_mut(length);
                queues.memory().read(address, piece)?;
                rest = more;
            }
            Ok(())
        })
    }

    /// Add to what the driver gets, and return how many of the bytes there is room for.
    ///
    /// They are in guest memory once the chain is completed.
    ///
    /// Raises:
    ///     StateError: the chain is completed.
    ///     TypeError: the data is not bytes or another buffer.
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        let data = match data.cast::<PyBytes>() {
            Ok(bytes) => bytes.clone(),
            Err(_) => PyMemoryView::from(data)?.call_method0("tobytes")?.cast_into::<PyBytes>()?,
        };
        let data = data.as_bytes();
        let room = usize::try_from(self.lengths.1).unwrap_or(usize::MAX);
        let written = self.taken.get()?.state.with(py, |state| {
            if state.chain.is_none() {
                return Err(completed());
            }
            let count = data.len().min(room.saturating_sub(state.data.len()));
            state.data.extend(data.get(..count).unwrap_or_default());
            Ok(count)
        });
        Ok(written?)
    }

    /// Give the chain back to the driver, with what was written.
    ///
    /// If the machine is paused, this happens when it continues. A second call does nothing.
    fn complete(&self, py: Python<'_>) -> PyResult<()> {
        self.taken.get()?.complete(py);
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(
        signature = (_kind, _error, _traceback, /),
        text_signature = "($self, kind, error, traceback, /)"
    )]
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.complete(py)
    }

    fn __repr__(&self) -> String {
        let (readable, writable) = self.lengths;
        format!("DescriptorChain(readable={readable}, writable={writable})")
    }
}

impl Drop for PyDescriptorChain {
    /// A chain that is not completed has been answered with what was written.
    fn drop(&mut self) {
        // None in a forked child, and at the end of the interpreter, when no driver waits.
        let Some(taken) = self.taken.take() else { return };
        let _ = try_attach(|py| taken.complete(py));
    }
}

/// Addresses and lengths of a chain's next readable bytes.
fn pieces(chain: &Chain, mut skip: u64, mut most: u64) -> Vec<(u64, usize)> {
    let mut found = Vec::new();
    for segment in chain.readable() {
        let length = u64::from(segment.length);
        if skip >= length {
            skip -= length;
            continue;
        }
        let count = (length - skip).min(most);
        if let (Ok(length), true) = (usize::try_from(count), count > 0) {
            found.push((segment.address + skip, length));
        }
        (skip, most) = (0, most - count);
    }
    found
}

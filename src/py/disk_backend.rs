//! A Python object as the contents of a disk. Its methods are called on the thread of the disk,
//! with no lock held; they may take any time.

use std::io;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyByteArray, PyBytes};

use super::config_part::{bad, unlike};
use super::enter::{attach, call_out};
use crate::disk::{Backend, Slice};

/// The most bytes that one call moves.
const MOST: usize = 1 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct PythonBackend {
    object: Py<PyAny>,
    size: u64,
    is_read_only: bool,
    can_discard: bool,
}

/// What `pread` may return.
#[derive(FromPyObject)]
enum Returned<'py> {
    Bytes(PyBackedBytes),
    Array(Bound<'py, PyByteArray>),
}

impl PythonBackend {
    /// # Errors
    /// If the object lacks `pread` or `size`.
    pub(super) fn new(object: &Bound<'_, PyAny>, at: &str) -> PyResult<Self> {
        let has = |name: &str| -> PyResult<bool> {
            Ok(object.getattr_opt(name)?.is_some_and(|method| method.is_callable()))
        };
        if !has("pread")? {
            let needed = "a path, bytes, or an object with size and pread()";
            return Err(bad(at, unlike(object, needed)));
        }
        let size = object.getattr("size").and_then(|size| size.extract());
        let size = size.map_err(|_| bad(at, "the object has no size, a number of bytes"))?;
        let (is_read_only, can_discard) = (!has("pwrite")?, has("discard")?);
        if !is_read_only && !has("flush")? {
            return Err(bad(at, "an object with pwrite() needs flush()"));
        }
        Ok(Self { object: object.clone().unbind(), size, is_read_only, can_discard })
    }

    fn call<T>(&self, call: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> io::Result<T> {
        attach(|py| {
            let result = call_out(py, |py| call(self.object.bind(py)));
            result.map_err(|error| io::Error::other(error.to_string()))
        })
    }

    fn read_one(&self, offset: u64, buffer: &Slice<'_>) -> io::Result<()> {
        let length = buffer.len();
        self.call(|object| {
            let returned = object.call_method1(intern!(object.py(), "pread"), (length, offset))?;
            let copied = match returned.extract()? {
                Returned::Bytes(bytes) if bytes.len() == length => {
                    buffer.copy_from(&bytes);
                    length
                }
                Returned::Bytes(bytes) => bytes.len(),
                Returned::Array(array) => {
                    let bytes = array.to_vec();
                    if bytes.len() == length {
                        buffer.copy_from(&bytes);
                    }
                    bytes.len()
                }
            };
            Ok(copied)
        })
        .and_then(|got| whole("pread", got, length))
    }

    fn write_one(&self, offset: u64, buffer: &Slice<'_>) -> io::Result<()> {
        let length = buffer.len();
        self.call(|object| {
            let py = object.py();
            let data = PyBytes::new_with(py, length, |bytes| {
                buffer.copy_to(bytes);
                Ok(())
            })?;
            let returned = object.call_method1(intern!(py, "pwrite"), (data, offset))?;
            Ok(if returned.is_none() { length } else { returned.extract()? })
        })
        .and_then(|written| whole("pwrite", written, length))
    }
}

/// Check how much a method has moved.
fn whole(method: &str, moved: usize, wanted: usize) -> io::Result<()> {
    if moved == wanted {
        return Ok(());
    }
    Err(io::Error::other(format!("{method}() moved {moved} of {wanted} bytes")))
}

/// The buffers in pieces of a bounded size, with their offsets on the disk.
fn pieces<'a>(
    mut offset: u64,
    buffers: &'a [Slice<'a>],
) -> impl Iterator<Item = (u64, Slice<'a>)> + 'a {
    let starts = buffers
        .iter()
        .flat_map(|buffer| (0..buffer.len()).step_by(MOST).map(move |start| (buffer, start)));
    starts.filter_map(move |(buffer, start)| {
        let piece = buffer.subslice(start, MOST.min(buffer.len() - start)).ok()?;
        let at = offset;
        offset += piece.len() as u64;
        Some((at, piece))
    })
}

impl Backend for PythonBackend {
    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn read_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        pieces(offset, buffers).try_for_each(|(at, piece)| self.read_one(at, &piece))
    }

    fn write_at(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        pieces(offset, buffers).try_for_each(|(at, piece)| self.write_one(at, &piece))
    }

    fn flush(&self) -> io::Result<()> {
        if self.is_read_only {
            return Ok(());
        }
        self.call(|object| object.call_method0(intern!(object.py(), "flush")).map(drop))
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        if !self.can_discard || length == 0 {
            return Ok(());
        }
        self.call(|object| {
            let name = intern!(object.py(), "discard");
            object.call_method1(name, (length, offset)).map(drop)
        })
    }

    fn resize(&self, _size: u64) -> io::Result<()> {
        // The object is the program's, which has changed it.
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn may_block(&self) -> bool {
        true
    }
}

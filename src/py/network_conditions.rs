//! The conditions of a link, from the keyword arguments of a call and as `pyvmm.LinkConditions`.

use std::time::Duration;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::ending::import;
use crate::error::{Error, ErrorKind};
use crate::net::switch::Conditions;

/// What a call changes.
#[derive(Debug, Default)]
pub(super) struct Change {
    delay: Option<Duration>,
    jitter: Option<Duration>,
    loss: Option<f64>,
    duplicate: Option<f64>,
    reorder: Option<f64>,
    bandwidth: Option<u64>,
    backlog: Option<Duration>,
}

fn seconds(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<Duration>> {
    let seconds: f64 = value.extract()?;
    let time = Duration::try_from_secs_f64(seconds).map_err(|_| {
        let detail = format!("{seconds:?} is not a number of seconds of at least 0");
        Error::new(ErrorKind::Config, name, detail)
    })?;
    Ok(Some(time))
}

fn bits(value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    let bits = value.extract().map_err(|_| {
        let detail = format!("{value:?} is not a number of bits per second, with 0 for no limit");
        Error::new(ErrorKind::Config, "bandwidth", detail)
    })?;
    Ok(Some(bits))
}

impl Change {
    /// # Errors
    /// `TypeError` for a name that is none, or a value of another type; `ConfigError` for a value
    /// that is out of range.
    pub(super) fn from_python(keywords: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let mut change = Self::default();
        for (name, value) in keywords.into_iter().flatten() {
            let name: String = name.extract()?;
            match name.as_str() {
                _ if value.is_none() => {}
                "delay" => change.delay = seconds(&name, &value)?,
                "jitter" => change.jitter = seconds(&name, &value)?,
                "loss" => change.loss = Some(value.extract()?),
                "duplicate" => change.duplicate = Some(value.extract()?),
                "reorder" => change.reorder = Some(value.extract()?),
                "bandwidth" => change.bandwidth = bits(&value)?,
                "backlog" => change.backlog = seconds(&name, &value)?,
                _ => {
                    let text = format!(
                        "a link has no {name:?}, only delay, jitter, loss, duplicate, reorder, \
                         bandwidth and backlog"
                    );
                    return Err(PyTypeError::new_err(text));
                }
            }
        }
        Ok(change)
    }

    pub(super) fn apply(&self, to: &mut Conditions) {
        let Self { delay, jitter, loss, duplicate, reorder, bandwidth, backlog } = self;
        *to = Conditions {
            delay: delay.unwrap_or(to.delay),
            jitter: jitter.unwrap_or(to.jitter),
            loss: loss.unwrap_or(to.loss),
            duplicate: duplicate.unwrap_or(to.duplicate),
            reorder: reorder.unwrap_or(to.reorder),
            bandwidth: bandwidth.unwrap_or(to.bandwidth),
            backlog: backlog.unwrap_or(to.backlog),
        };
    }
}

/// A `pyvmm.LinkConditions`.
pub(super) fn to_python<'py>(py: Python<'py>, of: &Conditions) -> PyResult<Bound<'py, PyAny>> {
    let Conditions { delay, jitter, loss, duplicate, reorder, bandwidth, backlog } = of;
    let [delay, jitter, backlog] = [delay, jitter, backlog].map(Duration::as_secs_f64);
    let values = (delay, jitter, *loss, *duplicate, *reorder, *bandwidth, backlog);
    import(py, "pyvmm.network")?.getattr("LinkConditions")?.call1(values)
}

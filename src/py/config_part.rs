//! A part of the Python configuration: reads its values, with errors that name the key.

use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::error::{Error, ErrorKind};

/// An object of the configuration and its key.
pub(super) struct Part<'py> {
    pub(super) object: Bound<'py, PyAny>,
    pub(super) key: &'static str,
}

impl<'py> Part<'py> {
    pub(super) fn at(&self, name: &str) -> String {
        if self.key.is_empty() { name.to_owned() } else { format!("{}.{name}", self.key) }
    }

    /// The value of a key. The error says what is `needed`.
    pub(super) fn get<T>(&self, name: &Bound<'py, PyString>, needed: &str) -> PyResult<T>
    where
        T: for<'a> FromPyObject<'a, 'py>,
    {
        let value = self.object.getattr(name)?;
        value.extract().map_err(|_| bad(self.at(&name.to_string()), unlike(&value, needed)))
    }

    /// A part of the configuration, of this class or of any class that is checked later.
    pub(super) fn part(
        &self,
        name: &Bound<'py, PyString>,
        key: &'static str,
        class: Option<&Py<PyAny>>,
    ) -> PyResult<Self> {
        let object = self.object.getattr(name)?;
        if let Some(class) = class.map(|class| class.bind(object.py()))
            && !object.is_instance(class)?
        {
            let needed = format!("a {}", class.getattr("__name__")?);
            return Err(bad(key, unlike(&object, &needed)));
        }
        Ok(Self { object, key })
    }
}

/// The error text for a value of the wrong kind.
pub(super) fn unlike(value: &Bound<'_, PyAny>, needed: &str) -> String {
    /// The maximum number of characters of a value in an error.
    const SHOWN: usize = 60;
    let shown = value.repr().map(|shown| shown.to_string()).unwrap_or_default();
    let class = value.get_type().name().map(|name| name.to_string()).unwrap_or_default();
    let is_short = (1..=SHOWN).contains(&shown.chars().count());
    format!("expected {needed}, not {}", if is_short { shown } else { class })
}

pub(super) fn bad(at: impl Into<String>, detail: impl Into<String>) -> PyErr {
    Error::new(ErrorKind::Config, at, detail).into()
}

//! A directory of the host that a guest can mount. Pure data.

use std::path::PathBuf;

use super::boot::bad;
use crate::error::Result;
use crate::share::Options;

/// The longest tag, which the guest mounts by.
const MOST_TAG: usize = 255;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareConfig {
    /// The directory.
    pub path: PathBuf,
    /// What the guest mounts it by.
    pub tag: String,
    /// How it is shared.
    pub options: Options,
}

impl ShareConfig {
    /// Check the values as far as possible without I/O.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Config`], with the key of the bad value as its place.
    pub fn check(&self) -> Result<()> {
        let tag = &self.tag;
        if !(1..=MOST_TAG).contains(&tag.len()) || tag.bytes().any(|byte| byte <= b' ') {
            let detail = format!("{tag:?} is not 1 to {MOST_TAG} bytes without blanks");
            return Err(bad("shares.tag", detail));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_tags_are_named_by_their_key() {
        for (tag, is_good) in
            [("a", true), ("", false), ("a b", false), ("a\0", false), (&"x".repeat(256), false)]
        {
            let path = PathBuf::from("/");
            let config = ShareConfig { path, tag: tag.into(), options: Options::default() };
            assert_eq!(config.check().map_err(|error| error.at).is_ok(), is_good, "{tag}");
        }
    }
}

//! Reads the files that a machine offers by fw_cfg.

use super::files::Files;
use crate::config::{Code, VmmConfig};
use crate::devices::check_names;
use crate::error::{Error, ErrorKind, Result};

/// The place in errors.
const AT: &str = "platform.fw_cfg.files";
/// The most bytes of a file, and of all. The state of all devices must fit into a snapshot's file.
const MAX_FILE: u64 = 64 << 20;
const MAX_FILES: u64 = 2 * MAX_FILE;

/// The files of fw_cfg, with their names.
///
/// # Errors
/// [`ErrorKind::Config`] for a name that cannot be used; [`ErrorKind::Boot`] if a file cannot be
/// read or is too large; what `interrupted` returns.
pub fn fw_cfg_files(
    config: &VmmConfig,
    interrupted: &dyn Fn() -> Result<()>,
) -> Result<Vec<(String, Vec<u8>)>> {
    let Some(files) = &config.fw_cfg else { return Ok(Vec::new()) };
    check_names(files.iter().map(|(name, _)| name.as_str()))
        .map_err(|detail| Error::new(ErrorKind::Config, AT, detail))?;
    let reader = Files { most: MAX_FILE, interrupted };
    let mut left = MAX_FILES;
    let mut read = |(name, code): &(String, Code)| {
        let most = MAX_FILE.min(left);
        let data = match code {
            Code::Bytes(bytes) if bytes.len() as u64 <= most => bytes.clone(),
            Code::Bytes(_) => return Err(too_large(ErrorKind::Config, name)),
            Code::File(path) => reader
                .read_within(path, AT, most)?
                .ok_or_else(|| too_large(ErrorKind::Boot, &path.display().to_string()))?,
        };
        left -= data.len() as u64;
        Ok((name.clone(), data))
    };
    files.iter().map(&mut read).collect()
}

fn too_large(kind: ErrorKind, what: &str) -> Error {
    let [file, all] = [MAX_FILE, MAX_FILES].map(|most| most >> 20);
    let detail =
        format!("{what}: too large; at most {file} MiB fit in a file, and {all} MiB in all");
    Error::new(kind, AT, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_and_names_checked() {
        let file = (String::from("opt/a"), Code::Bytes(b"x".to_vec()));
        let mut config = VmmConfig { fw_cfg: Some(vec![file]), ..VmmConfig::default() };
        let read = |config: &VmmConfig| fw_cfg_files(config, &|| Ok(()));
        assert_eq!(read(&config).unwrap(), [("opt/a".into(), b"x".to_vec())]);
        config.fw_cfg = Some(vec![("a b".into(), Code::File("/dev/null".into()))]);
        assert_eq!(read(&config).unwrap_err().at, AT);
        config.fw_cfg = Some(vec![("a".into(), Code::File("/nonexistent".into()))]);
        assert_eq!(read(&config).unwrap_err().kind, ErrorKind::Boot);
        config.fw_cfg = None;
        assert!(read(&config).unwrap().is_empty());
    }
}

//! Paths in archives.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Maximum length of a path, in bytes, as in the kernel.
const MAX_PATH: usize = 4095;

/// Checks a path of an archive, and returns it without `.` and repeated slashes. It is empty for
/// the folder itself.
///
/// # Errors
/// The fault of the path, as the end of a sentence.
pub(crate) fn inside(bytes: &[u8]) -> Result<PathBuf, &'static str> {
    if bytes.is_empty() {
        return Err("is empty");
    }
    if bytes.starts_with(b"/") {
        return Err("is absolute");
    }
    if bytes.contains(&0) {
        return Err("contains a zero byte");
    }
    if bytes.len() > MAX_PATH {
        return Err("is longer than 4095 bytes");
    }
    let mut path = PathBuf::new();
    for part in bytes.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("contains the component .."),
            part => path.push(OsStr::from_bytes(part)),
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_the_folder_are_accepted() {
        assert_eq!(inside(b"./a//b/./c/"), Ok(PathBuf::from("a/b/c")));
        assert_eq!(inside(b"./"), Ok(PathBuf::new()));
        assert_eq!(inside(b"a..b/..c"), Ok(PathBuf::from("a..b/..c")));
        for bad in [&b""[..], b"/etc", b"a/../b", b"..", b"a\0b", &[b'x'; 5000]] {
            assert!(inside(bad).is_err(), "{bad:?}");
        }
    }
}

//! The mounted file systems, read from `/proc/self/mountinfo` (proc(5)).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountEntry {
    pub(crate) target: PathBuf,
    pub(crate) fs_type: String,
    pub(crate) source: PathBuf,
}

/// Returns the file system mounted at exactly `dir`: the topmost one, if several are stacked there.
pub(crate) fn mounted_at(dir: &Path) -> io::Result<Option<MountEntry>> {
    let dir = match dir.canonicalize() {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(all()?.into_iter().rfind(|entry| entry.target == dir))
}

/// Returns the file system that contains `dir`; `None` when there is no such folder.
pub(crate) fn holding(dir: &Path) -> io::Result<Option<MountEntry>> {
    let dir = match dir.canonicalize() {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // Of several mounts at one folder, the last is the topmost.
    let holding = all()?.into_iter().filter(|entry| dir.starts_with(&entry.target));
    Ok(holding.max_by_key(|entry| entry.target.as_os_str().len()))
}

/// Lists all mounted file systems in the order of their mounts.
pub(crate) fn all() -> io::Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|&byte| byte == b'\n').filter_map(parse_line).collect())
}

/// Parses `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let target = fields.nth(4)?;
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = rest.next()?;
    let source = rest.next()?;
    Some(MountEntry {
        target: unescape(target),
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
        source: unescape(source),
    })
}

/// Decodes the octal escapes of mountinfo and fstab(5): space, tab, newline and backslash.
pub(crate) fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\').and_then(|digits| {
            digits.iter().try_fold(0u8, |value, digit| match digit {
                b'0'..=b'7' => value.checked_mul(8)?.checked_add(digit - b'0'),
                _ => None,
            })
        });
        match octal {
            Some(byte) => {
                path.push(byte);
                rest = &tail[3..];
            }
            None => {
                path.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

/// Encodes a path for fstab(5): the reverse of [`unescape`].
pub(crate) fn escape(path: &Path) -> OsString {
    let mut field = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => field.extend(format!("\\{byte:03o}").bytes()),
            other => field.push(other),
        }
    }
    OsString::from_vec(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_parsed_with_their_escapes() {
        let line = br"36 35 7:3 / /mnt/with\040space rw,noatime shared:1 - btrfs /dev/loop3 rw,space_cache=v2";
        let entry = parse_line(line).unwrap();
        assert_eq!(entry.target, Path::new("/mnt/with space"));
        assert_eq!(entry.fs_type, "btrfs");
        assert_eq!(entry.source, Path::new("/dev/loop3"));
        assert_eq!(escape(&entry.target), r"/mnt/with\040space");
    }

    #[test]
    fn escaped_paths_decode_to_the_same_bytes() {
        for name in [&b"/a b\tc\nd\\e"[..], b"/f\xfcr", b"/plain", "/größe".as_bytes()] {
            let path = PathBuf::from(OsString::from_vec(name.to_vec()));
            assert_eq!(unescape(escape(&path).as_bytes()), path);
        }
    }

    #[test]
    fn the_root_is_a_mount_point_and_a_plain_folder_is_not() {
        assert!(mounted_at(Path::new("/")).unwrap().is_some());
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(mounted_at(folder.path()).unwrap(), None);
        let holding = holding(folder.path()).unwrap().unwrap();
        assert!(folder.path().canonicalize().unwrap().starts_with(&holding.target));
        assert_eq!(super::holding(Path::new("/nonexistent")).unwrap(), None);
        assert_eq!(mounted_at(Path::new("/nonexistent")).unwrap(), None);
    }
}

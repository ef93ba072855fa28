//! The mount table of the kernel, read from `/proc/self/mountinfo` (proc(5)).
//!
//! The crate has its own parser, because the parser of the crate `procfs` (0.18) reads UTF-8 only:
//! one mount point with another name makes it reject the whole table. `procfs` also leaves the
//! kernel's escapes in the paths.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The major and minor number of the file system's device. The major number is 0 for a file
    /// system without a device, and for btrfs.
    pub device: (u32, u32),
    /// The folder of the file system that is visible at `target`; `/` unless a part is mounted.
    pub root: PathBuf,
    /// The mount point.
    pub target: PathBuf,
    /// The type of the file system, such as `btrfs`.
    pub fs_type: String,
    /// The device; for a file system without one, any text.
    pub source: PathBuf,
    /// The options of the file system, such as `rw,memory`.
    pub options: String,
}

impl Mount {
    /// Returns whether the file system has the option, which is a word without a value or a whole
    /// `NAME=VALUE`.
    pub fn has_option(&self, option: &str) -> bool {
        self.options.split(',').any(|each| each == option)
    }
}

/// Lists all mounted file systems in the order of their mounts.
///
/// # Errors
/// If the kernel's table cannot be read.
pub fn all() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// Returns the file system mounted at exactly `dir`: the topmost one, if several are stacked there.
///
/// # Errors
/// If the folder or the kernel's table cannot be read. A folder that does not exist is not an
/// error.
pub fn mounted_at(dir: &Path) -> io::Result<Option<Mount>> {
    let Some(dir) = resolved(dir)? else { return Ok(None) };
    Ok(all()?.into_iter().rfind(|mount| mount.target == dir))
}

/// Returns the file system that contains `dir`; `None` when there is no such folder.
///
/// # Errors
/// If the folder or the kernel's table cannot be read.
pub fn holding(dir: &Path) -> io::Result<Option<Mount>> {
    let Some(dir) = resolved(dir)? else { return Ok(None) };
    // Of several mounts at one folder, the last is the topmost.
    let holding = all()?.into_iter().filter(|mount| dir.starts_with(&mount.target));
    Ok(holding.max_by_key(|mount| mount.target.as_os_str().len()))
}

/// Returns a file system that is mounted at `dir` or below it.
///
/// # Errors
/// If the folder does not exist, or it or the kernel's table cannot be read.
pub fn within(dir: &Path) -> io::Result<Option<Mount>> {
    let dir = dir.canonicalize()?;
    Ok(all()?.into_iter().find(|mount| mount.target.starts_with(&dir)))
}

fn resolved(dir: &Path) -> io::Result<Option<PathBuf>> {
    match dir.canonicalize() {
        Ok(dir) => Ok(Some(dir)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Parses the content of a mountinfo file. Lines in another format are skipped.
pub fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// Parses `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
    let (root, target) = (fields.next()?, fields.next()?);
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let (fs_type, source) = (rest.next()?, rest.next()?);
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    Some(Mount {
        device: (device.0.parse().ok()?, device.1.parse().ok()?),
        root: unescape(root),
        target: unescape(target),
        fs_type: text(fs_type),
        source: unescape(source),
        options: text(rest.next().unwrap_or_default()),
    })
}

/// Decodes the octal escapes of mountinfo and fstab(5): space, tab, newline and backslash.
pub fn unescape(field: &[u8]) -> PathBuf {
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
pub fn escape(path: &Path) -> OsString {
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
        let line = br"36 35 7:3 /part /mnt/with\040space rw,noatime shared:1 - btrfs /dev/loop3 rw,space_cache=v2";
        let mount = parse_line(line).unwrap();
        assert_eq!(mount.device, (7, 3));
        assert_eq!(mount.root, Path::new("/part"));
        assert_eq!(mount.target, Path::new("/mnt/with space"));
        assert_eq!(mount.fs_type, "btrfs");
        assert_eq!(mount.source, Path::new("/dev/loop3"));
        assert!(mount.has_option("space_cache=v2") && mount.has_option("rw") && !mount.has_option("space_cache"));
        assert_eq!(escape(&mount.target), r"/mnt/with\040space");
    }

    #[test]
    fn one_name_that_is_not_utf_8_does_not_hide_the_other_mounts() {
        let table = b"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 8:2 / /f\xfcr rw - xfs /dev/sdb rw\nnot a mount\n";
        let targets: Vec<_> = parse(table).into_iter().map(|mount| mount.target).collect();
        let other = PathBuf::from(OsString::from_vec(b"/f\xfcr".to_vec()));
        assert_eq!(targets, [PathBuf::from("/"), other]);
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
        let root = mounted_at(Path::new("/")).unwrap().unwrap();
        assert!(within(Path::new("/")).unwrap().is_some());
        assert_eq!(root.target, Path::new("/"));
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(mounted_at(folder.path()).unwrap(), None);
        assert_eq!(within(folder.path()).unwrap(), None);
        let holding = holding(folder.path()).unwrap().unwrap();
        assert!(folder.path().canonicalize().unwrap().starts_with(&holding.target));
        let absent = Path::new("/nonexistent");
        assert_eq!(super::holding(absent).unwrap(), None);
        assert_eq!(mounted_at(absent).unwrap(), None);
        assert!(within(absent).is_err());
    }
}

//! Kinds of files, and of file systems.

use crate::files::names::encode;
use crate::server::Failure;
use rustix::fd::AsFd;
use rustix::fs::{FileType, Stat, fstatfs};
use rustix::io;
use scalebox_agent_api::FailureCode;
use std::path::Path;

/// File systems whose content the kernel generates when it is read. From `linux/magic.h`: proc,
/// sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs, selinuxfs, bpf, configfs, pstore,
/// efivarfs, binfmt_misc.
const GENERATED: [u64; 13] = [
    0x9fa0,
    0x6265_6572,
    0x0027_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0xf97c_ff8c,
    0xcafe_4a11,
    0x6265_6570,
    0x6165_676c,
    0xde5e_81e4,
    0x4249_4e4d,
];

/// Returns `true` if the file is in a file system whose content the kernel generates.
pub(crate) fn is_generated(file: impl AsFd) -> io::Result<bool> {
    let magic = fstatfs(file)?.f_type as u64;
    Ok(GENERATED.contains(&magic))
}

/// Returns the kind of a file.
pub(crate) fn of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Checks that the content of a file can be read or replaced: that it is a regular file.
///
/// # Errors
/// [`FailureCode::WrongKind`].
pub(crate) fn require_regular(path: &Path, stat: &Stat) -> Result<(), Failure> {
    let kind = match of(stat) {
        FileType::RegularFile => return Ok(()),
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        _ => "device",
    };
    Err(Failure::new(
        FailureCode::WrongKind,
        format!("{} is a {kind}, not a regular file", encode(path)),
    ))
}

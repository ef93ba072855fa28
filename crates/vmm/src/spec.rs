//! The specification of a machine.

use crate::error::{Error, Result};
use scalebox_units::{DiskLocation, Mac, VmId};
use std::path::{Path, PathBuf};

/// The specification of a machine. The files and devices it names must exist; only the content of
/// `run_dir` is created.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// The machine's id, unique on this host.
    pub id: VmId,
    /// The number of vCPUs; at least 1.
    pub vcpus: u32,
    /// The memory in MiB; at least [`MIN_MEMORY_MIB`].
    pub memory_mib: u64,
    /// A kernel that the hypervisor can boot directly.
    pub kernel: PathBuf,
    /// The initramfs, if the kernel needs one.
    pub initrd: Option<PathBuf>,
    /// The modules drive, shared by all machines of the kernel: the guest's third disk, read-only.
    pub modules: Option<PathBuf>,
    /// The kernel's command line, at most [`MAX_CMDLINE`] bytes. The console is `ttyS0`.
    pub cmdline: String,
    /// The root disk: the guest's first disk, `/dev/vda`.
    pub root: DiskLocation,
    /// I/O limits of the root disk.
    pub root_limits: DiskLimits,
    /// The seed drive: the guest's second disk, read-only.
    pub seed: PathBuf,
    /// The network interface.
    pub nic: Nic,
    /// Folder for sockets and for the record by which the machine is found again. It is created if
    /// missing, with mode 0700, and is used by this machine alone. The path must be short: a
    /// socket's path has at most 107 bytes, of which this crate needs [`MAX_SOCKET_NAME`].
    pub run_dir: PathBuf,
    /// The console log; one previous part is kept next to it (`….1`). See
    /// [`CONSOLE_LIMIT`](crate::CONSOLE_LIMIT).
    pub console_log: PathBuf,
    /// The account that the hypervisor runs as after opening its files. `None`: the account of this
    /// process.
    pub run_as: Option<RunAs>,
}

/// Minimum memory of a machine.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Maximum length of the kernel command line, in bytes: `COMMAND_LINE_SIZE` of the x86 kernel,
/// minus the terminating zero.
pub const MAX_CMDLINE: usize = 2047;
/// Maximum path length of a Unix socket, in bytes: `sun_path` minus the terminating zero (unix(7)).
const MAX_SOCKET_PATH: usize = 107;
/// Maximum number of bytes that this crate appends to `run_dir` to name a socket.
pub const MAX_SOCKET_NAME: usize = 16;

impl MachineSpec {
    /// Rejects invalid fields. A driver calls this before it creates anything.
    ///
    /// # Errors
    /// [`Error::Spec`], which names the field.
    pub fn check(&self) -> Result<()> {
        let invalid = |what, why: String| {
            Err(Error::Spec {
                id: self.id.clone(),
                what,
                why,
            })
        };
        if self.vcpus == 0 {
            return invalid("vcpus", "a machine needs at least 1".into());
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return invalid(
                "memory_mib",
                format!("{} is too small, minimum {MIN_MEMORY_MIB}", self.memory_mib),
            );
        }
        if self.cmdline.len() > MAX_CMDLINE {
            return invalid(
                "cmdline",
                format!("{} bytes is too long, maximum {MAX_CMDLINE}", self.cmdline.len()),
            );
        }
        if self.run_dir.as_os_str().len() + MAX_SOCKET_NAME > MAX_SOCKET_PATH {
            let max = MAX_SOCKET_PATH - MAX_SOCKET_NAME;
            return invalid(
                "run_dir",
                format!(
                    "{} is too long for sockets, maximum {max} bytes",
                    self.run_dir.display()
                ),
            );
        }
        if !is_interface_name(&self.nic.tap) {
            return invalid("nic.tap", format!("{:?} is not a network interface name", self.nic.tap));
        }
        if !self.nic.mac.is_unicast() {
            return invalid(
                "nic.mac",
                format!(
                    "{} is not a unicast MAC address such as 52:54:00:12:34:56",
                    self.nic.mac
                ),
            );
        }
        Ok(())
    }

    /// Returns the file that holds the root disk.
    pub(crate) fn root_file(&self) -> Result<&Path> {
        match &self.root {
            DiskLocation::File(path) => Ok(path),
            other => Err(Error::Spec {
                id: self.id.clone(),
                what: "root",
                why: format!("this driver supports only files, not {other:?}"),
            }),
        }
    }
}

/// Returns whether the name has at most 15 bytes (`IFNAMSIZ`), and no character with a meaning in a
/// hypervisor's option.
fn is_interface_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=15).contains(&name.len()) && name.bytes().all(plain) && name.bytes().any(|byte| byte != b'.')
}

/// A machine's network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// The existing tap on the host.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: Mac,
}

/// Limits on a guest's reads and writes together. Bursts of up to one second's worth are allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Requests per second; at least 1.
    pub iops: Option<u32>,
    /// Bytes per second.
    pub bytes_per_second: Option<u64>,
}

/// A Unix account, by numeric ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunAs {
    /// User id.
    pub uid: u32,
    /// Group id; the process is in no other group.
    pub gid: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "vm-0123456789ab".parse().unwrap(),
            vcpus: 1,
            memory_mib: 512,
            kernel: "/k".into(),
            initrd: None,
            modules: None,
            cmdline: "quiet".into(),
            root: DiskLocation::File("/r".into()),
            root_limits: DiskLimits::default(),
            seed: "/s".into(),
            nic: Nic {
                tap: "tap0".into(),
                mac: "52:54:00:12:34:56".parse().unwrap(),
            },
            run_dir: "/run/scaleboxd/vms/vm-0123456789ab".into(),
            console_log: "/c".into(),
            run_as: None,
        }
    }

    #[test]
    fn invalid_fields_are_rejected_by_name() {
        spec().check().unwrap();
        type Break = fn(&mut MachineSpec);
        let invalid: [(&str, Break); 7] = [
            ("vcpus", |spec| spec.vcpus = 0),
            ("memory_mib", |spec| spec.memory_mib = 31),
            ("cmdline", |spec| spec.cmdline = "x".repeat(2048)),
            ("run_dir", |spec| spec.run_dir = "/x".repeat(46).into()),
            ("nic.tap", |spec| spec.nic.tap = "tap0,script=/x".into()),
            ("nic.tap", |spec| spec.nic.tap = "a-name-too-long-".into()),
            ("nic.mac", |spec| spec.nic.mac = "53:54:00:12:34:56".parse().unwrap()),
        ];
        for (field, break_it) in invalid {
            let mut spec = spec();
            break_it(&mut spec);
            match spec.check() {
                Err(Error::Spec { what, .. }) => assert_eq!(what, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}

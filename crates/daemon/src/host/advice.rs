//! The remedies for the errors of the libraries.
//!
//! The libraries state facts: they depend neither on the settings and commands of the daemon nor on
//! the installation of its host. The remedies are here, one for each variant of an error.
//! [`advised`] appends them where a sentence leaves the daemon: in the body of a response, in the
//! log, and in the last line of a failed command.

use scalebox_images::Error as ImageError;
use scalebox_images::oci::OciError;
use scalebox_net::Error as NetError;
use scalebox_programs::ProgramError;
use scalebox_storage::{DeviceRefusal, FstabError, InitWarning, PoolSizeError, StorageError};
use scalebox_vmm::Error as VmmError;
use std::error::Error;
use std::iter;

/// Returns the error's sentence and the remedy, if there is one: `fact; remedy`.
pub(crate) fn advised(error: &(dyn Error + 'static)) -> String {
    match advice(error) {
        Some(advice) => format!("{error}; {advice}"),
        None => error.to_string(),
    }
}

/// Returns the remedy for an error of a library, or for the first cause of `error` that has one.
/// It continues a sentence.
pub(crate) fn advice(error: &(dyn Error + 'static)) -> Option<String> {
    iter::successors(Some(error), |error| (*error).source()).find_map(|error| {
        error
            .downcast_ref()
            .and_then(of_storage)
            .or_else(|| error.downcast_ref().and_then(of_init))
            .or_else(|| error.downcast_ref().and_then(of_net))
            .or_else(|| error.downcast_ref().and_then(of_vmm))
            .or_else(|| error.downcast_ref().and_then(of_image))
            .or_else(|| error.downcast_ref().and_then(of_oci))
            .or_else(|| error.downcast_ref().and_then(of_program))
    })
}

fn of_storage(error: &StorageError) -> Option<String> {
    Some(match error {
        StorageError::TooLittleSpace { folder, .. } => format!(
            "POOL_IMAGE would be in {}: set it to a path on a larger disk, or free space there",
            folder.display()
        ),
        StorageError::TemplateExists(_) => {
            "delete it first, or choose another name; an import can also replace it (--replace)".to_owned()
        }
        StorageError::TemplateBeingMade(_) => "wait for it, or choose another name".to_owned(),
        StorageError::DamagedTemplate { .. } => "import the template again".to_owned(),
        StorageError::DamagedRecord { .. } => "delete the template and import it again".to_owned(),
        StorageError::NotMounted(_) => "run `scaleboxd pool init`".to_owned(),
        StorageError::PoolMissing { image, .. } => format!(
            "restore the storage under {} and mount it. A new pool would be empty; to give up these VMs for good, move \
             STATE_DIR away first",
            image.display()
        ),
        StorageError::NoSysfs(_) => "mount sysfs (mount -t sysfs sysfs /sys), or bind the host's /sys/fs/btrfs \
                                     read-only into the container"
            .to_owned(),
        StorageError::NotAPool { .. } => {
            "set DATA_DIR to a folder on one, or POOL_IMAGE to the path of a new image".to_owned()
        }
        StorageError::OtherDevice { .. } => {
            "unmount it, or set DATA_DIR to another folder or POOL_DEVICE to the mounted device".to_owned()
        }
        StorageError::UnfitDevice { device, reason } => return of_device(reason, &device.display().to_string()),
        StorageError::NotEmpty(_) => "move them away, or set DATA_DIR to another folder".to_owned(),
        StorageError::OtherFolder(_) => "set DATA_DIR to an empty or new folder".to_owned(),
        StorageError::ForeignImage { .. } => "move it away, or set POOL_IMAGE to another path".to_owned(),
        StorageError::LinkedImage { .. } => "set POOL_IMAGE to the path of the file itself".to_owned(),
        StorageError::MountedElsewhere { .. } => "set DATA_DIR to that folder, or unmount it there first".to_owned(),
        StorageError::PoolSize(error) => return of_pool_size(error),
        StorageError::ExistingFileSystem(_) => "resize that file system with its own tools".to_owned(),
        StorageError::Busy(_) => "wait for it to finish".to_owned(),
        StorageError::Fstab(error) => return of_fstab(error),
        StorageError::Program(error) => return of_program(error),
        _ => return None,
    })
}

fn of_device(reason: &DeviceRefusal, device: &str) -> Option<String> {
    Some(match reason {
        DeviceRefusal::NotABlockDevice => {
            "set POOL_DEVICE to a block device, such as /dev/disk/by-id/…, or POOL_IMAGE to the path of a new image"
                .to_owned()
        }
        DeviceRefusal::Ambiguous(_) => format!("see wipefs --no-act {device}"),
        DeviceRefusal::ForeignContents(_) => format!("to erase its contents for good, run: wipefs --all {device}"),
        DeviceRefusal::SmallerThanRequested { .. } => "lower STORAGE_SIZE, or unset it".to_owned(),
        _ => return None,
    })
}

fn of_pool_size(error: &PoolSizeError) -> Option<String> {
    let advice = match error {
        PoolSizeError::NotLarger { .. } => "free space on the host disk, or choose a larger size",
        PoolSizeError::NotLargerOnDevice { .. } => "grow the device first",
        PoolSizeError::Overcommitted { .. } => "delete VMs, or choose a larger size",
        _ => return None,
    };
    Some(advice.to_owned())
}

fn of_fstab(error: &FstabError) -> Option<String> {
    match error {
        FstabError::Claimed { .. } => Some("remove that line, or set DATA_DIR to another folder".to_owned()),
        FstabError::Io { .. } | FstabError::NotAFile(_) => None,
    }
}

fn of_init(warning: &InitWarning) -> Option<String> {
    Some(match warning {
        InitWarning::OtherSize { .. } => "`scalebox pool grow --size` or `scalebox pool shrink --size` changes its \
                                          size while the daemon is running"
            .to_owned(),
        InitWarning::SizeOfExisting(_) => "unset STORAGE_SIZE".to_owned(),
        InitWarning::NotRegistered { error, line } => {
            let change = match error {
                FstabError::Claimed { .. } => "replace that line in the host's fstab by",
                FstabError::Io { .. } | FstabError::NotAFile(_) => "add to the host's fstab the line",
            };
            format!("{change} `{line}`, or set FSTAB=none if another program mounts it")
        }
        InitWarning::NoDirectIoWhileMounted(_) => "`scaleboxd down && scaleboxd pool init` tries again with the \
                                                   sector size of the host disk"
            .to_owned(),
        InitWarning::UnnecessaryImage(_) => {
            "with POOL_IMAGE=none the pool is a folder on it, without an image".to_owned()
        }
        _ => return None,
    })
}

fn of_net(error: &NetError) -> Option<String> {
    Some(match error {
        NetError::NoFreeAddress(_) => "delete a VM, or set SUBNET to a larger subnet".to_owned(),
        NetError::NoFreePort { .. } => "delete a VM, or widen PORT_MIN..PORT_MAX".to_owned(),
        NetError::Taken { .. } => "detach that VM first, or choose another".to_owned(),
        NetError::ForeignBridge { .. } => "set BRIDGE to a free name".to_owned(),
        NetError::ForeignTap { .. } => "find its owner, and remove it (ip link delete)".to_owned(),
        NetError::Gone(_) => "restart the daemon, which creates it again".to_owned(),
        NetError::Overlap { .. } => "set SUBNET to a private range that this host does not use".to_owned(),
        NetError::Netlink { .. } => "this needs CAP_NET_ADMIN (run as root)".to_owned(),
        NetError::Tap { .. } => "this needs /dev/net/tun (modprobe tun) and CAP_NET_ADMIN (run as root)".to_owned(),
        NetError::Sysctl { key, value, .. } => {
            format!("run `sysctl -w {key}={value}` as root, and check whether /proc/sys is writable")
        }
        NetError::NftMissing { package } => install(package),
        NetError::ForeignElement { table, .. } => {
            format!("run `nft delete table {table}` and restart, which creates the table again")
        }
        NetError::BridgeName(_)
        | NetError::Subnet { .. }
        | NetError::Ports { .. }
        | NetError::NotAGuestAddress { .. }
        | NetError::NftStart { .. }
        | NetError::Nft { .. }
        | NetError::HostPort { .. } => return None,
    })
}

fn of_vmm(error: &VmmError) -> Option<String> {
    Some(match error {
        VmmError::NotInstalled { package, .. } => format!("install it (Debian: apt-get install {package})"),
        VmmError::NoFirecracker(_) => "install a Firecracker release, or set VMM=auto or VMM=qemu".to_owned(),
        VmmError::Foreign { .. } => "restore the old VMM setting and stop the VM before changing VMM".to_owned(),
        VmmError::DynamicallyLinked(_) => "install a static release build".to_owned(),
        VmmError::UnfitJails(_) => "mount it without them, or set VMM=qemu".to_owned(),
        VmmError::NoKvm { .. } => "load the kvm module, or set ACCEL=auto or ACCEL=tcg".to_owned(),
        VmmError::KernelFormat { .. } => "build the template with a kernel that is compressed with LZ4".to_owned(),
        VmmError::Running { .. } => "adopt it, or stop it first".to_owned(),
        VmmError::Hung { .. } => "try again, or kill the machine".to_owned(),
        VmmError::Unkillable { .. } => "the host's storage may be stuck (see dmesg); try again".to_owned(),
        _ => return None,
    })
}

fn of_image(error: &ImageError) -> Option<String> {
    Some(match error {
        ImageError::Kernel(_) => "build with the suite bookworm, or report a bug".to_owned(),
        ImageError::StillMounted(folder) => {
            format!("unmount it (umount {}) and run the build again", folder.display())
        }
        ImageError::Program(error) => return of_program(error),
        _ => return None,
    })
}

fn of_oci(error: &OciError) -> Option<String> {
    match error {
        OciError::Program(error) => of_program(error),
        _ => None,
    }
}

fn of_program(error: &ProgramError) -> Option<String> {
    match error {
        ProgramError::Missing { package, .. } => Some(install(package)),
        _ => None,
    }
}

fn install(package: &str) -> String {
    format!("install the package {package} (apt-get install {package})")
}

#[cfg(test)]
mod tests;

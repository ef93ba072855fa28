//! Every error with a remedy, as the sentence that people read.

use super::*;
use scalebox_storage::pool_size;
use scalebox_units::{Bytes, Gib};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

type Row = (Box<dyn Error>, &'static str);

fn check(rows: Vec<Row>) {
    for (error, sentence) in rows {
        assert!(advice(error.as_ref()).is_some(), "no advice: {error}");
        assert_eq!(advised(error.as_ref()), sentence);
    }
}

fn row(error: impl Error + 'static, sentence: &'static str) -> Row {
    (Box::new(error), sentence)
}

fn denied() -> io::Error {
    io::ErrorKind::PermissionDenied.into()
}

#[test]
fn errors_about_templates_are_advised() {
    check(vec![
        row(
            StorageError::TemplateExists("node".to_owned()),
            "template node exists already; delete it first, or choose another name; an import can also replace it \
             (--replace)",
        ),
        row(
            StorageError::TemplateBeingMade("node".to_owned()),
            "template node is being created by another operation; wait for it, or choose another name",
        ),
        row(
            StorageError::DamagedTemplate {
                template: "node".to_owned(),
                reason: "is truncated".to_owned(),
            },
            "cannot grow a disk from template node: its file system is truncated; import the template again",
        ),
        row(
            StorageError::DamagedRecord {
                template: "node".to_owned(),
                path: "/pool/node.json".into(),
                reason: "it is empty".to_owned(),
            },
            "the record of template node, /pool/node.json, is damaged: it is empty; delete the template and import it again",
        ),
    ]);
}

#[test]
fn errors_about_the_place_of_a_pool_are_advised() {
    let pool = || PathBuf::from("/pool");
    let image = || PathBuf::from("/pool.img");
    check(vec![
        row(
            StorageError::TooLittleSpace {
                source: pool_size(Gib::new(24).bytes(), None).unwrap_err(),
                folder: "/srv".into(),
            },
            "Insufficient disk space. Need at least 25GB free, found 24GB; POOL_IMAGE would be in /srv: set it to a path \
             on a larger disk, or free space there",
        ),
        row(
            StorageError::NotMounted(pool()),
            "no pool is mounted at /pool; run `scaleboxd pool init`",
        ),
        row(
            StorageError::PoolMissing {
                image: image(),
                disks: 3,
            },
            "the pool is missing, and 3 VM disks should be in it; restore the storage under /pool.img and mount it. A new \
             pool would be empty; to give up these VMs for good, move STATE_DIR away first",
        ),
        row(
            StorageError::NoSysfs(pool()),
            "/sys/fs/btrfs has no entry for the btrfs at /pool; mount sysfs (mount -t sysfs sysfs /sys), or bind the \
             host's /sys/fs/btrfs read-only into the container",
        ),
        row(
            StorageError::NotAPool {
                path: pool(),
                fs_type: "ext4".to_owned(),
            },
            "/pool is on a ext4 file system, which cannot clone files: a pool needs btrfs, or XFS made with reflink=1; \
             set DATA_DIR to a folder on one, or POOL_IMAGE to the path of a new image",
        ),
        row(
            StorageError::OtherDevice {
                path: pool(),
                device: "/dev/a".into(),
                found: "/dev/b".into(),
            },
            "/pool is mounted from /dev/b, not from /dev/a; unmount it, or set DATA_DIR to another folder or POOL_DEVICE \
             to the mounted device",
        ),
        row(
            StorageError::Busy(pool()),
            "/pool is in use by another scaleboxd; wait for it to finish",
        ),
    ]);
}

#[test]
fn errors_about_other_data_in_place_of_a_pool_are_advised() {
    let (pool, image) = (|| PathBuf::from("/pool"), || PathBuf::from("/pool.img"));
    check(vec![
        row(
            StorageError::NotEmpty(pool()),
            "/pool is not empty, and mounting the pool would hide its contents; move them away, or set DATA_DIR to \
             another folder",
        ),
        row(
            StorageError::OtherFolder(pool()),
            "/pool contains files and is not a pool; set DATA_DIR to an empty or new folder",
        ),
        row(
            StorageError::ForeignImage {
                path: image(),
                found: "ext4".to_owned(),
            },
            "/pool.img contains ext4, not a pool; it was not changed; move it away, or set POOL_IMAGE to another path",
        ),
        row(
            StorageError::LinkedImage {
                path: image(),
                target: "/elsewhere".to_owned(),
            },
            "/pool.img is a symbolic link to /elsewhere, not a pool; it was not changed; set POOL_IMAGE to the path of \
             the file itself",
        ),
        row(
            StorageError::MountedElsewhere {
                image: image(),
                at: "/mnt".into(),
            },
            "/pool.img is already mounted at /mnt; set DATA_DIR to that folder, or unmount it there first",
        ),
        row(
            StorageError::from(claimed()),
            "/etc/fstab: /pool is already the mount point of /dev/sdb1; remove that line, or set DATA_DIR to another folder",
        ),
    ]);
}

fn claimed() -> FstabError {
    FstabError::Claimed {
        path: "/etc/fstab".into(),
        target: "/pool".into(),
        other: "/dev/sdb1".to_owned(),
    }
}

#[test]
fn unfit_devices_are_advised() {
    let unfit = |reason| StorageError::UnfitDevice {
        device: "/dev/a".into(),
        reason,
    };
    check(vec![
        row(
            unfit(DeviceRefusal::NotABlockDevice),
            "/dev/a cannot become a pool: it is not a block device; it was not changed; set POOL_DEVICE to a block device, \
             such as /dev/disk/by-id/…, or POOL_IMAGE to the path of a new image",
        ),
        row(
            unfit(DeviceRefusal::Ambiguous(
                "btrfs, and signatures of other contents".to_owned(),
            )),
            "/dev/a cannot become a pool: it contains btrfs, and signatures of other contents, so the owner of its data is \
             unclear; it was not changed; see wipefs --no-act /dev/a",
        ),
        row(
            unfit(DeviceRefusal::ForeignContents("ext4".to_owned())),
            "/dev/a cannot become a pool: it contains ext4; it was not changed; to erase its contents for good, run: \
             wipefs --all /dev/a",
        ),
        row(
            unfit(DeviceRefusal::SmallerThanRequested {
                found: Gib::new(10).bytes(),
                requested: "11G".to_owned(),
            }),
            "/dev/a cannot become a pool: it has 10 GiB, less than the requested 11G; it was not changed; lower \
             STORAGE_SIZE, or unset it",
        ),
    ]);
}

#[test]
fn errors_about_the_size_of_the_pool_are_advised() {
    let (size, current) = (Gib::new(20), Gib::new(30).bytes());
    check(vec![
        row(
            StorageError::from(PoolSizeError::NotLarger { size, current }),
            "20 GiB is not larger than the pool, which has 30 GiB; free space on the host disk, or choose a larger size",
        ),
        row(
            StorageError::from(PoolSizeError::NotLargerOnDevice {
                size: size.bytes(),
                current,
                device_size: current,
                device: "/dev/a".into(),
            }),
            "20 GiB is not larger than the pool, which has 30 GiB of the 30 GiB of /dev/a; grow the device first",
        ),
        row(
            StorageError::from(PoolSizeError::Overcommitted {
                promised: Gib::new(90).bytes(),
                size: size.bytes(),
                limit: Gib::new(72).bytes(),
            }),
            "90 GiB are committed to VMs, but a pool of 20 GiB can commit at most 72 GiB; delete VMs, or choose a larger \
             size",
        ),
        row(
            StorageError::ExistingFileSystem("/pool".into()),
            "the pool at /pool is on an existing file system, which Scalebox does not resize; resize that file system with \
             its own tools",
        ),
    ]);
}

#[test]
fn warnings_of_pool_init_are_advised() {
    let unregistered = |error| InitWarning::NotRegistered {
        error,
        line: "/pool.img /pool btrfs loop 0 0".to_owned(),
    };
    check(vec![
        row(
            InitWarning::OtherSize {
                requested: "40G".parse().unwrap(),
                found: Gib::new(30).bytes(),
            },
            "The requested size 40G has no effect: the pool already exists with 30 GiB; `scalebox pool grow --size` or \
             `scalebox pool shrink --size` changes its size while the daemon is running",
        ),
        row(
            InitWarning::SizeOfExisting("40G".parse().unwrap()),
            "The requested size 40G has no effect: the pool is on an existing file system; unset STORAGE_SIZE",
        ),
        row(
            unregistered(FstabError::NotAFile("/etc/fstab".into())),
            "cannot register the pool in /etc/fstab: it is not a regular file. The pool is mounted now, but will not be \
             after a reboot; add to the host's fstab the line `/pool.img /pool btrfs loop 0 0`, or set FSTAB=none if \
             another program mounts it",
        ),
        row(
            unregistered(claimed()),
            "/etc/fstab: /pool is already the mount point of /dev/sdb1. The pool is mounted now, but will not be after a \
             reboot; replace that line in the host's fstab by `/pool.img /pool btrfs loop 0 0`, or set FSTAB=none if \
             another program mounts it",
        ),
        row(
            InitWarning::NoDirectIoWhileMounted(missing()),
            "The pool's loop device does not use direct I/O, which makes the pool slower: the program tool is missing; \
             `scaleboxd down && scaleboxd pool init` tries again with the sector size of the host disk",
        ),
        row(
            InitWarning::UnnecessaryImage("/pool.img".into()),
            "/pool.img is on a file system that can clone files itself; with POOL_IMAGE=none the pool is a folder on it, \
             without an image",
        ),
    ]);
}

#[test]
fn errors_about_addresses_and_interfaces_are_advised() {
    let subnet = || "172.16.0.0/30".parse().unwrap();
    let name = || "scalebox0".to_owned();
    check(vec![
        row(
            NetError::NoFreeAddress(subnet()),
            "no free address in 172.16.0.0/30; delete a VM, or set SUBNET to a larger subnet",
        ),
        row(
            NetError::NoFreePort {
                min: 2201,
                max: 2202,
                used: 1,
                skipped: 1,
            },
            "no free port in 2201..2202: 1 are forwarded to VMs, 1 are in use by other programs; delete a VM, or widen \
             PORT_MIN..PORT_MAX",
        ),
        row(
            NetError::Taken {
                what: "port 2201".to_owned(),
                owner: "vm-0123456789ab".to_owned(),
            },
            "port 2201 is in use by another VM (vm-0123456789ab); detach that VM first, or choose another",
        ),
        row(
            NetError::ForeignBridge {
                name: name(),
                why: "is not a bridge",
            },
            "the interface scalebox0 exists and is not a bridge; it was not changed; set BRIDGE to a free name",
        ),
        row(
            NetError::ForeignTap {
                name: name(),
                why: "is not a tap",
            },
            "the interface scalebox0 exists and is not a tap; it was not changed; find its owner, and remove it (ip link \
             delete)",
        ),
        row(
            NetError::Gone(name()),
            "the interface scalebox0 was deleted by another program; restart the daemon, which creates it again",
        ),
        row(
            NetError::Overlap {
                subnet: subnet(),
                address: subnet(),
                interface: "eth0".to_owned(),
            },
            "the subnet 172.16.0.0/30 overlaps with 172.16.0.0/30 on eth0; set SUBNET to a private range that this host \
             does not use",
        ),
    ]);
}

#[test]
fn errors_of_the_kernel_s_network_are_advised() {
    check(vec![
        row(
            NetError::Netlink {
                action: "create the bridge".to_owned(),
                source: denied(),
            },
            "cannot create the bridge: permission denied; this needs CAP_NET_ADMIN (run as root)",
        ),
        row(
            NetError::Tap {
                action: "create the tap".to_owned(),
                source: denied(),
            },
            "cannot create the tap: permission denied; this needs /dev/net/tun (modprobe tun) and CAP_NET_ADMIN (run as \
             root)",
        ),
        row(
            NetError::Sysctl {
                key: "net.ipv4.ip_forward".to_owned(),
                value: "1",
                source: denied(),
            },
            "cannot set net.ipv4.ip_forward=1: permission denied; run `sysctl -w net.ipv4.ip_forward=1` as root, and \
             check whether /proc/sys is writable",
        ),
        row(
            NetError::NftMissing { package: "nftables" },
            "the program nft is missing; install the package nftables (apt-get install nftables)",
        ),
        row(
            NetError::ForeignElement {
                table: "ip scalebox".to_owned(),
                what: "a rule".to_owned(),
            },
            "the nftables table ip scalebox contains a rule, which Scalebox did not add; run `nft delete table ip \
             scalebox` and restart, which creates the table again",
        ),
    ]);
}

#[test]
fn errors_about_hypervisors_are_advised() {
    let id = || "vm-0123456789ab".parse().unwrap();
    check(vec![
        row(
            VmmError::NotInstalled {
                program: "qemu-system-x86_64",
                package: "qemu-system-x86",
            },
            "qemu-system-x86_64 is not on the PATH; install it (Debian: apt-get install qemu-system-x86)",
        ),
        row(
            VmmError::NoFirecracker("firecracker"),
            "firecracker is not on the PATH; install a Firecracker release, or set VMM=auto or VMM=qemu",
        ),
        row(
            VmmError::Foreign {
                id: id(),
                program: "firecracker".to_owned(),
            },
            "vm-0123456789ab runs under another hypervisor (firecracker); restore the old VMM setting and stop the VM \
             before changing VMM",
        ),
        row(
            VmmError::DynamicallyLinked("/bin/firecracker".into()),
            "/bin/firecracker cannot be used: it is dynamically linked, and its jail has no libraries; install a static \
             release build",
        ),
        row(
            VmmError::UnfitJails("/pool/jails".into()),
            "jailer cannot be used: /pool/jails is mounted with nodev or noexec; mount it without them, or set VMM=qemu",
        ),
        row(
            VmmError::NoKvm {
                why: "cannot open /dev/kvm: gone".to_owned(),
            },
            "KVM is required, but cannot open /dev/kvm: gone; load the kvm module, or set ACCEL=auto or ACCEL=tcg",
        ),
        row(
            VmmError::KernelFormat {
                id: id(),
                kernel: "/pool/vmlinuz".into(),
                version: "1.16.1".to_owned(),
                min: "1.17".to_owned(),
            },
            "vm-0123456789ab: kernel: /pool/vmlinuz is not an ELF image, and Firecracker 1.16.1 boots no other format \
             (1.17 and later do); build the template with a kernel that is compressed with LZ4",
        ),
    ]);
}

#[test]
fn errors_about_machines_are_advised() {
    let id = || "vm-0123456789ab".parse().unwrap();
    check(vec![
        row(
            VmmError::Running { id: id(), pid: Some(7) },
            "vm-0123456789ab is already running (process 7); adopt it, or stop it first",
        ),
        row(
            VmmError::Hung {
                id: id(),
                command: "stop",
                after: Duration::from_secs(10),
            },
            "vm-0123456789ab: the hypervisor did not respond to stop within 10s; try again, or kill the machine",
        ),
        row(
            VmmError::Unkillable {
                id: id(),
                pid: 7,
                after: Duration::from_secs(10),
            },
            "vm-0123456789ab: process 7 was killed but did not exit within 10s; the host's storage may be stuck (see \
             dmesg); try again",
        ),
    ]);
}

fn missing() -> ProgramError {
    ProgramError::Missing {
        program: "tool",
        package: "tools",
    }
}

#[test]
fn errors_about_builds_and_programs_are_advised() {
    const MISSING: &str = "the program tool is missing; install the package tools (apt-get install tools)";
    check(vec![
        row(
            ImageError::Kernel("it has no vmlinuz".to_owned()),
            "cannot use the archive's kernel package: it has no vmlinuz; build with the suite bookworm, or report a bug",
        ),
        row(
            ImageError::StillMounted("/scratch".into()),
            "/scratch is still mounted; unmount it (umount /scratch) and run the build again",
        ),
        row(missing(), MISSING),
        row(ImageError::from(missing()), MISSING),
        row(StorageError::from(missing()), MISSING),
    ]);
}

#[test]
fn errors_without_a_remedy_stay_as_they_are() {
    let used = Bytes::from_mib(1);
    let errors: [Box<dyn Error>; 3] = [
        Box::new(StorageError::NoTemplate("node".to_owned())),
        Box::new(StorageError::from(PoolSizeError::OverDevice {
            size: used,
            device_size: used,
            device: "/dev/a".into(),
        })),
        Box::new(denied()),
    ];
    for error in errors {
        assert_eq!(advised(error.as_ref()), error.to_string());
    }
}

//! Mounts the root file system and the modules drive.

use crate::init::command_line::CommandLine;
use crate::init::files::{cannot, read};
use rustix::mount::{MountFlags, mount as mount_call};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Time until the root disk must be there. It exists once its driver is loaded; the rest is for
/// hosts under load.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(5);
const DEVICE_INTERVAL: Duration = Duration::from_millis(10);

/// Maximum number of symbolic links that a path may contain, as in the kernel.
const MAX_LINKS: usize = 40;

/// Mounts `/dev`, `/proc` and `/sys` of the initramfs.
pub(crate) fn mount_kernel_file_systems() -> Result<(), String> {
    let flags = MountFlags::NOSUID;
    mount_at("dev", Path::new("/dev"), "devtmpfs", flags, "mode=755")?;
    mount_at("proc", Path::new("/proc"), "proc", flags, "")?;
    mount_at("sys", Path::new("/sys"), "sysfs", flags, "")
}

/// Mounts a file system. The error names the target.
pub(crate) fn mount_at(source: &str, target: &Path, kind: &str, flags: MountFlags, data: &str) -> Result<(), String> {
    let failed = |error: io::Error| cannot("mount", target)(error);
    let data = CString::new(data).map_err(|error| failed(error.into()))?;
    mount_call(source, target, kind, flags, data.as_c_str()).map_err(|error| failed(error.into()))
}

/// Mounts the root file system that `parameters` name on `target`.
pub(crate) fn mount(parameters: &CommandLine, target: &Path) -> Result<(), String> {
    let device = &parameters.device;
    wait_for(device)?;
    let (flags, data) = options(parameters);
    mount_at(&device.to_string_lossy(), target, &parameters.kind, flags, &data).map_err(|error| {
        format!(
            "{error} (the root file system: {} as {}, options {data:?})",
            device.display(),
            parameters.kind
        )
    })
}

fn wait_for(device: &Path) -> Result<(), String> {
    let start = Instant::now();
    loop {
        let there = fs::metadata(device).is_ok_and(|meta| meta.file_type().is_block_device());
        match there {
            true => return Ok(()),
            false if start.elapsed() < DEVICE_TIMEOUT => sleep(DEVICE_INTERVAL),
            false => {
                return Err(format!(
                    "no block device {} after {} s: it is not the machine's first virtio disk",
                    device.display(),
                    DEVICE_TIMEOUT.as_secs()
                ));
            }
        }
    }
}

/// Separates the options of the mount point from those of the file system.
fn options(parameters: &CommandLine) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, !parameters.writable);
    let mut data = Vec::new();
    for option in &parameters.flags {
        match option.as_str() {
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "defaults" | "" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Mounts the modules drive where the root file system has no modules of the running kernel. A
/// failure is reported on the console only: the guest has its disk and network without it.
pub(crate) fn mount_modules(drive: &Path, root: &Path) {
    if let Err(error) = try_mount_modules(drive, root) {
        eprintln!("scalebox-agent: cannot mount the kernel modules: {error}");
    }
}

fn try_mount_modules(drive: &Path, root: &Path) -> Result<(), String> {
    let version = read("/proc/sys/kernel/osrelease")?;
    // With a merged /usr, /lib is a link.
    let lib = resolve(root, Path::new("/lib")).map_err(cannot("find /lib in", root))?;
    let folder = lib.join("modules").join(version.trim_end());
    if folder.join("modules.dep").exists() {
        return Ok(());
    }
    fs::create_dir_all(&folder).map_err(cannot("create", &folder))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_at(&drive.to_string_lossy(), &folder, "ext4", flags, "")
}

/// Resolves `path` as a process with the root `root` would: absolute links and `..` stay inside.
/// Components that do not exist are taken as they are.
///
/// # Errors
/// `ELOOP` for too many links; the errors of reading one.
pub(crate) fn resolve(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let mut rest: Vec<PathBuf> = parts(path).collect();
    rest.reverse();
    let (mut inside, mut links) = (PathBuf::new(), 0);
    while let Some(part) = rest.pop() {
        if part.as_os_str() == ".." {
            inside.pop();
            continue;
        }
        let next = inside.join(&part);
        match fs::read_link(root.join(&next)) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(rustix::io::Errno::LOOP.into());
                }
                if target.is_absolute() {
                    inside = PathBuf::new();
                }
                let mut target: Vec<PathBuf> = parts(&target).collect();
                target.reverse();
                rest.append(&mut target);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => {
                inside = next;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(root.join(inside))
}

fn parts(path: &Path) -> impl Iterator<Item = PathBuf> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(PathBuf::from(name)),
        Component::ParentDir => Some(PathBuf::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_of_the_root_file_system_stay_inside_it() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("usr/lib/systemd")).unwrap();
        symlink("usr/lib", root.join("lib")).unwrap();
        symlink("/usr/lib", root.join("lib64")).unwrap();
        symlink("../../../../usr", root.join("usr/up")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let resolved = |path: &str| resolve(root, Path::new(path)).unwrap();
        assert_eq!(resolved("/lib/systemd"), root.join("usr/lib/systemd"));
        assert_eq!(
            resolved("/lib64/x"),
            root.join("usr/lib/x"),
            "an absolute link, a missing file"
        );
        assert_eq!(resolved("/usr/up/lib"), root.join("usr/lib"), "more .. than folders");
        assert_eq!(resolved("/../.."), root);
        assert!(resolve(root, Path::new("/loop")).is_err());
    }

    #[test]
    fn mount_options_are_separated_from_those_of_the_file_system() {
        let parameters = CommandLine {
            device: "/dev/vda".into(),
            kind: "ext4".into(),
            flags: vec![
                "noatime".into(),
                "commit=30".into(),
                "nodev".into(),
                "errors=panic".into(),
            ],
            writable: false,
            init: "/sbin/init".into(),
            init_kind: None,
            modules: None,
        };
        let (flags, data) = options(&parameters);
        assert_eq!(flags, MountFlags::NOATIME | MountFlags::NODEV | MountFlags::RDONLY);
        assert_eq!(data, "commit=30,errors=panic");
    }
}

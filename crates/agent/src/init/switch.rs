//! Makes the mounted root file system the root of process 1, and frees the initramfs.
//!
//! The same steps as `switch_root(8)`: move the mount over `/`, change the root, remove the files
//! of the initramfs, which occupy memory.

use crate::init::files::cannot;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir};
use rustix::mount::{UnmountFlags, mount_move, unmount};
use rustix::process::{chdir, chroot};
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Switches to `root`. `/dev` moves along; the root file system's init mounts the others itself.
pub(crate) fn to_root(root: &Path) -> Result<(), String> {
    // Lazily: the agent, which starts meanwhile, may read there.
    for mounted in ["/sys", "/proc"] {
        unmount(mounted, UnmountFlags::DETACH).map_err(|error| cannot("unmount", mounted)(error.into()))?;
    }
    let dev = root.join("dev");
    ensure_dir(&dev)?;
    mount_move("/dev", &dev).map_err(|error| cannot("move /dev to", &dev)(error.into()))?;
    let initramfs = open_dir(CWD, Path::new("/")).map_err(cannot("open", "/"))?;
    chdir(root).map_err(|error| cannot("enter", root)(error.into()))?;
    mount_move(".", "/").map_err(|error| cannot("move the root file system from", root)(error.into()))?;
    chroot(".").map_err(|error| cannot("enter", root)(error.into()))?;
    chdir("/").map_err(|error| cannot("enter", "/")(error.into()))?;
    if let Err(error) = remove_content(&initramfs) {
        eprintln!("scalebox-agent: cannot free the initramfs: {error}");
    }
    Ok(())
}

/// Creates a directory unless it exists.
pub(crate) fn ensure_dir(path: &Path) -> Result<(), String> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(cannot("create", path)(error)),
        _ => Ok(()),
    }
}

fn open_dir(at: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(at, path, flags, Mode::empty())?)
}

/// Removes the contents of a directory of the initramfs. Does not enter other file systems: the
/// root file system is mounted on it.
fn remove_content(dir: &OwnedFd) -> io::Result<()> {
    let device = rustix::fs::fstat(dir)?.st_dev;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        if entry.file_type() != FileType::Directory {
            rustix::fs::unlinkat(dir, name, AtFlags::empty())?;
            continue;
        }
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if stat.st_dev != device {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        remove_content(&rustix::fs::openat(dir, name, flags, Mode::empty())?)?;
        // The directory that the root file system was mounted on may be busy.
        let _ = rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_files_of_a_tree_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b/c")).unwrap();
        for name in ["init", "a/file", "a/b/c/file"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        std::os::unix::fs::symlink("/etc", folder.path().join("a/link")).unwrap();
        remove_content(&open_dir(CWD, folder.path()).unwrap()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(Path::new("/etc/passwd").exists(), "a link was followed");
    }
}

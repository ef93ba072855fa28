//! Builds the initramfs: busybox, one script and the virtio modules. It is not compressed:
//! decompressing its 3 MB would take an emulated CPU longer than loading them.

use crate::cpio::Archive;
use crate::embedded;
use crate::error::Error;
use crate::kernel::KernelPackage;

/// The commands that the script uses, as links to busybox.
const APPLETS: [&str; 8] = [
    "sh",
    "mkdir",
    "mount",
    "umount",
    "insmod",
    "reboot",
    "sleep",
    "switch_root",
];

/// Builds the archive with modules of `kernel`.
pub(crate) fn build(kernel: &KernelPackage) -> Result<Vec<u8>, Error> {
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "root", "modules"] {
        archive.dir(dir);
    }
    // The script's standard streams, which the kernel opens before anything is mounted.
    archive.char_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &kernel.busybox()?);
    for applet in APPLETS {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.file("init", 0o755, embedded::INITRAMFS_INIT.as_bytes());

    let mut order = String::new();
    for entry in embedded::entries(embedded::INITRAMFS_MODULES) {
        let name = entry.split_once(' ').map_or(entry, |(name, _device)| name);
        if let Some(module) = kernel.module(name)? {
            archive.file(&format!("modules/{name}.ko"), 0o644, &module);
            order.push_str(entry);
            order.push('\n');
        }
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

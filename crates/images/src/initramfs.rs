//! Builds the initramfs in two parts: the drivers of a kernel, and the agent of this release.
//!
//! The kernel unpacks one after the other. The drivers are installed with their kernel; the agent
//! is appended when a guest boots, so that an upgrade of the host upgrades it. Neither part is
//! compressed: decompressing 3 MB would take an emulated CPU longer than loading them.

use crate::cpio::Archive;
use crate::embedded;
use crate::error::Error;
use crate::kernel::KernelPackage;
use scalebox_agent_binary::AGENT;
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

/// Builds the archive with the modules of `kernel`.
pub(crate) fn drivers(kernel: &KernelPackage) -> Result<Vec<u8>, Error> {
    let mut archive = Archive::new();
    for dir in ["dev", "proc", "sys", "root", "modules"] {
        archive.dir(dir);
    }
    // The standard streams of process 1, which the kernel opens before anything is mounted.
    archive.char_device("dev/console", 5, 1);
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

/// Returns the archive that makes `scalebox-agent` the first program of a guest. It is appended to
/// the initramfs of a kernel, at a multiple of 4 bytes.
pub fn agent_archive() -> &'static [u8] {
    static ARCHIVE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut archive = Archive::new();
        // Replaces the script of the same name in a kernel's initramfs of earlier releases.
        archive.file("init", 0o755, AGENT);
        archive.finish()
    });
    &ARCHIVE
}

/// Returns a tag that distinguishes the archives of releases: 16 hexadecimal digits.
pub fn agent_tag() -> &'static str {
    static TAG: LazyLock<String> = LazyLock::new(|| {
        let digest = Sha256::digest(agent_archive());
        digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    });
    &TAG
}

//! The guests' kernels: chooses the kernel that a VM boots, and removes unused kernels.

use crate::host::error::ServiceError;
use crate::host::kernels_in_use::KernelInUse;
use crate::host::{BASE_TEMPLATE, Host, blocking};
use scalebox_storage::{AppendedArchive, Kernel};
use scalebox_units::KernelId;
use std::path::PathBuf;

/// Chooses the kernel to boot: the preferred one, or the newest if that is missing. `None` while
/// the host has none. The kernel is not removed until the returned guard is dropped. Blocks.
///
/// # Errors
/// If the pool cannot be read.
pub(crate) fn choose(host: &Host, preferred: Option<&KernelId>) -> Result<Option<KernelInUse>, ServiceError> {
    host.kernels_in_use
        .hold(|| Ok(host.pool.kernel_or_newest(preferred)?.map(|kernel| kernel.id)))
}

/// Returns the files of a kernel.
///
/// # Errors
/// 503 if the kernel is missing.
pub(crate) fn require(host: &Host, kernel: Option<&KernelId>) -> Result<Kernel, ServiceError> {
    kernel.and_then(|id| host.pool.kernel(id)).ok_or_else(|| {
        ServiceError::NotReady(format!(
            "this host has no guest kernel yet: run `scaleboxd template build {BASE_TEMPLATE}` on it"
        ))
    })
}

/// Returns the initramfs that guests of `kernel` boot: its drivers, and this release's agent. Makes
/// it if it does not exist. Blocks.
///
/// # Errors
/// If the pool cannot be written.
pub(crate) fn initramfs(host: &Host, kernel: &Kernel) -> Result<PathBuf, ServiceError> {
    let agent = AppendedArchive {
        tag: scalebox_images::agent_tag(),
        content: scalebox_images::agent_archive(),
    };
    Ok(host.pool.boot_initramfs(kernel, agent)?)
}

/// Removes the kernels that no VM and no template uses, except the newest. Failures are logged; the
/// next call tries again.
pub(crate) async fn remove_unused(host: &Host) {
    let on = host.clone();
    let removed = blocking(move || {
        on.kernels_in_use.remove(|mut used| {
            used.extend(on.vms.all().into_iter().filter_map(|record| record.kernel));
            on.pool.remove_unused_kernels(&used)
        })
    });
    match removed.await {
        Ok(removed) => {
            for kernel in removed {
                // The sweep removes files that could not be removed here.
                host.cleanups.sweep_soon();
                tracing::info!(kernel = kernel.as_str(), "removed a kernel that nothing uses");
            }
        }
        Err(error) => tracing::warn!(%error, "cannot remove unused kernels; retrying after the next deletion"),
    }
}

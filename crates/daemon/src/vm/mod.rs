//! Operations on one VM: creation, start and stop, change, snapshot, deletion, and recovery at
//! start.
//!
//! The functions here run in tasks of their own: they complete even if the caller stops waiting.

pub(crate) mod auto_extend;
pub(crate) mod change;
pub(crate) mod cleanup;
pub(crate) mod create;
pub(crate) mod exec;
pub(crate) mod exec_events;
pub(crate) mod files;
pub(crate) mod guest;
pub(crate) mod guest_fs;
pub(crate) mod idempotency;
pub(crate) mod lifecycle;
pub(crate) mod main_process;
pub(crate) mod pause;
pub(crate) mod reboot_loop;
pub(crate) mod recovery;
pub(crate) mod snapshot;
pub(crate) mod spec;
pub(crate) mod spool;
pub(crate) mod transition;
pub(crate) mod trim;
pub(crate) mod view;

use crate::host::Host;
use crate::host::error::ServiceError;
use scalebox_api::{CreateVm, Trimmed, UpdateVm, Vm};
use std::time::Duration;

/// Creates a VM. Completes even if the caller stops waiting.
///
/// If an earlier request with the same idempotency key created a VM, returns that VM; the second
/// value is then `true`.
///
/// # Errors
/// 404 if there is no such template, 400 if the disk is smaller than the template, 409 if the
/// name is in use, 507 if the disk does not fit, 503 if the host is not ready. Those of the pull of
/// an image, and 504 if it does not end within `pull_wait`. Nothing is left behind.
pub(crate) async fn create(host: &Host, request: CreateVm, pull_wait: Duration) -> Result<(Vm, bool), ServiceError> {
    host.detached(|host| async move { idempotency::create(&host, request, pull_wait).await })
        .await
}

/// Starts a stopped VM.
///
/// # Errors
/// 404; 409 if the VM is running or another operation is running on it.
pub(crate) async fn start(host: &Host, reference: String) -> Result<Vm, ServiceError> {
    host.detached(|host| async move { lifecycle::start_now(&host, &reference).await })
        .await
}

/// Shuts a VM down; kills the guest if it has not shut down after [`STOP_TIMEOUT`].
///
/// # Errors
/// 404; 409 if the VM is not running or another operation is running on it.
pub(crate) async fn stop(host: &Host, reference: String) -> Result<Vm, ServiceError> {
    host.detached(|host| async move { lifecycle::stop_now(&host, &reference).await })
        .await
}

/// Changes a VM. Grows its disk and the file system on it: live if the VM runs, otherwise
/// offline.
///
/// Waits for the operation in progress on the VM, so that of several concurrent requests, the
/// largest size takes effect.
///
/// # Errors
/// 404; 400 if the disk would become smaller; 507 if it does not fit. Nothing is changed then.
pub(crate) async fn update(host: &Host, reference: String, request: UpdateVm) -> Result<Vm, ServiceError> {
    host.detached(|host| async move { change::update_now(&host, &reference, request).await })
        .await
}

/// Discards the free blocks of a guest's file systems.
///
/// # Errors
/// 404; 409 if the VM is not running or its agent does not respond.
pub(crate) async fn trim_vm(host: &Host, reference: String) -> Result<Trimmed, ServiceError> {
    host.detached(|host| async move { trim::on_demand(&host, &reference).await })
        .await
}

/// Deletes a VM, running or not, with its disk. Cancels and undoes the creation of a VM of this
/// name.
///
/// # Errors
/// 404; 409 if another operation is running on the VM.
pub(crate) async fn delete(host: &Host, reference: String) -> Result<(), ServiceError> {
    host.detached(|host| async move { lifecycle::delete_now(&host, &reference).await })
        .await
}

/// Shuts a VM down as [`stop`] does, and starts it. A stopped VM is started.
///
/// # Errors
/// 404; 409 if another operation is running on the VM.
pub(crate) async fn restart(host: &Host, reference: String) -> Result<Vm, ServiceError> {
    host.detached(|host| async move { lifecycle::restart_now(&host, &reference).await })
        .await
}

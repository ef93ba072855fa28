//! `Idempotency-Key`: repeating a creation request returns the same VM
//! (draft-ietf-httpapi-idempotency-key-header).
//!
//! The key is committed together with the VM's record: whatever the crash point, a VM never exists
//! without its key. The key is known for as long as its VM exists; a trigger in the state file
//! deletes it with the record.

use crate::host::error::ServiceError;
use crate::host::{Host, blocking};
use crate::state::KeyedRequest;
use crate::vm::create::create_now;
use crate::vm::view;
use scalebox_api::{CreateVm, Vm};
use std::sync::Arc;
use std::time::Duration;

/// Creates the VM, or finds the VM created by the same request. Returns whether it was found.
///
/// # Errors
/// 409 while a request with the same key is in progress; 422 if the key belongs to a different
/// request; and the errors of a creation.
pub(crate) async fn create(host: &Host, request: CreateVm, pull_wait: Duration) -> Result<(Vm, bool), ServiceError> {
    let Some(keyed) = KeyedRequest::of(&request) else {
        return create_now(host, request, pull_wait).await.map(|vm| (vm, false));
    };
    let _in_use = host.keys.begin(&keyed.key)?;
    let (state, key) = (Arc::clone(&host.state), keyed.key.clone());
    match blocking(move || state.created_by(&key)).await? {
        None => create_now(host, request, pull_wait).await.map(|vm| (vm, false)),
        Some((vm, digest)) if digest == keyed.digest => view::get(host, vm.as_str()).map(|vm| (vm, true)),
        Some((vm, _)) => Err(ServiceError::IdempotencyMismatch(format!(
            "Idempotency-Key {} was used for a different request, which created {vm}: use a new key for each VM",
            keyed.key
        ))),
    }
}

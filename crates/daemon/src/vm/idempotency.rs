//! `Idempotency-Key`: repeating a creation request returns the same VM
//! (draft-ietf-httpapi-idempotency-key-header).
//!
//! The key is committed together with the VM's record: whatever the crash point, a VM never exists
//! without its key. The key is known for as long as its VM exists; a trigger in the state file
//! deletes it with the record.

use crate::host::error::ServiceError;
use crate::host::{Service, blocking};
use scalebox_client::{CreateVm, IdempotencyKey, Vm};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A creation request with its idempotency key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyedRequest {
    /// The key chosen by the client.
    pub key: IdempotencyKey,
    /// SHA-256 of the request, in hex; independent of the order of fields.
    pub digest: String,
}

impl KeyedRequest {
    /// Returns `None` for a request without a key.
    pub fn of(request: &CreateVm) -> Option<KeyedRequest> {
        let key = request.idempotency_key.clone()?;
        // Serialised in the order of the type, so that the order and spaces used by the client do
        // not matter.
        let text = serde_json::to_vec(request).ok()?;
        let digest = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        Some(KeyedRequest { key, digest })
    }
}

/// The keys of creations in progress.
#[derive(Default)]
pub struct KeysInUse(Mutex<HashSet<String>>);

impl KeysInUse {
    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, key: &IdempotencyKey) -> Result<KeyInUse<'_>, ServiceError> {
        if !self.lock().insert(key.as_str().to_owned()) {
            return Err(ServiceError::Busy(format!(
                "a request with Idempotency-Key {key} is still in progress: try again later"
            )));
        }
        Ok(KeyInUse {
            keys: self,
            key: key.as_str().to_owned(),
        })
    }
}

/// Marks a key as in use until it is dropped.
struct KeyInUse<'k> {
    keys: &'k KeysInUse,
    key: String,
}

impl Drop for KeyInUse<'_> {
    fn drop(&mut self) {
        self.keys.lock().remove(&self.key);
    }
}

/// Creates the VM, or finds the VM created by the same request. Returns whether it was found.
///
/// # Errors
/// 409 while a request with the same key is in progress; 422 if the key belongs to a different
/// request; and the errors of a creation.
pub async fn create(service: &Service, request: CreateVm) -> Result<(Vm, bool), ServiceError> {
    let Some(keyed) = KeyedRequest::of(&request) else {
        return service.create_now(request).await.map(|vm| (vm, false));
    };
    let _in_use = service.inner().keys.begin(&keyed.key)?;
    let (state, key) = (Arc::clone(&service.inner().state), keyed.key.clone());
    match blocking(move || state.created_by(&key)).await? {
        None => service.create_now(request).await.map(|vm| (vm, false)),
        Some((vm, digest)) if digest == keyed.digest => service.get(&vm).map(|vm| (vm, true)),
        Some((vm, _)) => Err(ServiceError::IdempotencyMismatch(format!(
            "Idempotency-Key {} was used for a different request, which created {vm}: use a new key for each VM",
            keyed.key
        ))),
    }
}

//! `Idempotency-Key`: a creation that is asked for again, by a client that did not hear the answer,
//! gives the same VM (draft-ietf-httpapi-idempotency-key-header).
//!
//! The key is committed together with the VM's record, so whatever the crash point, a VM never
//! exists without its key. It is known for as long as its VM exists; a trigger of the state file
//! deletes it with the record.

use crate::error::ServiceError;
use crate::service::{Service, blocking};
use scalebox_client::{CreateVm, IdempotencyKey, Vm};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A request that is to be carried out once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Once {
    /// The key that the client chose.
    pub key: IdempotencyKey,
    /// SHA-256 of the request, in hex; the same for any order of fields.
    pub digest: String,
}

impl Once {
    /// `None` for a request without a key.
    pub fn of(request: &CreateVm) -> Option<Once> {
        let key = request.idempotency_key.clone()?;
        // Fields in the order of the type: the same request is the same text, whatever order and
        // spaces the client used.
        let text = serde_json::to_vec(request).ok()?;
        let digest = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        Some(Once { key, digest })
    }
}

/// The keys of creations under way.
#[derive(Default)]
pub struct Keys(Mutex<HashSet<String>>);

impl Keys {
    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, key: &IdempotencyKey) -> Result<Turn<'_>, ServiceError> {
        if !self.lock().insert(key.as_str().to_owned()) {
            return Err(ServiceError::Busy(format!(
                "the request with Idempotency-Key {key} is still being carried out: ask again later"
            )));
        }
        Ok(Turn {
            keys: self,
            key: key.as_str().to_owned(),
        })
    }
}

/// The right to carry a key's request out, given back when dropped.
struct Turn<'k> {
    keys: &'k Keys,
    key: String,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.keys.lock().remove(&self.key);
    }
}

/// Makes the VM, or finds the one that the same request has made. Returns whether it was found.
///
/// # Errors
/// 409 while the same key's request is under way, 422 when it was another request; and those of a
/// creation.
pub async fn create(service: &Service, request: CreateVm) -> Result<(Vm, bool), ServiceError> {
    let Some(once) = Once::of(&request) else {
        return service.create_now(request).await.map(|vm| (vm, false));
    };
    let _turn = service.inner().keys.begin(&once.key)?;
    let (state, key) = (Arc::clone(&service.inner().state), once.key.clone());
    match blocking(move || state.made_by(&key)).await? {
        None => service.create_now(request).await.map(|vm| (vm, false)),
        Some((vm, digest)) if digest == once.digest => service.get(&vm).map(|vm| (vm, true)),
        Some((vm, _)) => Err(ServiceError::IdempotencyMismatch(format!(
            "Idempotency-Key {} belongs to another request, which made {vm}: use a new key for each VM",
            once.key
        ))),
    }
}

//! A creation request with its idempotency key, as it is committed with the VM.

use scalebox_api::{CreateVm, IdempotencyKey};
use sha2::{Digest, Sha256};

/// A creation request with its idempotency key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyedRequest {
    /// The key chosen by the client.
    pub key: IdempotencyKey,
    /// SHA-256 of the request, in hex; independent of the order of fields.
    pub digest: String,
}

impl KeyedRequest {
    /// Returns `None` for a request without a key.
    pub(crate) fn of(request: &CreateVm) -> Option<KeyedRequest> {
        let key = request.idempotency_key.clone()?;
        // The request is serialised in the order of the type, so that the order and spaces used by
        // the client do not matter.
        let text = serde_json::to_vec(request).ok()?;
        let digest = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        Some(KeyedRequest { key, digest })
    }
}

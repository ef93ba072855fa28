//! The idempotency keys of creations in progress.

use crate::host::error::ServiceError;
use scalebox_api::IdempotencyKey;
use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The keys of creations in progress.
#[derive(Default)]
pub(crate) struct KeysInUse(Mutex<HashSet<String>>);

impl KeysInUse {
    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks a key as in use.
    ///
    /// # Errors
    /// [`ServiceError::Busy`] if it is in use already.
    pub(crate) fn begin(&self, key: &IdempotencyKey) -> Result<KeyInUse<'_>, ServiceError> {
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
pub(crate) struct KeyInUse<'k> {
    keys: &'k KeysInUse,
    key: String,
}

impl Drop for KeyInUse<'_> {
    fn drop(&mut self) {
        self.keys.lock().remove(&self.key);
    }
}

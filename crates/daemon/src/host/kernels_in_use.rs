//! The kernels that operations in progress rely on.

use crate::host::error::ServiceError;
use scalebox_units::KernelId;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

/// The kernels that operations in progress rely on, although no template and no VM names them yet.
#[derive(Default)]
pub(crate) struct KernelsInUse {
    counts: Arc<Mutex<HashMap<KernelId, usize>>>,
}

/// Keeps a kernel from being removed until it is dropped.
pub(crate) struct KernelInUse {
    counts: Arc<Mutex<HashMap<KernelId, usize>>>,
    kernel: KernelId,
}

impl KernelInUse {
    /// Returns the kernel.
    pub(crate) fn id(&self) -> &KernelId {
        &self.kernel
    }
}

impl KernelsInUse {
    /// Keeps the kernel that `choose` returns from being removed. No removal runs meanwhile.
    ///
    /// # Errors
    /// Those of `choose`.
    pub(crate) fn hold(
        &self,
        choose: impl FnOnce() -> Result<Option<KernelId>, ServiceError>,
    ) -> Result<Option<KernelInUse>, ServiceError> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(kernel) = choose()? else { return Ok(None) };
        *counts.entry(kernel.clone()).or_default() += 1;
        Ok(Some(KernelInUse {
            counts: Arc::clone(&self.counts),
            kernel,
        }))
    }

    /// Calls `remove` with the kernels that must stay. No kernel is chosen meanwhile.
    pub(crate) fn remove<T>(&self, remove: impl FnOnce(HashSet<KernelId>) -> T) -> T {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        remove(counts.keys().cloned().collect())
    }
}

impl Drop for KernelInUse {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.kernel) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.kernel);
            }
        }
    }
}

//! The templates that disks are being cloned from.

use crate::host::error::ServiceError;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The templates that disks are being cloned from; these cannot be deleted.
#[derive(Default)]
pub(crate) struct TemplatesInUse {
    counts: Arc<Mutex<HashMap<String, usize>>>,
}

/// Keeps a template from being deleted until it is dropped.
pub(crate) struct TemplateInUse {
    counts: Arc<Mutex<HashMap<String, usize>>>,
    template: String,
}

impl TemplatesInUse {
    /// Keeps a template from being deleted.
    pub(crate) fn hold(&self, template: &str) -> TemplateInUse {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(template.to_owned()).or_default() += 1;
        TemplateInUse {
            counts: Arc::clone(&self.counts),
            template: template.to_owned(),
        }
    }

    /// Checks that the template can be deleted.
    ///
    /// # Errors
    /// 409 while a disk is being cloned from it.
    pub(crate) fn require_idle(&self, template: &str) -> Result<(), ServiceError> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.contains_key(template) {
            return Err(ServiceError::Busy(format!(
                "cannot delete template {template}: a VM is being created from it. Try again later"
            )));
        }
        Ok(())
    }
}

impl Drop for TemplateInUse {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.template) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.template);
            }
        }
    }
}

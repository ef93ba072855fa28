//! The kernels of VMs that earlier releases recorded without one.

use crate::host::error::ServiceError;
use crate::host::{Host, blocking};
use crate::state::Record;
use std::sync::Arc;

/// Assigns a kernel to each VM without one: that of its template, or the newest if the template is
/// gone. While the state is read-only, the choice is not recorded.
pub(super) async fn assign(host: &Host, mut records: Vec<Record>) -> Result<Vec<Record>, ServiceError> {
    if records.iter().all(|record| record.kernel.is_some()) {
        return Ok(records);
    }
    let (pool, state) = (Arc::clone(&host.pool), Arc::clone(&host.state));
    blocking(move || {
        for record in records.iter_mut().filter(|record| record.kernel.is_none()) {
            let template = record.template.parse().ok().and_then(|name| pool.template(&name).ok());
            let preferred = template.and_then(|template| template.kernel);
            let Some(kernel) = pool.kernel_or_newest(preferred.as_ref())?.map(|kernel| kernel.id) else {
                continue;
            };
            if !state.is_read_only()
                && let Err(error) = state.set_kernel(&record.id, &kernel)
            {
                tracing::warn!(vm = %record.id, %error, "cannot record the VM's kernel; the next start records it");
            }
            record.kernel = Some(kernel);
        }
        Ok::<_, ServiceError>(records)
    })
    .await
}

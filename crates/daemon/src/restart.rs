//! `POST /vms/{vm}/restart`: down and up again, as one operation.

use crate::error::ServiceError;
use crate::service::Service;
use scalebox_client::Vm;

impl Service {
    /// Shuts a VM down as [`Service::stop`] does, and starts it; one that does not run is started.
    ///
    /// # Errors
    /// 404, 409 when something is under way on it.
    pub async fn restart(&self, reference: String) -> Result<Vm, ServiceError> {
        let service = self.clone();
        self.detached(async move {
            let operation = service.inner().vms.begin(&reference, "being restarted")?;
            if let Some(machine) = &operation.machine {
                service.shut_down(&operation.record, machine).await?;
            }
            service.boot(&operation.record).await
        })
        .await
    }
}

//! `POST /vms/{vm}/restart`: stops and starts a VM as one operation.

use crate::host::Service;
use crate::host::error::ServiceError;
use scalebox_client::Vm;

impl Service {
    /// Shuts a VM down as [`Service::stop`] does, and starts it. A stopped VM is started.
    ///
    /// # Errors
    /// 404; 409 if another operation is running on the VM.
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

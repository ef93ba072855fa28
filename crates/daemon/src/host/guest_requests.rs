//! Limits on requests that use the agents of guests. Such a request may last as long as a command.

use crate::host::error::ServiceError;
use scalebox_units::VmId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Limit on the requests of all VMs. Fewer than the connections that the daemon serves.
const MAX_REQUESTS: usize = 768;
/// Limit on the requests of one VM.
const MAX_REQUESTS_PER_VM: usize = 256;

/// Counts the requests in progress. A clone counts the same requests.
#[derive(Clone, Default)]
pub(crate) struct GuestRequests(Arc<Mutex<Counts>>);

#[derive(Default)]
struct Counts {
    all: usize,
    by_vm: HashMap<VmId, usize>,
}

/// One request in progress, until it is dropped.
pub(crate) struct GuestRequest {
    requests: GuestRequests,
    vm: VmId,
}

impl GuestRequests {
    /// Counts a request.
    ///
    /// # Errors
    /// [`ServiceError::NotReady`] at a limit.
    pub(crate) fn begin(&self, vm: &VmId, name: &str) -> Result<GuestRequest, ServiceError> {
        let mut counts = self.lock();
        if counts.all >= MAX_REQUESTS {
            return Err(ServiceError::NotReady(format!(
                "{MAX_REQUESTS} commands and file transfers are already in progress on this host: try again later"
            )));
        }
        let of_vm = counts.by_vm.entry(vm.clone()).or_default();
        if *of_vm >= MAX_REQUESTS_PER_VM {
            return Err(ServiceError::NotReady(format!(
                "VM {name}: {MAX_REQUESTS_PER_VM} commands and file transfers are already in progress: try again later"
            )));
        }
        *of_vm += 1;
        counts.all += 1;
        Ok(GuestRequest {
            requests: self.clone(),
            vm: vm.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for GuestRequest {
    fn drop(&mut self) {
        let mut counts = self.requests.lock();
        counts.all -= 1;
        if let Some(count) = counts.by_vm.get_mut(&self.vm) {
            *count -= 1;
            if *count == 0 {
                counts.by_vm.remove(&self.vm);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_limited_and_the_host_too() {
        let requests = GuestRequests::default();
        let vm = |number: usize| format!("vm-{number:012x}").parse::<VmId>().unwrap();
        let of_one: Vec<_> = (0..MAX_REQUESTS_PER_VM)
            .map(|_| requests.begin(&vm(1), "one").unwrap())
            .collect();
        let refused = requests.begin(&vm(1), "one").err().unwrap().to_string();
        assert!(refused.starts_with("VM one: 256 commands"), "{refused}");
        let of_others: Vec<_> = (MAX_REQUESTS_PER_VM..MAX_REQUESTS)
            .map(|number| requests.begin(&vm(number), "other").unwrap())
            .collect();
        assert!(requests.begin(&vm(2), "two").is_err());
        drop(of_one);
        requests.begin(&vm(1), "one").unwrap();
        drop(of_others);
        assert_eq!(requests.lock().all, 0);
        assert!(requests.lock().by_vm.is_empty());
    }
}

//! The table of VMs in memory: their records, running operations, and the names, addresses and
//! ports in use.
//!
//! A std mutex guards the table. It is held for look-ups and small changes, never across an await;
//! the slowest step under it is a query to the kernel for a free port.

use crate::host::error::{ServiceError, quoted};
use crate::state::Record;
use scalebox_api::VmStatus;
use scalebox_net::{Addresses, Lease, NetConfig, port_is_free_on_host};
use scalebox_units::VmId;
use scalebox_vmm::Machine;
use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The table of VMs. A clone is another handle on the same table.
#[derive(Clone)]
pub(crate) struct Vms {
    table: Arc<Mutex<Table>>,
    /// Wakes waiting operations whenever an operation ends.
    idle: Arc<Notify>,
}

struct Table {
    by_id: BTreeMap<VmId, Entry>,
    /// The names of all VMs with their ids; those being created have none yet.
    names: HashMap<String, Option<VmId>>,
    /// The creations in progress, by VM name.
    creations: HashMap<String, Arc<Creation>>,
    addresses: Addresses,
}

struct Entry {
    record: Record,
    machine: Option<Arc<dyn Machine>>,
    /// The operation in progress on the VM; there is at most one.
    busy: Option<&'static str>,
}

impl Vms {
    /// Creates an empty table.
    pub(crate) fn new(network: &NetConfig) -> Vms {
        let table = Table {
            by_id: BTreeMap::new(),
            names: HashMap::new(),
            creations: HashMap::new(),
            addresses: Addresses::new(network),
        };
        Vms {
            table: Arc::new(Mutex::new(table)),
            idle: Arc::default(),
        }
    }

    /// Claims a name, an address and a port for a VM that is being created. They are released if
    /// the claim is dropped before [`Claim::publish`].
    ///
    /// # Errors
    /// [`ServiceError::NameTaken`] if the requested name is in use; [`ServiceError::NotReady`] if
    /// no name, address or port is free.
    pub(crate) fn claim(&self, name: Option<&str>) -> Result<Claim, ServiceError> {
        let mut table = self.lock();
        let name = match name {
            Some(name) if table.names.contains_key(name) => {
                return Err(ServiceError::NameTaken(format!(
                    "name {name} is in use; choose another, or omit it to have one generated"
                )));
            }
            Some(name) => name.to_owned(),
            None => free_name(&table.names)?,
        };
        let lease = table.addresses.claim(usable_port)?;
        table.names.insert(name.clone(), None);
        let creation = Arc::new(Creation::default());
        table.creations.insert(name.clone(), Arc::clone(&creation));
        Ok(Claim {
            name,
            lease,
            creation,
            published: false,
            vms: self.clone(),
        })
    }

    /// Adds a VM from the state file, at start.
    pub(crate) fn restore(&self, record: Record, machine: Option<Arc<dyn Machine>>) {
        let mut table = self.lock();
        table.names.insert(record.name.clone(), Some(record.id.clone()));
        table.addresses.occupy(lease(&record));
        table.by_id.insert(
            record.id.clone(),
            Entry {
                record,
                machine,
                busy: None,
            },
        );
    }

    /// Lists all VMs, oldest first.
    pub(crate) fn all(&self) -> Vec<Record> {
        let mut records: Vec<_> = self.lock().by_id.values().map(|entry| entry.record.clone()).collect();
        records.sort_by(|a, b| (&a.created_at, &a.id).cmp(&(&b.created_at, &b.id)));
        records
    }

    /// Counts the VMs created from a template.
    pub(crate) fn count_from_template(&self, template: &str) -> u64 {
        let table = self.lock();
        table
            .by_id
            .values()
            .filter(|entry| entry.record.template == template)
            .count() as u64
    }

    /// Lists only the statuses, for counting.
    pub(crate) fn statuses(&self) -> Vec<VmStatus> {
        self.lock().by_id.values().map(|entry| entry.record.status).collect()
    }

    /// Finds a VM by id or name.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub(crate) fn find(&self, reference: &str) -> Result<Record, ServiceError> {
        self.lock().find(reference).map(|entry| entry.record.clone())
    }

    /// Finds a VM by id or name, with its machine.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub(crate) fn find_with_machine(
        &self,
        reference: &str,
    ) -> Result<(Record, Option<Arc<dyn Machine>>), ServiceError> {
        let table = self.lock();
        let entry = table.find(reference)?;
        Ok((entry.record.clone(), entry.machine.clone()))
    }

    /// Begins an operation on a VM, found by id or name. No other can begin until the guard is
    /// dropped.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; [`ServiceError::Busy`], naming the operation in progress.
    pub(crate) fn begin(&self, reference: &str, operation: &'static str) -> Result<Operation, ServiceError> {
        let mut table = self.lock();
        let id = table.find(reference)?.record.id.clone();
        let entry = table.by_id.get_mut(&id).ok_or_else(|| not_found(reference))?;
        if let Some(current) = entry.busy {
            let name = &entry.record.name;
            return Err(ServiceError::Busy(format!("VM {name} is {current}: try again later")));
        }
        entry.busy = Some(operation);
        Ok(Operation {
            record: entry.record.clone(),
            machine: entry.machine.clone(),
            vms: self.clone(),
        })
    }

    /// Waits until no operation is in progress on the VM, then begins one like [`Vms::begin`].
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub(crate) async fn begin_when_idle(
        &self,
        reference: &str,
        operation: &'static str,
    ) -> Result<Operation, ServiceError> {
        loop {
            // The wait is registered before the check, so that the end of an operation in between
            // is noticed.
            let mut ended = std::pin::pin!(self.idle.notified());
            ended.as_mut().enable();
            match self.begin(reference, operation) {
                Err(ServiceError::Busy(_)) => ended.await,
                other => return other,
            }
        }
    }

    /// Cancels the creation of the VM with this name, if there is one, and waits until it has
    /// ended.
    pub(crate) async fn cancel_creation(&self, name: &str) -> Cancellation {
        let found = self.lock().creations.get(name).cloned();
        let Some(creation) = found else {
            return Cancellation::NotBeingCreated;
        };
        creation.cancelled.cancel();
        loop {
            // The wait is registered before the check, so that the end of an operation in between
            // is noticed.
            let mut ended = std::pin::pin!(self.idle.notified());
            ended.as_mut().enable();
            // If a creation of the same name has begun since then, it makes another VM.
            let in_progress = self
                .lock()
                .creations
                .get(name)
                .is_some_and(|now| Arc::ptr_eq(now, &creation));
            if !in_progress {
                return match creation.id.get() {
                    Some(id) => Cancellation::TooLate(id.clone()),
                    None => Cancellation::Undone,
                };
            }
            ended.await;
        }
    }

    /// Sets a VM's status and machine. Returns whether the VM exists; a deleted one is not added
    /// again.
    pub(crate) fn set(
        &self,
        id: &VmId,
        status: VmStatus,
        reason: Option<String>,
        machine: Option<Arc<dyn Machine>>,
    ) -> bool {
        match self.lock().by_id.get_mut(id) {
            Some(entry) => {
                entry.record.status = status;
                entry.record.status_reason = reason;
                entry.machine = machine;
                true
            }
            None => false,
        }
    }

    /// Sets a VM's status, if `machine` is still its machine: otherwise the operation in progress
    /// sets it. Returns whether its status changed.
    pub(crate) fn set_if_current(
        &self,
        id: &VmId,
        machine: &Arc<dyn Machine>,
        status: VmStatus,
        reason: Option<String>,
    ) -> bool {
        let mut table = self.lock();
        let entry = table.by_id.get_mut(id).filter(|entry| {
            let current = entry.machine.as_ref();
            current.is_some_and(|current| Arc::ptr_eq(current, machine))
        });
        let Some(entry) = entry else { return false };
        let changed = entry.record.status != status;
        entry.record.status = status;
        entry.record.status_reason = reason;
        changed
    }

    /// Lists the running VMs with no operation in progress, with their machines.
    pub(crate) fn running(&self) -> Vec<(VmId, Arc<dyn Machine>)> {
        let table = self.lock();
        table
            .running()
            .filter_map(|entry| Some((entry.record.id.clone(), Arc::clone(entry.machine.as_ref()?))))
            .collect()
    }

    /// Lists the VMs of [`Vms::running`] whose disk extends automatically and is below its limit.
    pub(crate) fn extending(&self) -> Vec<(Record, Arc<dyn Machine>)> {
        let table = self.lock();
        let extending = table.running().filter(|entry| {
            let extend = entry.record.auto_extend;
            extend.is_some_and(|extend| entry.record.disk_size.as_u64() < extend.limit_gib)
        });
        extending
            .filter_map(|entry| Some((entry.record.clone(), Arc::clone(entry.machine.as_ref()?))))
            .collect()
    }

    /// Changes a VM's record: its disk size or its settings. A deleted VM is not added again.
    pub(crate) fn change(&self, id: &VmId, change: impl FnOnce(&mut Record)) {
        if let Some(entry) = self.lock().by_id.get_mut(id) {
            change(&mut entry.record);
        }
    }

    /// Removes a VM and frees its name. Dropping the returned guard frees its address and port.
    pub(crate) fn remove(&self, id: &VmId) -> Option<LeaseGuard> {
        let mut table = self.lock();
        let entry = table.by_id.remove(id)?;
        table.names.remove(&entry.record.name);
        Some(LeaseGuard {
            lease: lease(&entry.record),
            vms: self.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Changes under the lock are small and do not panic half-way, so a poisoned table is
        // consistent.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn running(&self) -> impl Iterator<Item = &Entry> {
        self.by_id
            .values()
            .filter(|entry| entry.busy.is_none() && entry.record.status == VmStatus::Running)
    }

    fn find(&self, reference: &str) -> Result<&Entry, ServiceError> {
        self.by_id
            .get(reference)
            .or_else(|| self.by_id.get(self.names.get(reference)?.as_ref()?))
            .ok_or_else(|| not_found(reference))
    }
}

fn not_found(reference: &str) -> ServiceError {
    ServiceError::NotFound(format!("there is no VM {}", quoted(reference)))
}

fn lease(record: &Record) -> Lease {
    Lease {
        guest_ip: record.guest_ip,
        ssh_port: record.ssh_port,
    }
}

/// Limit for drawing a random name. With 300,000 names and ten thousand in use, one draw in thirty
/// collides.
const MAX_NAME_DRAWS: usize = 64;

fn free_name(taken: &HashMap<String, Option<VmId>>) -> Result<String, ServiceError> {
    (0..MAX_NAME_DRAWS)
        .filter_map(|_| petname::petname(3, "-"))
        .find(|name| name.len() <= 63 && !taken.contains_key(name))
        .ok_or_else(|| ServiceError::NotReady("no free random name was found: choose one in the field name".to_owned()))
}

/// Returns whether no other program on the host uses the port. Skips a port that cannot be checked.
fn usable_port(port: u16) -> bool {
    port_is_free_on_host(port).unwrap_or_else(|error| {
        tracing::warn!(port, %error, "cannot check whether a port is free; skipping it");
        false
    })
}

/// A creation in progress.
#[derive(Default)]
struct Creation {
    cancelled: CancellationToken,
    /// The VM's id; set when the VM has been created.
    id: OnceLock<VmId>,
}

/// The result of cancelling a creation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Cancellation {
    /// No VM with this name was being created.
    NotBeingCreated,
    /// The creation was undone completely.
    Undone,
    /// The VM had already been created; this is its id.
    TooLate(VmId),
}

/// A name, an address and a port claimed for a VM that is being created.
#[must_use = "dropping a claim releases its name, address and port"]
pub(crate) struct Claim {
    /// The name.
    pub name: String,
    /// The address and the port.
    pub lease: Lease,
    creation: Arc<Creation>,
    published: bool,
    vms: Vms,
}

impl Claim {
    /// Adds the created VM to the table, where other requests see it.
    pub(crate) fn publish(mut self, record: Record, machine: Option<Arc<dyn Machine>>) {
        self.published = true;
        let _first = self.creation.id.set(record.id.clone());
        let mut table = self.vms.lock();
        table.creations.remove(&self.name);
        table.names.insert(record.name.clone(), Some(record.id.clone()));
        table.by_id.insert(
            record.id.clone(),
            Entry {
                record,
                machine,
                busy: None,
            },
        );
    }

    /// Checks that the creation has not been cancelled.
    ///
    /// # Errors
    /// [`ServiceError::WrongState`] if the VM was deleted while it was being created.
    pub(crate) fn require_not_cancelled(&self) -> Result<(), ServiceError> {
        match self.creation.cancelled.is_cancelled() {
            true => Err(self.cancellation()),
            false => Ok(()),
        }
    }

    /// Waits until the creation is cancelled, and returns its error.
    pub(crate) async fn cancelled(&self) -> ServiceError {
        self.creation.cancelled.cancelled().await;
        self.cancellation()
    }

    fn cancellation(&self) -> ServiceError {
        ServiceError::WrongState(format!("VM {} was deleted while it was being created", self.name))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.published {
            let mut table = self.vms.lock();
            table.names.remove(&self.name);
            table.creations.remove(&self.name);
            table.addresses.release(self.lease);
        }
        self.vms.idle.notify_waiters();
    }
}

/// Keeps the address and port of a deleted VM in use until it is dropped.
#[must_use = "dropping it frees the address and the port"]
pub(crate) struct LeaseGuard {
    lease: Lease,
    vms: Vms,
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        self.vms.lock().addresses.release(self.lease);
    }
}

/// An operation in progress on a VM. Dropping it lets the next one begin.
pub(crate) struct Operation {
    /// The VM's record when the operation began.
    pub record: Record,
    /// The VM's machine when the operation began.
    pub machine: Option<Arc<dyn Machine>>,
    vms: Vms,
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let Some(entry) = self.vms.lock().by_id.get_mut(&self.record.id) {
            entry.busy = None;
        }
        self.vms.idle.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vms() -> Vms {
        Vms::new(&NetConfig::new("scalebox0", "172.16.0.0/24".parse().unwrap(), 22001..=22100).unwrap())
    }

    const ID: &str = "vm-000000000001";

    fn id() -> VmId {
        ID.parse().unwrap()
    }

    fn make(vms: &Vms, name: Option<&str>) -> Result<(), ServiceError> {
        let claim = vms.claim(name)?;
        let record = Record {
            id: id(),
            name: claim.name.clone(),
            guest_ip: claim.lease.guest_ip,
            ssh_port: claim.lease.ssh_port,
            status: VmStatus::Stopped,
            ..crate::state::example_record(1)
        };
        claim.publish(record, None);
        Ok(())
    }

    #[test]
    fn a_name_is_in_use_from_its_claim_until_its_vm_is_deleted() {
        let vms = vms();
        let claim = vms.claim(Some("one")).unwrap();
        assert!(matches!(vms.claim(Some("one")), Err(ServiceError::NameTaken(_))));
        drop(claim);
        make(&vms, Some("one")).unwrap();
        assert!(matches!(vms.claim(Some("one")), Err(ServiceError::NameTaken(_))));
        drop(vms.remove(&id()));
        assert!(vms.claim(Some("one")).is_ok());
    }

    #[test]
    fn a_vm_is_found_by_id_and_by_name() {
        let vms = vms();
        make(&vms, Some("one")).unwrap();
        assert_eq!(vms.find(ID).unwrap(), vms.find("one").unwrap());
        assert!(matches!(vms.find("two"), Err(ServiceError::NotFound(_))));
    }

    #[test]
    fn a_second_operation_is_rejected_with_the_one_in_progress() {
        let vms = vms();
        make(&vms, Some("one")).unwrap();
        let operation = vms.begin("one", "being stopped").unwrap();
        let Err(ServiceError::Busy(message)) = vms.begin(ID, "being deleted") else {
            panic!("two at once")
        };
        assert!(message.contains("VM one is being stopped"), "{message}");
        drop(operation);
        assert!(vms.begin(ID, "being deleted").is_ok());
    }

    #[tokio::test]
    async fn a_waiting_operation_begins_when_the_one_before_ends() {
        let vms = vms();
        make(&vms, None).unwrap();
        let operation = vms.begin(ID, "being started").unwrap();
        let waiting = vms.begin_when_idle(ID, "ending");
        let (_, begun) = tokio::join!(async { drop(operation) }, waiting);
        assert!(begun.is_ok());
        drop(vms.remove(&id()));
        assert!(matches!(
            vms.begin_when_idle(ID, "ending").await,
            Err(ServiceError::NotFound(_))
        ));
    }

    #[test]
    fn generated_names_have_three_words_and_are_unique() {
        let vms = vms();
        let claims: Vec<_> = (0..90).map(|_| vms.claim(None).unwrap()).collect();
        let names: std::collections::HashSet<_> = claims.iter().map(|claim| claim.name.clone()).collect();
        assert_eq!(names.len(), claims.len());
        for name in names {
            assert_eq!(name.split('-').count(), 3, "{name}");
            assert!(name.parse::<scalebox_api::VmName>().is_ok(), "{name}");
        }
    }

    #[test]
    fn enough_names_exist_and_every_word_is_valid_in_a_name() {
        let words = petname::Petnames::default();
        assert!(words.cardinality(3) >= 300_000, "{}", words.cardinality(3));
        for list in [&words.adverbs, &words.adjectives, &words.nouns] {
            assert!(
                list.iter()
                    .all(|word| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase()))
            );
        }
    }
}

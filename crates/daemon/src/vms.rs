//! The VMs in memory: what each is known to do, which operation is under way on it, and which
//! names, addresses and ports are taken.
//!
//! One std mutex guards the table; it is held for look-ups and small changes, never across an
//! await, nor for longer than it takes to ask the kernel whether a port is free.

use crate::error::{ServiceError, quoted};
use crate::state::Record;
use scalebox_client::VmStatus;
use scalebox_net::{Addresses, Lease, NetConfig, port_is_free_on_host};
use scalebox_vmm::Machine;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// The table of VMs. Cloning gives another handle on the same table.
#[derive(Clone)]
pub struct Vms {
    table: Arc<Mutex<Table>>,
    /// Told whenever an operation ends.
    idle: Arc<Notify>,
}

struct Table {
    by_id: BTreeMap<String, Entry>,
    /// Names of VMs, those being made included.
    names: HashSet<String>,
    /// Those being made, by name; the flag says that one was deleted meanwhile.
    making: HashMap<String, Arc<Making>>,
    addresses: Addresses,
}

struct Entry {
    record: Record,
    machine: Option<Arc<dyn Machine>>,
    /// What is under way on it: one operation at a time.
    busy: Option<&'static str>,
}

impl Vms {
    /// An empty table.
    pub fn new(network: &NetConfig) -> Vms {
        let table = Table {
            by_id: BTreeMap::new(),
            names: HashSet::new(),
            making: HashMap::new(),
            addresses: Addresses::new(network),
        };
        Vms {
            table: Arc::new(Mutex::new(table)),
            idle: Arc::default(),
        }
    }

    /// Takes a name, an address and a port for a VM that is being made. They are free again when
    /// the claim is dropped before [`Claim::publish`].
    ///
    /// # Errors
    /// [`ServiceError::NameTaken`] when the name asked for is taken; [`ServiceError::NotReady`]
    /// when nothing is free.
    pub fn claim(&self, name: Option<&str>) -> Result<Claim, ServiceError> {
        let mut table = self.lock();
        let name = match name {
            Some(name) if table.names.contains(name) => {
                return Err(ServiceError::NameTaken(format!(
                    "name {name} is taken by another VM: choose another, or none to be given one"
                )));
            }
            Some(name) => name.to_owned(),
            None => free_name(&table.names)?,
        };
        let lease = table
            .addresses
            .claim(usable_port)
            .map_err(|error| ServiceError::NotReady(error.to_string()))?;
        table.names.insert(name.clone());
        let making = Arc::new(Making::default());
        table.making.insert(name.clone(), Arc::clone(&making));
        Ok(Claim {
            name,
            lease,
            making,
            published: false,
            vms: self.clone(),
        })
    }

    /// Enters a VM of the state file, at start.
    pub fn restore(&self, record: Record, machine: Option<Arc<dyn Machine>>) {
        let mut table = self.lock();
        table.names.insert(record.name.clone());
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

    /// All VMs, oldest first.
    pub fn all(&self) -> Vec<Record> {
        let mut records: Vec<_> = self.lock().by_id.values().map(|entry| entry.record.clone()).collect();
        records.sort_by(|a, b| (&a.created_at, &a.id).cmp(&(&b.created_at, &b.id)));
        records
    }

    /// How many were made from a template.
    pub fn made_from(&self, template: &str) -> u64 {
        let table = self.lock();
        table
            .by_id
            .values()
            .filter(|entry| entry.record.template == template)
            .count() as u64
    }

    /// The statuses alone, for counting.
    pub fn statuses(&self) -> Vec<VmStatus> {
        self.lock().by_id.values().map(|entry| entry.record.status).collect()
    }

    /// The VM with that id or name.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub fn find(&self, reference: &str) -> Result<Record, ServiceError> {
        self.lock().find(reference).map(|entry| entry.record.clone())
    }

    /// The VM with that id or name, and its machine.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub fn find_with_machine(&self, reference: &str) -> Result<(Record, Option<Arc<dyn Machine>>), ServiceError> {
        let table = self.lock();
        let entry = table.find(reference)?;
        Ok((entry.record.clone(), entry.machine.clone()))
    }

    /// Begins an operation on the VM with that id or name; no other can begin until the guard is
    /// dropped.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; [`ServiceError::Busy`], with what is under way.
    pub fn begin(&self, reference: &str, operation: &'static str) -> Result<Operation, ServiceError> {
        let mut table = self.lock();
        let id = table.find(reference)?.record.id.clone();
        let entry = table.by_id.get_mut(&id).ok_or_else(|| not_found(reference))?;
        if let Some(under_way) = entry.busy {
            let name = &entry.record.name;
            return Err(ServiceError::Busy(format!(
                "VM {name} is {under_way}: try again when that is done"
            )));
        }
        entry.busy = Some(operation);
        Ok(Operation {
            record: entry.record.clone(),
            machine: entry.machine.clone(),
            vms: self.clone(),
        })
    }

    /// As [`Vms::begin`], after whatever is under way on the VM has ended.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn begin_when_idle(&self, reference: &str, operation: &'static str) -> Result<Operation, ServiceError> {
        loop {
            // Registered before looking, so that an end between the two is not missed.
            let mut ended = std::pin::pin!(self.idle.notified());
            ended.as_mut().enable();
            match self.begin(reference, operation) {
                Err(ServiceError::Busy(_)) => ended.await,
                other => return other,
            }
        }
    }

    /// Calls the creation of the VM of that name off, if there is one, and waits until it has
    /// ended.
    pub async fn call_off(&self, name: &str) -> CalledOff {
        let called = self.lock().making.get(name).cloned();
        let Some(called) = called else {
            return CalledOff::NotBeingMade;
        };
        called.called_off.store(true, Ordering::Relaxed);
        loop {
            // Registered before looking, so that an end between the two is not missed.
            let mut ended = std::pin::pin!(self.idle.notified());
            ended.as_mut().enable();
            // One of the same name that began since is another VM.
            let making = self
                .lock()
                .making
                .get(name)
                .is_some_and(|now| Arc::ptr_eq(now, &called));
            if !making {
                return match called.id.get() {
                    Some(id) => CalledOff::TooLate(id.clone()),
                    None => CalledOff::Undone,
                };
            }
            ended.await;
        }
    }

    /// Notes what a VM does now, and with which machine. One that is gone is not made anew; returns
    /// whether it was there.
    pub fn set(&self, id: &str, status: VmStatus, reason: Option<String>, machine: Option<Arc<dyn Machine>>) -> bool {
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

    /// Notes what a VM does now, if `machine` is still the one it has: an operation under way knows
    /// better. Returns the VM if that is news.
    pub fn note(&self, id: &str, machine: &Arc<dyn Machine>, status: VmStatus, reason: Option<&str>) -> Option<Record> {
        if let Some(entry) = self.lock().by_id.get_mut(id)
            && entry
                .machine
                .as_ref()
                .is_some_and(|current| Arc::ptr_eq(current, machine))
        {
            let news = entry.record.status != status;
            entry.record.status = status;
            entry.record.status_reason = reason.map(str::to_owned);
            return news.then(|| entry.record.clone());
        }
        None
    }

    /// The VMs that run and have nothing under way, with their machines.
    pub fn running(&self) -> Vec<(String, Arc<dyn Machine>)> {
        let table = self.lock();
        table
            .running()
            .filter_map(|entry| Some((entry.record.id.clone(), Arc::clone(entry.machine.as_ref()?))))
            .collect()
    }

    /// The VMs among them whose disks extend themselves and are not as large as they may become.
    pub fn extending(&self) -> Vec<(Record, Arc<dyn Machine>)> {
        let table = self.lock();
        let extending = table.running().filter(|entry| {
            let extend = entry.record.auto_extend;
            extend.is_some_and(|extend| entry.record.disk_size_gib < extend.limit_gib)
        });
        extending
            .filter_map(|entry| Some((entry.record.clone(), Arc::clone(entry.machine.as_ref()?))))
            .collect()
    }

    /// Notes what else has changed of a VM: its disk, its settings. One that is gone is not made
    /// anew.
    pub fn change(&self, id: &str, change: impl FnOnce(&mut Record)) {
        if let Some(entry) = self.lock().by_id.get_mut(id) {
            change(&mut entry.record);
        }
    }

    /// Removes a VM. Its name is free again; its address and port are when the returned guard is
    /// dropped.
    pub fn remove(&self, id: &str) -> Option<Vacated> {
        let mut table = self.lock();
        let entry = table.by_id.remove(id)?;
        table.names.remove(&entry.record.name);
        Some(Vacated {
            lease: lease(&entry.record),
            vms: self.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Every change under the lock is small and does not panic half-way.
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
            .or_else(|| self.by_id.values().find(|entry| entry.record.name == reference))
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

/// How often a random name is drawn before giving up: with 300,000 names and ten thousand taken,
/// one draw in thirty collides.
const DRAWS: usize = 64;

fn free_name(taken: &HashSet<String>) -> Result<String, ServiceError> {
    (0..DRAWS)
        .filter_map(|_| petname::petname(3, "-"))
        .find(|name| name.len() <= 63 && !taken.contains(name))
        .ok_or_else(|| ServiceError::NotReady("no free name was found: choose one with the field name".to_owned()))
}

/// Whether no other program of the host listens on the port. One that cannot be asked about is
/// skipped.
fn usable_port(port: u16) -> bool {
    port_is_free_on_host(port).unwrap_or_else(|error| {
        tracing::warn!(port, %error, "a port is skipped");
        false
    })
}

/// A creation under way.
#[derive(Default)]
struct Making {
    called_off: AtomicBool,
    /// Once the VM stands.
    id: OnceLock<String>,
}

/// What came of calling a creation off.
#[derive(Debug, PartialEq, Eq)]
pub enum CalledOff {
    /// There was none to call off.
    NotBeingMade,
    /// Nothing is left of it.
    Undone,
    /// The VM of that id stands.
    TooLate(String),
}

/// A name, an address and a port, held for a VM that is being made.
#[must_use = "dropping a claim gives its name, address and port back"]
pub struct Claim {
    /// The name.
    pub name: String,
    /// The address and the port.
    pub lease: Lease,
    making: Arc<Making>,
    published: bool,
    vms: Vms,
}

impl Claim {
    /// The VM stands: from now on others see it.
    pub fn publish(mut self, record: Record, machine: Option<Arc<dyn Machine>>) {
        self.published = true;
        let _first = self.making.id.set(record.id.clone());
        let mut table = self.vms.lock();
        table.making.remove(&self.name);
        table.by_id.insert(
            record.id.clone(),
            Entry {
                record,
                machine,
                busy: None,
            },
        );
    }

    /// Whether the VM is still wanted.
    ///
    /// # Errors
    /// [`ServiceError::WrongState`] when it was deleted while it was being made.
    pub fn still_wanted(&self) -> Result<(), ServiceError> {
        if self.making.called_off.load(Ordering::Relaxed) {
            let name = &self.name;
            return Err(ServiceError::WrongState(format!(
                "VM {name} was deleted while it was being made"
            )));
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.published {
            let mut table = self.vms.lock();
            table.names.remove(&self.name);
            table.making.remove(&self.name);
            table.addresses.release(self.lease);
        }
        self.vms.idle.notify_waiters();
    }
}

/// The address and port of a VM that was removed. Dropped, they can be given to another.
#[must_use = "dropping it frees the address and the port"]
pub struct Vacated {
    lease: Lease,
    vms: Vms,
}

impl Drop for Vacated {
    fn drop(&mut self) {
        self.vms.lock().addresses.release(self.lease);
    }
}

/// An operation under way on a VM; dropped, the next may begin.
pub struct Operation {
    /// The VM as it stood when the operation began.
    pub record: Record,
    /// Its machine at that time.
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

    fn make(vms: &Vms, id: &str, name: Option<&str>) -> Result<(), ServiceError> {
        let claim = vms.claim(name)?;
        let record = Record {
            id: id.into(),
            name: claim.name.clone(),
            template: "debian-base".into(),
            ssh_public_key: String::new(),
            created_at: id.into(),
            vcpu_count: 1,
            mem_size_mib: 512,
            disk_size_gib: 2,
            auto_extend: None,
            limits: crate::state::VmLimits::default(),
            autostart: true,
            vmm: None,
            guest_ip: claim.lease.guest_ip,
            ssh_port: claim.lease.ssh_port,
            status: VmStatus::Stopped,
            status_reason: None,
        };
        claim.publish(record, None);
        Ok(())
    }

    #[test]
    fn a_name_is_taken_from_its_claim_to_its_vm_s_end() {
        let vms = vms();
        let claim = vms.claim(Some("one")).unwrap();
        assert!(matches!(vms.claim(Some("one")), Err(ServiceError::NameTaken(_))));
        drop(claim);
        make(&vms, "vm-1", Some("one")).unwrap();
        assert!(matches!(vms.claim(Some("one")), Err(ServiceError::NameTaken(_))));
        drop(vms.remove("vm-1"));
        assert!(vms.claim(Some("one")).is_ok());
    }

    #[test]
    fn a_vm_is_found_by_id_and_by_name() {
        let vms = vms();
        make(&vms, "vm-1", Some("one")).unwrap();
        assert_eq!(vms.find("vm-1").unwrap(), vms.find("one").unwrap());
        assert!(matches!(vms.find("two"), Err(ServiceError::NotFound(_))));
    }

    #[test]
    fn one_operation_at_a_time_and_the_refusal_says_what_is_under_way() {
        let vms = vms();
        make(&vms, "vm-1", Some("one")).unwrap();
        let operation = vms.begin("one", "being stopped").unwrap();
        let Err(ServiceError::Busy(message)) = vms.begin("vm-1", "being deleted") else {
            panic!("two at once")
        };
        assert!(message.contains("VM one is being stopped"), "{message}");
        drop(operation);
        assert!(vms.begin("vm-1", "being deleted").is_ok());
    }

    #[tokio::test]
    async fn who_waits_for_a_vm_begins_when_the_operation_before_ends() {
        let vms = vms();
        make(&vms, "vm-1", None).unwrap();
        let operation = vms.begin("vm-1", "being started").unwrap();
        let waiting = vms.begin_when_idle("vm-1", "ending");
        let (_, begun) = tokio::join!(async { drop(operation) }, waiting);
        assert!(begun.is_ok());
        drop(vms.remove("vm-1"));
        assert!(matches!(
            vms.begin_when_idle("vm-1", "ending").await,
            Err(ServiceError::NotFound(_))
        ));
    }

    #[test]
    fn names_given_are_three_words_and_never_twice() {
        let vms = vms();
        let claims: Vec<_> = (0..90).map(|_| vms.claim(None).unwrap()).collect();
        let names: HashSet<_> = claims.iter().map(|claim| claim.name.clone()).collect();
        assert_eq!(names.len(), claims.len());
        for name in names {
            assert_eq!(name.split('-').count(), 3, "{name}");
            assert!(name.parse::<scalebox_client::VmName>().is_ok(), "{name}");
        }
    }

    #[test]
    fn there_are_names_enough_and_each_word_can_stand_in_one() {
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

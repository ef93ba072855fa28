//! The simulated driver: launch, adopt, force stop.

use crate::sim_vmm::body::{Body, Holding};
use crate::sim_vmm::control::SimMachine;
use crate::sim_vmm::faults::{Operation, hang};
use crate::sim_vmm::guest::SimGuest;
use crate::sim_vmm::machine::Handle;
use crate::sim_vmm::next_call::NextCall;
use crate::sim_vmm::world::World;
use async_trait::async_trait;
use scalebox_units::VmId;
use scalebox_vmm::{Error, ExitReason, Machine, MachineSpec, Result, Vmm};
use std::path::Path;
use std::sync::Arc;

/// A simulated hypervisor. Clones drive the same machines.
#[derive(Clone)]
pub struct SimVmm {
    world: Arc<World>,
    name: &'static str,
}

impl Default for SimVmm {
    fn default() -> SimVmm {
        SimVmm::new()
    }
}

impl SimVmm {
    /// Creates a driver on a host without machines.
    pub fn new() -> SimVmm {
        SimVmm {
            world: Arc::default(),
            name: "qemu",
        }
    }

    /// Returns another driver on the same host. Neither adopts the machines of the other.
    #[must_use]
    pub fn with_name(&self, name: &'static str) -> SimVmm {
        SimVmm {
            world: self.world.clone(),
            name,
        }
    }

    /// Ends the daemon, as a crash does, and returns the driver of the next one. All machines keep
    /// running, without a holder.
    ///
    /// Handles of the ended daemon do nothing any more: their calls never return, and they receive
    /// no events.
    #[must_use]
    pub fn restart(&self) -> SimVmm {
        for body in self.world.lock().machines.values() {
            body.lock().holder = None;
        }
        self.clone()
    }

    /// Returns the handle with which a test controls a machine.
    ///
    /// # Panics
    /// If the machine does not exist.
    #[allow(clippy::panic, reason = "a test that asks for a missing machine fails")]
    pub fn machine(&self, id: &VmId) -> SimMachine {
        self.find(id).unwrap_or_else(|| panic!("{id} does not exist"))
    }

    /// Returns the handle of [`SimVmm::machine`], if the machine exists. A machine that has ended
    /// does not exist, unless its guest powered off while the machine had no holder.
    pub fn find(&self, id: &VmId) -> Option<SimMachine> {
        let body = self.world.lock().machines.get(id)?.clone();
        Some(SimMachine {
            world: self.world.clone(),
            body,
        })
    }

    /// Returns the ids of all machines.
    pub fn machines(&self) -> Vec<VmId> {
        self.world.lock().machines.keys().cloned().collect()
    }

    /// Sets the outcome of the next call of `operation`, for any machine.
    pub fn next(&self, operation: Operation) -> NextCall {
        NextCall {
            world: self.world.clone(),
            machine: None,
            operation,
        }
    }

    /// Changes the settings of guests that are launched from now on.
    pub fn set_guest(&self, change: impl FnOnce(&mut SimGuest)) {
        change(&mut self.world.lock().guest);
    }

    /// Sets whether discards reach the disks' files.
    pub fn set_supports_discard(&self, supports: bool) {
        self.world.lock().supports_discard = supports;
    }

    /// Sets whether the hypervisor's program is installed.
    pub fn set_can_launch(&self, can_launch: bool) {
        self.world.lock().can_launch = can_launch;
    }

    fn handle(&self, body: Arc<Body>, holding: Arc<Holding>) -> Arc<dyn Machine> {
        Arc::new(Handle {
            world: self.world.clone(),
            body,
            holding,
        })
    }

    fn body(&self, id: &VmId) -> Option<Arc<Body>> {
        self.world.lock().machines.get(id).cloned()
    }
}

/// Prevents a second launch of the same machine.
struct Launching<'a> {
    world: &'a World,
    id: &'a VmId,
}

impl<'a> Launching<'a> {
    fn begin(world: &'a World, id: &'a VmId) -> Result<Launching<'a>> {
        let mut state = world.lock();
        let running = state.machines.get(id).map(|body| body.pid);
        if running.is_some() || !state.launching.insert(id.clone()) {
            return Err(Error::Running {
                id: id.clone(),
                pid: running,
            });
        }
        Ok(Launching { world, id })
    }
}

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        self.world.lock().launching.remove(self.id);
    }
}

#[async_trait]
impl Vmm for SimVmm {
    fn name(&self) -> &'static str {
        self.name
    }

    fn max_vcpus(&self) -> u32 {
        288
    }

    fn can_launch(&self) -> bool {
        self.world.lock().can_launch
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        if !self.can_launch() {
            return Err(Error::NotInstalled {
                program: self.name,
                package: "sim",
            });
        }
        spec.check()?;
        let launching = Launching::begin(&self.world, &spec.id)?;
        self.world.fault(&spec.id, Operation::Launch).await?;
        let holding = Holding::new();
        let body = {
            let mut state = self.world.lock();
            let (pid, guest) = (state.next_pid(), state.guest.clone());
            let body = Body::new(spec.clone(), pid, self.name, guest, holding.clone());
            state.machines.insert(spec.id.clone(), body.clone());
            body
        };
        drop(launching);
        World::boot(&body);
        Ok(self.handle(body, holding))
    }

    async fn adopt(&self, id: &VmId, _run_dir: &Path) -> Result<Option<Arc<dyn Machine>>> {
        self.world.fault(id, Operation::Adopt).await?;
        let Some(body) = self.body(id) else { return Ok(None) };
        if body.driver != self.name {
            return Err(Error::Foreign {
                id: id.clone(),
                program: body.driver.to_owned(),
            });
        }
        let holding = Holding::new();
        let is_hung = {
            let mut inside = body.lock();
            if inside.holder.is_some() {
                return Err(Error::Running {
                    id: id.clone(),
                    pid: Some(body.pid),
                });
            }
            if !inside.is_hung {
                inside.holder = Some(holding.clone());
            }
            inside.is_hung
        };
        if is_hung {
            return Err(hang(id, Operation::Adopt).await);
        }
        let ended = body.lock().exit_reason();
        if let Some(reason) = ended {
            holding.ended.send_replace(Some(reason));
            self.world.lock().machines.remove(id);
        }
        Ok(Some(self.handle(body, holding)))
    }

    async fn force_stop(&self, id: &VmId, _run_dir: &Path) -> Result<bool> {
        self.world.fault(id, Operation::ForceStop).await?;
        let Some(body) = self.body(id) else { return Ok(false) };
        if body.lock().holder.is_some() {
            return Err(Error::Running {
                id: id.clone(),
                pid: Some(body.pid),
            });
        }
        self.world.end(&body, ExitReason::Killed);
        self.world.lock().machines.remove(id);
        Ok(true)
    }
}

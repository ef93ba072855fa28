//! The handle to a simulated machine, as the daemon sees it.

use crate::sim_vmm::body::{Body, Holding};
use crate::sim_vmm::faults::{Operation, hang};
use crate::sim_vmm::world::World;
use crate::sim_vmm::{agent, qga};
use async_trait::async_trait;
use scalebox_units::{Bytes, VmId};
use scalebox_vmm::{Channel, DiskLimits, Error, ExitReason, Machine, MachineEvent, MachineState, Result};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::broadcast;
use tokio::time::{sleep, timeout};

/// Interval between shutdown requests.
const SHUTDOWN_INTERVAL: Duration = Duration::from_secs(2);

pub(crate) struct Handle {
    pub(crate) world: Arc<World>,
    pub(crate) body: Arc<Body>,
    pub(crate) holding: Arc<Holding>,
}

impl Handle {
    /// Applies the fault that the test has set for the call. Waits forever if the daemon of this
    /// handle has ended.
    async fn begin(&self, operation: Operation) -> Result<()> {
        self.unless_released().await;
        self.world.fault(self.id(), operation).await?;
        self.unless_released().await;
        Ok(())
    }

    async fn unless_released(&self) {
        let is_holder = |holder: &Arc<Holding>| Arc::ptr_eq(holder, &self.holding);
        if !self.body.lock().holder.as_ref().is_some_and(is_holder) {
            std::future::pending::<()>().await;
        }
    }

    /// Begins a command that the hypervisor has to respond to.
    async fn begin_command(&self, operation: Operation) -> Result<()> {
        self.check_running()?;
        self.begin(operation).await?;
        if self.body.lock().is_hung {
            return Err(hang(self.id(), operation).await);
        }
        self.check_running()
    }

    fn check_running(&self) -> Result<()> {
        match self.body.lock().exit_reason() {
            Some(reason) => Err(Error::Ended {
                id: self.id().clone(),
                reason,
            }),
            None => Ok(()),
        }
    }

    /// Requests a shutdown. A hypervisor that hangs does not pass the request on.
    fn request_shutdown(&self) {
        if !self.body.lock().is_hung {
            self.world.request_shutdown(&self.body);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut inside = self.body.lock();
        if inside
            .holder
            .as_ref()
            .is_some_and(|holder| Arc::ptr_eq(holder, &self.holding))
        {
            inside.holder = None;
        }
    }
}

#[async_trait]
impl Machine for Handle {
    fn id(&self) -> &VmId {
        &self.body.spec.id
    }

    fn pid(&self) -> i32 {
        self.body.pid
    }

    async fn state(&self) -> Result<MachineState> {
        match self.begin_command(Operation::State).await {
            Ok(()) => Ok(self.body.lock().state.clone()),
            Err(Error::Ended { reason, .. }) => Ok(MachineState::Ended(reason)),
            Err(error) => Err(error),
        }
    }

    async fn pause(&self) -> Result<()> {
        self.begin_command(Operation::Pause).await?;
        self.body.lock().pause();
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        self.begin_command(Operation::Resume).await?;
        self.body.lock().resume();
        Ok(())
    }

    async fn resize_root(&self, size: Bytes) -> Result<()> {
        self.begin_command(Operation::ResizeRoot).await?;
        self.body.grow(size)
    }

    fn supports_discard(&self) -> bool {
        self.world.lock().supports_discard
    }

    async fn limit_disk(&self, limits: DiskLimits) -> Result<()> {
        self.begin_command(Operation::LimitDisk).await?;
        self.body.lock().limits = limits;
        Ok(())
    }

    async fn stop(&self, grace: Duration) -> Result<ExitReason> {
        self.begin(Operation::Stop).await?;
        if !self.body.lock().is_hung {
            self.body.lock().resume();
        }
        let requests = async {
            loop {
                self.request_shutdown();
                sleep(SHUTDOWN_INTERVAL).await;
            }
        };
        let ended = async {
            tokio::select! {
                biased;
                reason = self.exited() => reason,
                never = requests => never,
            }
        };
        match timeout(grace, ended).await {
            Ok(reason) => Ok(reason),
            Err(_) => self.kill().await,
        }
    }

    async fn kill(&self) -> Result<ExitReason> {
        self.begin(Operation::Kill).await?;
        self.world.end(&self.body, ExitReason::Killed);
        Ok(self.exited().await)
    }

    async fn exited(&self) -> ExitReason {
        let mut ended = self.holding.ended.subscribe();
        let reason = ended.wait_for(Option::is_some).await;
        // The handle keeps the sender alive.
        reason
            .ok()
            .and_then(|reason| reason.clone())
            .unwrap_or(ExitReason::Unknown)
    }

    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.holding.events.subscribe()
    }

    async fn channel(&self, channel: Channel) -> Result<UnixStream> {
        let connected = match channel {
            Channel::Qga => {
                self.begin(Operation::Qga).await?;
                qga::connect(&self.world, &self.body)
            }
            Channel::Agent => {
                self.begin(Operation::Agent).await?;
                agent::connect(&self.world, &self.body)
            }
        };
        connected.map_err(|error| Error::Agent {
            id: self.id().clone(),
            why: error.to_string(),
        })
    }
}

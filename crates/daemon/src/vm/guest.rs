//! Reaches the agent of a running VM's guest.

use crate::host::Host;
use crate::host::agent_link::Agent;
use crate::host::error::ServiceError;
use crate::host::guest_requests::GuestRequest;
use crate::state::Record;
use scalebox_api::{AgentInfo, VmStats, VmStatus};
use scalebox_guest::AgentError;
use scalebox_vmm::Machine;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// Pause between two attempts to reach the agent of a guest that boots.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum length of an agent's version in a response, in characters.
const MAX_VERSION: usize = 64;

/// A running VM whose agent responds, for one request.
pub(crate) struct Guest {
    /// The daemon.
    pub(crate) host: Host,
    /// The VM, at the start of the request.
    pub(crate) record: Record,
    /// The connection to its agent.
    pub(crate) agent: Agent,
    _request: GuestRequest,
}

/// Connects to the agent of a VM.
///
/// # Errors
/// 404; 409 if the VM is not running; 503 if its agent does not respond, or at a limit.
pub(crate) async fn reach(host: &Host, reference: &str) -> Result<Guest, ServiceError> {
    let (record, machine) = running(host, reference)?;
    let request = host.guest_requests.begin(&record.id, &record.name)?;
    let agent = host.agents.reach(&machine).await;
    let agent = agent.map_err(|error| ServiceError::of_agent(&record.name, &error))?;
    Ok(Guest {
        host: host.clone(),
        record,
        agent,
        _request: request,
    })
}

/// Finds a running VM and its machine.
fn running(host: &Host, reference: &str) -> Result<(Record, Arc<dyn Machine>), ServiceError> {
    let (record, machine) = host.vms.find_with_machine(reference)?;
    match (record.status, machine) {
        (VmStatus::Running, Some(machine)) => Ok((record, machine)),
        _ => Err(ServiceError::WrongState(format!(
            "VM {} is {}: its agent responds only while it runs",
            record.name, record.status
        ))),
    }
}

impl Guest {
    /// Returns the error of a request to the agent.
    pub(crate) fn failed(&self, error: &AgentError) -> ServiceError {
        ServiceError::of_agent(&self.record.name, error)
    }

    /// Connects again, after the connection has ended.
    ///
    /// # Errors
    /// Those of [`reach`], except for limits: the request is counted already.
    pub(crate) async fn reconnect(&mut self) -> Result<(), ServiceError> {
        let (_, machine) = running(&self.host, self.record.id.as_str())?;
        let agent = self.host.agents.reach(&machine).await;
        self.agent = agent.map_err(|error| self.failed(&error))?;
        Ok(())
    }
}

/// Waits until the agent of a VM that was just created responds.
///
/// # Errors
/// 504 after `within`; 409 if the VM ends before. The VM is kept.
pub(crate) async fn wait_for_agent(host: &Host, id: &str, within: Duration) -> Result<(), ServiceError> {
    let deadline = Instant::now() + within;
    let response = async {
        loop {
            let (record, machine) = running(host, id)?;
            match host.agents.reach(&machine).await {
                Ok(_agent) => return Ok(()),
                Err(error) => tracing::trace!(vm = %record.id, %error, "the guest is still booting"),
            }
            sleep(RETRY_INTERVAL).await;
        }
    };
    match timeout_at(deadline, response).await {
        Ok(responds) => responds,
        Err(_) => {
            let record = host.vms.find(id)?;
            Err(ServiceError::GuestTimeout {
                message: format!(
                    "VM {}: its agent does not respond after {} s; the VM is kept",
                    record.name,
                    within.as_secs()
                ),
                details: json!({ "id": record.id.as_str(), "name": record.name }),
            })
        }
    }
}

/// Returns load and memory of a guest, as its agent reports them.
///
/// # Errors
/// 404, 409, 503.
pub(crate) async fn stats(host: &Host, reference: &str) -> Result<VmStats, ServiceError> {
    let guest = reach(host, reference).await?;
    let (stats, info) = tokio::join!(guest.agent.stats(), guest.agent.info());
    let stats = stats.map_err(|error| guest.failed(&error))?;
    let info = info.map_err(|error| guest.failed(&error))?;
    let printable = |char: &char| !char.is_control();
    Ok(VmStats {
        uptime_seconds: stats.uptime_seconds,
        load: stats.load,
        cpu_busy_ms: stats.cpu_busy_ms,
        memory_total_bytes: stats.memory_total,
        memory_available_bytes: stats.memory_available,
        agent_memory_bytes: stats.agent_memory,
        root_total_bytes: stats.root_total,
        root_used_bytes: stats.root_used,
        processes: stats.processes,
        network_received_bytes: stats.network_received,
        network_sent_bytes: stats.network_sent,
        execs: stats.execs,
        agent: AgentInfo {
            version: info.version.chars().filter(printable).take(MAX_VERSION).collect(),
            init: match info.init {
                scalebox_agent_api::InitKind::System => "system",
                scalebox_agent_api::InitKind::Agent => "agent",
            }
            .to_owned(),
        },
    })
}

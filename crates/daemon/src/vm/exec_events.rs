//! The events of commands: `exec_started` and `exec_ended`.
//!
//! A stream that follows a command receives its end. For all other commands of a VM, one task
//! queries the agent, until there are none.

use crate::host::Host;
use crate::state::Record;
use scalebox_agent_api::ExecEnd;
use scalebox_api::{EventKind, Signal, VmStatus};
use scalebox_units::{ExecId, VmId};
use serde_json::json;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Interval at which the agent is queried for the ends of commands. Longer if the agent responds
/// slowly.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);
/// The agent spends at most one of this many seconds on the responses.
const SHARE: u32 = 20;
/// Maximum length of the name of a program in an event, in characters.
const MAX_PROGRAM: usize = 200;

/// Publishes that a request started a command, and watches for its end.
pub(crate) fn started(host: &Host, vm: &Record, exec: &ExecId, argv: &[String]) {
    let start = host.execs.start(&vm.id, exec);
    if start.publish {
        let program: String = argv
            .iter()
            .take(1)
            .flat_map(|name| name.chars())
            .take(MAX_PROGRAM)
            .collect();
        let details = json!({ "exec": exec.as_str(), "program": program });
        host.events.publish(EventKind::ExecStarted, Some(vm), details);
    }
    if start.watch {
        tokio::spawn(watch(host.clone(), vm.clone()));
    }
}

/// Publishes the end of a command, once. `end` is `None` if the guest no longer has the result.
pub(crate) fn ended(host: &Host, vm: &Record, exec: &ExecId, end: Option<ExecEnd>) {
    if host.execs.end(&vm.id, exec) {
        let signal = end.and_then(|end| end.signal).and_then(Signal::new);
        let details = json!({
            "exec": exec.as_str(),
            "exit_code": end.and_then(|end| end.exit_code),
            "signal": signal.map(|signal| signal.to_string()),
        });
        host.events.publish(EventKind::ExecEnded, Some(vm), details);
    }
}

/// Publishes the ends of a VM's commands that no stream follows, until there are none or the VM has
/// ended.
async fn watch(host: Host, vm: Record) {
    let mut pause = WATCH_INTERVAL;
    loop {
        tokio::select! {
            () = sleep(pause) => {}
            () = host.closing.cancelled() => return,
        }
        let Some(unattended) = host.execs.unattended(&vm.id) else {
            return;
        };
        if !runs(&host, &vm.id) {
            // The commands have ended with their VM; the VM's own event reports that.
            host.execs.forget(&vm.id);
            return;
        }
        let begun = Instant::now();
        if !unattended.is_empty() {
            ask(&host, &vm, unattended).await;
        }
        pause = WATCH_INTERVAL.max(begun.elapsed() * SHARE);
    }
}

fn runs(host: &Host, vm: &VmId) -> bool {
    let found = host.vms.find(vm.as_str());
    found.is_ok_and(|record| matches!(record.status, VmStatus::Running | VmStatus::Paused))
}

async fn ask(host: &Host, vm: &Record, unattended: Vec<ExecId>) {
    let Ok((_, Some(machine))) = host.vms.find_with_machine(vm.id.as_str()) else {
        return;
    };
    let listed = match host.agents.reach(&machine).await {
        Ok(agent) => agent.execs().await,
        Err(error) => Err(error),
    };
    let listed = match listed {
        Ok(listed) => listed,
        Err(error) => {
            tracing::debug!(vm = %vm.id, %error, "cannot query the ends of commands; retrying");
            return;
        }
    };
    for exec in unattended {
        match listed.iter().find(|status| status.id == exec.as_str()) {
            Some(status) if status.end.is_none() => {}
            Some(status) => ended(host, vm, &exec, status.end),
            // Forgotten by the agent, or the guest has rebooted.
            None => ended(host, vm, &exec, None),
        }
    }
}

//! Decides the status of a VM at the daemon's start. The decision is a pure function.

use scalebox_api::VmStatus;

/// The observations about one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Observed {
    /// The recorded status.
    pub status: VmStatus,
    /// `true` if a stop was recorded and not completed.
    pub stopping: bool,
    /// The state of the VM's machine.
    pub machine: Found,
    /// `true` if the VM's disk is missing from the pool.
    pub disk_missing: bool,
    /// `true` if the host was rebooted since the VMs were last started.
    pub rebooted: bool,
    /// `true` if the VM is started after a reboot of the host.
    pub autostart: bool,
}

/// The state in which a VM's machine was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// The machine was adopted.
    Adopted,
    /// The process may exist, but could not be adopted. Holds the cause and the remedy.
    Unreachable(String),
    /// There is no machine.
    Nothing,
}

/// The decision about a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The VM runs.
    Run,
    /// The VM runs, and the stop that a crash interrupted is completed.
    CompleteStop,
    /// The VM is started as soon as the daemon serves requests.
    StartAfterReboot,
    /// The VM has stopped.
    Stop {
        /// The reason, if it was not a request.
        reason: Option<&'static str>,
    },
    /// The VM has failed.
    Fail {
        /// The cause.
        reason: &'static str,
    },
    /// The machine may run; the next start tries to adopt it again.
    Unreachable {
        /// The cause and the remedy.
        reason: String,
    },
    /// The VM stays as recorded.
    Keep,
}

/// Decides the status of a VM.
pub(super) fn decide(observed: &Observed) -> Verdict {
    let was_running = matches!(observed.status, VmStatus::Running | VmStatus::Paused);
    if observed.disk_missing {
        return Verdict::Fail {
            reason: "the VM's disk is missing from the pool",
        };
    }
    match &observed.machine {
        Found::Adopted if observed.stopping => Verdict::CompleteStop,
        Found::Adopted => Verdict::Run,
        Found::Unreachable(reason) => Verdict::Unreachable { reason: reason.clone() },
        Found::Nothing if was_running && observed.rebooted && observed.autostart => Verdict::StartAfterReboot,
        Found::Nothing if was_running && observed.rebooted => Verdict::Stop {
            reason: Some("the host went down, and the VM's autostart is off"),
        },
        Found::Nothing if was_running => Verdict::Stop {
            reason: Some("the VM's machine ended while scaleboxd was not running"),
        },
        Found::Nothing if observed.stopping => Verdict::Stop { reason: None },
        Found::Nothing => Verdict::Keep,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns every combination of observations, with its verdict.
    fn all() -> Vec<(Observed, Verdict)> {
        let statuses = [VmStatus::Running, VmStatus::Paused, VmStatus::Stopped, VmStatus::Failed];
        let machines = [Found::Adopted, Found::Unreachable("why".to_owned()), Found::Nothing];
        let mut all = Vec::new();
        for (status, machine) in statuses
            .iter()
            .flat_map(|status| machines.iter().map(move |machine| (status, machine)))
        {
            for bits in 0..16 {
                let observed = Observed {
                    status: *status,
                    machine: machine.clone(),
                    stopping: bits & 1 != 0 && *status == VmStatus::Stopped,
                    disk_missing: bits & 2 != 0,
                    rebooted: bits & 4 != 0,
                    autostart: bits & 8 != 0,
                };
                let verdict = decide(&observed);
                all.push((observed, verdict));
            }
        }
        all
    }

    fn verdicts(which: impl Fn(&Observed) -> bool) -> Vec<Verdict> {
        let found: Vec<_> = all()
            .into_iter()
            .filter(|(observed, _)| which(observed))
            .map(|(_, verdict)| verdict)
            .collect();
        assert!(!found.is_empty());
        found
    }

    fn was_running(observed: &Observed) -> bool {
        matches!(observed.status, VmStatus::Running | VmStatus::Paused)
    }

    #[test]
    fn a_vm_without_its_disk_has_failed_whatever_else_was_found() {
        for verdict in verdicts(|observed| observed.disk_missing) {
            assert!(matches!(verdict, Verdict::Fail { .. }), "{verdict:?}");
        }
        for verdict in verdicts(|observed| !observed.disk_missing) {
            assert!(!matches!(verdict, Verdict::Fail { .. }), "{verdict:?}");
        }
    }

    #[test]
    fn an_adopted_machine_runs_on() {
        for verdict in
            verdicts(|observed| observed.machine == Found::Adopted && !observed.disk_missing && !observed.stopping)
        {
            assert_eq!(verdict, Verdict::Run);
        }
    }

    #[test]
    fn an_interrupted_stop_is_completed() {
        for verdict in
            verdicts(|observed| observed.machine == Found::Adopted && !observed.disk_missing && observed.stopping)
        {
            assert_eq!(verdict, Verdict::CompleteStop);
        }
        for verdict in
            verdicts(|observed| observed.machine == Found::Nothing && !observed.disk_missing && observed.stopping)
        {
            assert_eq!(verdict, Verdict::Stop { reason: None });
        }
    }

    #[test]
    fn a_machine_that_cannot_be_adopted_keeps_its_record() {
        let unreachable = |observed: &Observed| matches!(observed.machine, Found::Unreachable(_));
        for verdict in verdicts(|observed| unreachable(observed) && !observed.disk_missing) {
            assert_eq!(
                verdict,
                Verdict::Unreachable {
                    reason: "why".to_owned()
                }
            );
        }
    }

    #[test]
    fn vms_that_ran_are_started_after_a_reboot_if_their_autostart_is_on() {
        for (observed, verdict) in all() {
            let expected = observed.machine == Found::Nothing
                && was_running(&observed)
                && observed.rebooted
                && observed.autostart
                && !observed.disk_missing;
            assert_eq!(verdict == Verdict::StartAfterReboot, expected, "{observed:?}");
        }
    }

    #[test]
    fn vms_whose_machine_is_gone_have_stopped_with_the_reason() {
        let gone =
            |observed: &Observed| observed.machine == Found::Nothing && was_running(observed) && !observed.disk_missing;
        for (rebooted, word) in [(true, "autostart is off"), (false, "while scaleboxd was not running")] {
            for verdict in verdicts(|observed| {
                gone(observed) && observed.rebooted == rebooted && !(rebooted && observed.autostart)
            }) {
                assert!(
                    matches!(verdict, Verdict::Stop { reason: Some(reason) } if reason.contains(word)),
                    "{verdict:?}"
                );
            }
        }
    }

    #[test]
    fn vms_that_did_not_run_stay_as_they_are() {
        for verdict in verdicts(|observed| {
            observed.machine == Found::Nothing && !was_running(observed) && !observed.stopping && !observed.disk_missing
        }) {
            assert_eq!(verdict, Verdict::Keep);
        }
    }
}

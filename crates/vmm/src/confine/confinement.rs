//! Confines a machine's process with a control group and Landlock rules. Its account and the
//! hypervisor's seccomp filter confine it further.

use crate::confine::cgroup::{self, Cgroups, Group, ResourceLimits};
use crate::confine::landlock::{self, AllowedFiles, Sandbox};
use crate::error::{Error, Result};
use crate::process::Process;
use crate::run_dir::RunDir;
use crate::spec::MachineSpec;
use scalebox_units::Bytes;
use std::io;

/// CPU time of a hypervisor for disk, network and console, in percent of one CPU. It is added to
/// the guest's vCPUs.
const CPU_OVERHEAD_PERCENT: u64 = 25;

/// Returns one sentence for each kind of confinement that this host lacks. Changes nothing.
pub fn missing_confinement() -> Vec<String> {
    let no_landlock = (!landlock::is_available()).then(|| {
        "this kernel has no Landlock: a guest that breaks into its hypervisor can read all world-readable files"
            .to_owned()
    });
    let groups = cgroup::usable()
        .err()
        .map(|why| format!("{why}: memory and CPU of machines are not limited"));
    no_landlock.into_iter().chain(groups).collect()
}

/// The means of confinement that this host offers.
#[derive(Debug, Clone)]
pub(crate) struct Confinement {
    cgroups: Option<Cgroups>,
}

/// Confinement that one process applies to itself before it executes the hypervisor.
#[derive(Debug)]
pub(crate) struct Confined {
    group: Option<Group>,
    sandbox: Option<Sandbox>,
}

impl Confinement {
    /// Probes the host, and logs missing kinds of confinement once.
    pub(crate) fn find() -> Confinement {
        for gap in missing_confinement() {
            tracing::warn!("{gap}");
        }
        let cgroups = Cgroups::find();
        if let Err(why) = &cgroups {
            tracing::warn!(why, "machines run without control groups");
        }
        Confinement { cgroups: cgroups.ok() }
    }

    /// Prepares the confinement of a machine's process. The hypervisor may use `overhead` of memory
    /// on top of the guest's. With `allowed: None` there are no Landlock rules, because the driver
    /// restricts file access in another way.
    ///
    /// # Errors
    /// [`Error::Io`]; [`RunDir::clear`] then removes everything that was created.
    pub(crate) fn prepare(
        &self,
        spec: &MachineSpec,
        dir: &RunDir,
        allowed: Option<&AllowedFiles>,
        overhead: Bytes,
    ) -> Result<Confined> {
        let sandbox = allowed
            .map(|allowed| Sandbox::new(allowed).map_err(Error::io("restrict file access for", &allowed.sockets)))
            .transpose()?;
        let group = match &self.cgroups {
            None => None,
            Some(cgroups) => {
                // The groups are recorded before they are created, so that clearing the folder
                // removes them.
                dir.record_groups(&cgroups.folders(spec.id.as_str()))?;
                let share = ResourceLimits {
                    memory: Bytes::from_mib(spec.memory_mib) + overhead,
                    cpu_percent: u64::from(spec.vcpus) * 100 + CPU_OVERHEAD_PERCENT,
                };
                let made = cgroups.make(spec.id.as_str(), share);
                Some(made.map_err(Error::io("create the control group of", spec.id.as_str()))?)
            }
        };
        Ok(Confined { group, sandbox })
    }
}

impl Confined {
    /// Runs in a child between fork and exec, as its last step: makes system calls only.
    pub(crate) fn enter(&mut self) -> io::Result<()> {
        Process::bound_self()?;
        if let Some(group) = &self.group {
            group.enter()?;
        }
        match &mut self.sandbox {
            Some(sandbox) => sandbox.enter(),
            None => Ok(()),
        }
    }
}

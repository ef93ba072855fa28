//! What keeps a machine's process to itself, beside its account and the hypervisor's own seccomp
//! filter: a control group, and a fence around its files.

use crate::cgroup::{self, Cgroups, Group, Share};
use crate::machine::MachineSpec;
use crate::process::Process;
use crate::run_dir::RunDir;
use crate::sandbox::{self, Needed, Sandbox};
use crate::{Error, Result};
use scalebox_units::Bytes;
use std::io;

/// The share of a processor, in percent of one, that a hypervisor has beside its guest's
/// processors: for disk, network and console.
const CPU_BESIDE_GUEST: u64 = 25;

/// What keeps no machine to itself on this host, a sentence each; none where all is there. Changes
/// nothing.
pub fn unconfined() -> Vec<String> {
    let landlock = (!sandbox::is_there()).then(|| {
        "this kernel has no Landlock: a guest that breaks into its hypervisor sees the files that anybody may read"
            .to_owned()
    });
    let groups = cgroup::usable()
        .err()
        .map(|why| format!("{why}: machines are not bound in either"));
    landlock.into_iter().chain(groups).collect()
}

/// What this host has for it.
#[derive(Debug, Clone)]
pub(crate) struct Confinement {
    cgroups: Option<Cgroups>,
}

/// What one process puts on before it becomes the hypervisor.
#[derive(Debug)]
pub(crate) struct Confined {
    group: Option<Group>,
    sandbox: Option<Sandbox>,
}

impl Confinement {
    /// Looks at the host; what it does not have is logged, once.
    pub(crate) fn find() -> Confinement {
        for lack in unconfined() {
            tracing::warn!("{lack}");
        }
        let cgroups = Cgroups::find();
        if let Err(why) = &cgroups {
            tracing::warn!(why, "machines have no control groups of their own");
        }
        Confinement { cgroups: cgroups.ok() }
    }

    /// Prepares what a machine's process will put on. Its hypervisor may take `beside_guest` of
    /// memory. It is not fenced in to files that are `needed` where something else sees to that.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is left then but what [`RunDir::clear`] removes.
    pub(crate) fn prepare(
        &self,
        spec: &MachineSpec,
        dir: &RunDir,
        needed: Option<&Needed>,
        beside_guest: Bytes,
    ) -> Result<Confined> {
        let sandbox = needed
            .map(|needed| Sandbox::new(needed).map_err(Error::io("fence in", &needed.sockets)))
            .transpose()?;
        let group = match &self.cgroups {
            None => None,
            Some(cgroups) => {
                // Noted before it is made: whoever clears the folder removes it.
                dir.note_groups(&cgroups.folders(spec.id.as_str()))?;
                let share = Share {
                    memory: Bytes::from_mib(spec.memory_mib) + beside_guest,
                    cpu_percent: u64::from(spec.vcpus) * 100 + CPU_BESIDE_GUEST,
                };
                let made = cgroups.make(spec.id.as_str(), share);
                Some(made.map_err(Error::io("make the control group of", spec.id.as_str()))?)
            }
        };
        Ok(Confined { group, sandbox })
    }
}

impl Confined {
    /// For a child between fork and exec, as its last step: system calls alone.
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

//! Limits a machine's memory and CPU with a control group of its own, on hosts that have control
//! groups.
//!
//! Uses version 2 where one hierarchy has both controllers (every current distribution), otherwise
//! the two hierarchies of version 1, whose files have other names. All groups of machines are below
//! a group named `scalebox`. A machine's process joins its group itself, before it executes the
//! hypervisor, so that no part of the hypervisor ever runs outside. See
//! Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ in the kernel source.

use scalebox_mounts::Mount;
use scalebox_units::Bytes;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The parent of the machines' groups.
const PARENT: &str = "scalebox";
/// Period over which the CPU quota is counted: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// Minimum age of an empty group that is swept: a machine may be about to join a younger one.
const MIN_SWEEP_AGE: Duration = Duration::from_secs(60);

/// Number and interval of attempts to remove a group. A process that has ended leaves its group a
/// moment later.
const MAX_REMOVE_ATTEMPTS: u32 = 20;
const REMOVE_RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// The controllers of a hierarchy, as far as they are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Controller {
    /// Memory and CPU, version 2.
    Unified,
    /// Memory, version 1.
    Memory,
    /// CPU, version 1.
    Cpu,
    /// No controller: the hierarchy in which systemd tracks the processes of services, if it is not
    /// one of the above.
    Services,
}

/// The hierarchies and folders in which machines get their groups.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    parents: Vec<(Controller, PathBuf)>,
}

/// The group of one machine in each hierarchy, before its process has joined.
#[derive(Debug)]
pub(crate) struct Group {
    /// Folders of the group, one per hierarchy.
    folders: Vec<PathBuf>,
    /// Open `cgroup.procs` files: writing a pid moves that process; zero means the writer itself.
    procs_files: Vec<File>,
}

/// Limits of one machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResourceLimits {
    /// Memory of the guest and its hypervisor together.
    pub(crate) memory: Bytes,
    /// CPU time, in percent of one CPU.
    pub(crate) cpu_percent: u64,
}

impl Cgroups {
    /// Looks for control groups on this host, creates the parent group, and removes leftover groups
    /// of machines that are gone.
    ///
    /// # Errors
    /// The reason why control groups cannot be used.
    pub(crate) fn find() -> Result<Cgroups, String> {
        let mut found = Cgroups { parents: Vec::new() };
        for (controller, folder) in suitable()? {
            let parent = folder.join(PARENT);
            match make_parent(controller, &folder, &parent) {
                Ok(()) => found.parents.push((controller, parent)),
                // This hierarchy limits nothing, and may be read-only, as in a container.
                Err(error) if controller == Controller::Services => {
                    tracing::debug!(%error, path = %parent.display(), "machines stay in the control group of this service");
                }
                Err(error) => return Err(format!("{}: {error}", parent.display())),
            }
        }
        found.sweep();
        Ok(found)
    }

    /// Returns the folders of a machine's group, whether they exist or not.
    pub(crate) fn folders(&self, id: &str) -> Vec<PathBuf> {
        self.parents.iter().map(|(_, parent)| parent.join(id)).collect()
    }

    /// Creates a machine's group, or reuses a leftover group of the same name.
    pub(crate) fn make(&self, id: &str, share: ResourceLimits) -> io::Result<Group> {
        let mut group = Group {
            folders: Vec::new(),
            procs_files: Vec::new(),
        };
        for ((controller, _), folder) in self.parents.iter().zip(self.folders(id)) {
            let made = match fs::create_dir(&folder) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            };
            let made = made
                .and_then(|()| {
                    group.folders.push(folder.clone());
                    limit(*controller, &folder, share)
                })
                .and_then(|()| File::options().write(true).open(folder.join("cgroup.procs")));
            match made {
                Ok(procs_file) => group.procs_files.push(procs_file),
                Err(error) => {
                    remove(&group.folders);
                    return Err(error);
                }
            }
        }
        Ok(group)
    }

    /// Removes the groups of machines that are gone. The kernel does not remove a group that has
    /// processes.
    fn sweep(&self) {
        for (_, parent) in &self.parents {
            let Ok(entries) = fs::read_dir(parent) else { continue };
            for entry in entries.flatten() {
                let old = entry.metadata().and_then(|meta| meta.modified()).is_ok_and(|made| {
                    SystemTime::now()
                        .duration_since(made)
                        .is_ok_and(|age| age > MIN_SWEEP_AGE)
                });
                if old && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    // EBUSY: the machine is running.
                    let _in_use = fs::remove_dir(entry.path());
                }
            }
        }
    }
}

impl Group {
    /// Moves the calling process into the group. Safe in a child between fork and exec: makes
    /// system calls only.
    pub(crate) fn enter(&self) -> rustix::io::Result<()> {
        for procs_file in &self.procs_files {
            rustix::io::write(procs_file, b"0")?;
        }
        Ok(())
    }
}

/// Returns the hierarchies on this host that can limit memory and CPU. Changes nothing.
///
/// # Errors
/// The reason why there are none.
pub(crate) fn usable() -> Result<Vec<(Controller, PathBuf)>, String> {
    let suitable = suitable()?;
    match suitable
        .iter()
        .any(|(controller, _)| *controller != Controller::Services)
    {
        true => Ok(suitable),
        false => Err("this host has no control groups for memory and CPU".to_owned()),
    }
}

/// Returns the hierarchies in which a machine gets a group.
///
/// These are the ones with controllers, and the one in which systemd tracks services. A process
/// that stayed in the daemon's group there would be killed together with the service (`systemctl
/// kill`).
fn suitable() -> Result<Vec<(Controller, PathBuf)>, String> {
    const OWN: &str = "/proc/self/cgroup";
    let mounts = scalebox_mounts::all().map_err(|error| format!("cannot list the mounts: {error}"))?;
    let own = fs::read_to_string(OWN).map_err(|error| format!("{OWN}: {error}"))?;
    let hierarchies = hierarchies(&mounts, &own);
    Ok(choose(hierarchies, has_controllers))
}

fn choose(
    hierarchies: Vec<(Controller, PathBuf)>,
    has_controllers: impl Fn(&Path) -> bool,
) -> Vec<(Controller, PathBuf)> {
    let is_unified = |(controller, _): &&(Controller, PathBuf)| *controller == Controller::Unified;
    if let Some(unified) = hierarchies
        .iter()
        .filter(is_unified)
        .find(|(_, folder)| has_controllers(folder))
    {
        return vec![unified.clone()];
    }
    // A version 2 hierarchy without controllers serves systemd only. Without one, systemd tracks
    // services in a version 1 hierarchy of its own.
    let unified = hierarchies
        .iter()
        .find(is_unified)
        .map(|(_, folder)| (Controller::Services, folder.clone()));
    let services = |(controller, _): &(Controller, PathBuf)| *controller == Controller::Services;
    let tracked = unified.or_else(|| hierarchies.iter().find(|hierarchy| services(hierarchy)).cloned());
    let limited = hierarchies
        .into_iter()
        .filter(|hierarchy| !is_unified(&hierarchy) && !services(hierarchy));
    limited.chain(tracked).collect()
}

/// Removes a group without processes. A group that cannot be removed is left for the sweep at the
/// next start.
pub(crate) fn remove(folders: &[PathBuf]) {
    for folder in folders {
        let mut removed = fs::remove_dir(folder);
        for _ in 0..MAX_REMOVE_ATTEMPTS {
            if !matches!(&removed, Err(error) if error.kind() == io::ErrorKind::ResourceBusy) {
                break;
            }
            std::thread::sleep(REMOVE_RETRY_INTERVAL);
            removed = fs::remove_dir(folder);
        }
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %folder.display(), %error, "cannot remove a control group; the next start of the daemon removes it");
        }
    }
}

/// Returns whether the kernel has killed a process because the group ran out of memory.
pub(crate) fn ran_out_of_memory(folders: &[PathBuf]) -> bool {
    folders.iter().any(|folder| {
        let events = fs::read_to_string(folder.join("memory.events"))
            .or_else(|_| fs::read_to_string(folder.join("memory.oom_control")))
            .unwrap_or_default();
        events
            .lines()
            .filter_map(|line| line.strip_prefix("oom_kill "))
            .any(|count| count.trim() != "0")
    })
}

fn limit(controller: Controller, folder: &Path, share: ResourceLimits) -> io::Result<()> {
    let memory = share.memory.as_u64().to_string();
    let quota = share.cpu_percent * CPU_PERIOD_US / 100;
    let files: &[(&str, String)] = &match controller {
        Controller::Unified => vec![
            ("memory.max", memory),
            // The kernel must kill the whole group or nothing.
            ("memory.oom.group", "1".to_owned()),
            ("cpu.max", format!("{quota} {CPU_PERIOD_US}")),
        ],
        Controller::Memory => vec![("memory.limit_in_bytes", memory)],
        Controller::Services => vec![],
        Controller::Cpu => vec![
            ("cpu.cfs_period_us", CPU_PERIOD_US.to_string()),
            ("cpu.cfs_quota_us", quota.to_string()),
        ],
    };
    for (file, value) in files {
        fs::write(folder.join(file), value)?;
    }
    Ok(())
}

fn make_parent(controller: Controller, folder: &Path, parent: &Path) -> io::Result<()> {
    let made = match fs::create_dir(parent) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    made?;
    if controller == Controller::Unified {
        // A group gets only the controllers that its parent enables.
        for group in [folder, parent] {
            fs::write(group.join("cgroup.subtree_control"), "+memory +cpu")?;
        }
    }
    Ok(())
}

fn has_controllers(folder: &Path) -> bool {
    let controllers = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    ["memory", "cpu"]
        .iter()
        .all(|wanted| controllers.split_whitespace().any(|controller| controller == *wanted))
}

/// Returns the folders below which groups are created, from the mounted hierarchies and
/// `/proc/self/cgroup`.
///
/// For version 2 this is the top of the hierarchy: the daemon's own group contains processes, and
/// such a group cannot enable controllers for its children. For version 1 it is the daemon's own
/// group, whose limits then apply to the machines too.
fn hierarchies(mounts: &[Mount], own: &str) -> Vec<(Controller, PathBuf)> {
    let mut found = Vec::new();
    for mount in mounts {
        match mount.fs_type.as_str() {
            "cgroup2" => found.push((Controller::Unified, mount.target.clone())),
            "cgroup" => {
                if mount.has_option("name=systemd") {
                    found.push((Controller::Services, mount.target.clone()));
                }
                for (name, controller) in [("memory", Controller::Memory), ("cpu", Controller::Cpu)] {
                    if mount.has_option(name)
                        && let Some(own) = own_group(own, name)
                        && let Ok(below) = Path::new(own).strip_prefix(&mount.root)
                    {
                        found.push((controller, mount.target.join(below)));
                    }
                }
            }
            _ => {}
        }
    }
    found
}

/// Returns this process' group in the version 1 hierarchy with that controller, from lines such as
/// `4:memory:/user.slice`.
fn own_group<'a>(own: &'a str, controller: &str) -> Option<&'a str> {
    own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        controllers.split(',').any(|name| name == controller).then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    #[test]
    fn version_2_uses_the_top_group_and_version_1_the_own_group() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(
            hierarchies(
                &scalebox_mounts::parse(unified.as_bytes()),
                "0::/system.slice/scaleboxd.service"
            ),
            [(Controller::Unified, "/sys/fs/cgroup".into())]
        );
        let legacy = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      35 31 0:32 /docker/7 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";
        let own = "5:memory:/docker/7/inner\n1:cpu,cpuacct:/\n0::/";
        assert_eq!(
            hierarchies(&scalebox_mounts::parse(legacy.as_bytes()), own),
            [
                (Controller::Cpu, "/sys/fs/cgroup/cpu,cpuacct".into()),
                (Controller::Memory, "/sys/fs/cgroup/memory/inner".into())
            ]
        );
    }

    #[test]
    fn machines_leave_the_service_group_even_without_version_2_controllers() {
        let at = |controller, folder: &str| (controller, PathBuf::from(folder));
        let (memory, cpu) = (at(Controller::Memory, "/m/service"), at(Controller::Cpu, "/c/service"));
        let unified = at(Controller::Unified, "/u");
        // In order: unified; hybrid; version 1 only; version 2 without controllers.
        for (hierarchies, has_controllers, chosen) in [
            (vec![unified.clone()], true, vec![unified.clone()]),
            (
                vec![
                    memory.clone(),
                    cpu.clone(),
                    at(Controller::Services, "/s"),
                    unified.clone(),
                ],
                false,
                vec![memory.clone(), cpu.clone(), at(Controller::Services, "/u")],
            ),
            (
                vec![memory.clone(), at(Controller::Services, "/s"), cpu.clone()],
                false,
                vec![memory.clone(), cpu.clone(), at(Controller::Services, "/s")],
            ),
            (vec![unified], false, vec![at(Controller::Services, "/u")]),
        ] {
            assert_eq!(choose(hierarchies, |_| has_controllers), chosen);
        }
    }

    /// Runs a shell script in a new group, and returns the group and the script's output.
    fn in_group(cgroups: &Cgroups, id: &str, share: ResourceLimits, script: &str) -> (Group, std::process::Output) {
        let group = cgroups.make(id, share).unwrap();
        let procs_files: Vec<File> = group.procs_files.iter().map(|file| file.try_clone().unwrap()).collect();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::null());
        let joining = Group {
            folders: Vec::new(),
            procs_files,
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(move || Ok(joining.enter()?)) };
        let output = command.output().unwrap();
        (group, output)
    }

    #[test]
    fn a_process_starts_in_its_group_and_cannot_exceed_its_limits() {
        let cgroups = match Cgroups::find() {
            Ok(cgroups) => cgroups,
            Err(why) => {
                println!("not run: {why}");
                return;
            }
        };
        let id = format!("vm-test{:08x}", std::process::id());
        let share = ResourceLimits {
            memory: Bytes::from_mib(64),
            cpu_percent: 50,
        };
        let (group, inside) = in_group(&cgroups, &id, share, "cat /proc/self/cgroup");
        assert!(
            String::from_utf8_lossy(&inside.stdout).contains(&format!("/scalebox/{id}")),
            "{inside:?}"
        );
        assert!(!ran_out_of_memory(&group.folders));
        let (group, greedy) = in_group(
            &cgroups,
            &id,
            share,
            "exec head -c 200M /dev/zero | tail -c 150M | wc -c",
        );
        assert!(ran_out_of_memory(&group.folders), "{greedy:?}");
        drop(group.procs_files);
        remove(&group.folders);
        assert!(group.folders.iter().all(|folder| !folder.exists()));
    }
}

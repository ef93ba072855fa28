//! What a machine may take of the host's memory and processors: a control group of its own, where
//! the host has some.
//!
//! Version 2 where one hierarchy has both controllers (every current distribution), else the two of
//! version 1; they differ in the names of files. Machines' groups lie below one named `scalebox`. A
//! machine's process enters its group by itself, before it becomes the hypervisor, so that nothing
//! of it is ever outside. (Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of the kernel.)

use scalebox_units::Bytes;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The group that holds those of all machines.
const PARENT: &str = "scalebox";
/// The time in which the processors' share is counted, in microseconds: the kernel's default.
const PERIOD: u64 = 100_000;
/// An empty group younger than this may be one that a machine is about to enter.
const YOUNG: Duration = Duration::from_secs(60);

/// The last of a process that has ended leaves its group a moment later: how often that is waited
/// for, and how long.
const LEAVING_TRIES: u32 = 20;
const LEAVING: Duration = Duration::from_millis(10);

/// A hierarchy with a controller that machines are limited by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Controller {
    /// Memory and processors, version 2.
    Unified,
    /// Memory, version 1.
    Memory,
    /// Processors, version 1.
    Cpu,
    /// None: the hierarchy by which systemd tells which processes belong to which service, where it
    /// is none of those above.
    Services,
}

/// Where the groups of machines are made.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    parents: Vec<(Controller, PathBuf)>,
}

/// The group of one machine, in each hierarchy, before its process is in it.
#[derive(Debug)]
pub(crate) struct Group {
    /// Its folders.
    folders: Vec<PathBuf>,
    /// Writing a process' number into them moves it there; zero is the writer's own.
    entrances: Vec<File>,
}

/// What a machine may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    /// Of memory: the guest's and its hypervisor's.
    pub(crate) memory: Bytes,
    /// Of processors, in percent of one.
    pub(crate) cpu_percent: u64,
}

impl Cgroups {
    /// Looks for control groups on this host, makes the parent of the machines' groups, and removes
    /// what machines that are gone left in it.
    ///
    /// # Errors
    /// Why there are none that can be used.
    pub(crate) fn find() -> Result<Cgroups, String> {
        let mut found = Cgroups { parents: Vec::new() };
        for (controller, folder) in suitable()? {
            let parent = folder.join(PARENT);
            match make_parent(controller, &folder, &parent) {
                Ok(()) => found.parents.push((controller, parent)),
                // It limits nothing, and is not everybody's to write: a container's is not.
                Err(error) if controller == Controller::Services => {
                    tracing::debug!(%error, path = %parent.display(), "machines stay in the group of this service");
                }
                Err(error) => return Err(format!("{}: {error}", parent.display())),
            }
        }
        found.sweep();
        Ok(found)
    }

    /// Where the group of a machine is, made or not.
    pub(crate) fn folders(&self, id: &str) -> Vec<PathBuf> {
        self.parents.iter().map(|(_, parent)| parent.join(id)).collect()
    }

    /// Makes the group of a machine. What an earlier one of its name left gives way.
    pub(crate) fn make(&self, id: &str, share: Share) -> io::Result<Group> {
        let mut group = Group {
            folders: Vec::new(),
            entrances: Vec::new(),
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
                Ok(entrance) => group.entrances.push(entrance),
                Err(error) => {
                    remove(&group.folders);
                    return Err(error);
                }
            }
        }
        Ok(group)
    }

    /// Removes the groups of machines that are gone. One with a process in it is not removed by the
    /// kernel.
    fn sweep(&self) {
        for (_, parent) in &self.parents {
            let Ok(entries) = fs::read_dir(parent) else { continue };
            for entry in entries.flatten() {
                let old = entry
                    .metadata()
                    .and_then(|meta| meta.modified())
                    .is_ok_and(|made| SystemTime::now().duration_since(made).is_ok_and(|age| age > YOUNG));
                if old && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    // Busy is what a machine that runs is.
                    let _in_use = fs::remove_dir(entry.path());
                }
            }
        }
    }
}

impl Group {
    /// Moves the calling process into the group. For a child between fork and exec: system calls
    /// alone.
    pub(crate) fn enter(&self) -> rustix::io::Result<()> {
        for entrance in &self.entrances {
            rustix::io::write(entrance, b"0")?;
        }
        Ok(())
    }
}

/// Where this host has control groups for memory and processors; changes nothing.
///
/// # Errors
/// Why there are none.
pub(crate) fn usable() -> Result<Vec<(Controller, PathBuf)>, String> {
    let suitable = suitable()?;
    match suitable
        .iter()
        .any(|(controller, _)| *controller != Controller::Services)
    {
        true => Ok(suitable),
        false => Err("this host has no control groups for memory and processors".to_owned()),
    }
}

/// The hierarchies in which a machine gets a group: those with controllers, and the one of
/// systemd's services. A process that stayed in the daemon's group there would be killed with the
/// service (`systemctl kill`).
fn suitable() -> Result<Vec<(Controller, PathBuf)>, String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let hierarchies = hierarchies(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?);
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
    // Version 2 without controllers is there for services alone; systemd uses its own of version 1
    // where there is none.
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

/// Removes a group that no process is in any more. One that cannot be removed is left for the next
/// start's sweep.
pub(crate) fn remove(folders: &[PathBuf]) {
    for folder in folders {
        let mut removed = fs::remove_dir(folder);
        for _ in 0..LEAVING_TRIES {
            if !matches!(&removed, Err(error) if error.kind() == io::ErrorKind::ResourceBusy) {
                break;
            }
            std::thread::sleep(LEAVING);
            removed = fs::remove_dir(folder);
        }
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %folder.display(), %error, "a control group is left; a later start removes it");
        }
    }
}

/// Memory that ran out in a group has its process killed: whether that has happened.
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

fn limit(controller: Controller, folder: &Path, share: Share) -> io::Result<()> {
    let memory = share.memory.as_u64().to_string();
    let quota = share.cpu_percent * PERIOD / 100;
    let files: &[(&str, String)] = &match controller {
        Controller::Unified => vec![
            ("memory.max", memory),
            // All of a machine, or nothing.
            ("memory.oom.group", "1".to_owned()),
            ("cpu.max", format!("{quota} {PERIOD}")),
        ],
        Controller::Memory => vec![("memory.limit_in_bytes", memory)],
        Controller::Services => vec![],
        Controller::Cpu => vec![
            ("cpu.cfs_period_us", PERIOD.to_string()),
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
        // A group has the controllers that the one above it hands down.
        for handing_down in [folder, parent] {
            fs::write(handing_down.join("cgroup.subtree_control"), "+memory +cpu")?;
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

/// The folders below which groups are made, from `/proc/self/mountinfo` and `/proc/self/cgroup`.
///
/// Of version 2 the top of the hierarchy: a group with processes in it, as the daemon's own has,
/// hands no controllers down. Of version 1 the daemon's own group, whose bounds then hold for the
/// machines too.
fn hierarchies(mountinfo: &str, own: &str) -> Vec<(Controller, PathBuf)> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        // `36 35 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory`
        let Some((mount, file_system)) = line.split_once(" - ") else {
            continue;
        };
        let mut mount = mount.split(' ').skip(3);
        let (Some(root), Some(at)) = (mount.next(), mount.next()) else {
            continue;
        };
        let mut file_system = file_system.split(' ');
        let (kind, options) = (
            file_system.next().unwrap_or_default(),
            file_system.nth(1).unwrap_or_default(),
        );
        match kind {
            "cgroup2" => found.push((Controller::Unified, PathBuf::from(at))),
            "cgroup" => {
                if options.split(',').any(|option| option == "name=systemd") {
                    found.push((Controller::Services, PathBuf::from(at)));
                }
                for (name, controller) in [("memory", Controller::Memory), ("cpu", Controller::Cpu)] {
                    if options.split(',').any(|option| option == name)
                        && let Some(own) = own_group(own, name).and_then(|own| own.strip_prefix(root))
                    {
                        found.push((controller, Path::new(at).join(own.trim_start_matches('/'))));
                    }
                }
            }
            _ => {}
        }
    }
    found
}

/// The group of this process in the hierarchy of version 1 with that controller:
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
    fn version_2_is_taken_at_its_top_and_version_1_below_one_s_own_group() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(
            hierarchies(unified, "0::/system.slice/scaleboxd.service"),
            [(Controller::Unified, "/sys/fs/cgroup".into())]
        );
        let legacy = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      35 31 0:32 /docker/7 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";
        let own = "5:memory:/docker/7/inner\n1:cpu,cpuacct:/\n0::/";
        assert_eq!(
            hierarchies(legacy, own),
            [
                (Controller::Cpu, "/sys/fs/cgroup/cpu,cpuacct".into()),
                (Controller::Memory, "/sys/fs/cgroup/memory/inner".into())
            ]
        );
    }

    #[test]
    fn without_controllers_of_version_2_a_machine_still_leaves_the_group_of_the_service() {
        let at = |controller, folder: &str| (controller, PathBuf::from(folder));
        let (memory, cpu) = (at(Controller::Memory, "/m/service"), at(Controller::Cpu, "/c/service"));
        let unified = at(Controller::Unified, "/u");
        // Unified; hybrid; version 1 alone; version 2 without any controller.
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

    /// Runs a shell in a group, and returns how it ended.
    fn in_group(cgroups: &Cgroups, id: &str, share: Share, script: &str) -> (Group, std::process::Output) {
        let group = cgroups.make(id, share).unwrap();
        let entrances: Vec<File> = group.entrances.iter().map(|file| file.try_clone().unwrap()).collect();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::null());
        let entering = Group {
            folders: Vec::new(),
            entrances,
        };
        // SAFETY: system calls alone.
        unsafe { command.pre_exec(move || Ok(entering.enter()?)) };
        let output = command.output().unwrap();
        (group, output)
    }

    #[test]
    fn a_process_is_in_its_group_from_the_beginning_and_cannot_take_more() {
        let cgroups = match Cgroups::find() {
            Ok(cgroups) => cgroups,
            Err(why) => {
                println!("not run: {why}");
                return;
            }
        };
        let id = format!("vm-test{:08x}", std::process::id());
        let share = Share {
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
        drop(group.entrances);
        remove(&group.folders);
        assert!(group.folders.iter().all(|folder| !folder.exists()));
    }
}

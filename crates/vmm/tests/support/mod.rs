//! A lab for machines: a folder, a tap, disks and a driver. All of them are removed at the end,
//! even after a panic.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod guest;

use guest::Guest;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use scalebox_units::{Bytes, DiskLocation, VmId};
use scalebox_vmm::{Accel, DiskLimits, Machine, MachineSpec, Nic, QemuDriver, console_tail};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Timeout for any single wait. Generous, for emulation on a busy machine.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// The files and devices with which a machine is launched.
pub(crate) struct Lab {
    folder: PathBuf,
    tap: String,
    owned: Option<TempDir>,
    has_tap: bool,
    pub driver: QemuDriver,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        let owned = tempfile::Builder::new().prefix("vmm-").tempdir().unwrap();
        let tap = format!("t{}", &unique(owned.path())[..10]);
        run("ip", &["tuntap", "add", "dev", &tap, "mode", "tap"]);
        let folder = owned.path().to_owned();
        Lab {
            folder,
            tap,
            owned: Some(owned),
            has_tap: true,
            driver: QemuDriver::find(Accel::Tcg).unwrap(),
        }
    }

    /// Creates a lab for the simulated driver, which needs no tap and so no root.
    pub(crate) fn without_tap() -> Lab {
        let owned = tempfile::Builder::new().prefix("vmm-").tempdir().unwrap();
        Lab {
            folder: owned.path().to_owned(),
            tap: "simulated0".to_owned(),
            owned: Some(owned),
            has_tap: false,
            driver: QemuDriver::without_program(),
        }
    }

    /// Opens the same lab in another process.
    fn shared(folder: &str, tap: &str) -> Lab {
        Lab {
            folder: folder.into(),
            tap: tap.into(),
            owned: None,
            has_tap: true,
            driver: QemuDriver::find(Accel::Tcg).unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Returns the specification of a machine, with newly created disks.
    pub(crate) fn spec(&self, guest: Guest) -> MachineSpec {
        let id: VmId = format!("vm-{}", unique(&self.folder)).parse().unwrap();
        guest.write_to(&self.path("kernel"));
        for (disk, size) in [("root", Bytes::from_mib(16)), ("seed", Bytes::from_mib(1))] {
            File::create(self.path(disk)).unwrap().set_len(size.as_u64()).unwrap();
        }
        MachineSpec {
            id,
            vcpus: 1,
            memory_mib: 64,
            kernel: self.path("kernel"),
            initrd: None,
            modules: None,
            cmdline: String::new(),
            root: DiskLocation::File(self.path("root")),
            root_limits: DiskLimits::default(),
            seed: self.path("seed"),
            nic: Nic {
                tap: self.tap.clone(),
                mac: "52:54:00:12:34:56".parse().unwrap(),
            },
            run_dir: self.path("run"),
            console_log: self.path("console.log"),
            run_as: None,
        }
    }

    /// Returns the console output so far.
    pub(crate) fn console(&self) -> String {
        console_tail(&self.path("console.log"), Bytes::from_mib(8)).unwrap()
    }

    pub(crate) async fn wait_for_console(&self, text: &str) {
        until(&format!("{text:?} on the console"), || self.console().contains(text)).await;
    }

    /// Re-runs the test `name` in a child process, which gets the lab by [`Lab::inherited`] and
    /// must die by SIGKILL.
    pub(crate) fn in_a_process_that_dies(&self, name: &str) {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env("VMM_LAB", &self.folder)
            .env("VMM_LAB_TAP", &self.tap)
            .process_group(0)
            .status()
            .unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "{status}"
        );
    }

    pub(crate) fn inherited() -> Option<Lab> {
        let folder = std::env::var("VMM_LAB").ok()?;
        Some(Lab::shared(&folder, &std::env::var("VMM_LAB_TAP").unwrap()))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owned.is_none() {
            return;
        }
        // Searched by folder and by id, because a jailed process names no folder.
        let id = format!("vm-{}", unique(&self.folder));
        for pid in [self.folder.to_str().unwrap(), &id]
            .into_iter()
            .flat_map(processes_with)
        {
            signal(pid, Signal::KILL);
        }
        if !self.has_tap {
            return;
        }
        let deleted = Command::new("ip").args(["link", "delete", &self.tap]).status();
        if !deleted.is_ok_and(|status| status.success()) {
            eprintln!("cannot delete tap {}", self.tap);
        }
    }
}

/// Kills this process with SIGKILL: no destructors run.
pub(crate) fn die() -> ! {
    signal(std::process::id() as i32, Signal::KILL);
    unreachable!("SIGKILL")
}

/// Sends a signal to a process of the lab.
pub(crate) fn signal(pid: i32, signal: Signal) {
    if let Ok(pidfd) = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()) {
        // An error means that the process has already ended.
        let _ = pidfd_send_signal(pidfd, signal);
    }
}

/// Returns the hypervisor processes that have `text` in their arguments.
pub(crate) fn processes_with(text: &str) -> Vec<i32> {
    let entries = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let has = |pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).into_owned();
        (arguments.contains("qemu-system") || arguments.starts_with("/firecracker\0")) && arguments.contains(text)
    };
    entries.filter(has).collect()
}

/// Returns one field of `/proc/PID/status`.
pub(crate) fn status_line(machine: &dyn Machine, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Polls until `condition` holds, for states without an event.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < TEST_TIMEOUT, "still waiting for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

/// Derives 12 hex digits from a temporary folder's path.
fn unique(folder: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    folder.hash(&mut hasher);
    format!("{:012x}", hasher.finish() & 0xffff_ffff_ffff)
}

//! The agent as process 1 of a guest without an init. It mounts the file systems that a system
//! needs, sets up host name and network, reaps processes, and shuts the guest down on request.

use crate::init::root::mount_at;
use crate::init::seed::Facts;
use crate::init::switch::ensure_dir;
use crate::init::{agent_process, network};
use crate::run_dir::{self, RunDir};
use crate::system;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_bind};
use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot, sethostname};
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

/// Delay before an agent that has ended is started again.
const RESTART_DELAY: Duration = Duration::from_secs(1);

/// Runs process 1 for as long as the guest runs. The agent gets the opened agent port, once the
/// guest is set up for its commands.
pub(crate) fn run(facts: &Facts, port: Option<OwnedFd>) -> Result<Infallible, String> {
    // Ctrl+Alt+Del, by which Firecracker requests a shutdown, becomes a signal instead of a reset.
    if let Err(error) = reboot(RebootCommand::CadOff) {
        eprintln!("scalebox-agent: cannot disable the reset on Ctrl+Alt+Del: {error}");
    }
    for failed in [mount_all(), name(facts), generate(facts), write_main(facts)]
        .into_iter()
        .filter_map(Result::err)
    {
        eprintln!("scalebox-agent: {failed}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start a runtime: {error}"))?;
    runtime.block_on(async {
        if let Err(error) = network::configure(facts).await {
            eprintln!("scalebox-agent: {error}");
        }
        agent_process::start(port)?;
        supervise().await
    })
}

fn mount_all() -> Result<(), String> {
    let strict = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let shared = MountFlags::NOSUID | MountFlags::NODEV;
    let all: [(&str, &str, &str, MountFlags, &str); 8] = [
        ("proc", "/proc", "proc", strict, ""),
        ("sysfs", "/sys", "sysfs", strict, ""),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", strict, "nsdelegate"),
        (
            "devpts",
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "gid=5,mode=620,ptmxmode=666",
        ),
        ("mqueue", "/dev/mqueue", "mqueue", strict, ""),
        ("shm", "/dev/shm", "tmpfs", shared, "mode=1777"),
        ("run", "/run", "tmpfs", shared, "mode=755"),
        ("tmp", "/tmp", "tmpfs", shared, "mode=1777"),
    ];
    let mut failed = Vec::new();
    for (source, target, kind, flags, data) in all {
        let target = Path::new(target);
        // A pulled image keeps its /tmp, because it may be large.
        if kind == "tmpfs" && target == Path::new("/tmp") && target.is_dir() {
            continue;
        }
        let mounted = ensure_dir(target).and_then(|()| mount_at(source, target, kind, flags, data));
        failed.extend(mounted.err());
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        // An existing link is already correct.
        let _ = std::os::unix::fs::symlink(target, link);
    }
    match failed.is_empty() {
        true => Ok(()),
        false => Err(failed.join("; ")),
    }
}

fn name(facts: &Facts) -> Result<(), String> {
    let Some(name) = &facts.hostname else {
        return Ok(());
    };
    sethostname(name.as_bytes()).map_err(|error| format!("cannot set the host name {name}: {error}"))
}

/// Covers the image's files of host name and name servers with generated ones, as containers do.
/// The image's disk does not change, except for an empty file where it has none.
fn generate(facts: &Facts) -> Result<(), String> {
    let name = facts.hostname.as_deref().unwrap_or("localhost");
    let mut resolvers = String::new();
    for server in &facts.dns {
        resolvers.push_str(&format!("nameserver {server}\n"));
    }
    let hosts = format!("127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost ip6-localhost ip6-loopback\n");
    for folder in [run_dir::FOLDER, "/etc"] {
        ensure_dir(Path::new(folder))?;
    }
    for (file, content) in [
        ("hostname", format!("{name}\n")),
        ("hosts", hosts),
        ("resolv.conf", resolvers),
    ] {
        let (from, to) = (Path::new(run_dir::FOLDER).join(file), Path::new("/etc").join(file));
        cover(&from, &to, &content).map_err(|error| format!("cannot write {}: {error}", to.display()))?;
    }
    Ok(())
}

/// Hands the main process over to the agent.
fn write_main(facts: &Facts) -> Result<(), String> {
    let Some(main) = &facts.main else {
        return Ok(());
    };
    let written = RunDir::at(Path::new(run_dir::FOLDER)).write_main(main);
    written.map_err(|error| format!("cannot start the main process: {error}"))
}

fn cover(from: &Path, to: &Path, content: &str) -> std::io::Result<()> {
    fs::write(from, content)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    rustix::fs::open(to, flags, Mode::from_raw_mode(0o644))?;
    Ok(mount_bind(from, to)?)
}

/// Reaps every process that ends, and restarts the agent if it ends. Shuts the guest down when the
/// host presses a button.
async fn supervise() -> Result<Infallible, String> {
    let listen = |kind| signal(kind).map_err(|error| format!("cannot receive signals: {error}"));
    let mut ended = listen(SignalKind::child())?;
    let (mut reset, mut power_off) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let (pressed, mut button) = tokio::sync::mpsc::channel(1);
    watch_power_button(&pressed);
    loop {
        if !agent_process::runs()? {
            sleep(RESTART_DELAY).await;
            agent_process::start(None)?;
        }
        tokio::select! {
            _ = ended.recv() => reap()?,
            _ = reset.recv() => system::end(true),
            _ = power_off.recv() => system::end(false),
            Some(()) = button.recv() => system::end(false),
        }
    }
}

fn reap() -> Result<(), String> {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) | Err(Errno::CHILD) => return Ok(()),
            Err(error) => return Err(format!("cannot wait for processes: {error}")),
        }
    }
}

/// Watches the input devices for the power button, by which QEMU requests a shutdown.
fn watch_power_button(pressed: &tokio::sync::mpsc::Sender<()>) {
    let Ok(devices) = fs::read_dir("/dev/input") else {
        return;
    };
    for path in devices.flatten().map(|entry| entry.path()) {
        let (Ok(device), pressed) = (File::open(&path), pressed.clone()) else {
            continue;
        };
        std::thread::spawn(move || {
            if wait_for_power_key(device).is_ok() {
                let _ = pressed.blocking_send(());
            }
        });
    }
}

/// Reads events (`struct input_event` of input.h: two longs, type, code, value) until the power key
/// is pressed.
fn wait_for_power_key(mut device: File) -> std::io::Result<()> {
    const EV_KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    let mut event = [0; 24];
    loop {
        device.read_exact(&mut event)?;
        let word = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
        if word(16) == EV_KEY && word(18) == KEY_POWER && event[20] == 1 {
            return Ok(());
        }
    }
}

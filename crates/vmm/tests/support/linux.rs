//! A guest that boots Linux to our own agent: the kernel that `make test` caches, and a root of
//! busybox without an init.

use crate::support::{Lab, run};
use scalebox_agent_api::frame::Frame;
use scalebox_agent_api::{StartExec, Terminal, WindowSize};
use scalebox_guest::{AgentConnection, SeedDrive, kernel_cmdline};
use scalebox_images::{Recipe, agent_archive};
use scalebox_units::DiskLocation;
use scalebox_vmm::{Channel, Error, Machine, MachineSpec};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time for a guest to boot. Emulated, or with KVM on an emulated host, it takes many seconds.
const BOOT_TIMEOUT: Duration = Duration::from_secs(240);
/// Time for the agent to respond on one connection, after which another one is opened.
const GREETING_TIMEOUT: Duration = Duration::from_secs(30);

/// The name of the guest.
pub(crate) const HOSTNAME: &str = "very-silly-penguin";

/// Turns `spec` into the specification of a guest that boots.
pub(crate) fn boot(lab: &Lab, spec: &mut MachineSpec) {
    let cached = template_cache().join(Recipe::default().fingerprint());
    assert!(cached.is_dir(), "{}: `make test` makes it", cached.display());
    fs::copy(cached.join("vmlinux"), &spec.kernel).unwrap();
    let mut initramfs = fs::read(cached.join("initrd.img")).unwrap();
    initramfs.resize(initramfs.len().next_multiple_of(4), 0);
    initramfs.extend(agent_archive());
    let initrd = lab.path("initrd");
    fs::write(&initrd, initramfs).unwrap();
    spec.initrd = Some(initrd);
    spec.cmdline = kernel_cmdline();
    spec.memory_mib = 256;
    seed(spec);
    let DiskLocation::File(disk) = &spec.root else {
        panic!("a file");
    };
    write_root(&lab.path("root-files"), disk);
}

fn seed(spec: &MachineSpec) {
    let drive = SeedDrive {
        instance_id: spec.id.to_string(),
        hostname: HOSTNAME.parse().unwrap(),
        ssh_public_key: None,
        mac: spec.nic.mac,
        address: "172.16.3.4/16".parse().unwrap(),
        gateway: "172.16.0.1".parse().unwrap(),
        dns: Vec::new(),
    };
    drive.write(&spec.seed).unwrap();
}

/// Writes a file system with busybox to `disk`.
fn write_root(folder: &Path, disk: &Path) {
    let bin = folder.join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy(busybox(), bin.join("busybox")).unwrap();
    for applet in ["sh", "cat", "echo", "hostname", "stty", "sleep", "df"] {
        symlink("busybox", bin.join(applet)).unwrap();
    }
    let (folder, disk) = (folder.to_str().unwrap(), disk.to_str().unwrap());
    fs::remove_file(disk).unwrap();
    run("mke2fs", &["-q", "-t", "ext4", "-d", folder, disk, "32M"]);
}

fn busybox() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let mut all = std::env::split_paths(&path).map(|folder| folder.join("busybox"));
    all.find(|file| file.exists()).expect("busybox-static is installed")
}

/// Returns the folder where `make test` keeps the finished Debian template.
fn template_cache() -> PathBuf {
    match std::env::var_os("SCALEBOX_CACHE") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/template-cache"),
    }
}

/// Connects to the agent of a guest, which may still be booting.
pub(crate) async fn connect(machine: &dyn Machine) -> AgentConnection {
    let begun = Instant::now();
    loop {
        let failed = match machine.channel(Channel::Agent).await {
            Ok(stream) => match AgentConnection::open(stream, GREETING_TIMEOUT).await {
                Ok(connection) => return connection,
                Err(error) => error.to_string(),
            },
            Err(error @ Error::Agent { .. }) => error.to_string(),
            Err(error) => panic!("{error}"),
        };
        assert!(begun.elapsed() < BOOT_TIMEOUT, "the agent does not respond: {failed}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Returns a request to run a shell command.
pub(crate) fn command(id: &str, line: &str) -> StartExec {
    StartExec {
        id: id.to_owned(),
        argv: ["/bin/sh", "-c", line].map(str::to_owned).into(),
        env: Vec::new(),
        cwd: None,
        user: None,
        tty: None,
        stdin: false,
        timeout_ms: None,
        buffer: None,
        attached: false,
    }
}

/// Returns the same request with a terminal.
pub(crate) fn in_a_terminal(exec: StartExec, rows: u16, cols: u16) -> StartExec {
    let size = WindowSize { rows, cols };
    StartExec {
        tty: Some(Terminal { size, term: None }),
        ..exec
    }
}

/// Everything that a command wrote.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    pub stdout: String,
    pub stderr: String,
    /// Offset after the last byte.
    pub end: u64,
}

/// Reads the output of a command from `since` to its end, or until stdout has `lines` complete
/// lines.
pub(crate) async fn read(agent: &AgentConnection, id: &str, since: u64, lines: usize) -> Written {
    let mut output = agent.output(id, since, true).await.unwrap();
    let mut written = Written {
        end: since,
        ..Written::default()
    };
    while let Some(frame) = output.next().await {
        let (offset, bytes, into) = match frame.unwrap() {
            Frame::Stdout { offset, bytes } => (offset, bytes, &mut written.stdout),
            Frame::Stderr { offset, bytes } => (offset, bytes, &mut written.stderr),
            Frame::End { offset, .. } => {
                assert_eq!(offset, written.end);
                break;
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(offset, written.end, "a gap or a repetition");
        written.end += bytes.len() as u64;
        into.push_str(std::str::from_utf8(&bytes).unwrap());
        if written.stdout.matches('\n').count() >= lines {
            break;
        }
    }
    written
}

/// Runs a command to its end, and returns its output and exit code.
pub(crate) async fn run_in(agent: &AgentConnection, exec: StartExec) -> (Written, Option<i32>) {
    agent.start_exec(&exec).await.unwrap();
    let written = read(agent, &exec.id, 0, usize::MAX).await;
    let status = agent.exec(&exec.id).await.unwrap();
    (written, status.end.and_then(|end| end.exit_code))
}

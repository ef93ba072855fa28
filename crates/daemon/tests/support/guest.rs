//! Guests as their users access them: keys, SSH through the forward, and the hypervisor processes.

use super::{Host, TOKEN, eventually, output_of, run, text};
use scalebox_api::{CreateExec, CreateVm, CreateVmQuery, Vm, WaitFor};
use scalebox_client::Client;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// A user's key pair.
pub(crate) struct Key {
    pub private: PathBuf,
    pub public: String,
}

impl Key {
    pub(crate) fn new(host: &Host, name: &str) -> Key {
        let private = host.folder.join(name);
        run(
            "ssh-keygen",
            &["-q", "-t", "ed25519", "-N", "", "-C", name, "-f", text(&private)],
        );
        let public = fs::read_to_string(private.with_extension("pub"))
            .unwrap()
            .trim()
            .to_owned();
        Key { private, public }
    }

    pub(crate) fn request(&self, name: &str) -> CreateVm {
        let template = "debian-base".parse().unwrap();
        CreateVm {
            name: Some(name.parse().unwrap()),
            ..CreateVm::new(template, Some(self.public.parse().unwrap()))
        }
    }

    pub(crate) fn ssh(&self, vm: &Vm, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-i", text(&self.private), "-p", &vm.ssh_port.to_string()]);
        for option in [
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "IdentitiesOnly=yes",
            "ConnectTimeout=10",
        ] {
            ssh.args(["-o", option]);
        }
        ssh.args([&format!("user@{}", vm.ip), command]).stdin(Stdio::null());
        ssh
    }

    /// Returns the output of `command` in the guest.
    pub(crate) fn run(&self, vm: &Vm, command: &str) -> String {
        let output = self.ssh(vm, command).output().unwrap();
        assert!(
            output.status.success(),
            "{command:?} in {}: {}",
            vm.name,
            output_of(&output)
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn is_refused_by(&self, vm: &Vm) {
        let output = self.ssh(vm, "true").output().unwrap();
        assert!(
            !output.status.success() && output_of(&output).contains("Permission denied"),
            "{}",
            output_of(&output)
        );
    }
}

pub(crate) fn wait_for_ssh(vm: &Vm) {
    eventually(&format!("the SSH banner of {}", vm.name), || {
        let stream = TcpStream::connect((vm.ip.as_str(), vm.ssh_port)).ok()?;
        // One connection is kept open: each one dropped early costs the guest's sshd a process.
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut banner = String::new();
        BufReader::new(stream).read_line(&mut banner).ok()?;
        banner.starts_with("SSH-2.0").then_some(())
    });
}

/// Waits until the agent responds.
pub(crate) const WAIT: CreateVmQuery = CreateVmQuery {
    wait: Some(WaitFor::Agent),
    wait_seconds: Some(300),
};

/// Creates a VM without a key, and waits until commands can run in it.
pub(crate) fn create(client: &Client, template: &str, name: &str) -> Vm {
    let request = CreateVm {
        name: Some(name.parse().unwrap()),
        ..CreateVm::new(template.parse().unwrap(), None)
    };
    client.create_vm_and_wait(&request, WAIT).unwrap()
}

/// Returns the output of a command line, which must succeed.
pub(crate) fn sh(client: &Client, vm: &str, command: &str) -> String {
    let ended = client.run_exec(vm, &CreateExec::of_command(command)).unwrap();
    assert_eq!(ended.exit_code, Some(0), "{command}: {ended:?}");
    ended.stdout.trim().to_owned()
}

/// Returns the path of a program that is built next to the daemon.
pub(crate) fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_scaleboxd")).with_file_name(name)
}

/// Runs the command line without a terminal, key or input.
pub(crate) fn scalebox(host: &Host, args: &[&str]) -> Output {
    scalebox_with_input(host, args, "")
}

/// Runs the command line with `input` on stdin.
pub(crate) fn scalebox_with_input(host: &Host, args: &[&str], input: &str) -> Output {
    let program = program("scalebox");
    let mut command = Command::new(&program);
    command
        .args(args)
        .env("SCALEBOX_URL", &host.url)
        .env("SCALEBOX_TOKEN", TOKEN)
        .env("HOME", &host.folder);
    let file = host.folder.join("input");
    fs::write(&file, input).unwrap();
    let input = fs::File::open(&file).unwrap();
    command.stdin(input).output().unwrap_or_else(|error| {
        panic!("{}: {error}; `make test` builds it", program.display());
    })
}

/// Lists the hypervisor processes of this host.
pub(crate) fn machines(host: &Host) -> Vec<String> {
    let folder = host.folder.join("run/vms");
    let ours = |pid: &str| {
        let line = fs::read(Path::new("/proc").join(pid).join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains("qemu-system") && line.contains(text(&folder))
    };
    let processes = fs::read_dir("/proc")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    processes
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && ours(name))
        .collect()
}

pub(crate) fn machine_of(host: &Host, vm: &Vm) -> rustix::process::Pid {
    let command = |pid: &String| fs::read(Path::new("/proc").join(pid).join("cmdline")).unwrap_or_default();
    let ours = |pid: &String| String::from_utf8_lossy(&command(pid)).contains(&vm.id);
    let pid = machines(host).into_iter().find(ours).expect("its machine");
    rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap()
}

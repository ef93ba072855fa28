//! Measures how long a guest takes from the request to SSH or to its first command, and where the
//! time goes.

use crate::command::{SSH_OPTIONS, run};
use crate::disks::{DiskFactory, TEMPLATE};
use crate::measure::timed;
use crate::outcome::Outcome;
use crate::setup::Setup;
use crate::wait::wait_until;
use scalebox_api::{CreateExec, CreateVm, CreateVmQuery, Vm, WaitFor};
use scalebox_client::Client;
use serde::Serialize;
use std::io::Read;
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

/// The parts of one boot, in seconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Boot {
    /// Time from the request to the SSH server's banner.
    pub to_ssh_s: f64,
    /// Time until `POST /vms` returns: disk, seed drive, network, and a hypervisor that runs the
    /// guest.
    pub vmm_s: f64,
    /// Time from then until the guest's kernel starts the first program of its root, by the guest's
    /// clock.
    pub kernel_s: f64,
    /// Time of the remaining boot: from the first program to the banner.
    pub user_space_s: f64,
}

/// Creates a VM and waits until its guest responds to SSH.
pub(crate) fn measure(setup: &Setup, factory: &DiskFactory<'_>) -> Outcome<(Boot, Vm)> {
    let mut request = CreateVm::new(TEMPLATE.parse()?, Some(factory.key().clone()));
    request.disk_size_gib = Some(3);
    let begun = Instant::now();
    let vm = factory.client().create_vm(&request)?;
    let vmm = begun.elapsed();
    wait_for_ssh(vm.ssh_port)?;
    let to_ssh = begun.elapsed();
    let kernel = kernel_time(setup, vm.ssh_port)?;
    let boot = Boot {
        to_ssh_s: to_ssh.as_secs_f64(),
        vmm_s: vmm.as_secs_f64(),
        kernel_s: kernel.as_secs_f64(),
        user_space_s: to_ssh.saturating_sub(vmm + kernel).as_secs_f64(),
    };
    Ok((boot, vm))
}

/// Creates a VM of `template`, and runs `command` in it as soon as its agent responds. Returns the
/// time from the request to the command's result, and deletes the VM.
pub(crate) fn measure_first_exec(client: &Client, template: &str, command: &[&str]) -> Outcome<Duration> {
    let request = CreateVm::new(template.parse()?, None);
    let query = CreateVmQuery {
        wait: Some(WaitFor::Agent),
        wait_seconds: Some(240),
    };
    let exec = CreateExec::of_argv(command.iter().map(|&word| word.to_owned()).collect());
    let (time, (vm, ended)) = timed(|| {
        let vm = client.create_vm_and_wait(&request, query)?;
        let ended = client.run_exec(&vm.id, &exec)?;
        Ok((vm, ended))
    })?;
    client.delete_vm(&vm.id)?;
    match ended.exit_code {
        Some(0) => Ok(time),
        _ => Err(format!("{command:?} failed in a VM of {template}: {ended:?}").into()),
    }
}

/// Asks the guest's systemd when it started, in microseconds since the kernel did
/// (`UserspaceTimestampMonotonic`, org.freedesktop.systemd1(5)).
fn kernel_time(setup: &Setup, port: u16) -> Outcome<Duration> {
    let mut command = Command::new("ssh");
    command.args(SSH_OPTIONS).arg("-i").arg(setup.scratch.join("key"));
    command.args(["-p", &port.to_string(), "user@127.0.0.1"]);
    command.args(["systemctl", "show", "--value", "--property=UserspaceTimestampMonotonic"]);
    let text = run(&mut command)?;
    let micros = text
        .parse()
        .map_err(|_| format!("the guest does not report its boot times: {text}"))?;
    Ok(Duration::from_micros(micros))
}

/// Waits for the banner, which an SSH server sends first (RFC 4253, section 4.2).
pub(crate) fn wait_for_ssh(port: u16) -> Outcome<()> {
    wait_until("the guest responds to SSH", || {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
            return Ok(false);
        };
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut banner = [0; 4];
        Ok(stream.read_exact(&mut banner).is_ok() && &banner == b"SSH-")
    })
}

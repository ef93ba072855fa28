//! Measures how long a guest takes from the request to SSH, and where the time goes.

use crate::disks::{DiskFactory, TEMPLATE};
use crate::outcome::Outcome;
use crate::setup::Setup;
use crate::wait::wait_until;
use scalebox_api::{CreateVm, Vm};
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

/// Asks the guest's systemd when it started, in microseconds since the kernel did
/// (`UserspaceTimestampMonotonic`, org.freedesktop.systemd1(5)).
fn kernel_time(setup: &Setup, port: u16) -> Outcome<Duration> {
    let output = Command::new("ssh")
        .args([
            "-o",
            "BatchMode=yes",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ])
        .args(["-o", "LogLevel=ERROR", "-i"])
        .arg(setup.scratch.join("key"))
        .args(["-p", &port.to_string(), "user@127.0.0.1"])
        .args(["systemctl", "show", "--value", "--property=UserspaceTimestampMonotonic"])
        .output()
        .map_err(|error| format!("cannot run ssh: {error}; install it with scripts/deps.sh"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let micros = text.trim().parse().map_err(|_| {
        format!(
            "the guest does not report its boot times: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        )
    })?;
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

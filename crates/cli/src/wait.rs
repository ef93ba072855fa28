//! Waits until a guest has booted: until it responds to SSH, or its agent responds in a guest
//! without an init system, which has no SSH.

use crate::error::Error;
use crate::output::Output;
use crate::running::check_runs;
use indicatif::ProgressBar;
use scalebox_api::{Init, Vm};
use scalebox_client::{Client, ClientError};
use std::io::{self, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

/// Time between two connection attempts: short compared with a boot, long compared with a refused
/// connection.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
/// Time between two queries of the VM's status.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);
/// Maximum time to wait for a connection, and for the SSH banner on it.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Waits until `vm` has booted. Returns the VM as the server describes it then, and the time it
/// took.
///
/// # Errors
/// Fails with the VM's status as soon as it stops running, and after `timeout`.
pub(crate) fn until_booted(
    client: &Client,
    vm: Vm,
    timeout: Duration,
    output: &Output,
) -> Result<(Vm, Duration), Error> {
    let progress = output.progress(&format!("waiting for {} of {}", awaited(&vm), vm.name));
    let began = Instant::now();
    let (mut vm, mut queried) = (vm, began);
    loop {
        check_runs(&vm)?;
        let left = timeout.saturating_sub(began.elapsed());
        let attempt = match vm.init {
            Some(Init::Agent) => client.stats(&vm.id).map(drop).map_err(|error| error.to_string()),
            _ => read_ssh_banner(&vm, left.clamp(RETRY_INTERVAL, ATTEMPT_TIMEOUT)).map_err(|error| describe(&error)),
        };
        let Err(last_error) = attempt else {
            return Ok((refresh(client, vm)?, began.elapsed()));
        };
        show(&progress, &vm, &last_error);
        if began.elapsed() >= timeout {
            return Err(timed_out(vm, timeout.as_secs(), last_error));
        }
        thread::sleep(RETRY_INTERVAL);
        if queried.elapsed() >= STATUS_INTERVAL {
            vm = refresh(client, vm)?;
            queried = Instant::now();
        }
    }
}

fn awaited(vm: &Vm) -> &'static str {
    match vm.init {
        Some(Init::Agent) => "the agent",
        _ => "SSH",
    }
}

fn timed_out(vm: Vm, seconds: u64, last: String) -> Error {
    match vm.init {
        Some(Init::Agent) => Error::AgentTimeout {
            name: vm.name,
            seconds,
            last,
        },
        _ => Error::SshTimeout {
            address: format!("{}:{}", vm.ip, vm.ssh_port),
            name: vm.name,
            seconds,
            last,
        },
    }
}

/// Queries the VM again. An unreachable daemon does not end the wait: it may be restarting, and
/// the guest boots without it.
fn refresh(client: &Client, vm: Vm) -> Result<Vm, Error> {
    match client.vm(&vm.id) {
        Ok(vm) => Ok(vm),
        Err(ClientError::Unreachable { .. } | ClientError::Lost { .. }) => Ok(vm),
        Err(error) => Err(error.into()),
    }
}

fn show(progress: &ProgressBar, vm: &Vm, last_error: &str) {
    let address = match vm.init {
        Some(Init::Agent) => String::new(),
        _ => format!(" at {}:{}", vm.ip, vm.ssh_port),
    };
    let what = awaited(vm);
    progress.set_message(format!("waiting for {what} of {}{address} ({last_error})", vm.name));
}

/// Connects and reads until the identification line of an SSH 2 server. Other lines may precede it
/// (RFC 4253, section 4.2). A connection alone proves nothing: the forwarded port may accept long
/// before the guest does.
fn read_ssh_banner(vm: &Vm, timeout: Duration) -> io::Result<()> {
    const MAX_BANNER_BYTES: usize = 4096;
    let address = (vm.ip.as_str(), vm.ssh_port).to_socket_addrs()?.next();
    let address = address.ok_or_else(|| io::Error::other("no such address"))?;
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    let (mut received, mut buffer) = (Vec::new(), [0; 256]);
    while received.len() < MAX_BANNER_BYTES {
        if received
            .split(|&byte| byte == b'\n')
            .any(|line| line.starts_with(b"SSH-2.0-"))
        {
            return Ok(());
        }
        match stream.read(&mut buffer)? {
            0 => return Err(io::Error::other("the connection closed without an SSH banner")),
            n => received.extend_from_slice(&buffer[..n]),
        }
    }
    Err(io::Error::other("the response is not SSH"))
}

/// Describes an error that is expected while a guest boots, without its error number.
fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no response".to_owned(),
        io::ErrorKind::Other => error.to_string(),
        kind => kind.to_string(),
    }
}

//! Waiting until a guest answers SSH: the moment from which a VM is of use.

use crate::error::Error;
use crate::output::Output;
use crate::vm::check_runs;
use indicatif::ProgressBar;
use scalebox_client::{Client, ClientError, Vm};
use std::io::{self, Read};
use std::net::{TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

/// Between two tries. Short beside a boot, long beside a refused connection.
const PAUSE: Duration = Duration::from_millis(250);
/// Between two looks at the VM's status.
const LOOK: Duration = Duration::from_secs(2);
/// For a connection, and for a greeting over it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits until `vm` greets as an SSH server; returns it as the server then describes it, and how
/// long it took.
///
/// # Errors
/// At once when the VM no longer runs, with its reason; else when `timeout` is over.
pub fn until_ssh(client: &Client, vm: Vm, timeout: Duration, output: &Output) -> Result<(Vm, Duration), Error> {
    let progress = output.progress(&format!("waiting for SSH of {}", vm.name));
    let began = Instant::now();
    let (mut vm, mut looked) = (vm, began);
    loop {
        check_runs(&vm)?;
        let left = timeout.saturating_sub(began.elapsed());
        let silence = match greeting(&vm, left.clamp(PAUSE, PATIENCE)) {
            Ok(()) => return Ok((look_again(client, vm)?, began.elapsed())),
            Err(error) => said(&error),
        };
        show(&progress, &vm, &silence);
        if began.elapsed() >= timeout {
            let address = format!("{}:{}", vm.ip, vm.ssh_port);
            return Err(Error::Silent {
                name: vm.name,
                address,
                seconds: timeout.as_secs(),
                last: silence,
            });
        }
        thread::sleep(PAUSE);
        if looked.elapsed() >= LOOK {
            vm = look_again(client, vm)?;
            looked = Instant::now();
        }
    }
}

/// A daemon that is just being started anew does not end the wait: the guest boots on without it.
fn look_again(client: &Client, vm: Vm) -> Result<Vm, Error> {
    match client.vm(&vm.id) {
        Ok(vm) => Ok(vm),
        Err(ClientError::Unreachable { .. } | ClientError::Lost { .. }) => Ok(vm),
        Err(error) => Err(error.into()),
    }
}

fn show(progress: &ProgressBar, vm: &Vm, silence: &str) {
    progress.set_message(format!(
        "waiting for SSH of {} at {}:{} ({silence})",
        vm.name, vm.ip, vm.ssh_port
    ));
}

/// Connects and reads until the line that every SSH 2 server sends first, perhaps after others (RFC
/// 4253, section 4.2). A port that is forwarded may accept long before the guest does, so that a
/// connection alone says nothing.
fn greeting(vm: &Vm, patience: Duration) -> io::Result<()> {
    const LONGEST: usize = 4096;
    let address = (vm.ip.as_str(), vm.ssh_port).to_socket_addrs()?.next();
    let address = address.ok_or_else(|| io::Error::other("no such address"))?;
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let (mut heard, mut buffer) = (Vec::new(), [0; 256]);
    while heard.len() < LONGEST {
        if heard
            .split(|&byte| byte == b'\n')
            .any(|line| line.starts_with(b"SSH-2.0-"))
        {
            return Ok(());
        }
        match stream.read(&mut buffer)? {
            0 => return Err(io::Error::other("the connection ends without a greeting")),
            n => heard.extend_from_slice(&buffer[..n]),
        }
    }
    Err(io::Error::other("what answers is not SSH"))
}

/// The system's words for what is normal while a guest boots, without their numbers.
fn said(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer".to_owned(),
        io::ErrorKind::Other => error.to_string(),
        kind => kind.to_string(),
    }
}

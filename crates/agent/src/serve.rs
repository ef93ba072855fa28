//! Serves the host, in a process of its own.

use crate::run_dir::{self, RunDir};
use crate::server::Agent;
use crate::transport;
use rustix::process::{chdir, chroot};
use scalebox_agent_api::InitKind;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

/// The arguments with which the agent was started.
#[derive(Debug, PartialEq, Eq)]
pub struct ServeOptions {
    init: InitKind,
    /// The opened agent port, if the starting process had it.
    port: Option<RawFd>,
}

impl ServeOptions {
    /// Parses the arguments after `serve`: `--init=system` or `--init=agent`, and `--port=FD`.
    /// Returns `None` for others.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Option<ServeOptions> {
        let mut options = ServeOptions {
            init: InitKind::System,
            port: None,
        };
        for argument in arguments {
            match argument.split_once('=')? {
                ("--init", "system") => options.init = InitKind::System,
                ("--init", "agent") => options.init = InitKind::Agent,
                ("--port", fd) => options.port = Some(fd.parse().ok()?),
                _ => return None,
            }
        }
        Some(options)
    }
}

/// Serves the host until the guest ends. The working directory becomes the root: the process was
/// started in the initramfs, in the root file system that was about to become the guest's root.
///
/// # Errors
/// If the machine has no agent port and no vsock.
pub fn run(options: ServeOptions) -> io::Result<()> {
    chroot(".")?;
    chdir("/")?;
    let port = options.port.map(|fd| {
        // SAFETY: the starting process passed this descriptor on to this one, which owns it.
        unsafe { OwnedFd::from_raw_fd(fd) }
    });
    if let Some(port) = &port {
        rustix::io::fcntl_setfd(port, rustix::io::FdFlags::CLOEXEC)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let agent = Agent::new(options.init);
        if options.init == InitKind::Agent {
            start_main(&agent);
        }
        transport::run(agent, port).await
    })
}

/// Starts the main process of a guest without an init, if it has one.
fn start_main(agent: &Arc<Agent>) {
    let folder = Path::new(run_dir::FOLDER);
    match RunDir::at(folder).read_main() {
        Ok(Some(main)) => {
            let agent = Arc::clone(agent);
            tokio::spawn(async move { agent.supervise(main, folder).await });
        }
        Ok(None) => {}
        Err(error) => eprintln!("scalebox-agent: cannot start the main process: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_parsed_and_others_rejected() {
        let parse = |arguments: &[&str]| ServeOptions::parse(arguments.iter().map(|&argument| argument.to_owned()));
        let agent = parse(&["--init=agent", "--port=5"]);
        assert_eq!(
            agent,
            Some(ServeOptions {
                init: InitKind::Agent,
                port: Some(5)
            })
        );
        assert_eq!(parse(&["--init=other"]), None);
        assert_eq!(parse(&["--port=five"]), None);
        assert_eq!(parse(&["extra"]), None);
    }
}

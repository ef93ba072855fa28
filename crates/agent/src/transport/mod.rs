//! The connections on which the host reaches the agent.

pub(crate) mod port;
mod vsock;

use crate::server::{Agent, serve};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// Time between two connections on the serial port. The port reads as ended while no host is
/// connected.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(50);

/// Serves the host for as long as the guest runs. Uses the serial port if the machine has one,
/// otherwise the vsock.
///
/// # Errors
/// If the machine has neither.
pub(crate) async fn run(agent: Arc<Agent>, opened: Option<OwnedFd>) -> io::Result<()> {
    let opened = match opened {
        Some(port) => Some(port),
        None => port::open()?,
    };
    let Some(opened) = opened else {
        return vsock::serve_all(agent).await;
    };
    loop {
        let port = port::Port::new(opened.try_clone()?)?;
        if let Err(error) = serve(&agent, port).await
            && error.kind() != io::ErrorKind::UnexpectedEof
        {
            eprintln!("scalebox-agent: the connection to the host ended: {error}");
        }
        sleep(RECONNECT_INTERVAL).await;
    }
}

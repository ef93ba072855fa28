//! The vsock of the agent, under Firecracker.

use crate::server::{Agent, serve};
use scalebox_agent_api::VSOCK_PORT;
use std::io;
use std::sync::Arc;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

/// Accepts connections of the host and serves each in a task of its own.
///
/// # Errors
/// If the machine has no vsock.
pub(crate) async fn serve_all(agent: Arc<Agent>) -> io::Result<()> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, VSOCK_PORT))?;
    loop {
        let (stream, peer) = listener.accept().await?;
        // Programs of the guest could connect through the loopback transport.
        if peer.cid() != VMADDR_CID_HOST {
            continue;
        }
        let agent = Arc::clone(&agent);
        tokio::spawn(async move {
            if let Err(error) = serve(&agent, stream).await {
                eprintln!("scalebox-agent: a connection of the host ended: {error}");
            }
        });
    }
}

//! Shutdown through `qemu-guest-agent`.
//!
//! The power button and Ctrl+Alt+Del need a program in the guest that reacts to them. The agent
//! needs none.

use crate::error::Result;
use qapi::futures::QgaStreamTokio;
use qapi::qga::{GuestShutdownMode, guest_shutdown};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Timeout of one attempt. An agent that obeys sends no response, and neither does a missing one.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);

/// Limit on the data that the agent may send during one attempt. It runs in the guest and is not
/// trusted, and a response is buffered whole.
const MAX_RESPONSE_BYTES: u64 = 64 << 10;

/// Requests a shutdown of the guest from the agent. The request was successful if the machine ends.
pub(crate) async fn request_shutdown(agent: impl Future<Output = Result<UnixStream>>, mode: GuestShutdownMode) {
    let attempt = async {
        let stream = agent.await.map_err(std::io::Error::other)?;
        let (reader, writer) = tokio::io::split(stream);
        let (service, events) = QgaStreamTokio::open_split(reader.take(MAX_RESPONSE_BYTES), writer).into_parts();
        let command = service.execute(guest_shutdown { mode: Some(mode) });
        tokio::select! {
            response = command => response.map(drop).map_err(std::io::Error::from),
            closed = events => closed,
        }
    };
    if let Ok(Err(error)) = timeout(ATTEMPT_TIMEOUT, attempt).await {
        tracing::debug!(%error, "the guest agent did not accept the shutdown");
    }
}

//! The guest agent's own shutdown.
//!
//! The power button needs somebody in the guest who listens for it (logind or acpid); the agent does without.

use qapi::futures::QgaStreamTokio;
use qapi::qga::{GuestShutdownMode, guest_shutdown};
use std::path::Path;
use std::time::Duration;
use tokio::time::timeout;

/// The longest that one attempt lasts. An agent that obeys does not answer at all; one that is not there neither.
const ATTEMPT: Duration = Duration::from_secs(1);

/// Asks the agent to power the guest off. Whether it obeys is seen by the machine's end only.
pub(crate) async fn ask_to_shut_down(socket: &Path) {
    let attempt = async {
        let (service, events) = QgaStreamTokio::open_uds(socket).await?.into_parts();
        let command = service.execute(guest_shutdown {
            mode: Some(GuestShutdownMode::Powerdown),
        });
        tokio::select! {
            answer = command => answer.map(drop).map_err(std::io::Error::from),
            closed = events => closed,
        }
    };
    if let Ok(Err(error)) = timeout(ATTEMPT, attempt).await {
        tracing::debug!(%error, "the guest agent did not take the shutdown");
    }
}

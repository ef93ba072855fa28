//! The guest agent's own shutdown.
//!
//! The power button, and Ctrl+Alt+Del, need somebody in the guest who listens for them; the agent
//! does without.

use crate::Result;
use qapi::futures::QgaStreamTokio;
use qapi::qga::{GuestShutdownMode, guest_shutdown};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The longest that one attempt lasts. An agent that obeys does not answer at all; one that is not
/// there neither.
const ATTEMPT: Duration = Duration::from_secs(1);

/// What it may say meanwhile, in bytes: it is a guest's program, and an answer is read whole.
const MOST_SAID: u64 = 64 << 10;

/// Asks the agent to end the guest. Whether it obeys is seen by the machine's end only.
pub(crate) async fn ask_to_shut_down(agent: impl Future<Output = Result<UnixStream>>, mode: GuestShutdownMode) {
    let attempt = async {
        let stream = agent.await.map_err(std::io::Error::other)?;
        let (answers, questions) = tokio::io::split(stream);
        let (service, events) = QgaStreamTokio::open_split(answers.take(MOST_SAID), questions).into_parts();
        let command = service.execute(guest_shutdown { mode: Some(mode) });
        tokio::select! {
            answer = command => answer.map(drop).map_err(std::io::Error::from),
            closed = events => closed,
        }
    };
    if let Ok(Err(error)) = timeout(ATTEMPT, attempt).await {
        tracing::debug!(%error, "the guest agent did not take the shutdown");
    }
}

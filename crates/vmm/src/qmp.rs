//! QEMU's control socket (the QEMU Machine Protocol), every command with a deadline.
//!
//! A command's answer comes in through the event stream: as long as commands are sent, somebody has to poll the [`Events`].

use futures::StreamExt;
use qapi::futures::{QapiEvents, QapiService, QmpStreamTokio};
use qapi::qmp::{Event, QmpCommand};
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The longest that QEMU may take to answer a command. It answers in milliseconds; a host that emulates many guests on few
/// cores, in seconds.
pub(crate) const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// The longest that a freshly connected QEMU may take for its greeting. It is silent while another client is connected.
const GREETING_DEADLINE: Duration = Duration::from_secs(2);

/// What QEMU says unasked.
pub(crate) struct Events(QapiEvents<QmpStreamTokio<ReadHalf<UnixStream>>>);

/// A connected control socket.
pub(crate) struct Qmp(QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>);

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("no answer within {0:?}")]
    Hung(Duration),
    #[error("{0}")]
    Refused(String),
}

impl Qmp {
    pub(crate) async fn connect(socket: &Path) -> Result<(Qmp, Events), QmpError> {
        let handshake = async {
            let greeted = QmpStreamTokio::open_uds(socket).await?;
            // Answers carry the number of their command only where out-of-band execution exists (QEMU 2.12). Without, a command
            // given up on would take the next one's answer.
            if !greeted.capabilities.supports_oob() {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "this QEMU does not number its answers",
                ));
            }
            Ok(greeted.negotiate().await?.into_parts())
        };
        match timeout(GREETING_DEADLINE, handshake).await {
            Ok(Ok((service, events))) => Ok((Qmp(service), Events(events))),
            Ok(Err(error)) => Err(QmpError::Refused(error.to_string())),
            Err(_) => Err(QmpError::Hung(GREETING_DEADLINE)),
        }
    }

    /// Sends one command and waits for its answer. If the future is dropped, the command may still be carried out.
    pub(crate) async fn execute<C: QmpCommand>(&self, command: C) -> Result<C::Ok, QmpError> {
        match timeout(COMMAND_DEADLINE, self.0.execute(command)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(QmpError::Refused(error.to_string())),
            Err(_) => Err(QmpError::Hung(COMMAND_DEADLINE)),
        }
    }
}

impl Events {
    /// The next event; `None` when the connection is over. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            match self.0.next().await? {
                Ok(event) => return Some(event),
                // The answer to a command that was given up on, or an event of a newer QEMU.
                Err(error) => tracing::debug!(%error, "QMP message ignored"),
            }
        }
    }
}

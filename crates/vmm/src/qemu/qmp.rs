//! QEMU's control socket (QEMU Machine Protocol); every command has a timeout.
//!
//! Commands run one at a time, and a started command is never abandoned. The crate `qapi` does not
//! number commands (it would on the capability `oob`, which it does not recognise), so a response
//! belongs to whichever caller waits. If a caller's future is dropped, its command still runs to
//! completion. A command that times out closes the connection, and the next command uses a new one.
//! So does a command that could not be sent: `qapi` keeps waiting for its response, and would treat
//! the next command as a second one of the same number.
//!
//! Responses arrive through the event stream: while commands are sent, some task must poll the
//! [`Events`].

use futures::StreamExt;
use qapi::ExecuteError;
use qapi::futures::{QapiEvents, QapiService, QmpStreamTokio};
use qapi::qmp::{Event, QmpCommand};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;

/// Timeout of one command. QEMU usually responds within milliseconds, but within seconds on a host
/// that emulates many guests on few cores.
pub(crate) const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout for the greeting. QEMU is silent while another client is connected.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);

/// The events that QEMU emits.
pub(crate) struct Events {
    stream: QapiEvents<QmpStreamTokio<ReadHalf<UnixStream>>>,
    closed: Arc<Notify>,
}

/// A connected control socket.
#[derive(Clone)]
pub(crate) struct Qmp {
    connection: Arc<Mutex<Connection>>,
    closed: Arc<Notify>,
}

enum Connection {
    Open(QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>),
    /// A command timed out. A late response would be mistaken for that of another command.
    TimedOut,
    /// The socket is broken: QEMU has ended, or is about to.
    Broken(String),
}

/// The error of a command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("no response within {0:?}")]
    TimedOut(Duration),
    #[error("{0}")]
    Refused(String),
}

impl Qmp {
    pub(crate) async fn connect(socket: &Path) -> Result<(Qmp, Events), QmpError> {
        let handshake = async { QmpStreamTokio::open_uds(socket).await?.negotiate().await };
        let (service, stream) = match timeout(GREETING_TIMEOUT, handshake).await {
            Ok(Ok(connected)) => connected.into_parts(),
            Ok(Err(error)) => return Err(QmpError::Refused(error.to_string())),
            Err(_) => return Err(QmpError::TimedOut(GREETING_TIMEOUT)),
        };
        let closed = Arc::new(Notify::new());
        let qmp = Qmp {
            connection: Arc::new(Mutex::new(Connection::Open(service))),
            closed: closed.clone(),
        };
        Ok((qmp, Events { stream, closed }))
    }

    /// Sends one command and waits for the response. If the future is dropped, the command is still
    /// executed.
    pub(crate) async fn execute<C>(&self, command: C) -> Result<C::Ok, QmpError>
    where
        C: QmpCommand + Send + 'static,
        C::Ok: Send,
    {
        let result = tokio::spawn(self.clone().run(command)).await;
        result.unwrap_or_else(|error| Err(QmpError::Refused(error.to_string())))
    }

    async fn run<C: QmpCommand>(self, command: C) -> Result<C::Ok, QmpError> {
        let mut connection = self.connection.lock().await;
        let service = match &*connection {
            Connection::Open(service) => service,
            Connection::TimedOut => return Err(QmpError::TimedOut(COMMAND_TIMEOUT)),
            Connection::Broken(why) => return Err(QmpError::Refused(why.clone())),
        };
        match timeout(COMMAND_TIMEOUT, service.execute(command)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(ExecuteError::Qapi(error))) => Err(QmpError::Refused(error.to_string())),
            Ok(Err(ExecuteError::Io(error))) => {
                let why = error.to_string();
                *connection = Connection::Broken(why.clone());
                self.closed.notify_one();
                Err(QmpError::Refused(why))
            }
            Err(_) => {
                *connection = Connection::TimedOut;
                self.closed.notify_one();
                Err(QmpError::TimedOut(COMMAND_TIMEOUT))
            }
        }
    }
}

impl Events {
    /// Returns the next event, or `None` once the connection is closed. Dropping the future loses
    /// nothing.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            let message = tokio::select! {
                message = self.stream.next() => message?,
                () = self.closed.notified() => return None,
            };
            match message {
                Ok(event) => return Some(event),
                // The event may be one that only a newer QEMU has.
                Err(error) => tracing::debug!(%error, "ignoring a QMP message"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::qmp::query_status;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;

    /// Sends QEMU's greeting and accepts the client's capabilities command.
    async fn greet(listener: UnixListener) -> UnixStream {
        let (mut client, _) = listener.accept().await.unwrap();
        let greeting = r#"{"QMP":{"version":{"qemu":{"micro":0,"minor":2,"major":7},"package":""},"capabilities":[]}}"#;
        client.write_all(format!("{greeting}\n").as_bytes()).await.unwrap();
        let mut line = String::new();
        BufReader::new(&mut client).read_line(&mut line).await.unwrap();
        client.write_all(b"{\"return\":{}}\n").await.unwrap();
        client
    }

    #[tokio::test]
    async fn every_command_on_a_broken_socket_fails() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let server = tokio::spawn(greet(UnixListener::bind(&socket).unwrap()));
        let (qmp, mut events) = Qmp::connect(&socket).await.unwrap();
        // No task polls the events, as when the machine's end was detected otherwise: the commands
        // detect the broken socket themselves.
        drop(server.await.unwrap());
        for _ in 0..3 {
            let outcome = qmp.execute(query_status {}).await;
            assert!(matches!(outcome, Err(QmpError::Refused(_))), "{outcome:?}");
        }
        assert!(events.next().await.is_none(), "the connection is over");
    }
}

//! QEMU's control socket (the QEMU Machine Protocol), every command with a deadline.
//!
//! Commands go one at a time, and none is ever left half-way: crate `qapi` does not number them (it
//! does not recognise the capability that it would take as the sign, `oob`), so an answer belongs
//! to whoever waits. A caller who goes away leaves his command running; one that has no answer in
//! time ends the connection, and the next one starts afresh. So does one that could not be sent:
//! `qapi` goes on waiting for its answer, and takes the next command for a second one of the same
//! number.
//!
//! An answer comes in through the event stream: as long as commands are sent, somebody has to poll
//! the [`Events`].

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

/// The longest that QEMU may take to answer a command. It answers in milliseconds; a host that
/// emulates many guests on few cores, in seconds.
pub(crate) const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// The longest that QEMU may take to greet. It is silent while another client is connected.
const GREETING_DEADLINE: Duration = Duration::from_secs(2);

/// What QEMU says unasked.
pub(crate) struct Events {
    stream: QapiEvents<QmpStreamTokio<ReadHalf<UnixStream>>>,
    given_up: Arc<Notify>,
}

/// A connected control socket.
#[derive(Clone)]
pub(crate) struct Qmp {
    line: Arc<Mutex<Line>>,
    given_up: Arc<Notify>,
}

enum Line {
    Open(QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>),
    /// A command had no answer in time. Should it come yet, it would be taken for another's.
    GivenUp,
    /// The socket is broken: QEMU is gone, or about to be.
    Broken(String),
}

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
        let handshake = async { QmpStreamTokio::open_uds(socket).await?.negotiate().await };
        let (service, stream) = match timeout(GREETING_DEADLINE, handshake).await {
            Ok(Ok(connected)) => connected.into_parts(),
            Ok(Err(error)) => return Err(QmpError::Refused(error.to_string())),
            Err(_) => return Err(QmpError::Hung(GREETING_DEADLINE)),
        };
        let given_up = Arc::new(Notify::new());
        let qmp = Qmp {
            line: Arc::new(Mutex::new(Line::Open(service))),
            given_up: given_up.clone(),
        };
        Ok((qmp, Events { stream, given_up }))
    }

    /// Sends one command and waits for its answer. If the future is dropped, the command is carried
    /// out all the same.
    pub(crate) async fn execute<C>(&self, command: C) -> Result<C::Ok, QmpError>
    where
        C: QmpCommand + Send + 'static,
        C::Ok: Send,
    {
        let answered = tokio::spawn(self.clone().carry_out(command)).await;
        answered.unwrap_or_else(|error| Err(QmpError::Refused(error.to_string())))
    }

    async fn carry_out<C: QmpCommand>(self, command: C) -> Result<C::Ok, QmpError> {
        let mut line = self.line.lock().await;
        let service = match &*line {
            Line::Open(service) => service,
            Line::GivenUp => return Err(QmpError::Hung(COMMAND_DEADLINE)),
            Line::Broken(why) => return Err(QmpError::Refused(why.clone())),
        };
        match timeout(COMMAND_DEADLINE, service.execute(command)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ExecuteError::Qapi(error))) => Err(QmpError::Refused(error.to_string())),
            Ok(Err(ExecuteError::Io(error))) => {
                let why = error.to_string();
                *line = Line::Broken(why.clone());
                self.given_up.notify_one();
                Err(QmpError::Refused(why))
            }
            Err(_) => {
                *line = Line::GivenUp;
                self.given_up.notify_one();
                Err(QmpError::Hung(COMMAND_DEADLINE))
            }
        }
    }
}

impl Events {
    /// The next event; `None` when the connection is over. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            let message = tokio::select! {
                message = self.stream.next() => message?,
                () = self.given_up.notified() => return None,
            };
            match message {
                Ok(event) => return Some(event),
                // Such as an event that only a newer QEMU has.
                Err(error) => tracing::debug!(%error, "QMP message ignored"),
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

    /// Greets as QEMU does, and takes its capabilities' command.
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
    async fn commands_on_a_broken_socket_are_refused_one_after_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let server = tokio::spawn(greet(UnixListener::bind(&socket).unwrap()));
        let (qmp, mut events) = Qmp::connect(&socket).await.unwrap();
        // Nobody polls the events, as when the machine's end was heard of otherwise: the commands
        // find out by themselves.
        drop(server.await.unwrap());
        for _ in 0..3 {
            let outcome = qmp.execute(query_status {}).await;
            assert!(matches!(outcome, Err(QmpError::Refused(_))), "{outcome:?}");
        }
        assert!(events.next().await.is_none(), "the connection is over");
    }
}

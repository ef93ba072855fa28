//! The command `scalebox events`.

use crate::error::Error;
use crate::output::Output;
use scalebox_api::Event;
use scalebox_client::{Client, ClientError};
use std::thread;
use std::time::Duration;

/// Time between two attempts to reconnect.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);

/// Prints events, and resumes after the last one when the connection is lost.
pub(crate) fn events(client: &Client, since: Option<u64>, follow: bool, output: &Output) -> Result<(), Error> {
    // Without following, the stream has only past events: start with the oldest.
    let mut since = since.or((!follow).then_some(0));
    let mut stream = client.events(since, follow)?;
    loop {
        for event in stream.by_ref() {
            match event {
                Ok(event) => show(&event, output)?,
                Err(ClientError::Lost { .. }) if follow => break,
                Err(error) => return Err(error.into()),
            }
        }
        if !follow {
            return Ok(());
        }
        since = stream.last_id().or(since);
        output.hint("lost the connection to the server; reconnecting");
        stream = reconnect(client, since)?;
        output.hint("reconnected to the server");
    }
}

fn reconnect(client: &Client, since: Option<u64>) -> Result<scalebox_client::EventStream, ClientError> {
    loop {
        match client.events(since, true) {
            Err(ClientError::Unreachable { .. } | ClientError::Lost { .. }) => thread::sleep(RECONNECT_INTERVAL),
            other => return other,
        }
    }
}

fn show(event: &Event, output: &Output) -> Result<(), Error> {
    if output.json {
        return output.json_line(event);
    }
    let name = event.vm.as_ref().map_or("-", |vm| vm.name.as_str());
    let details: Vec<_> = event
        .details
        .iter()
        .map(|(field, value)| match value.as_str() {
            Some(text) if text.chars().all(|c| c.is_alphanumeric() || c.is_ascii_punctuation()) => {
                format!("{field}={text}")
            }
            // The value is quoted as JSON: text from a guest must not be mistaken for our own
            // output.
            _ => format!("{field}={value}"),
        })
        .collect();
    let line = format!("{}  {:16}  {name:24}  {}", event.at, event.kind, details.join(" "));
    output.line(line.trim_end())
}

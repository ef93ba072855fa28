//! `scalebox events`.

use crate::error::Error;
use crate::output::Output;
use scalebox_client::{Client, ClientError, Event};
use std::thread;
use std::time::Duration;

/// Between two attempts to reach a server that went away.
const AGAIN: Duration = Duration::from_secs(1);

/// Shows what happens; goes on where it was after the server was away.
pub fn events(client: &Client, since: Option<u64>, follow: bool, output: &Output) -> Result<(), Error> {
    // All that is kept, where nothing is waited for.
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
        output.hint("the server is away; waiting for it");
        stream = reach(client, since)?;
        output.hint("it is back");
    }
}

fn reach(client: &Client, since: Option<u64>) -> Result<scalebox_client::EventStream, ClientError> {
    loop {
        match client.events(since, true) {
            Err(ClientError::Unreachable { .. } | ClientError::Lost { .. }) => thread::sleep(AGAIN),
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
            // Quoted: what a guest has said must not look like a line of ours.
            _ => format!("{field}={value}"),
        })
        .collect();
    let line = format!("{}  {:16}  {name:24}  {}", event.at, event.kind, details.join(" "));
    output.line(line.trim_end())
}

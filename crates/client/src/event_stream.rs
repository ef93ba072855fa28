//! Reads `GET /events`, a stream of server-sent events
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

use crate::error::ClientError;
use scalebox_api::Event;
use std::io::{BufRead, BufReader, Read};

/// An iterator over the events of a host. It ends when the daemon ends the stream, and returns an
/// error when the connection is lost. To resume, request the events after [`EventStream::last_id`].
pub struct EventStream {
    lines: BufReader<Box<dyn Read + Send>>,
    /// The request, `GET http://HOST:PORT/events`, for error messages.
    call: String,
    last_id: Option<u64>,
}

/// Maximum length of a line or an event.
const MAX_EVENT_BYTES: u64 = 1 << 20;

impl EventStream {
    pub(crate) fn new(body: impl Read + Send + 'static, call: String) -> Self {
        EventStream {
            lines: BufReader::new(Box::new(body)),
            call,
            last_id: None,
        }
    }

    /// Returns the id after which to resume. That is the id of the last event read, or, before the
    /// first one, the id of the daemon's latest event.
    pub fn last_id(&self) -> Option<u64> {
        self.last_id
    }

    /// Returns the data of the next event; `None` at the end of the stream. An incomplete event is
    /// dropped.
    fn data(&mut self) -> Result<Option<String>, ClientError> {
        let mut data = String::new();
        loop {
            let mut line = String::new();
            let read = self.lines.by_ref().take(MAX_EVENT_BYTES).read_line(&mut line);
            match read {
                Ok(0) => return Ok(None),
                Ok(_) if line.ends_with('\n') => {}
                Ok(_) if line.len() as u64 == MAX_EVENT_BYTES => return Err(self.protocol("a line of over 1 MiB")),
                Ok(_) => return Ok(None),
                Err(error) => {
                    return Err(ClientError::Lost {
                        call: self.call.clone(),
                        why: error.to_string(),
                        hint: "request the events after the last one",
                    });
                }
            }
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() && !data.is_empty() {
                return Ok(Some(data));
            }
            if let Some(id) = line.strip_prefix("id:") {
                self.last_id = id.trim().parse().ok().or(self.last_id);
            }
            // The field `event` repeats the kind in the data; a line that begins with a colon is a
            // keep-alive comment. Both are skipped.
            if let Some(value) = line.strip_prefix("data:") {
                if !data.is_empty() {
                    data.push('\n');
                }
                data += value.strip_prefix(' ').unwrap_or(value);
            }
            if data.len() as u64 > MAX_EVENT_BYTES {
                return Err(self.protocol("an event of over 1 MiB"));
            }
        }
    }

    fn protocol(&self, received: &str) -> ClientError {
        ClientError::Protocol {
            call: self.call.clone(),
            why: received.to_owned(),
        }
    }
}

impl Iterator for EventStream {
    type Item = Result<Event, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        let data = match self.data() {
            Ok(data) => data?,
            Err(error) => return Some(Err(error)),
        };
        let event = serde_json::from_str(&data);
        Some(event.map_err(|error| self.protocol(&format!("an invalid event ({error})"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_api::EventKind;

    fn events(text: &'static str) -> Vec<Result<Event, ClientError>> {
        EventStream::new(text.as_bytes(), "GET http://x/events".into()).collect()
    }

    #[test]
    fn keep_alive_comments_and_incomplete_events_are_skipped() {
        let stream = "id: 6\n: here\n\nevent: created\r\nid: 7\r\ndata: {\"id\": 7, \"at\": \"now\", \"kind\": \"created\"}\r\n\r\n: alive\n\n\
            data:{\"id\":8,\"at\":\"now\",\ndata: \"kind\":\"deleted\",\"details\":{}}\n\nid: 9\ndata: {\"id\": 9";
        let read: Vec<_> = events(stream).into_iter().map(Result::unwrap).collect();
        let read: Vec<_> = read.into_iter().map(|event| (event.id, event.kind)).collect();
        assert_eq!(read, [(7, EventKind::Created), (8, EventKind::Deleted)]);
    }

    #[test]
    fn a_stream_without_events_has_an_id_to_resume_after() {
        let mut stream = EventStream::new(&b"id: 6\n: here\n\n"[..], String::new());
        assert!(stream.next().is_none());
        assert_eq!(stream.last_id(), Some(6));
    }

    #[test]
    fn invalid_events_are_errors() {
        let read = events("data: hello\n\n");
        assert!(matches!(read[..], [Err(ClientError::Protocol { .. })]), "{read:?}");
    }
}

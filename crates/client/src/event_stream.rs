//! Reading `GET /events`: server-sent events
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>) off a response's body.

use crate::event::Event;
use crate::http::ClientError;
use std::io::{BufRead, BufReader, Read};

/// The events of a host as they happen; ends where the daemon ends the stream, with an error where
/// the connection breaks off. To go on from there, ask again with the last event's id.
pub struct EventStream {
    lines: BufReader<Box<dyn Read + Send>>,
    /// `GET http://HOST:PORT/events`, for errors.
    call: String,
    last_id: Option<u64>,
}

/// No event is longer than this many bytes.
const LONGEST: u64 = 1 << 20;

impl EventStream {
    pub(crate) fn new(body: impl Read + Send + 'static, call: String) -> Self {
        EventStream {
            lines: BufReader::new(Box::new(body)),
            call,
            last_id: None,
        }
    }

    /// The id to go on from after this stream: that of the last event read, or the daemon's last
    /// before the first.
    pub fn last_id(&self) -> Option<u64> {
        self.last_id
    }

    /// The data of the next event; `None` at the stream's end. One that is cut off is not an event.
    fn data(&mut self) -> Result<Option<String>, ClientError> {
        let mut data = String::new();
        loop {
            let mut line = String::new();
            let read = self.lines.by_ref().take(LONGEST).read_line(&mut line);
            match read {
                Ok(0) => return Ok(None),
                Ok(_) if line.ends_with('\n') => {}
                Ok(_) if line.len() as u64 == LONGEST => return Err(self.not_understood("an endless line")),
                Ok(_) => return Ok(None),
                Err(error) => {
                    return Err(ClientError::Lost {
                        call: self.call.clone(),
                        why: error.to_string(),
                        hint: "ask again for the events since the last",
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
            // The kind stands in the data too; a line that begins with a colon is a sign of life.
            if let Some(value) = line.strip_prefix("data:") {
                if !data.is_empty() {
                    data.push('\n');
                }
                data += value.strip_prefix(' ').unwrap_or(value);
            }
            if data.len() as u64 > LONGEST {
                return Err(self.not_understood("an endless event"));
            }
        }
    }

    fn not_understood(&self, what: &str) -> ClientError {
        ClientError::Protocol {
            call: self.call.clone(),
            why: what.to_owned(),
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
        Some(event.map_err(|error| self.not_understood(&format!("an event that is none ({error})"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventKind;

    fn events(text: &'static str) -> Vec<Result<Event, ClientError>> {
        EventStream::new(text.as_bytes(), "GET http://x/events".into()).collect()
    }

    #[test]
    fn events_are_read_between_signs_of_life_and_one_cut_off_is_none() {
        let stream = "id: 6\n: here\n\nevent: created\r\nid: 7\r\ndata: {\"id\": 7, \"at\": \"now\", \"kind\": \"created\"}\r\n\r\n: alive\n\n\
            data:{\"id\":8,\"at\":\"now\",\ndata: \"kind\":\"deleted\",\"details\":{}}\n\nid: 9\ndata: {\"id\": 9";
        let read: Vec<_> = events(stream).into_iter().map(Result::unwrap).collect();
        let read: Vec<_> = read.into_iter().map(|event| (event.id, event.kind)).collect();
        assert_eq!(read, [(7, EventKind::Created), (8, EventKind::Deleted)]);
    }

    #[test]
    fn a_stream_without_events_tells_where_to_go_on() {
        let mut stream = EventStream::new(&b"id: 6\n: here\n\n"[..], String::new());
        assert!(stream.next().is_none());
        assert_eq!(stream.last_id(), Some(6));
    }

    #[test]
    fn what_is_no_event_is_an_error() {
        let read = events("data: hello\n\n");
        assert!(matches!(read[..], [Err(ClientError::Protocol { .. })]), "{read:?}");
    }
}

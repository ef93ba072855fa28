//! Reads the output of an exec, a stream of JSON lines.

use crate::error::ClientError;
use scalebox_api::OutputLine;
use std::io::{BufRead, BufReader, Read};

/// An iterator over the lines of an exec's output. After the last line (`Exit` or `Failed`) it
/// ends; if the stream ends earlier, it returns an error.
pub struct OutputStream {
    lines: BufReader<Box<dyn Read + Send>>,
    /// The request, for error messages.
    call: String,
    /// `true` if the stream may end without a last line, because it shows only past output.
    may_end: bool,
    has_ended: bool,
}

/// Maximum length of a line. The daemon's lines have at most 64 KiB of output, in base64.
const MAX_LINE_BYTES: u64 = 1 << 20;

impl OutputStream {
    pub(crate) fn new(body: impl Read + Send + 'static, call: String, may_end: bool) -> Self {
        OutputStream {
            lines: BufReader::new(Box::new(body)),
            call,
            may_end,
            has_ended: false,
        }
    }

    fn read(&mut self) -> Result<Option<OutputLine>, ClientError> {
        let mut line = Vec::new();
        let read = self.lines.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
        match read {
            Ok(0) if self.may_end => Ok(None),
            Ok(_) if line.ends_with(b"\n") => match serde_json::from_slice(&line) {
                Ok(line) => Ok(Some(line)),
                Err(error) => Err(self.protocol(format!("an invalid line ({error})"))),
            },
            Ok(_) if line.len() as u64 == MAX_LINE_BYTES => Err(self.protocol("a line of over 1 MiB".to_owned())),
            Ok(_) => Err(self.lost("the stream ended before the command".to_owned())),
            Err(error) => Err(self.lost(error.to_string())),
        }
    }

    fn protocol(&self, why: String) -> ClientError {
        ClientError::Protocol {
            call: self.call.clone(),
            why,
        }
    }

    fn lost(&self, why: String) -> ClientError {
        ClientError::Lost {
            call: self.call.clone(),
            why,
            hint: "the command may still run: scalebox exec --list shows it",
        }
    }
}

impl Iterator for OutputStream {
    type Item = Result<OutputLine, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        let line = self.read().transpose();
        self.has_ended = matches!(
            line,
            None | Some(Err(_) | Ok(OutputLine::Exit { .. } | OutputLine::Failed(_)))
        );
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &'static str, may_end: bool) -> Vec<Result<OutputLine, ClientError>> {
        OutputStream::new(text.as_bytes(), "GET http://x".into(), may_end).collect()
    }

    #[test]
    fn streams_end_after_the_last_line_or_with_an_error() {
        let start = "{\"exec\":\"exec-0123456789ab\"}\n{\"stdout\":\"aGkK\",\"offset\":0}\n";
        let end = "{\"exit\":{\"exit_code\":0,\"signal\":null,\"timed_out\":false,\"duration_ms\":1}}\n";
        let complete: &'static str = format!("{start}{end}ignored\n").leak();
        assert!(read(complete, false).into_iter().all(|line| line.is_ok()));
        assert_eq!(read(complete, false).len(), 3);
        let start: &'static str = start.to_owned().leak();
        assert!(matches!(read(start, false)[..], [_, _, Err(ClientError::Lost { .. })]));
        assert_eq!(read(start, true).len(), 2);
        assert!(matches!(read("{\"std", true)[..], [Err(ClientError::Lost { .. })]));
        assert!(matches!(read("hello\n", true)[..], [Err(ClientError::Protocol { .. })]));
    }
}

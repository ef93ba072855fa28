//! The output of an exec as a response.

use crate::exec::buffer::{Following, Output};
use crate::exec::table::Exec;
use crate::server::{Failure, Query, Response, stream};
use bytes::Bytes;
use scalebox_agent_api::FailureCode;
use scalebox_agent_api::frame::Frame;
use std::io;
use std::sync::Arc;

/// Responds with the frames from the offset `since` on, and with `follow` until the exec has ended.
pub(crate) fn respond(exec: &Exec, query: &Query) -> Result<Response, Failure> {
    let position = query.parsed("since")?.unwrap_or(0);
    let output = Arc::clone(&exec.output);
    let (_, end) = output.range();
    if position > end {
        let error = format!("the offset {position} is after the end of the output, {end}");
        return Err(Failure::new(FailureCode::Invalid, error));
    }
    match query.flag("follow")? {
        true => Ok(follow(exec, position)),
        false => Ok(frames(Reader {
            following: None,
            output,
            position,
            until: end,
        })),
    }
}

/// Responds with the frames from the offset `position` on, until the exec has ended.
pub(crate) fn follow(exec: &Exec, position: u64) -> Response {
    let output = Arc::clone(&exec.output);
    frames(Reader {
        following: Some(output.follow(position)),
        output,
        position,
        until: u64::MAX,
    })
}

fn frames(reader: Reader) -> Response {
    stream(futures::stream::unfold(Some(reader), |reader| async {
        reader?.next().await
    }))
}

struct Reader {
    output: Arc<Output>,
    following: Option<Following>,
    position: u64,
    until: u64,
}

impl Reader {
    /// Returns the next frames, and the reader unless they are the last ones.
    async fn next(mut self) -> Option<(io::Result<Bytes>, Option<Reader>)> {
        let output = Arc::clone(&self.output);
        loop {
            let grown = output.grown();
            let mut frames = Vec::new();
            let (position, end) = output.read(self.position, self.until, &mut frames);
            self.position = position;
            if let Some(following) = &self.following {
                following.has_read(position);
            }
            if let Some(end) = end {
                Frame::End { offset: position, end }.encode(&mut frames);
                return Some((Ok(frames.into()), None));
            }
            if !frames.is_empty() {
                return Some((Ok(frames.into()), Some(self)));
            }
            if position >= self.until {
                return None;
            }
            grown.await;
        }
    }
}

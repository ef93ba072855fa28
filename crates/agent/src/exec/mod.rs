//! Commands: start, output, signals, terminals.
//!
//! | file | content |
//! |---|---|
//! | `start` | from a request to a running exec |
//! | `check`, `image`, `streams`, `launch` | its steps: limits, program, pipes, process |
//! | `wait`, `copy` | from a running exec to its end |
//! | `supervise` | the main process of a guest without an init, and its restarts |
//! | `buffer`, `ring` | the output in between, in bounded memory |
//! | `output`, `stdin`, `signal`, `resize` | requests for an exec |
//! | `table` | all execs |

mod buffer;
mod check;
mod copy;
mod image;
mod launch;
mod output;
mod resize;
mod ring;
mod signal;
mod start;
mod stdin;
mod streams;
mod supervise;
mod table;
mod wait;

pub(crate) use supervise::supervise;
pub(crate) use table::Execs;

use crate::server::{Failure, Query, Request, Response, json, no_content, no_route, read_json};
use hyper::Method;
use scalebox_agent_api::{Signal, WindowSize};
use std::sync::Arc;

/// Responds to a request below `/v1/execs`; `rest` is the path after it.
pub(crate) async fn respond(execs: &Arc<Execs>, request: Request, rest: &[&str]) -> Result<Response, Failure> {
    let method = request.method().clone();
    match (method, rest) {
        (Method::POST, []) => {
            let follow = Query::of(&request).flag("follow")?;
            let status = start::start(execs, read_json(request).await?).await?;
            match follow {
                true => Ok(output::follow(&*execs.get(&status.id)?, 0)),
                false => Ok(json(&status)),
            }
        }
        (Method::GET, []) => Ok(json(&execs.list())),
        (Method::GET, [id]) => Ok(json(&execs.get(id)?.status())),
        (Method::GET, [id, "output"]) => output::respond(&*execs.get(id)?, &Query::of(&request)),
        (Method::POST, [id, "stdin"]) => {
            let close = Query::of(&request).flag("close")?;
            stdin::respond(&*execs.get(id)?, request, close).await
        }
        (Method::POST, [id, "signal"]) => {
            let exec = execs.get(id)?;
            let Signal { signal } = read_json(request).await?;
            signal::send(&exec, signal).map(|()| no_content())
        }
        (Method::POST, [id, "resize"]) => {
            let exec = execs.get(id)?;
            let size: WindowSize = read_json(request).await?;
            resize::resize(&exec, size).map(|()| no_content())
        }
        _ => Err(no_route(&request)),
    }
}

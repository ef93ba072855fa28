//! `GET /vms/{vm}/stats` and `GET /vms/{vm}/console`.

use crate::host::error::ServiceError;
use crate::host::{Host, blocking};
use crate::http::extract::Segment;
use crate::http::query::{MAX_OFFSET, Params};
use crate::vm::guest;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::Uri;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream};
use scalebox_api::VmStats;
use scalebox_units::VmId;
use scalebox_vmm::{CONSOLE_LIMIT, ConsoleReader};
use std::io;
use std::time::Duration;
use tokio::time::sleep;

/// Interval at which a log that is followed is read.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(250);

/// Returns load and memory of a VM, as its agent reports them.
#[utoipa::path(
    get, path = "/vms/{vm}/stats", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses(
        (status = 200, body = VmStats), (status = 404, description = "No such VM."),
        (status = 409, description = "The VM is not running."), (status = 503, description = "The VM's agent does not respond."),
    )
)]
pub(crate) async fn stats(State(host): State<Host>, Segment(vm): Segment) -> Result<Json<VmStats>, ServiceError> {
    guest::stats(&host, &vm).await.map(Json)
}

/// Returns the console log of a VM, running or not.
///
/// Control characters except line feed and tab are left out.
#[utoipa::path(
    get, path = "/vms/{vm}/console", tag = "VMs",
    params(
        ("vm" = String, Path, description = "Id or name of the VM."),
        ("follow" = Option<bool>, Query, description = "`true` continues with new output until the VM is deleted."),
        ("tail" = Option<u64>, Query, description = "Number of bytes at the end of the log to begin with; by default the whole log, at most 1 MiB."),
    ),
    responses(
        (status = 200, content_type = "text/plain", body = String),
        (status = 400, description = "A query parameter is invalid; the error names it."),
        (status = 404, description = "No such VM."),
    )
)]
pub(crate) async fn console(
    State(host): State<Host>,
    Segment(vm): Segment,
    uri: Uri,
) -> Result<Response, ServiceError> {
    let params = Params::parse(&uri, &["follow", "tail"])?;
    let follow = params.flag("follow")?;
    let max = CONSOLE_LIMIT.as_u64();
    let tail = params.number("tail", MAX_OFFSET)?.unwrap_or(max).min(max);
    let id = host.vms.find(&vm)?.id;
    let log = host.console_log(&id);
    let reader = blocking(move || ConsoleReader::open(&log, tail).map_err(unreadable)).await?;
    let log = Log { host, id, reader };
    let kind = [(CONTENT_TYPE, "text/plain; charset=utf-8")];
    Ok((kind, Body::from_stream(text(log, follow))).into_response())
}

fn unreadable(error: io::Error) -> ServiceError {
    ServiceError::Internal(format!("cannot read a console log: {error}"))
}

struct Log {
    host: Host,
    id: VmId,
    reader: ConsoleReader,
}

/// Returns the text of a log. With `follow`, it ends when the VM is deleted or the daemon stops.
fn text(log: Log, follow: bool) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some(log), move |log| async move {
        let Log { host, id, mut reader } = log?;
        loop {
            let read = blocking(move || Ok::<_, ServiceError>((reader.read(), reader))).await;
            let text = match read {
                Ok((text, back)) => {
                    reader = back;
                    text
                }
                Err(error) => return Some((Err(io::Error::other(error.to_string())), None)),
            };
            match text {
                Ok(text) if text.is_empty() && follow => {}
                Ok(text) if text.is_empty() => return None,
                Ok(text) => return Some((Ok(Bytes::from(text)), Some(Log { host, id, reader }))),
                Err(error) => {
                    tracing::warn!(vm = %id, %error, "cannot read the console log");
                    return Some((Err(error), None));
                }
            }
            host.vms.find(id.as_str()).ok()?;
            tokio::select! {
                () = sleep(FOLLOW_INTERVAL) => {}
                () = host.closing.cancelled() => return None,
            }
        }
    })
}

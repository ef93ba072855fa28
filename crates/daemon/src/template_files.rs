//! Templates to elsewhere and from elsewhere: `GET /templates/{name}/export` and `POST
//! /templates/{name}/import`.
//!
//! Both stream: an image is packed or unpacked as it goes over the wire, and stands nowhere in
//! between. Each takes a thread that waits for the network, so there are few at a time, and none
//! waits for ever.

use crate::api::{BODY_TIMEOUT, Segment, require_unpacked, root_cause};
use crate::error::ServiceError;
use crate::service::{BASE_TEMPLATE, Service, blocking, template_name};
use axum::Json;
use axum::body::{self, Body};
use axum::extract::{Query, State};
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, EXPECT};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use scalebox_client::{EventKind, Template, TemplateName};
use scalebox_units::Bytes;
use serde::Deserialize;
use serde_json::json;
use std::io::{self, BufWriter, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{self, error::SendTimeoutError};
use tokio::time::timeout;
use tokio_util::io::{StreamReader, SyncIoBridge};
use tokio_util::sync::CancellationToken;

/// The size of the image that the answer to an export holds packed.
const IMAGE_BYTES: HeaderName = HeaderName::from_static("scalebox-image-bytes");
/// What is packed and not yet taken by the network: so many pieces of that many bytes.
const AHEAD: usize = 8;
const PIECE: usize = 64 << 10;
/// Templates on their way at once.
pub(crate) const MOST_TRANSFERS: usize = 8;
/// How long a client may leave a piece of an export where it is.
const PIECE_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the rest of an import is listened to that has failed already.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(900);

/// What `POST /templates/{name}/import` may be asked with.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    replace: Option<bool>,
}

/// A template's image, packed with zstd.
#[utoipa::path(
    get, path = "/templates/{name}/export", tag = "Templates",
    params(("name" = String, Path, description = "Name of the template.")),
    responses(
        (status = 200, content_type = "application/zstd", body = [u8], description = "One zstd frame with a checksum.",
            headers(("Scalebox-Image-Bytes" = u64, description = "The size of the image."))),
        (status = 404, description = "No such template."),
        (status = 503, description = "Too many templates are on their way already."),
    )
)]
pub async fn export(
    State(service): State<Service>,
    method: Method,
    Segment(name): Segment,
) -> Result<Response, ServiceError> {
    let parsed = template_name(&name)?;
    if method == Method::HEAD {
        let pool = Arc::clone(&service.inner().pool);
        let template = blocking(move || pool.template(&parsed)).await?;
        // It is not packed for that, so how long it would be is not known.
        let body = Body::from_stream(stream::empty::<io::Result<body::Bytes>>());
        return Ok((export_head(&name, template.size)?, body).into_response());
    }
    let transfer = service.begin_transfer()?;
    let pool = Arc::clone(&service.inner().pool);
    let packing = blocking(move || pool.pack_template(&parsed)).await?;
    let size = packing.size();
    let (sender, receiver) = mpsc::channel(AHEAD);
    let mut pieces = Pieces {
        sender,
        runtime: Handle::current(),
    };
    tokio::task::spawn_blocking(move || {
        let _transfer = transfer;
        let mut out = BufWriter::with_capacity(PIECE, &mut pieces);
        let written = packing.write_to(&mut out, |_| {}).and_then(|()| out.flush());
        // What is left in the buffer is of no use behind a failure.
        let (_pieces, _left) = out.into_parts();
        let last = match written {
            Ok(()) => Ok(Piece::End),
            Err(error) => {
                tracing::warn!(%error, "an export ended early");
                Err(error)
            }
        };
        // Who hung up does not hear it.
        let _hung_up = pieces.send(last);
    });
    let body = Body::from_stream(going_out(receiver, service.inner().closing.clone()));
    Ok((export_head(&name, size)?, body).into_response())
}

fn export_head(name: &str, size: Bytes) -> Result<[(HeaderName, HeaderValue); 3], ServiceError> {
    let file = format!("attachment; filename=\"{name}.ext4.zst\"");
    let file = HeaderValue::from_str(&file).map_err(|error| ServiceError::Internal(error.to_string()))?;
    Ok([
        (CONTENT_TYPE, HeaderValue::from_static("application/zstd")),
        (CONTENT_DISPOSITION, file),
        (IMAGE_BYTES, HeaderValue::from(size.as_u64())),
    ])
}

/// Makes a template of an ext4 image, bare or packed with zstd, that comes in as the body.
#[utoipa::path(
    post, path = "/templates/{name}/import", tag = "Templates",
    params(
        ("name" = String, Path, description = "Name of the template to be made."),
        ("replace" = Option<bool>, Query, description = "Whether one of that name gives way to it."),
    ),
    request_body(content = [u8], content_type = "application/octet-stream"),
    responses(
        (status = 201, body = Template),
        (status = 400, description = "It is no template, damaged, or larger than the largest disk."),
        (status = 403, description = "A protected name."),
        (status = 409, description = "The name is taken, or a VM is being made from it."),
        (status = 503, description = "Too many templates are on their way already."),
        (status = 507, description = "It does not fit."),
    )
)]
pub async fn import(
    State(service): State<Service>,
    Segment(name): Segment,
    wish: Result<Query<Wish>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<Template>), ServiceError> {
    let Query(wish) =
        wish.map_err(|_| ServiceError::invalid("the query may hold replace=true or replace=false".to_owned()))?;
    // What is packed with zstd is one by itself: the header says no more than the file does.
    require_unpacked(&headers, &["zstd"])?;
    let input = Heard {
        input: SyncIoBridge::new(StreamReader::new(Box::pin(arriving(body)))),
        comes: !headers.contains_key(EXPECT),
        stalled: false,
    };
    let template = service
        .import_template(name, input, wish.replace.unwrap_or(false))
        .await?;
    Ok((StatusCode::CREATED, Json(template)))
}

/// The body's pieces, each waited for only so long.
fn arriving(body: Body) -> impl Stream<Item = io::Result<body::Bytes>> + Send {
    stream::unfold(body.into_data_stream(), |mut pieces| async {
        let piece = match timeout(BODY_TIMEOUT, pieces.next()).await {
            Ok(Some(piece)) => piece.map_err(|error| io::Error::other(root_cause(&error))),
            Ok(None) => return None,
            Err(_) => {
                let why = format!("nothing came for {} s", BODY_TIMEOUT.as_secs());
                Err(io::Error::new(io::ErrorKind::TimedOut, why))
            }
        };
        Some((piece, pieces))
    })
}

/// What an export consists of.
enum Piece {
    Data(body::Bytes),
    /// All of it was sent.
    End,
}

/// The pieces of an export, until the daemon is told to stop: it does not wait for who asked, who
/// can ask again.
fn going_out(
    receiver: mpsc::Receiver<io::Result<Piece>>,
    closing: CancellationToken,
) -> impl Stream<Item = io::Result<body::Bytes>> + Send {
    stream::unfold(Some((receiver, closing)), |state| async {
        let (mut receiver, closing) = state?;
        let piece = tokio::select! {
            piece = receiver.recv() => piece.unwrap_or_else(|| Err(io::Error::other("the export ended early"))),
            () = closing.cancelled() => Err(io::Error::other("scaleboxd is being stopped")),
        };
        match piece {
            Ok(Piece::Data(bytes)) => Some((Ok(bytes), Some((receiver, closing)))),
            Ok(Piece::End) => None,
            // The connection is cut: what was sent does not look like all of it.
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// The sending end of a body that is written by a thread that may block.
struct Pieces {
    sender: mpsc::Sender<io::Result<Piece>>,
    runtime: Handle,
}

impl Pieces {
    fn send(&self, piece: io::Result<Piece>) -> io::Result<()> {
        let sent = self.runtime.block_on(self.sender.send_timeout(piece, PIECE_TIMEOUT));
        sent.map_err(|error| match error {
            SendTimeoutError::Timeout(_) => {
                let why = format!("the client took nothing for {} s", PIECE_TIMEOUT.as_secs());
                io::Error::new(io::ErrorKind::TimedOut, why)
            }
            SendTimeoutError::Closed(_) => io::Error::new(io::ErrorKind::BrokenPipe, "the client hung up"),
        })
    }
}

impl Write for &mut Pieces {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.send(Ok(Piece::Data(body::Bytes::copy_from_slice(piece))))?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A body, and whether it is on its way: a client may wait with it (`Expect: 100-continue`) until
/// something of it is read.
struct Heard<R> {
    input: R,
    comes: bool,
    /// Nothing came for [`BODY_TIMEOUT`].
    stalled: bool,
}

impl<R: Read> Read for Heard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.comes = true;
        let read = self.input.read(buffer);
        self.stalled |= read
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::TimedOut);
        read
    }
}

impl<R: Read> Heard<R> {
    /// Listens to the rest. A client that sends all before it reads would not get to the answer
    /// otherwise.
    fn drain(&mut self) {
        let begun = Instant::now();
        let mut piece = vec![0; PIECE];
        while self.comes && begun.elapsed() < DRAIN_TIMEOUT && self.input.read(&mut piece).is_ok_and(|read| read > 0) {}
    }
}

impl Service {
    /// Takes one of the places for templates on their way.
    fn begin_transfer(&self) -> Result<OwnedSemaphorePermit, ServiceError> {
        Arc::clone(&self.inner().transfers).try_acquire_owned().map_err(|_| {
            ServiceError::NotReady(format!(
                "{MOST_TRANSFERS} templates are being exported or imported already: try again when one is done"
            ))
        })
    }

    /// Makes a template of an image that comes in as a stream.
    ///
    /// # Errors
    /// 400 when it is none, 408 when it stops arriving, 403 for [`BASE_TEMPLATE`], 409 when there
    /// is one of that name or it is being made, 507 when it does not fit. Nothing is left then.
    async fn import_template(
        &self,
        name: String,
        mut input: Heard<impl Read + Send + 'static>,
        replace: bool,
    ) -> Result<Template, ServiceError> {
        if name == BASE_TEMPLATE {
            return Err(ServiceError::Forbidden(format!(
                "the template {BASE_TEMPLATE} is protected: choose another name"
            )));
        }
        let form = |form| ServiceError::invalid(format!("the template's name {form}"));
        let parsed: TemplateName = name.parse().map_err(form)?;
        let service = self.clone();
        let transfer = self.begin_transfer()?;
        self.detached(async move {
            let _transfer = transfer;
            if replace {
                service.inner().cloning.require_idle(&name)?;
            }
            let (pool, largest) = (
                Arc::clone(&service.inner().pool),
                service.inner().settings.max_disk_size.bytes(),
            );
            let made = blocking(move || {
                let made = pool.unpack_template(&parsed, &mut input, largest, replace);
                match made {
                    Err(_) if input.stalled => Err(ServiceError::Timeout(format!(
                        "the image stopped arriving: nothing came for {} s; send it again",
                        BODY_TIMEOUT.as_secs()
                    ))),
                    Err(error) => {
                        input.drain();
                        Err(error.into())
                    }
                    Ok(made) => Ok(made),
                }
            })
            .await?;
            service.inner().cleanups.sweep_soon();
            tracing::info!(template = name, size_bytes = made.size.as_u64(), "template imported");
            let events = &service.inner().events;
            events.publish(EventKind::TemplateCreated, None, json!({ "template": name }));
            Ok(service.describe_template(made))
        })
        .await
    }
}

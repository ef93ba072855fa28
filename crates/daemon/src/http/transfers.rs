//! Template export and import: `GET /templates/{name}/export` and `POST /templates/{name}/import`.
//!
//! Both stream: the image is compressed or decompressed in transit, without a temporary file. Only
//! an image that has to be converted is stored in one. Each transfer blocks a thread on the
//! network, so their number is limited, and every wait has a deadline.

use crate::host::error::ServiceError;
use crate::host::handle::MAX_TRANSFERS;
use crate::host::{BASE_TEMPLATE, Host, blocking, template_name};
use crate::http::extract::{BODY_TIMEOUT, Segment, require_supported_encoding, root_cause};
use crate::templates::{self, import::Import};
use axum::Json;
use axum::body::{self, Body};
use axum::extract::{Query, State};
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, EXPECT};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use scalebox_api::{EventKind, Template, TemplateName};
use scalebox_images::oci::Task;
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

/// The uncompressed size of an exported image.
const IMAGE_BYTES: HeaderName = HeaderName::from_static("scalebox-image-bytes");
/// Limit on the compressed chunks of an export that the network has not taken yet.
const MAX_BUFFERED_CHUNKS: usize = 8;
const CHUNK_BYTES: usize = 64 << 10;
/// Time limit for a client to read the next chunk of an export.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(120);
/// Time limit for reading the rest of an import that has already failed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(900);

/// The query parameters of `POST /templates/{name}/import`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImportQuery {
    replace: Option<bool>,
}

/// Returns a template's image, compressed with zstd.
#[utoipa::path(
    get, path = "/templates/{name}/export", tag = "Templates",
    params(("name" = String, Path, description = "Name of the template.")),
    responses(
        (status = 200, content_type = "application/zstd", body = [u8], description = "One zstd frame with a checksum.",
            headers(("Scalebox-Image-Bytes" = u64, description = "The uncompressed size of the image."))),
        (status = 404, description = "No such template."),
        (status = 503, description = "Too many templates are being exported or imported."),
    )
)]
pub(crate) async fn export(
    State(host): State<Host>,
    method: Method,
    Segment(name): Segment,
) -> Result<Response, ServiceError> {
    let parsed = template_name(&name)?;
    if method == Method::HEAD {
        let pool = Arc::clone(&host.pool);
        let template = blocking(move || pool.template(&parsed)).await?;
        // The length of the compressed image is unknown, so the response has no `Content-Length`.
        let body = Body::from_stream(stream::empty::<io::Result<body::Bytes>>());
        return Ok((export_head(&name, template.size)?, body).into_response());
    }
    let transfer = begin_transfer(&host)?;
    let pool = Arc::clone(&host.pool);
    let packing = blocking(move || pool.pack_template(&parsed)).await?;
    let size = packing.size();
    let (sender, receiver) = mpsc::channel(MAX_BUFFERED_CHUNKS);
    let mut chunks = ChunkSender {
        sender,
        runtime: Handle::current(),
    };
    tokio::task::spawn_blocking(move || {
        let _transfer = transfer;
        let mut out = BufWriter::with_capacity(CHUNK_BYTES, &mut chunks);
        let written = packing.write_to(&mut out, |_| {}).and_then(|()| out.flush());
        // After a failure, the rest of the buffer is discarded.
        let (_chunks, _unsent) = out.into_parts();
        let last = match written {
            Ok(()) => Ok(Chunk::End),
            Err(error) => {
                tracing::warn!(%error, "export ended early");
                Err(error)
            }
        };
        // The client may have disconnected.
        let _disconnected = chunks.send(last);
    });
    let body = Body::from_stream(export_chunks(receiver, host.closing.clone()));
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

/// Creates a template from the image in the body: an ext4 file system, also compressed with zstd, a
/// disk with a partition table, a qcow2 image, an OCI archive, or the output of `docker save`.
#[utoipa::path(
    post, path = "/templates/{name}/import", tag = "Templates",
    params(
        ("name" = String, Path, description = "Name of the template to create."),
        ("replace" = Option<bool>, Query, description = "`true` replaces an existing template of this name."),
    ),
    request_body(content = [u8], content_type = "application/octet-stream"),
    responses(
        (status = 201, body = Template),
        (status = 400, description = "Not an image of a known kind, damaged, incomplete, or over MAX_DISK_SIZE_GIB."),
        (status = 403, description = "The template name is protected."),
        (status = 409, description = "The name is in use, or a VM is being created from the template."),
        (status = 503, description = "Too many templates are being exported or imported."),
        (status = 507, description = "The template does not fit into the pool."),
    )
)]
pub(crate) async fn import(
    State(host): State<Host>,
    Segment(name): Segment,
    query: Result<Query<ImportQuery>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<Template>), ServiceError> {
    let Query(query) = query.map_err(|_| {
        ServiceError::invalid("invalid query: only replace=true and replace=false are supported".to_owned())
    })?;
    // zstd is detected from the content, so the header is accepted and adds nothing.
    require_supported_encoding(&headers, &["zstd"])?;
    let input = ImportBody {
        input: SyncIoBridge::new(StreamReader::new(Box::pin(import_chunks(body)))),
        is_sending: !headers.contains_key(EXPECT),
        stalled: false,
    };
    let template = import_template(&host, name, input, query.replace.unwrap_or(false)).await?;
    Ok((StatusCode::CREATED, Json(template)))
}

/// Returns the chunks of an import's body. Each must arrive within [`BODY_TIMEOUT`].
fn import_chunks(body: Body) -> impl Stream<Item = io::Result<body::Bytes>> + Send {
    stream::unfold(body.into_data_stream(), |mut chunks| async {
        let chunk = match timeout(BODY_TIMEOUT, chunks.next()).await {
            Ok(Some(chunk)) => chunk.map_err(|error| io::Error::other(root_cause(&error))),
            Ok(None) => return None,
            Err(_) => {
                let why = format!("no data received for {} s", BODY_TIMEOUT.as_secs());
                Err(io::Error::new(io::ErrorKind::TimedOut, why))
            }
        };
        Some((chunk, chunks))
    })
}

/// A chunk of an export's response body.
enum Chunk {
    Data(body::Bytes),
    /// The image is complete.
    End,
}

/// Returns the chunks of an export. Ends when the daemon stops, which does not wait for exports:
/// the client can repeat the request.
fn export_chunks(
    receiver: mpsc::Receiver<io::Result<Chunk>>,
    closing: CancellationToken,
) -> impl Stream<Item = io::Result<body::Bytes>> + Send {
    stream::unfold(Some((receiver, closing)), |state| async {
        let (mut receiver, closing) = state?;
        let chunk = tokio::select! {
            chunk = receiver.recv() => chunk.unwrap_or_else(|| Err(io::Error::other("the export ended early"))),
            () = closing.cancelled() => Err(io::Error::other("scaleboxd is stopping")),
        };
        match chunk {
            Ok(Chunk::Data(bytes)) => Some((Ok(bytes), Some((receiver, closing)))),
            Ok(Chunk::End) => None,
            // Closes the connection, so that the client does not treat the partial image as
            // complete.
            Err(error) => Some((Err(error), None)),
        }
    })
}

/// The sending end of an export's body, for the thread that compresses the image.
struct ChunkSender {
    sender: mpsc::Sender<io::Result<Chunk>>,
    runtime: Handle,
}

impl ChunkSender {
    fn send(&self, chunk: io::Result<Chunk>) -> io::Result<()> {
        let sent = self.runtime.block_on(self.sender.send_timeout(chunk, CHUNK_TIMEOUT));
        sent.map_err(|error| match error {
            SendTimeoutError::Timeout(_) => {
                let why = format!("the client read no data for {} s", CHUNK_TIMEOUT.as_secs());
                io::Error::new(io::ErrorKind::TimedOut, why)
            }
            SendTimeoutError::Closed(_) => io::Error::new(io::ErrorKind::BrokenPipe, "the client disconnected"),
        })
    }
}

impl Write for &mut ChunkSender {
    fn write(&mut self, chunk: &[u8]) -> io::Result<usize> {
        self.send(Ok(Chunk::Data(body::Bytes::copy_from_slice(chunk))))?;
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The body of an import. A client that sends `Expect: 100-continue` starts sending it only after
/// the first read.
struct ImportBody<R> {
    input: R,
    is_sending: bool,
    /// No data arrived for [`BODY_TIMEOUT`].
    stalled: bool,
}

impl<R: Read> Read for ImportBody<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.is_sending = true;
        let read = self.input.read(buffer);
        self.stalled |= read
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::TimedOut);
        read
    }
}

impl<R: Read> ImportBody<R> {
    /// Reads and discards the rest of the body. A client that sends all of it before it reads would
    /// not receive the response otherwise.
    fn drain(&mut self) {
        let begun = Instant::now();
        let mut chunk = vec![0; CHUNK_BYTES];
        while self.is_sending
            && begun.elapsed() < DRAIN_TIMEOUT
            && self.input.read(&mut chunk).is_ok_and(|read| read > 0)
        {}
    }
}

/// Reserves one of the [`MAX_TRANSFERS`] concurrent exports and imports.
fn begin_transfer(host: &Host) -> Result<OwnedSemaphorePermit, ServiceError> {
    Arc::clone(&host.transfers).try_acquire_owned().map_err(|_| {
        ServiceError::NotReady(format!(
            "{MAX_TRANSFERS} templates are already being exported or imported: try again later"
        ))
    })
}

/// Creates a template from an image that arrives as a stream.
///
/// # Errors
/// 400 if it is not a template image; 408 if it stops arriving; 403 for [`BASE_TEMPLATE`]; 409
/// if the name is in use or the template is already being created; 507 if it does not fit.
/// Nothing is left behind then.
async fn import_template(
    host: &Host,
    name: String,
    mut input: ImportBody<impl Read + Send + 'static>,
    replace: bool,
) -> Result<Template, ServiceError> {
    if name == BASE_TEMPLATE {
        return Err(ServiceError::Forbidden(format!(
            "the template {BASE_TEMPLATE} is protected: choose another name"
        )));
    }
    let form = |form| ServiceError::invalid(format!("the template name {form}"));
    let parsed: TemplateName = name.parse().map_err(form)?;
    let transfer = begin_transfer(host)?;
    host.detached(|host| async move {
        let _transfer = transfer;
        if replace {
            host.templates_in_use.require_idle(&name)?;
        }
        let max_disk = host.settings.max_disk_size.bytes();
        let import = Import::new(Arc::clone(&host.pool), parsed, max_disk, replace);
        let stopping = tokio::spawn(cancel_when_closing(import.task(), host.closing.clone()));
        let made = blocking(move || match import.stream(&mut input) {
            Err(_) if input.stalled => Err(ServiceError::Timeout(format!(
                "the image is incomplete: no data received for {} s; send it again",
                BODY_TIMEOUT.as_secs()
            ))),
            Err(error) => {
                input.drain();
                Err(error)
            }
            Ok(made) => Ok(made),
        })
        .await;
        stopping.abort();
        let made = made?;
        host.cleanups.sweep_soon();
        tracing::info!(template = name, size_bytes = made.size.as_u64(), "template imported");
        let events = &host.events;
        events.publish(EventKind::TemplateCreated, None, json!({ "template": name }));
        Ok(templates::describe(&host, made))
    })
    .await
}

/// Ends a conversion when the daemon is to stop: the client can repeat the request.
async fn cancel_when_closing(task: Task, closing: CancellationToken) {
    closing.cancelled().await;
    task.cancel();
}

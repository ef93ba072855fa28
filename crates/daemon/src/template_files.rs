//! Templates to elsewhere and from elsewhere: `GET /templates/{name}/export` and `POST /templates/{name}/import`.
//!
//! Both stream: an image is packed or unpacked as it goes over the wire, and stands nowhere in between.

use crate::api::{BODY_TIMEOUT, Segment};
use crate::error::ServiceError;
use crate::service::{BASE_TEMPLATE, Service, blocking};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use scalebox_client::{EventKind, Template};
use scalebox_storage::Name;
use serde::Deserialize;
use serde_json::json;
use std::io::{self, BufWriter, Read, Write};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::io::{StreamReader, SyncIoBridge};

/// The size of the image that the answer to an export holds packed.
const IMAGE_BYTES: HeaderName = HeaderName::from_static("scalebox-image-bytes");
/// What is packed and not yet taken by the network: so many pieces of that many bytes.
const AHEAD: usize = 8;
const PIECE: usize = 64 << 10;

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
    )
)]
pub async fn export(State(service): State<Service>, Segment(name): Segment) -> Result<Response, ServiceError> {
    let missing = || ServiceError::NotFound(format!("there is no template {name:?}"));
    let parsed: Name = name.parse().map_err(|_| missing())?;
    let pool = Arc::clone(&service.inner().pool);
    let packing = blocking(move || pool.pack_template(&parsed)).await?;
    let size = packing.size().as_u64();
    let (sender, mut receiver) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut out = BufWriter::with_capacity(PIECE, Pieces(sender.clone()));
        if let Err(error) = packing.write_to(&mut out, |_| {}).and_then(|()| out.flush()) {
            tracing::warn!(%error, "an export ended early");
            // Who hung up does not hear it.
            let _hung_up = sender.blocking_send(Err(error));
        }
    });
    let body = Body::from_stream(stream::poll_fn(move |context| receiver.poll_recv(context)));
    let file = format!("attachment; filename=\"{name}.ext4.zst\"");
    let file = HeaderValue::from_str(&file).map_err(|error| ServiceError::Internal(error.to_string()))?;
    let head = [
        (CONTENT_TYPE, HeaderValue::from_static("application/zstd")),
        (CONTENT_DISPOSITION, file),
        (IMAGE_BYTES, HeaderValue::from(size)),
    ];
    Ok((head, body).into_response())
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
        (status = 507, description = "It does not fit."),
    )
)]
pub async fn import(
    State(service): State<Service>,
    Segment(name): Segment,
    wish: Result<Query<Wish>, axum::extract::rejection::QueryRejection>,
    body: Body,
) -> Result<(StatusCode, Json<Template>), ServiceError> {
    let Query(wish) =
        wish.map_err(|_| ServiceError::Invalid("the query may hold replace=true or replace=false".to_owned()))?;
    let reader = SyncIoBridge::new(StreamReader::new(Box::pin(arriving(body))));
    let template = service
        .import_template(name, reader, wish.replace.unwrap_or(false))
        .await?;
    Ok((StatusCode::CREATED, Json(template)))
}

/// The body's pieces, each waited for only so long.
fn arriving(body: Body) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(body.into_data_stream(), |mut pieces| async {
        let piece = match timeout(BODY_TIMEOUT, pieces.next()).await {
            Ok(Some(piece)) => piece.map_err(io::Error::other),
            Ok(None) => return None,
            Err(_) => {
                let why = format!("nothing came for {} s", BODY_TIMEOUT.as_secs());
                Err(io::Error::new(io::ErrorKind::TimedOut, why))
            }
        };
        Some((piece, pieces))
    })
}

/// The sending end of a body that is written by a thread that may block.
struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(piece)));
        sent.map(|()| piece.len())
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the client hung up"))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Service {
    /// Makes a template of an image that comes in as a stream.
    ///
    /// # Errors
    /// 400 when it is none, 403 for [`BASE_TEMPLATE`], 409 when there is one of that name or it is being made, 507 when it does not fit. Nothing
    /// is left then.
    pub async fn import_template(
        &self,
        name: String,
        mut input: impl Read + Send + 'static,
        replace: bool,
    ) -> Result<Template, ServiceError> {
        if name == BASE_TEMPLATE {
            return Err(ServiceError::Forbidden(format!(
                "the template {BASE_TEMPLATE} is protected: choose another name"
            )));
        }
        let service = self.clone();
        self.detached(async move {
            let parsed: Name = name.parse()?;
            if replace {
                service.inner().cloning.require_idle(&name)?;
            }
            let (pool, largest) = (
                Arc::clone(&service.inner().pool),
                service.inner().settings.max_disk_size.bytes(),
            );
            let made = blocking(move || {
                let made = pool.unpack_template(&parsed, &mut input, largest, replace);
                if made.is_err() {
                    // A client that sends all before it reads would not get to the answer. What it failed with is known already.
                    let _ended = io::copy(&mut input, &mut io::sink());
                }
                made
            })
            .await?;
            tracing::info!(template = name, size_bytes = made.size.as_u64(), "template imported");
            let events = &service.inner().events;
            events.publish(EventKind::TemplateCreated, None, json!({ "template": name }));
            Ok(service.describe_template(made))
        })
        .await
    }
}

//! The HTTP API: routes, authentication, limits on a request, and the request id in every log line.

use crate::host::Service;
use crate::host::error::{ServiceError, quoted};
use crate::host::random::random_hex;
use crate::http::event_stream;
use crate::http::logins::{FailedLogins, Peer};
use crate::http::metrics;
use crate::http::openapi;
use crate::http::transfers;
use crate::settings::Token;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, HOST, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router};
use scalebox_client::{
    CreateVm, Health, HostInfo, IdempotencyKey, PoolInfo, ResizePool, Snapshot, SnapshotVm, Template, TemplateList,
    Trimmed, UpdateVm, Vm, VmList,
};
use scalebox_units::Gib;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq;
use tracing::Instrument;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// The largest body that is read; a request with the longest SSH key is a hundredth of it.
const MAX_BODY_BYTES: usize = 1 << 20;
/// Time limit for a body to arrive, or for the next piece of one that is streamed.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(30);
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Closes the connection of an unauthenticated client after this response. Further responses might
/// not fit into the socket's buffer, and the server would have to wait for the client.
const CLOSE_AFTER_RESPONSE: [(HeaderName, HeaderValue); 1] = [(CONNECTION, HeaderValue::from_static("close"))];

/// Returns all routes; every route except `/health` requires the token.
pub fn router(service: Service, token: &Token) -> Router {
    let token = Arc::new(Guard {
        token: TokenDigest::new(token),
        failed: FailedLogins::default(),
    });
    let guarded = OpenApiRouter::new()
        .routes(routes!(list_vms, create_vm))
        .routes(routes!(get_vm, update_vm, delete_vm))
        .routes(routes!(start_vm))
        .routes(routes!(stop_vm))
        .routes(routes!(restart_vm))
        .routes(routes!(trim_vm))
        .routes(routes!(snapshot_vm))
        .routes(routes!(list_templates))
        .routes(routes!(get_template, delete_template))
        .routes(routes!(transfers::export))
        .routes(routes!(transfers::import))
        .routes(routes!(pool))
        .routes(routes!(grow_pool))
        .routes(routes!(shrink_pool))
        .routes(routes!(trim_pool))
        .routes(routes!(info))
        .routes(routes!(event_stream::events))
        .routes(routes!(metrics::metrics))
        .routes(routes!(openapi::openapi))
        .with_state(service.clone());
    let (guarded, described) = guarded.split_for_parts();
    let (open, mut document) = OpenApiRouter::with_openapi(openapi::Api::openapi())
        .routes(routes!(health))
        .split_for_parts();
    document.merge(described);
    let document = openapi::Served::new(&openapi::complete(&document, service.limits()));
    let guarded = guarded
        .fallback(no_such_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(Extension(document))
        .layer(from_fn_with_state(token, require_token));
    open.method_not_allowed_fallback(method_not_allowed)
        .merge(guarded)
        .layer(from_fn_with_state(service, metrics::count))
        .layer(from_fn(with_request_id))
}

/// Reports that the daemon is serving requests.
#[utoipa::path(get, path = "/health", tag = "Host", security(()), responses((status = 200, body = Health)))]
async fn health() -> impl IntoResponse {
    (CLOSE_AFTER_RESPONSE, Json(Health::ok()))
}

/// Creates a VM and starts it.
#[utoipa::path(
    post, path = "/vms", tag = "VMs", request_body = CreateVm,
    params(("Idempotency-Key" = Option<String>, Header, description = "While the VM exists, repeating the request with the same key returns this VM instead of creating another.")),
    responses(
        (status = 201, body = Vm, description = "The VM. Its guest is still booting.", headers(
            ("Idempotent-Replayed" = Option<String>, description = "`true` if an earlier request with the same key created the VM.")
        )),
        (status = 400, description = "A field is invalid; the error names it."),
        (status = 404, description = "No such template."),
        (status = 409, description = "The name is in use, a request with this key is still running, or the VM was deleted while it was being created."),
        (status = 422, description = "The key was used for a different request."),
        (status = 503, description = "The host is not ready: it has no guest kernel or no free port, or the pool is not mounted."),
        (status = 507, description = "The disk does not fit into the pool, or the state disk is full."),
    )
)]
async fn create_vm(
    State(service): State<Service>,
    headers: HeaderMap,
    RawBody(body): RawBody,
) -> Result<impl IntoResponse, ServiceError> {
    let mut request = CreateVm::parse(&body, service.limits())?;
    request.idempotency_key = idempotency_key(&headers)?;
    let (vm, replayed) = service.create(request).await?;
    // A replay has the same status as the first response, as
    // draft-ietf-httpapi-idempotency-key-header requires; the header marks it.
    let mark = replayed.then_some([(IDEMPOTENT_REPLAYED, "true")]);
    Ok((StatusCode::CREATED, mark, Json(vm)))
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, ServiceError> {
    let mut keys = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(key) = keys.next() else {
        return Ok(None);
    };
    if keys.next().is_some() {
        let twice = "the header Idempotency-Key was sent more than once: send one key per VM";
        return Err(ServiceError::invalid(twice.to_owned()));
    }
    let key = String::from_utf8_lossy(key.as_bytes()).parse();
    key.map(Some)
        .map_err(|form| ServiceError::invalid(format!("the header Idempotency-Key {form}")))
}

/// Lists all VMs, oldest first.
#[utoipa::path(get, path = "/vms", tag = "VMs", responses((status = 200, body = VmList)))]
async fn list_vms(State(service): State<Service>) -> Json<VmList> {
    Json(VmList { vms: service.list() })
}

/// Returns one VM.
#[utoipa::path(get, path = "/vms/{vm}", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")), responses((status = 200, body = Vm), (status = 404, description = "No such VM.")))]
async fn get_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.get(&vm).map(Json)
}

/// Deletes a VM, running or not, with its disk.
#[utoipa::path(
    delete, path = "/vms/{vm}", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 204), (status = 404, description = "No such VM."), (status = 409, description = "Another operation is running on the VM."))
)]
async fn delete_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<StatusCode, ServiceError> {
    service.delete(vm).await.map(|()| StatusCode::NO_CONTENT)
}

/// Changes a VM. The disk of a running VM grows live.
#[utoipa::path(
    patch, path = "/vms/{vm}", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")), request_body = UpdateVm,
    responses(
        (status = 200, body = Vm, description = "The changed VM. `disk` reports whether the guest's file system has grown."),
        (status = 400, description = "A field is invalid; the error names it. Disks do not shrink."),
        (status = 404, description = "No such VM."),
        (status = 409, description = "The disk cannot grow: its file system is damaged, or the VM's hypervisor does not respond."),
        (status = 503, description = "The pool is not mounted."),
        (status = 507, description = "The larger disk does not fit into the pool, or the state disk is full."),
    )
)]
async fn update_vm(
    State(service): State<Service>,
    Segment(vm): Segment,
    RawBody(body): RawBody,
) -> Result<Json<Vm>, ServiceError> {
    let request = UpdateVm::parse(&body, service.limits())?;
    service.update(vm, request).await.map(Json)
}

/// Starts a stopped VM.
#[utoipa::path(
    post, path = "/vms/{vm}/start", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Vm), (status = 404, description = "No such VM."), (status = 409, description = "The VM is already running, or another operation is running on it."), (status = 503, description = "The host is not ready: it has no guest kernel, or the pool is not mounted."))
)]
async fn start_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.start(vm).await.map(Json)
}

/// Shuts a VM down and starts it again. A stopped VM is started.
#[utoipa::path(
    post, path = "/vms/{vm}/restart", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Vm), (status = 404, description = "No such VM."), (status = 409, description = "Another operation is running on the VM."), (status = 503, description = "The host is not ready: it has no guest kernel, or the pool is not mounted."))
)]
async fn restart_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.restart(vm).await.map(Json)
}

/// Shuts a VM down. A guest that has not shut down after a minute is killed.
#[utoipa::path(
    post, path = "/vms/{vm}/stop", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Vm), (status = 404, description = "No such VM."), (status = 409, description = "The VM is not running, or another operation is running on it."))
)]
async fn stop_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.stop(vm).await.map(Json)
}

/// Discards the blocks of deleted files in the guest, which returns their space to the pool.
#[utoipa::path(
    post, path = "/vms/{vm}/trim", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Trimmed), (status = 404, description = "No such VM."), (status = 409, description = "The VM is not running, or its guest agent does not respond."))
)]
async fn trim_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Trimmed>, ServiceError> {
    service.trim_vm(vm).await.map(Json)
}

/// Creates a template from a VM's disk. The VM may be running.
#[utoipa::path(
    post, path = "/vms/{vm}/snapshot", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")), request_body = SnapshotVm,
    responses(
        (status = 201, body = Snapshot),
        (status = 400, description = "A field is invalid; the error names it."),
        (status = 403, description = "The template name is protected."),
        (status = 404, description = "No such VM."),
        (status = 409, description = "The name is in use, another operation is running on the VM, or its disk cannot become a template."),
        (status = 503, description = "The pool is not mounted."),
        (status = 507, description = "The template does not fit into the pool."),
    )
)]
async fn snapshot_vm(
    State(service): State<Service>,
    Segment(vm): Segment,
    RawBody(body): RawBody,
) -> Result<(StatusCode, Json<Snapshot>), ServiceError> {
    let request = SnapshotVm::parse(&body)?;
    Ok((StatusCode::CREATED, Json(service.snapshot(vm, request).await?)))
}

/// Lists all templates.
#[utoipa::path(get, path = "/templates", tag = "Templates", responses((status = 200, body = TemplateList), (status = 503, description = "The pool is not mounted.")))]
async fn list_templates(State(service): State<Service>) -> Result<Json<TemplateList>, ServiceError> {
    Ok(Json(TemplateList {
        templates: service.templates().await?,
    }))
}

/// Returns one template.
#[utoipa::path(
    get, path = "/templates/{name}", tag = "Templates", params(("name" = String, Path, description = "Name of the template.")),
    responses((status = 200, body = Template), (status = 404, description = "No such template."), (status = 503, description = "The pool is not mounted."))
)]
async fn get_template(State(service): State<Service>, Segment(name): Segment) -> Result<Json<Template>, ServiceError> {
    service.template(name).await.map(Json)
}

/// Deletes a template. VMs created from it are kept.
#[utoipa::path(
    delete, path = "/templates/{name}", tag = "Templates", params(("name" = String, Path, description = "Name of the template.")),
    responses(
        (status = 204),
        (status = 403, description = "The template is protected."),
        (status = 404, description = "No such template."),
        (status = 409, description = "A VM is being created from the template."),
        (status = 503, description = "The pool is not mounted."),
    )
)]
async fn delete_template(State(service): State<Service>, Segment(name): Segment) -> Result<StatusCode, ServiceError> {
    service.delete_template(name).await.map(|()| StatusCode::NO_CONTENT)
}

/// Returns the pool's capacity, free space and commitments.
#[utoipa::path(get, path = "/pool", tag = "Pool", responses((status = 200, body = PoolInfo), (status = 503, description = "The pool is not mounted.")))]
async fn pool(State(service): State<Service>) -> Result<Json<PoolInfo>, ServiceError> {
    service.pool().map(Json)
}

/// Grows the pool while it is in use. Without a size, it grows to 80 % of the space on the host
/// disk.
#[utoipa::path(
    post, path = "/pool/grow", tag = "Pool", request_body = Option<ResizePool>,
    responses(
        (status = 200, body = PoolInfo),
        (status = 400, description = "The size is not larger than the pool or exceeds the space available, or the pool's size is not Scalebox's to change."),
        (status = 409, description = "The pool is already being resized."),
        (status = 503, description = "The pool is not mounted."),
    )
)]
async fn grow_pool(State(service): State<Service>, RawBody(body): RawBody) -> Result<Json<PoolInfo>, ServiceError> {
    let request = ResizePool::parse_grow(&body)?;
    service.grow_pool(request.size_gib.map(Gib::new)).await.map(Json)
}

/// Shrinks the pool while it is in use.
#[utoipa::path(
    post, path = "/pool/shrink", tag = "Pool", request_body = ResizePool,
    responses(
        (status = 200, body = PoolInfo),
        (status = 400, description = "The size is not smaller than the pool, or is too small for the used, committed or reserved space."),
        (status = 409, description = "The pool is already being resized."),
        (status = 503, description = "The pool is not mounted."),
    )
)]
async fn shrink_pool(State(service): State<Service>, RawBody(body): RawBody) -> Result<Json<PoolInfo>, ServiceError> {
    let size = ResizePool::parse_shrink(&body)?;
    service.shrink_pool(Gib::new(size)).await.map(Json)
}

/// Discards the pool's free blocks, which returns their space to the host disk.
#[utoipa::path(post, path = "/pool/trim", tag = "Pool", responses((status = 200, body = Trimmed), (status = 409, description = "The pool is being resized."), (status = 503, description = "The pool is not mounted.")))]
async fn trim_pool(State(service): State<Service>) -> Result<Json<Trimmed>, ServiceError> {
    service.trim_pool().await.map(Json)
}

/// Returns information about the host, its VMs and its limits.
#[utoipa::path(get, path = "/info", tag = "Host", responses((status = 200, body = HostInfo), (status = 503, description = "The pool is not mounted.")))]
async fn info(State(service): State<Service>) -> Result<Json<HostInfo>, ServiceError> {
    service.info().await.map(Json)
}

async fn no_such_route(uri: Uri) -> ServiceError {
    ServiceError::NotFound(format!(
        "there is no route {}: GET /openapi.json lists the routes",
        quoted(uri.path())
    ))
}

async fn method_not_allowed(method: Method, uri: Uri) -> ServiceError {
    let (path, method) = (quoted(uri.path()), quoted(method.as_str()));
    ServiceError::MethodNotAllowed(format!(
        "{path} does not support {method}: the header Allow lists the methods"
    ))
}

/// The variable segment of a route's path, percent-decoded.
pub(crate) struct Segment(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ServiceError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ServiceError> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(segment)) => Ok(Segment(segment)),
            Err(_) => Err(ServiceError::invalid(format!(
                "the path {} does not decode to UTF-8: send the id or name as the API lists it",
                quoted(parts.uri.path())
            ))),
        }
    }
}

/// A body as raw bytes, whatever its content type, within the limits of size and time.
struct RawBody(Bytes);

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = ServiceError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ServiceError> {
        let too_large = || ServiceError::TooLarge(format!("the body is larger than {MAX_BODY_BYTES} bytes"));
        let announced = request
            .headers()
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > MAX_BODY_BYTES as u64) {
            return Err(too_large());
        }
        require_supported_encoding(request.headers(), &[])?;
        let body = request.into_body();
        match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, MAX_BODY_BYTES)).await {
            Ok(Ok(bytes)) => Ok(RawBody(bytes)),
            Ok(Err(error)) if is_length_limit(&error) => Err(too_large()),
            Ok(Err(error)) => Err(ServiceError::invalid(format!(
                "cannot read the body: {}; send all of it, with Content-Length or in chunks",
                root_cause(&error)
            ))),
            Err(_) => Err(ServiceError::Timeout(format!(
                "the body did not arrive within {} s",
                BODY_TIMEOUT.as_secs()
            ))),
        }
    }
}

/// Rejects a body with a `Content-Encoding` (RFC 9110, section 8.4) other than those in
/// `supported`.
pub(crate) fn require_supported_encoding(headers: &HeaderMap, supported: &[&str]) -> Result<(), ServiceError> {
    let encodings = headers.get_all(CONTENT_ENCODING).iter();
    let encodings: Vec<String> = encodings
        .flat_map(|value| {
            String::from_utf8_lossy(value.as_bytes())
                .split(',')
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .map(|encoding| encoding.trim().to_ascii_lowercase())
        .filter(|encoding| !encoding.is_empty() && encoding != "identity" && !supported.contains(&encoding.as_str()))
        .collect();
    match encodings.first() {
        None => Ok(()),
        Some(encoding) => Err(ServiceError::Unsupported(format!(
            "the Content-Encoding {} is not supported: send the body uncompressed, without this header",
            quoted(encoding)
        ))),
    }
}

/// Removes a trailing slash from the request's path: clients that join paths by hand send `/vms/`
/// for `/vms`.
pub(crate) fn without_trailing_slash(mut request: Request) -> Request {
    let uri = request.uri();
    let Some(path) = uri.path().strip_suffix('/').filter(|path| !path.is_empty()) else {
        return request;
    };
    let target = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut parts = uri.clone().into_parts();
    if let Ok(target) = target.parse() {
        parts.path_and_query = Some(target);
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// Returns the innermost cause; the outer errors only report that reading a body failed.
pub(crate) fn root_cause(error: &axum::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn is_length_limit(error: &axum::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if error.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// The token's SHA-256 digest. Comparing digests takes the same time for every token, so its
/// duration reveals nothing, not even the token's length.
struct TokenDigest([u8; 32]);

impl TokenDigest {
    fn new(token: &Token) -> Self {
        TokenDigest(Sha256::digest(token.secret()).into())
    }

    fn matches(&self, offered: &[u8]) -> bool {
        let offered: [u8; 32] = Sha256::digest(offered).into();
        self.0.ct_eq(&offered).into()
    }
}

/// Authentication for all routes except `/health`.
struct Guard {
    token: TokenDigest,
    failed: FailedLogins,
}

async fn require_token(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let offered = request
        .headers()
        .get(AUTHORIZATION)
        .map(HeaderValue::as_bytes)
        .and_then(bearer);
    if offered.is_some_and(|offered| guard.token.matches(offered)) {
        return next.run(request).await;
    }
    guard.failed.record(request.extensions().get::<Peer>().copied());
    let mut response = ServiceError::Unauthorized.into_response();
    response
        .headers_mut()
        .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response.headers_mut().extend(CLOSE_AFTER_RESPONSE);
    response
}

/// Returns the token of `Bearer TOKEN`. The scheme is case-insensitive (RFC 9110, section 11.1).
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token.trim_ascii())
}

/// Gives each request an id and logs its end. A valid id sent by the client is kept. The id is in
/// every log line of the request and in the response.
async fn with_request_id(request: Request<Body>, next: Next) -> Response {
    let id = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| valid_id(id.as_bytes()))
        .unwrap_or_else(random_id);
    let reads = request.method() == Method::GET || request.method() == Method::HEAD;
    let path = request.uri().path().to_owned();
    // Cut to a length that suits a log line.
    let (method, shown) = (shortened(request.method().as_str()), shortened(&path));
    let span = tracing::info_span!("request", id, method, path = shown);
    async move {
        let begun = Instant::now();
        let mut response = match request.headers().get_all(HOST).iter().count() {
            0 | 1 => next.run(request).await,
            // RFC 9112, section 3.2. A proxy in front of us may have used the other one.
            _ => ServiceError::invalid("the header Host was sent more than once: send it once".to_owned())
                .into_response(),
        };
        let (status, ms) = (response.status().as_u16(), begun.elapsed().as_millis() as u64);
        // Successful reads change nothing, and failed logins are already logged.
        let expected = (reads && response.status().is_success()) || response.status() == StatusCode::UNAUTHORIZED;
        if expected {
            tracing::debug!(status, ms, "request finished");
        } else {
            tracing::info!(status, ms, "request finished");
        }
        if let Ok(id) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        response
    }
    .instrument(span)
    .await
}

fn shortened(text: &str) -> String {
    const MAX_BYTES: usize = 200;
    // A method and a path are ASCII, so every index is a character boundary.
    match text.get(..MAX_BYTES).filter(|start| start.len() < text.len()) {
        Some(start) => format!("{start}…"),
        None => text.to_owned(),
    }
}

fn valid_id(id: &[u8]) -> Option<String> {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let id = (1..=64).contains(&id.len()).then_some(id)?;
    id.iter().all(allowed).then(|| String::from_utf8_lossy(id).into_owned())
}

fn random_id() -> String {
    random_hex(8).unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot draw a random request id");
        "none".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bearer_scheme_is_case_insensitive() {
        assert_eq!(bearer(b"Bearer abc"), Some(&b"abc"[..]));
        assert_eq!(bearer(b"bearer abc "), Some(&b"abc"[..]));
        for header in [&b"abc"[..], b"Basic abc", b"Bearer", b""] {
            assert_eq!(bearer(header), None);
        }
    }

    #[test]
    fn request_ids_that_could_break_a_log_line_are_replaced() {
        assert_eq!(valid_id(b"build-17.a_b"), Some("build-17.a_b".to_owned()));
        for id in [&b""[..], b"a b", b"a\nb", &[b'a'; 65]] {
            assert_eq!(valid_id(id), None);
        }
    }
}

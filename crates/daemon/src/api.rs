//! The HTTP API: routes, the token, the limits on a request, one id from the HTTP line down to the
//! last step.

use crate::error::{ServiceError, quoted};
use crate::event_stream;
use crate::logins::{FailedLogins, Peer};
use crate::metrics;
use crate::openapi;
use crate::random::random_hex;
use crate::service::Service;
use crate::settings::Token;
use crate::template_files;
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

/// The largest body that is read. A request with a key of the longest kind is a hundredth of it.
const LARGEST_BODY: usize = 1 << 20;
/// How long a client may take to send a body, or the next piece of one that is streamed.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(30);
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// To whoever shows no token: the connection ends behind it. What does not fit into the socket's
/// buffer would have to be waited for.
const LAST_ANSWER: [(HeaderName, HeaderValue); 1] = [(CONNECTION, HeaderValue::from_static("close"))];

/// All routes, behind the token but for `/health`.
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
        .routes(routes!(template_files::export))
        .routes(routes!(template_files::import))
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

/// Whether the daemon serves.
#[utoipa::path(get, path = "/health", tag = "Host", security(()), responses((status = 200, body = Health)))]
async fn health() -> impl IntoResponse {
    (LAST_ANSWER, Json(Health::ok()))
}

/// Makes a VM and starts it.
#[utoipa::path(
    post, path = "/vms", tag = "VMs", request_body = CreateVm,
    params(("Idempotency-Key" = Option<String>, Header, description = "While the VM exists, the same request with the same key gives it again.")),
    responses(
        (status = 201, body = Vm, description = "The VM; its guest is still booting.", headers(
            ("Idempotent-Replayed" = Option<String>, description = "`true`: an earlier request with the key made it.")
        )),
        (status = 400, description = "What is wrong with which field."),
        (status = 404, description = "No such template."),
        (status = 409, description = "The name is taken, the key's request is under way, or the VM was deleted meanwhile."),
        (status = 422, description = "The key belongs to another request."),
        (status = 503, description = "The host is not ready: no kernel, no free port, or the pool is not mounted."),
        (status = 507, description = "It does not fit."),
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
    // The status of the first answer, as draft-ietf-httpapi-idempotency-key-header has it; the
    // header tells them apart.
    let mark = replayed.then_some([(IDEMPOTENT_REPLAYED, "true")]);
    Ok((StatusCode::CREATED, mark, Json(vm)))
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, ServiceError> {
    let mut keys = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(key) = keys.next() else {
        return Ok(None);
    };
    if keys.next().is_some() {
        let twice = "the header Idempotency-Key is given several times: send one key for each VM";
        return Err(ServiceError::invalid(twice.to_owned()));
    }
    let key = String::from_utf8_lossy(key.as_bytes()).parse();
    key.map(Some)
        .map_err(|form| ServiceError::invalid(format!("the header Idempotency-Key {form}")))
}

/// All VMs, oldest first.
#[utoipa::path(get, path = "/vms", tag = "VMs", responses((status = 200, body = VmList)))]
async fn list_vms(State(service): State<Service>) -> Json<VmList> {
    Json(VmList { vms: service.list() })
}

/// One VM.
#[utoipa::path(get, path = "/vms/{vm}", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")), responses((status = 200, body = Vm), (status = 404, description = "No such VM.")))]
async fn get_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.get(&vm).map(Json)
}

/// Deletes a VM, running or not, with its disk.
#[utoipa::path(
    delete, path = "/vms/{vm}", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 204), (status = 404, description = "No such VM."), (status = 409, description = "Something is under way on it."))
)]
async fn delete_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<StatusCode, ServiceError> {
    service.delete(vm).await.map(|()| StatusCode::NO_CONTENT)
}

/// Changes a VM; its disk grows live if it runs.
#[utoipa::path(
    patch, path = "/vms/{vm}", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")), request_body = UpdateVm,
    responses(
        (status = 200, body = Vm, description = "The VM as it is now; `disk` tells what became of the guest's file system."),
        (status = 400, description = "What is wrong with which field; disks do not shrink."),
        (status = 404, description = "No such VM."),
        (status = 409, description = "The disk cannot grow: its file system is damaged, or the VM's machine does not answer."),
        (status = 503, description = "The pool is not mounted."),
        (status = 507, description = "It does not fit."),
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
    responses((status = 200, body = Vm), (status = 404, description = "No such VM."), (status = 409, description = "It runs, or something is under way on it."), (status = 503, description = "The host is not ready: no kernel, or the pool is not mounted."))
)]
async fn start_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.start(vm).await.map(Json)
}

/// Shuts a VM down and starts it again; one that does not run is started.
#[utoipa::path(
    post, path = "/vms/{vm}/restart", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Vm), (status = 404, description = "No such VM."), (status = 409, description = "Something is under way on it."), (status = 503, description = "The host is not ready: no kernel, or the pool is not mounted."))
)]
async fn restart_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.restart(vm).await.map(Json)
}

/// Shuts a VM down: by the guest itself, or after a minute without it.
#[utoipa::path(
    post, path = "/vms/{vm}/stop", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Vm), (status = 404, description = "No such VM."), (status = 409, description = "It does not run, or something is under way on it."))
)]
async fn stop_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.stop(vm).await.map(Json)
}

/// Has a guest give back the blocks of what it deleted.
#[utoipa::path(
    post, path = "/vms/{vm}/trim", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Trimmed), (status = 404, description = "No such VM."), (status = 409, description = "It does not run, or no agent answers."))
)]
async fn trim_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Trimmed>, ServiceError> {
    service.trim_vm(vm).await.map(Json)
}

/// Makes a template of a VM's disk, running or not.
#[utoipa::path(
    post, path = "/vms/{vm}/snapshot", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")), request_body = SnapshotVm,
    responses(
        (status = 201, body = Snapshot),
        (status = 400, description = "What is wrong with which field."),
        (status = 403, description = "A protected name."),
        (status = 404, description = "No such VM."),
        (status = 409, description = "The name is taken, something is under way on the VM, or its disk cannot become a template."),
        (status = 503, description = "The pool is not mounted."),
        (status = 507, description = "It does not fit."),
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

/// All templates.
#[utoipa::path(get, path = "/templates", tag = "Templates", responses((status = 200, body = TemplateList), (status = 503, description = "The pool is not mounted.")))]
async fn list_templates(State(service): State<Service>) -> Result<Json<TemplateList>, ServiceError> {
    Ok(Json(TemplateList {
        templates: service.templates().await?,
    }))
}

/// One template.
#[utoipa::path(
    get, path = "/templates/{name}", tag = "Templates", params(("name" = String, Path, description = "Name of the template.")),
    responses((status = 200, body = Template), (status = 404, description = "No such template."), (status = 503, description = "The pool is not mounted."))
)]
async fn get_template(State(service): State<Service>, Segment(name): Segment) -> Result<Json<Template>, ServiceError> {
    service.template(name).await.map(Json)
}

/// Deletes a template; VMs made from it stay.
#[utoipa::path(
    delete, path = "/templates/{name}", tag = "Templates", params(("name" = String, Path, description = "Name of the template.")),
    responses(
        (status = 204),
        (status = 403, description = "It is protected."),
        (status = 404, description = "No such template."),
        (status = 409, description = "A VM is being made from it."),
        (status = 503, description = "The pool is not mounted."),
    )
)]
async fn delete_template(State(service): State<Service>, Segment(name): Segment) -> Result<StatusCode, ServiceError> {
    service.delete_template(name).await.map(|()| StatusCode::NO_CONTENT)
}

/// What the pool holds, can still take, and has promised.
#[utoipa::path(get, path = "/pool", tag = "Pool", responses((status = 200, body = PoolInfo), (status = 503, description = "The pool is not mounted.")))]
async fn pool(State(service): State<Service>) -> Result<Json<PoolInfo>, ServiceError> {
    service.pool().map(Json)
}

/// Grows the pool while it is in use; without a size, by the 80 % rule on today's host disk.
#[utoipa::path(
    post, path = "/pool/grow", tag = "Pool", request_body = Option<ResizePool>,
    responses(
        (status = 200, body = PoolInfo),
        (status = 400, description = "No growth, more than there is, or a size that is not the pool's own."),
        (status = 409, description = "Its size is being changed already."),
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
        (status = 400, description = "No shrinking, or what is used, promised or kept free would not fit."),
        (status = 409, description = "Its size is being changed already."),
        (status = 503, description = "The pool is not mounted."),
    )
)]
async fn shrink_pool(State(service): State<Service>, RawBody(body): RawBody) -> Result<Json<PoolInfo>, ServiceError> {
    let size = ResizePool::parse_shrink(&body)?;
    service.shrink_pool(Gib::new(size)).await.map(Json)
}

/// Gives the pool's free blocks back to the host disk.
#[utoipa::path(post, path = "/pool/trim", tag = "Pool", responses((status = 200, body = Trimmed), (status = 409, description = "Its size is being changed."), (status = 503, description = "The pool is not mounted.")))]
async fn trim_pool(State(service): State<Service>) -> Result<Json<Trimmed>, ServiceError> {
    service.trim_pool().await.map(Json)
}

/// The host and what is on it.
#[utoipa::path(get, path = "/info", tag = "Host", responses((status = 200, body = HostInfo), (status = 503, description = "The pool is not mounted.")))]
async fn info(State(service): State<Service>) -> Result<Json<HostInfo>, ServiceError> {
    service.info().await.map(Json)
}

async fn no_such_route(uri: Uri) -> ServiceError {
    ServiceError::NotFound(format!(
        "there is no route {}: GET /openapi.json lists them",
        quoted(uri.path())
    ))
}

async fn method_not_allowed(method: Method, uri: Uri) -> ServiceError {
    let (path, method) = (quoted(uri.path()), quoted(method.as_str()));
    ServiceError::MethodNotAllowed(format!("{path} does not take {method}: see the header Allow"))
}

/// The one variable part of a path, decoded.
pub(crate) struct Segment(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ServiceError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ServiceError> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(segment)) => Ok(Segment(segment)),
            Err(_) => Err(ServiceError::invalid(format!(
                "the path {} is not UTF-8 when its percent signs are decoded: send the id or name as it is listed",
                quoted(parts.uri.path())
            ))),
        }
    }
}

/// A body as its bytes, whatever its content type says, within the limits of size and time.
struct RawBody(Bytes);

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = ServiceError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ServiceError> {
        let too_large = || ServiceError::TooLarge(format!("the body is larger than {LARGEST_BODY} bytes"));
        let announced = request
            .headers()
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > LARGEST_BODY as u64) {
            return Err(too_large());
        }
        require_unpacked(request.headers(), &[])?;
        let body = request.into_body();
        match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, LARGEST_BODY)).await {
            Ok(Ok(bytes)) => Ok(RawBody(bytes)),
            Ok(Err(error)) if is_length_limit(&error) => Err(too_large()),
            Ok(Err(error)) => Err(ServiceError::invalid(format!(
                "the body could not be read: {}; send it whole, with its length or in chunks",
                root_cause(&error)
            ))),
            Err(_) => Err(ServiceError::Timeout(format!(
                "the body did not arrive within {} s",
                BODY_TIMEOUT.as_secs()
            ))),
        }
    }
}

/// Refuses a body that was packed for its way (RFC 9110, section 8.4), but for the packings in
/// `taken`.
pub(crate) fn require_unpacked(headers: &HeaderMap, taken: &[&str]) -> Result<(), ServiceError> {
    let packings = headers.get_all(CONTENT_ENCODING).iter();
    let packings: Vec<String> = packings
        .flat_map(|value| {
            String::from_utf8_lossy(value.as_bytes())
                .split(',')
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .map(|packing| packing.trim().to_ascii_lowercase())
        .filter(|packing| !packing.is_empty() && packing != "identity" && !taken.contains(&packing.as_str()))
        .collect();
    match packings.first() {
        None => Ok(()),
        Some(packing) => Err(ServiceError::Unsupported(format!(
            "a body with Content-Encoding {} is not read: send it unpacked, without that header",
            quoted(packing)
        ))),
    }
}

/// The request, at `/vms` if it was sent to `/vms/`: those who join paths by hand mean the same by
/// both.
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

/// What is at the bottom of it: the layers above only say that a body was read.
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

/// The token as its digest: equal lengths make the comparison's time tell nothing, not even how
/// long the token is.
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

/// What stands before all routes but `/health`.
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
    guard.failed.note(request.extensions().get::<Peer>().copied());
    let mut response = ServiceError::Unauthorized.into_response();
    response
        .headers_mut()
        .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response.headers_mut().extend(LAST_ANSWER);
    response
}

/// The token of `Bearer TOKEN`; the scheme's case does not matter (RFC 9110, section 11.1).
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token.trim_ascii())
}

/// Gives each request an id, the client's own if it sent a sane one, and logs its end. The id
/// stands in every line that is logged on the way and in the answer.
async fn with_request_id(request: Request<Body>, next: Next) -> Response {
    let id = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| sane_id(id.as_bytes()))
        .unwrap_or_else(random_id);
    let reads = request.method() == Method::GET || request.method() == Method::HEAD;
    let path = request.uri().path().to_owned();
    // As much of both as a log line bears.
    let (method, shown) = (shortened(request.method().as_str()), shortened(&path));
    let span = tracing::info_span!("request", id, method, path = shown);
    async move {
        let begun = Instant::now();
        let mut response = match request.headers().get_all(HOST).iter().count() {
            0 | 1 => next.run(request).await,
            // RFC 9112, section 3.2: what stands before us may have read the other one.
            _ => {
                ServiceError::invalid("the header Host is given several times: send it once".to_owned()).into_response()
            }
        };
        let (status, ms) = (response.status().as_u16(), begun.elapsed().as_millis() as u64);
        // What changes nothing and worked, and what was logged already.
        let expected = (reads && response.status().is_success()) || response.status() == StatusCode::UNAUTHORIZED;
        if expected {
            tracing::debug!(status, ms, "answered");
        } else {
            tracing::info!(status, ms, "answered");
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
    const SHOWN: usize = 200;
    // A method and a path are ASCII.
    match text.get(..SHOWN).filter(|start| start.len() < text.len()) {
        Some(start) => format!("{start}…"),
        None => text.to_owned(),
    }
}

fn sane_id(id: &[u8]) -> Option<String> {
    let sane = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let id = (1..=64).contains(&id.len()).then_some(id)?;
    id.iter().all(sane).then(|| String::from_utf8_lossy(id).into_owned())
}

fn random_id() -> String {
    random_hex(8).unwrap_or_else(|error| {
        tracing::warn!(%error, "a request has no id of its own");
        "none".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bearer_token_is_read_whatever_the_scheme_s_case() {
        assert_eq!(bearer(b"Bearer abc"), Some(&b"abc"[..]));
        assert_eq!(bearer(b"bearer abc "), Some(&b"abc"[..]));
        for header in [&b"abc"[..], b"Basic abc", b"Bearer", b""] {
            assert_eq!(bearer(header), None);
        }
    }

    #[test]
    fn a_request_id_that_could_break_a_log_line_is_not_taken() {
        assert_eq!(sane_id(b"build-17.a_b"), Some("build-17.a_b".to_owned()));
        for id in [&b""[..], b"a b", b"a\nb", &[b'a'; 65]] {
            assert_eq!(sane_id(id), None);
        }
    }
}

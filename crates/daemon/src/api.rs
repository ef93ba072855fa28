//! The HTTP API: routes, the token, the limits on a request, one id from the HTTP line down to the last step.

use crate::error::ServiceError;
use crate::event_stream;
use crate::metrics;
use crate::random::random_hex;
use crate::service::Service;
use crate::settings::Token;
use crate::template_files;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use scalebox_client::{
    CreateVm, Health, HostInfo, IdempotencyKey, PoolInfo, ResizePool, Snapshot, SnapshotVm, TemplateList, Trimmed,
    UpdateVm, Vm, VmList,
};
use scalebox_storage::Gib;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq;
use tracing::Instrument;

/// The largest body that is read. A request with a key of the longest kind is a hundredth of it.
const LARGEST_BODY: usize = 1 << 20;
/// How long a client may take to send a body, or the next piece of one that is streamed.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(30);
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// All routes, behind the token but for `/health`.
pub fn router(service: Service, token: &Token) -> Router {
    let token = Arc::new(TokenDigest::new(token));
    let guarded = Router::new()
        .route("/vms", get(list_vms).post(create_vm))
        .route("/vms/{vm}", get(get_vm).patch(update_vm).delete(delete_vm))
        .route("/vms/{vm}/start", post(start_vm))
        .route("/vms/{vm}/stop", post(stop_vm))
        .route("/vms/{vm}/restart", post(restart_vm))
        .route("/vms/{vm}/trim", post(trim_vm))
        .route("/vms/{vm}/snapshot", post(snapshot_vm))
        .route("/templates", get(list_templates))
        .route("/templates/{name}", axum::routing::delete(delete_template))
        .route("/templates/{name}/export", get(template_files::export))
        .route("/templates/{name}/import", post(template_files::import))
        .route("/pool", get(pool))
        .route("/pool/grow", post(grow_pool))
        .route("/pool/shrink", post(shrink_pool))
        .route("/pool/trim", post(trim_pool))
        .route("/info", get(info))
        .route("/events", get(event_stream::events))
        .route("/metrics", get(metrics::metrics))
        .fallback(no_such_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(token, require_token))
        .with_state(service.clone());
    Router::new()
        .route("/health", get(health).fallback(method_not_allowed))
        .merge(guarded)
        .layer(from_fn_with_state(service, metrics::count))
        .layer(from_fn(with_request_id))
}

async fn health() -> Json<Health> {
    Json(Health::ok())
}

async fn create_vm(
    State(service): State<Service>,
    headers: HeaderMap,
    RawBody(body): RawBody,
) -> Result<impl IntoResponse, ServiceError> {
    let mut request = CreateVm::parse(&body, service.limits())?;
    request.idempotency_key = idempotency_key(&headers)?;
    let (vm, replayed) = service.create(request).await?;
    // The status of the first answer, as draft-ietf-httpapi-idempotency-key-header has it; the header tells them apart.
    let mark = replayed.then_some([(IDEMPOTENT_REPLAYED, "true")]);
    Ok((StatusCode::CREATED, mark, Json(vm)))
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, ServiceError> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else {
        return Ok(None);
    };
    let key = String::from_utf8_lossy(key.as_bytes()).parse();
    key.map(Some)
        .map_err(|form| ServiceError::Invalid(format!("the header Idempotency-Key {form}")))
}

async fn list_vms(State(service): State<Service>) -> Json<VmList> {
    Json(VmList { vms: service.list() })
}

async fn get_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.get(&vm).map(Json)
}

async fn delete_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<StatusCode, ServiceError> {
    service.delete(vm).await.map(|()| StatusCode::NO_CONTENT)
}

async fn update_vm(
    State(service): State<Service>,
    Segment(vm): Segment,
    RawBody(body): RawBody,
) -> Result<Json<Vm>, ServiceError> {
    let request = UpdateVm::parse(&body, service.limits())?;
    service.update(vm, request).await.map(Json)
}

async fn start_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.start(vm).await.map(Json)
}

async fn restart_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.restart(vm).await.map(Json)
}

async fn stop_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    service.stop(vm).await.map(Json)
}

async fn trim_vm(State(service): State<Service>, Segment(vm): Segment) -> Result<Json<Trimmed>, ServiceError> {
    service.trim_vm(vm).await.map(Json)
}

async fn snapshot_vm(
    State(service): State<Service>,
    Segment(vm): Segment,
    RawBody(body): RawBody,
) -> Result<(StatusCode, Json<Snapshot>), ServiceError> {
    let request = SnapshotVm::parse(&body)?;
    Ok((StatusCode::CREATED, Json(service.snapshot(vm, request).await?)))
}

async fn list_templates(State(service): State<Service>) -> Result<Json<TemplateList>, ServiceError> {
    Ok(Json(TemplateList {
        templates: service.templates().await?,
    }))
}

async fn delete_template(State(service): State<Service>, Segment(name): Segment) -> Result<StatusCode, ServiceError> {
    service.delete_template(name).await.map(|()| StatusCode::NO_CONTENT)
}

async fn pool(State(service): State<Service>) -> Result<Json<PoolInfo>, ServiceError> {
    service.pool().map(Json)
}

async fn grow_pool(State(service): State<Service>, RawBody(body): RawBody) -> Result<Json<PoolInfo>, ServiceError> {
    let request = ResizePool::parse_grow(&body)?;
    service.grow_pool(request.size_gib.map(Gib::new)).await.map(Json)
}

async fn shrink_pool(State(service): State<Service>, RawBody(body): RawBody) -> Result<Json<PoolInfo>, ServiceError> {
    let size = ResizePool::parse_shrink(&body)?;
    service.shrink_pool(Gib::new(size)).await.map(Json)
}

async fn trim_pool(State(service): State<Service>) -> Result<Json<Trimmed>, ServiceError> {
    service.trim_pool().await.map(Json)
}

async fn info(State(service): State<Service>) -> Result<Json<HostInfo>, ServiceError> {
    service.info().await.map(Json)
}

async fn no_such_route(uri: Uri) -> ServiceError {
    ServiceError::NotFound(format!("there is no route {}", uri.path()))
}

async fn method_not_allowed(method: Method, uri: Uri) -> ServiceError {
    ServiceError::MethodNotAllowed(format!("{} does not take {method}", uri.path()))
}

/// The one variable part of a path, decoded.
pub(crate) struct Segment(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ServiceError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ServiceError> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(segment)) => Ok(Segment(segment)),
            Err(_) => Err(ServiceError::Invalid(format!(
                "{} is not the path of anything: it is not UTF-8",
                parts.uri.path()
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
        let (parts, body) = request.into_parts();
        drop(parts);
        match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, LARGEST_BODY)).await {
            Ok(Ok(bytes)) => Ok(RawBody(bytes)),
            Ok(Err(error)) if is_length_limit(&error) => Err(too_large()),
            Ok(Err(error)) => Err(ServiceError::Invalid(format!("the body could not be read: {error}"))),
            Err(_) => Err(ServiceError::Timeout(format!(
                "the body did not arrive within {} s",
                BODY_TIMEOUT.as_secs()
            ))),
        }
    }
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

/// The token as its digest: equal lengths make the comparison's time tell nothing, not even how long the token is.
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

async fn require_token(State(token): State<Arc<TokenDigest>>, request: Request, next: Next) -> Response {
    let offered = request
        .headers()
        .get(AUTHORIZATION)
        .map(HeaderValue::as_bytes)
        .and_then(bearer);
    if offered.is_some_and(|offered| token.matches(offered)) {
        return next.run(request).await;
    }
    let mut response = ServiceError::Unauthorized.into_response();
    response
        .headers_mut()
        .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// The token of `Bearer TOKEN`; the scheme's case does not matter (RFC 9110, section 11.1).
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token.trim_ascii())
}

/// Gives each request an id, the client's own if it sent a sane one, and logs its end. The id stands in every line that is logged on the way and
/// in the answer.
async fn with_request_id(request: Request<Body>, next: Next) -> Response {
    let id = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| sane_id(id.as_bytes()))
        .unwrap_or_else(random_id);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = tracing::info_span!("request", id, %method, path);
    async move {
        let begun = Instant::now();
        let mut response = next.run(request).await;
        let (status, ms) = (response.status().as_u16(), begun.elapsed().as_millis() as u64);
        if path == "/health" {
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

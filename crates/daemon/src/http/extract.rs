//! Extractors for handlers, which read parts of a request within limits of size and time.

use crate::host::error::{ServiceError, quoted};
use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use axum::http::request::Parts;
use scalebox_units::ExecId;
use std::time::Duration;

/// Maximum size of a body; a request with an SSH key of maximum length is a hundredth of it.
const MAX_BODY_BYTES: usize = 1 << 20;
/// Time limit for a body to arrive, or for the next piece of a streamed body.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The variable segment of a route's path, percent-decoded.
pub(crate) struct Segment(pub String);

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

/// The path of an exec: a VM's id or name, percent-decoded, and the exec's id.
pub(crate) struct ExecPath {
    pub vm: String,
    pub exec: ExecId,
}

impl<S: Send + Sync> FromRequestParts<S> for ExecPath {
    type Rejection = ServiceError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ServiceError> {
        let Ok(Path((vm, exec))) = Path::<(String, String)>::from_request_parts(parts, state).await else {
            return Err(ServiceError::invalid(format!(
                "the path {} does not decode to UTF-8: send the ids or names as the API lists them",
                quoted(parts.uri.path())
            )));
        };
        // A malformed id cannot belong to an exec.
        let unknown = |_| ServiceError::NotFound(format!("there is no exec {}", quoted(&exec)));
        let exec = exec.parse().map_err(unknown)?;
        Ok(ExecPath { vm, exec })
    }
}

/// A body as raw bytes, whatever its content type, within the limits of size and time.
pub(crate) struct RawBody(pub Bytes);

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

/// Returns the innermost cause, because the outer errors only report that reading a body failed.
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

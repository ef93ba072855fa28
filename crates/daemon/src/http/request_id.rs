//! Request ids, and the log line of each request.

use crate::host::error::ServiceError;
use crate::host::random::random_hex;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::HOST;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::time::Instant;
use tracing::Instrument;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Assigns an id to each request, and logs the request when it has ended. A valid id sent by the
/// client is kept. The id is in every log line of the request and in the response.
pub(crate) async fn with_request_id(request: Request<Body>, next: Next) -> Response {
    let id = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| valid_id(id.as_bytes()))
        .unwrap_or_else(random_id);
    let reads = request.method() == Method::GET || request.method() == Method::HEAD;
    let path = request.uri().path().to_owned();
    // Method and path are cut to a length that suits a log line.
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
    fn request_ids_that_could_break_a_log_line_are_replaced() {
        assert_eq!(valid_id(b"build-17.a_b"), Some("build-17.a_b".to_owned()));
        for id in [&b""[..], b"a b", b"a\nb", &[b'a'; 65]] {
            assert_eq!(valid_id(id), None);
        }
    }
}

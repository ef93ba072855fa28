//! Authentication: the bearer token of every route except `/health`.

use crate::host::error::ServiceError;
use crate::http::logins::{FailedLogins, Peer};
use crate::settings::Token;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONNECTION, WWW_AUTHENTICATE};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// Closes the connection of an unauthenticated client after this response. Further responses might
/// not fit into the socket's buffer, and the server would have to wait for the client.
pub(crate) const CLOSE_AFTER_RESPONSE: [(HeaderName, HeaderValue); 1] =
    [(CONNECTION, HeaderValue::from_static("close"))];

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
pub(crate) struct Guard {
    token: TokenDigest,
    failed: FailedLogins,
}

impl Guard {
    /// Requires `token`.
    pub(crate) fn new(token: &Token) -> Guard {
        Guard {
            token: TokenDigest::new(token),
            failed: FailedLogins::default(),
        }
    }
}

/// Rejects requests without the token.
pub(crate) async fn require_token(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
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
}

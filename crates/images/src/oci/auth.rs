//! Access to a registry: the answer to a challenge (RFC 9110, section 11; Docker's token protocol).

use crate::oci::address::authority;
use crate::oci::error::{OciError, quoted};
use crate::oci::registry::{Registry, read_document};
use http_auth::{ChallengeRef, parse_challenges};
use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};
use serde::Deserialize;
use std::fmt;

/// A user name and a password, or an access token in place of a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user name.
    pub username: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// The answer of a token service; the two fields are the same.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// What a request shows to be let in.
#[derive(Clone)]
pub(crate) enum Access {
    Basic(Credentials),
    Bearer(String),
}

/// Returns the access that a registry asks for with status 401.
pub(crate) async fn answer(registry: &Registry, challenge: &HeaderMap, repository: &str) -> Result<Access, OciError> {
    let denied = |reason: &str| OciError::Unauthorized {
        registry: registry.name().to_owned(),
        reason: reason.to_owned(),
    };
    let headers = challenge.get_all(WWW_AUTHENTICATE).iter();
    let texts: Vec<&str> = headers.filter_map(|value| value.to_str().ok()).collect();
    let challenges: Vec<ChallengeRef<'_>> = texts
        .iter()
        .filter_map(|text| parse_challenges(text).ok())
        .flatten()
        .collect();
    let of = |scheme: &str| {
        challenges
            .iter()
            .find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme))
    };
    if let Some(bearer) = of("bearer") {
        return token(registry, bearer, repository).await;
    }
    match (of("basic"), registry.credentials()) {
        (Some(_), Some(credentials)) => Ok(Access::Basic(credentials.clone())),
        (Some(_), None) => Err(denied("it needs a user name and a password")),
        (None, _) => Err(denied("it offers no way to log in that is supported (Basic or Bearer)")),
    }
}

/// Asks a token service for a token that allows pulling from `repository`.
async fn token(registry: &Registry, challenge: &ChallengeRef<'_>, repository: &str) -> Result<Access, OciError> {
    let parameter = |name: &str| {
        let mut parameters = challenge.params.iter();
        let found = parameters.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped())
    };
    // The same rules as for a redirect: not to other places, and not without encryption.
    let mut service = registry.follow(parameter("realm").unwrap_or_default().as_bytes())?;
    if let Some(name) = parameter("service") {
        service.query_pairs_mut().append_pair("service", &name);
    }
    let scope = format!("repository:{repository}:pull");
    service.query_pairs_mut().append_pair("scope", &scope);
    let host = authority(&service);
    let access = registry.credentials().cloned().map(Access::Basic);
    let response = registry.send(&service, access.as_ref(), HeaderMap::new()).await?;
    let status = response.status();
    let body = read_document(response, &host, "a token", registry.deadlines()).await?;
    if matches!(status.as_u16(), 400 | 401 | 403) {
        return Err(OciError::Unauthorized {
            registry: registry.name().to_owned(),
            reason: format!("{host} answered {}", status.as_u16()),
        });
    }
    if !status.is_success() {
        return Err(OciError::Status {
            host,
            status: status.as_u16(),
            message: quoted(&body),
        });
    }
    let token: Option<Token> = serde_json::from_slice(&body).ok();
    let value = token.and_then(|token| token.token.or(token.access_token));
    value.map(Access::Bearer).ok_or_else(|| OciError::Unauthorized {
        registry: registry.name().to_owned(),
        reason: format!("{host} did not send a token"),
    })
}

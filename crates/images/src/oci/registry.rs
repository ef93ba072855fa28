//! Requests to one registry, by the OCI distribution specification.
//!
//! Credentials and tokens are sent to the registry's own host and port only, never along a
//! redirect; a token service receives the credentials, as the protocol requires. Connections use
//! HTTP without encryption only if the registry is on loopback, or the caller allows it, and then
//! only if HTTPS does not work.

use crate::oci::access::{Access, Credentials};
use crate::oci::address::{Forbidden, Reach, Resolver, authority};
use crate::oci::error::{OciError, quoted};
use crate::oci::limits::{Deadlines, MAX_ATTEMPTS, MAX_DOCUMENT, MAX_MIRROR_ATTEMPTS, MAX_REDIRECTS};
use http_auth::{ChallengeRef, parse_challenges};
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue, LOCATION, RANGE, WWW_AUTHENTICATE};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};
use scalebox_units::Bytes;
use serde::Deserialize;
use std::error::Error;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// The media types of manifests and lists of them.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";
/// The host that serves `docker.io`.
const DOCKER_HUB: &str = "registry-1.docker.io";
/// Maximum size of an error's body that is read, in bytes.
const MAX_ERROR: u64 = 64 << 10;

/// A connection to a registry.
pub(crate) struct Registry {
    name: String,
    base: Url,
    client: Client,
    reach: Arc<Reach>,
    credentials: Option<Credentials>,
    /// The response to the last challenge.
    access: Mutex<Option<Access>>,
    deadlines: Deadlines,
    /// Maximum number of attempts of a request, or of those in a row without progress of a layer.
    attempts: u32,
}

impl Registry {
    /// Determines how to reach the registry `name`, which is a host with an optional port.
    ///
    /// # Errors
    /// [`OciError::Reference`], [`OciError::Unreachable`].
    pub(crate) async fn open(
        name: &str,
        insecure: bool,
        credentials: Option<Credentials>,
        deadlines: Deadlines,
    ) -> Result<Registry, OciError> {
        let host = match name {
            "docker.io" | "index.docker.io" => DOCKER_HUB,
            other => other,
        };
        let with_scheme = |scheme: &str| {
            Url::parse(&format!("{scheme}://{host}/")).map_err(|error| OciError::Reference {
                reference: quoted(name.as_bytes()),
                reason: error.to_string(),
            })
        };
        let secure = Registry::at(name, with_scheme("https")?, credentials.clone(), deadlines)?;
        if !(insecure || is_loopback(&secure.base)) {
            return Ok(secure);
        }
        let v2 = secure.url("v2/")?;
        match secure.send(&v2, None, HeaderMap::new()).await {
            Ok(_) => Ok(secure),
            Err(error) => {
                tracing::debug!(registry = name, %error, "no HTTPS; using HTTP");
                Registry::at(name, with_scheme("http")?, credentials, deadlines)
            }
        }
    }

    /// Prepares requests to a mirror, without credentials.
    ///
    /// # Errors
    /// [`OciError::Unreachable`] if the system's certificates cannot be read.
    pub(crate) fn mirror(base: &Url, deadlines: Deadlines) -> Result<Registry, OciError> {
        Ok(Registry {
            attempts: MAX_MIRROR_ATTEMPTS,
            ..Registry::at(&authority(base), base.clone(), None, deadlines)?
        })
    }

    fn at(name: &str, base: Url, credentials: Option<Credentials>, deadlines: Deadlines) -> Result<Registry, OciError> {
        // Fails if a provider is installed already, which is equally good.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let reach = Reach::of(&base);
        let client = Client::builder()
            .user_agent(concat!("scalebox/", env!("CARGO_PKG_VERSION")))
            .redirect(Policy::none())
            .no_proxy()
            .dns_resolver(Resolver(Arc::clone(&reach)))
            .connect_timeout(deadlines.connect)
            .build()
            .map_err(|error| OciError::Unreachable {
                host: name.to_owned(),
                reason: causes(&error),
            })?;
        Ok(Registry {
            name: name.to_owned(),
            base,
            client,
            reach,
            credentials,
            access: Mutex::new(None),
            deadlines,
            attempts: MAX_ATTEMPTS,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn credentials(&self) -> Option<&Credentials> {
        self.credentials.as_ref()
    }

    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }

    pub(crate) fn deadlines(&self) -> &Deadlines {
        &self.deadlines
    }

    pub(crate) fn follow(&self, location: &[u8]) -> Result<Url, OciError> {
        self.reach.follow(&self.base, location)
    }

    /// Returns a manifest or a list of manifests. `reference` is a tag or a digest.
    ///
    /// # Errors
    /// [`OciError::NotFound`], [`OciError::Unauthorized`], [`OciError::TooLarge`], and errors of
    /// connections.
    pub(crate) async fn manifest(&self, repository: &str, reference: &str) -> Result<Vec<u8>, OciError> {
        let url = self.url(&format!("v2/{repository}/manifests/{reference}"))?;
        let what = format!("{repository}:{reference}");
        let get = || async {
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(MANIFESTS))]);
            let response = self.get(repository, url.clone(), &headers, &what).await?;
            read_document(response, &authority(&url), "a manifest", &self.deadlines).await
        };
        self.retrying(get).await
    }

    /// Returns the response with a blob, from byte `offset` on. Its status shows whether the
    /// registry supports the offset.
    ///
    /// # Errors
    /// As for [`Registry::manifest`]. This makes one attempt.
    pub(crate) async fn blob(&self, repository: &str, digest: &str, offset: u64) -> Result<Response, OciError> {
        let url = self.url(&format!("v2/{repository}/blobs/{digest}"))?;
        let mut headers = HeaderMap::new();
        if offset > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={offset}-"))
        {
            headers.insert(RANGE, range);
        }
        self.get(repository, url, &headers, &format!("the blob {digest}")).await
    }

    /// Calls `attempt` until it succeeds, fails for good, or has failed too often.
    pub(crate) async fn retrying<T, F: Future<Output = Result<T, OciError>>>(
        &self,
        attempt: impl Fn() -> F,
    ) -> Result<T, OciError> {
        let mut failures = 0;
        loop {
            match attempt().await {
                Err(error) if error.is_transient() && failures + 1 < self.attempts => {
                    tracing::debug!(registry = self.name, %error, "retrying a request");
                    self.pause(failures).await;
                    failures += 1;
                }
                done => return done,
            }
        }
    }

    /// Waits before the next attempt, after `failures` earlier ones.
    pub(crate) async fn pause(&self, failures: u32) {
        sleep(self.deadlines.backoff * 2_u32.saturating_pow(failures)).await;
    }

    fn url(&self, path: &str) -> Result<Url, OciError> {
        self.base.join(path).map_err(|error| OciError::Reference {
            reference: quoted(path.as_bytes()),
            reason: error.to_string(),
        })
    }

    /// Makes one request, follows redirects, and answers one challenge.
    async fn get(&self, repository: &str, url: Url, headers: &HeaderMap, what: &str) -> Result<Response, OciError> {
        let (mut url, mut redirects, mut challenged) = (url, 0, false);
        loop {
            let own = url.origin() == self.base.origin();
            let access = own.then(|| self.access()).flatten();
            let response = self.send(&url, access.as_ref(), headers.clone()).await?;
            let status = response.status();
            let location = response
                .headers()
                .get(LOCATION)
                .map(|value| value.as_bytes().to_owned());
            match (status, location) {
                (StatusCode::OK | StatusCode::PARTIAL_CONTENT, _) => return Ok(response),
                (StatusCode::UNAUTHORIZED, _) if own && !challenged => {
                    challenged = true;
                    let access = answer(self, response.headers(), repository).await?;
                    *self.access.lock().unwrap_or_else(PoisonError::into_inner) = Some(access);
                }
                (_, Some(location)) if status.is_redirection() => {
                    redirects += 1;
                    if redirects > MAX_REDIRECTS {
                        return Err(OciError::Redirect {
                            host: authority(&url),
                            target: quoted(&location),
                            reason: "there were too many redirects before it",
                        });
                    }
                    url = self.reach.follow(&url, &location)?;
                }
                _ => return Err(self.failure(&url, response, what).await),
            }
        }
    }

    fn access(&self) -> Option<Access> {
        self.access.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends one request, and waits for the head of its response.
    pub(crate) async fn send(
        &self,
        url: &Url,
        access: Option<&Access>,
        headers: HeaderMap,
    ) -> Result<Response, OciError> {
        let mut request = self.client.get(url.clone()).headers(headers);
        request = match access {
            Some(Access::Basic(credentials)) => request.basic_auth(&credentials.username, Some(&credentials.password)),
            Some(Access::Bearer(token)) => request.bearer_auth(token),
            None => request,
        };
        match timeout(self.deadlines.request, request.send()).await {
            Ok(sent) => sent.map_err(|error| broken(&authority(url), &error)),
            Err(_) => Err(OciError::Stalled {
                host: authority(url),
                seconds: self.deadlines.request.as_secs(),
            }),
        }
    }

    /// Turns an error response into an [`OciError`].
    async fn failure(&self, url: &Url, response: Response, what: &str) -> OciError {
        let (status, host) = (response.status(), authority(url));
        let body = read(response, &host, MAX_ERROR, "an error", &self.deadlines).await;
        let message = message(&body.unwrap_or_default());
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => OciError::Unauthorized {
                registry: self.name.clone(),
                reason: format!("it responded with {}: {message}", status.as_u16()),
            },
            StatusCode::NOT_FOUND => OciError::NotFound {
                registry: self.name.clone(),
                what: what.to_owned(),
            },
            _ => OciError::Status {
                host,
                status: status.as_u16(),
                message,
            },
        }
    }
}

/// Returns whether a host is on loopback by its name.
fn is_loopback(url: &Url) -> bool {
    let address = crate::oci::address::literal(url);
    url.host_str() == Some("localhost") || address.is_some_and(|address| address.is_loopback())
}

/// Returns the message in the body of an error (distribution specification, "Error Codes").
fn message(body: &[u8]) -> String {
    let parsed: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let field = |name| parsed.as_ref()?.pointer(&format!("/errors/0/{name}"))?.as_str();
    match field("message")
        .filter(|text| !text.is_empty())
        .or_else(|| field("code"))
    {
        Some(text) => quoted(text.as_bytes()),
        None => quoted(body),
    }
}

/// The response of a token service; the two fields are the same.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// Returns the access that a registry requires with status 401 (RFC 9110, section 11; Docker's
/// token protocol).
async fn answer(registry: &Registry, challenge: &HeaderMap, repository: &str) -> Result<Access, OciError> {
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
        (None, _) => Err(denied("it supports neither Basic nor Bearer authentication")),
    }
}

/// Requests a token that allows pulling from `repository` from a token service.
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
            reason: format!("{host} responded with {}", status.as_u16()),
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

/// Reads a manifest, token or configuration.
pub(crate) async fn read_document(
    response: Response,
    host: &str,
    what: &str,
    deadlines: &Deadlines,
) -> Result<Vec<u8>, OciError> {
    read(response, host, MAX_DOCUMENT, what, deadlines).await
}

async fn read(
    mut response: Response,
    host: &str,
    limit: u64,
    what: &str,
    deadlines: &Deadlines,
) -> Result<Vec<u8>, OciError> {
    let deadline = Instant::now() + deadlines.request;
    let mut body = Vec::new();
    let reading = async {
        while let Some(chunk) = next_chunk(&mut response, host, deadlines.stall).await? {
            if (body.len() + chunk.len()) as u64 > limit {
                return Err(OciError::TooLarge {
                    what: format!("{what} of {host}"),
                    limit: Bytes::new(limit),
                });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(())
    };
    match timeout_at(deadline, reading).await {
        Ok(read) => read.map(|()| body),
        Err(_) => Err(OciError::Deadline {
            host: host.to_owned(),
            what: what.to_owned(),
            seconds: deadlines.request.as_secs(),
        }),
    }
}

/// Returns the next part of a body; `None` at its end.
pub(crate) async fn next_chunk(
    response: &mut Response,
    host: &str,
    stall: Duration,
) -> Result<Option<bytes::Bytes>, OciError> {
    match timeout(stall, response.chunk()).await {
        Ok(chunk) => chunk.map_err(|error| broken(host, &error)),
        Err(_) => Err(OciError::Stalled {
            host: host.to_owned(),
            seconds: stall.as_secs(),
        }),
    }
}

/// Returns the error of a broken connection.
fn broken(host: &str, error: &reqwest::Error) -> OciError {
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(inner) = cause {
        if let Some(forbidden) = inner.downcast_ref::<Forbidden>() {
            return OciError::ForbiddenAddress {
                host: forbidden.host.clone(),
                address: forbidden.address.to_string(),
            };
        }
        cause = inner.source();
    }
    OciError::Unreachable {
        host: host.to_owned(),
        reason: causes(error),
    }
}

/// Joins an error and its causes. The error itself repeats the URL.
fn causes(error: &reqwest::Error) -> String {
    let mut texts = Vec::new();
    let mut cause = error.source();
    while let Some(inner) = cause {
        texts.push(inner.to_string());
        cause = inner.source();
    }
    texts.dedup();
    match texts.is_empty() {
        true => "the connection failed".to_owned(),
        false => quoted(texts.join(": ").as_bytes()),
    }
}

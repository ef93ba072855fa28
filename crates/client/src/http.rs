//! A blocking client: one method a call of the API, typed both ways.

use crate::error_code::{ErrorBody, ErrorCode};
use crate::event_stream::EventStream;
use crate::types::{Health, HostInfo, PoolInfo, Snapshot, Template, TemplateList, Trimmed, Vm, VmList};
use crate::{CreateVm, ResizePool, SnapshotVm, UpdateVm};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::io::{self, Read};
use std::time::Duration;
use ureq::http::uri::Authority;
use ureq::http::{Method, Request, Response, header, request};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, SendBody, Timeout};

/// Speaks to one daemon. Cheap to make; every call has a connection of its own, so that a daemon
/// that was started anew between two calls is not noticed.
pub struct Client {
    agent: Agent,
    base: String,
    authorization: String,
}

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is none.
    #[error("{url:?} is not the address of a server: {why}; write it as http://HOST:PORT or https://HOST")]
    Url {
        /// As it was given.
        url: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The token cannot stand in a header line. It is not shown.
    #[error("the token must be of printable ASCII characters without spaces, and not empty")]
    Token,
    /// No connection came about: the daemon knows nothing of the request.
    #[error("cannot reach scaleboxd at {url}: {why}; {hint}")]
    Unreachable {
        /// The daemon's address.
        url: String,
        /// What the system said.
        why: String,
        /// What to try.
        hint: &'static str,
    },
    /// The connection ended without a whole answer: the daemon may or may not have carried out the
    /// request.
    #[error("no answer from {call}: {why}; {hint}")]
    Lost {
        /// Method and address.
        call: String,
        /// What happened.
        why: String,
        /// What to try.
        hint: &'static str,
    },
    /// The daemon said no.
    #[error("{message}")]
    Refused {
        /// The HTTP status, 400 and up.
        status: u16,
        /// The daemon's sentence, and a hint where the address may be wrong.
        message: String,
        /// The answer, with its code.
        body: Box<ErrorBody>,
    },
    /// Something answered that is no scaleboxd, or one that this client does not understand.
    #[error("{call} answered {why}; is this the address of a scaleboxd?")]
    Protocol {
        /// Method and address.
        call: String,
        /// What is wrong with the answer.
        why: String,
    },
}

impl ClientError {
    /// The HTTP status, where the daemon said no.
    pub fn status(&self) -> Option<u16> {
        match self {
            ClientError::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// The reason of a refusal, for programs.
    pub fn code(&self) -> Option<&ErrorCode> {
        match self {
            ClientError::Refused { body, .. } => Some(&body.code),
            _ => None,
        }
    }
}

/// The token is left out.
impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

/// To a connection, TLS included.
const CONNECT: Duration = Duration::from_secs(10);
/// For what a daemon answers from memory.
const ASK: Duration = Duration::from_secs(30);
/// For what it does to a VM. Above every deadline of its own (a guest's shutdown, the check of a
/// template), because a client that gives up first does not learn how it ended.
const WORK: Duration = Duration::from_secs(300);
/// Between two signs of life on a stream of events; the daemon gives one every 15 seconds.
const QUIET: Duration = Duration::from_secs(60);
/// An answer is read up to this many bytes: some ten thousand VMs.
const LONGEST_ANSWER: u64 = 16 << 20;

impl Client {
    /// A client of the daemon at `url` (`http://HOST:PORT`, `https://HOST`, perhaps with a path
    /// that a proxy takes off).
    ///
    /// # Errors
    /// An address or a token that no request could be made with. Nothing is sent yet.
    pub fn new(url: &str, token: &str) -> Result<Self, ClientError> {
        let base = check_url(url)?;
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(ClientError::Token);
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // A redirect is an answer of something else: it must not take the token along.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(0)
            .timeout_connect(Some(CONNECT))
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .user_agent(concat!("scalebox-client/", env!("CARGO_PKG_VERSION")));
        // A proxy cannot reach this machine's own loopback, whatever the environment says.
        let config = if is_loopback(&base) { config.proxy(None) } else { config };
        Ok(Client {
            agent: config.build().new_agent(),
            base,
            authorization: format!("Bearer {token}"),
        })
    }

    /// The daemon's address, without a slash at its end.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// `GET /health`.
    ///
    /// # Errors
    /// As every call: see [`ClientError`].
    pub fn health(&self) -> Result<Health, ClientError> {
        self.ask("/health")
    }

    /// `POST /vms`: returns when the VM's machine was started; its guest is then still booting.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn create_vm(&self, request: &CreateVm) -> Result<Vm, ClientError> {
        let mut call = Call::new(self, Method::POST, "/vms", WORK);
        call.idempotency_key = request.idempotency_key.as_ref().map(|key| format!("\"{key}\""));
        let body = serde_json::to_vec(request).map_err(|error| call.protocol(error.to_string()))?;
        call.run(Some(body))?.json()
    }

    /// `GET /vms`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn vms(&self) -> Result<Vec<Vm>, ClientError> {
        self.ask("/vms").map(|VmList { vms }| vms)
    }

    /// `GET /vms/{id or name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn vm(&self, id_or_name: &str) -> Result<Vm, ClientError> {
        self.ask(&vm_path(id_or_name))
    }

    /// `DELETE /vms/{id or name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn delete_vm(&self, id_or_name: &str) -> Result<(), ClientError> {
        self.delete(&vm_path(id_or_name))
    }

    /// `POST /vms/{id or name}/start`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn start_vm(&self, id_or_name: &str) -> Result<Vm, ClientError> {
        self.post(&(vm_path(id_or_name) + "/start"))
    }

    /// `POST /vms/{id or name}/stop`: the guest's own shutdown, and after its deadline a kill.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stop_vm(&self, id_or_name: &str) -> Result<Vm, ClientError> {
        self.post(&(vm_path(id_or_name) + "/stop"))
    }

    /// `POST /vms/{id or name}/restart`: stopped as by [`Client::stop_vm`], and started; one that
    /// does not run is started.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn restart_vm(&self, id_or_name: &str) -> Result<Vm, ClientError> {
        self.post(&(vm_path(id_or_name) + "/restart"))
    }

    /// `PATCH /vms/{id or name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn update_vm(&self, id_or_name: &str, request: &UpdateVm) -> Result<Vm, ClientError> {
        self.send(Method::PATCH, &vm_path(id_or_name), request)
    }

    /// `POST /vms/{id or name}/trim`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn trim_vm(&self, id_or_name: &str) -> Result<Trimmed, ClientError> {
        self.post(&(vm_path(id_or_name) + "/trim"))
    }

    /// `POST /vms/{id or name}/snapshot`: returns when the template can be used.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn snapshot_vm(&self, id_or_name: &str, request: &SnapshotVm) -> Result<Snapshot, ClientError> {
        self.send(Method::POST, &(vm_path(id_or_name) + "/snapshot"), request)
    }

    /// `GET /templates`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn templates(&self) -> Result<Vec<Template>, ClientError> {
        self.ask("/templates").map(|TemplateList { templates }| templates)
    }

    /// `DELETE /templates/{name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn delete_template(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&template_path(name, ""))
    }

    /// `GET /templates/{name}/export`: the template's image, packed with zstd.
    ///
    /// # Errors
    /// See [`ClientError`]; what breaks off later is the reader's to tell.
    pub fn export_template(&self, name: &str) -> Result<Export, ClientError> {
        let call = Call::new(self, Method::GET, &template_path(name, "/export"), ASK);
        let (response, call) = call.begin("application/zstd")?;
        let image_bytes = response
            .headers()
            .get("Scalebox-Image-Bytes")
            .and_then(|size| size.to_str().ok()?.parse().ok())
            .ok_or_else(|| call.protocol("another file than was asked for".to_owned()))?;
        Ok(Export {
            image_bytes,
            packed: Box::new(response.into_body().into_reader()),
        })
    }

    /// `POST /templates/{name}/import`: makes a template of an ext4 image, packed with zstd or
    /// bare. With `replace`, one of that name gives way to it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn import_template(
        &self,
        name: &str,
        image: impl Read + 'static,
        replace: bool,
    ) -> Result<Template, ClientError> {
        let path = template_path(name, &format!("/import?replace={replace}"));
        Call::new(self, Method::POST, &path, WORK).upload(image)?.json()
    }

    /// `GET /pool`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn pool(&self) -> Result<PoolInfo, ClientError> {
        self.ask("/pool")
    }

    /// `POST /pool/grow`; without a size, to 80 % of what the host disk can hold today.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn grow_pool(&self, size_gib: Option<u64>) -> Result<PoolInfo, ClientError> {
        self.send(Method::POST, "/pool/grow", &ResizePool { size_gib })
    }

    /// `POST /pool/shrink`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn shrink_pool(&self, size_gib: u64) -> Result<PoolInfo, ClientError> {
        self.send(
            Method::POST,
            "/pool/shrink",
            &ResizePool {
                size_gib: Some(size_gib),
            },
        )
    }

    /// `POST /pool/trim`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn trim_pool(&self) -> Result<Trimmed, ClientError> {
        self.send(Method::POST, "/pool/trim", &serde_json::json!({}))
    }

    /// `GET /events`: what happens from now on, or after the event `since` where one is given (0:
    /// all that the daemon still knows). Without `follow` the stream ends with what has happened so
    /// far.
    ///
    /// # Errors
    /// See [`ClientError`]; once it runs, the stream has its own.
    pub fn events(&self, since: Option<u64>, follow: bool) -> Result<EventStream, ClientError> {
        let since = since.map_or_else(String::new, |since| format!("&since={since}"));
        let path = format!("/events?follow={follow}{since}");
        Call::new(self, Method::GET, &path, ASK).stream()
    }

    /// `GET /info`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn info(&self) -> Result<HostInfo, ClientError> {
        self.ask("/info")
    }

    fn ask<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        Call::new(self, Method::GET, path, ASK).run(None)?.json()
    }

    fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        Call::new(self, Method::POST, path, WORK).run(None)?.json()
    }

    fn delete(&self, path: &str) -> Result<(), ClientError> {
        Call::new(self, Method::DELETE, path, WORK).run(None).map(drop)
    }

    fn send<T: DeserializeOwned>(&self, method: Method, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let call = Call::new(self, method, path, WORK);
        let body = serde_json::to_vec(body).map_err(|error| call.protocol(error.to_string()))?;
        call.run(Some(body))?.json()
    }
}

/// A template on its way out.
pub struct Export {
    /// The size of its image.
    pub image_bytes: u64,
    /// The image, packed with zstd. What comes is whole when it unpacks to [`Export::image_bytes`].
    pub packed: Box<dyn Read + Send>,
}

/// One request on its way.
struct Call<'c> {
    client: &'c Client,
    method: Method,
    url: String,
    patience: Duration,
    /// As it stands in the header.
    idempotency_key: Option<String>,
}

/// What came back with a status under 300.
struct Answer<'c> {
    call: Call<'c>,
    body: String,
}

impl<'c> Call<'c> {
    fn new(client: &'c Client, method: Method, path: &str, patience: Duration) -> Self {
        Call {
            client,
            method,
            url: format!("{}{path}", client.base),
            patience,
            idempotency_key: None,
        }
    }

    fn run(self, body: Option<Vec<u8>>) -> Result<Answer<'c>, ClientError> {
        let response = self.transmit(body).map_err(|error| self.failed(error))?;
        self.answer(response)
    }

    fn answer(self, mut response: Response<Body>) -> Result<Answer<'c>, ClientError> {
        let status = response.status();
        let text = response.body_mut().with_config().limit(LONGEST_ANSWER).read_to_string();
        let body = text.map_err(|error| self.failed(error))?;
        if status.is_success() {
            return Ok(Answer { call: self, body });
        }
        match serde_json::from_str::<ErrorBody>(&body) {
            Ok(refusal) if status.as_u16() >= 400 => Err(ClientError::Refused {
                status: status.as_u16(),
                message: self.with_hint(refusal.error.clone()),
                body: Box::new(refusal),
            }),
            _ => Err(self.protocol(match response.headers().get(header::LOCATION) {
                Some(location) => format!("{status}, to {}", String::from_utf8_lossy(location.as_bytes())),
                None => format!("{status} without saying why in the API's form"),
            })),
        }
    }

    /// The daemon has no idea that what stands before its routes came from the address.
    fn with_hint(&self, error: String) -> String {
        let host = self.client.base.split_once("://").map_or("", |(_, rest)| rest);
        match host.split_once('/') {
            Some((_, path)) if error.starts_with("there is no route") => {
                let base = &self.client.base;
                format!("{error}; the address {base} has the path /{path}: leave that out, unless a proxy takes it off")
            }
            _ => error,
        }
    }

    fn transmit(&self, body: Option<Vec<u8>>) -> Result<Response<Body>, ureq::Error> {
        let request = self.request().header(header::ACCEPT, "application/json");
        let request = match &self.idempotency_key {
            Some(key) => request.header("Idempotency-Key", key),
            None => request,
        };
        let agent = &self.client.agent;
        let patience = Some(self.patience);
        // Without any body at all, ureq would announce the chunks of one for a POST.
        if body.is_none() && self.method != Method::POST {
            let request = request.body(())?;
            return agent.run(agent.configure_request(request).timeout_global(patience).build());
        }
        let request = match &body {
            Some(_) => request.header(header::CONTENT_TYPE, "application/json"),
            None => request,
        };
        let request = request.body(body.unwrap_or_default())?;
        agent.run(agent.configure_request(request).timeout_global(patience).build())
    }

    /// As [`Call::run`], for an answer that comes bit by bit and has no end in time.
    fn stream(self) -> Result<EventStream, ClientError> {
        let (response, call) = self.begin("text/event-stream")?;
        Ok(EventStream::new(response.into_body().into_reader(), call.to_string()))
    }

    /// The answer's head, and its body yet to be read; the server gives a sign of life at least
    /// every [`QUIET`].
    fn begin(self, accept: &str) -> Result<(Response<Body>, Self), ClientError> {
        let request = self.request().header(header::ACCEPT, accept);
        let agent = &self.client.agent;
        let answered = request.body(()).map_err(ureq::Error::from).and_then(|request| {
            let request = agent.configure_request(request);
            agent.run(
                request
                    .timeout_recv_response(Some(self.patience))
                    .timeout_per_read(Some(QUIET))
                    .build(),
            )
        });
        let response = answered.map_err(|error| self.failed(error))?;
        if !response.status().is_success() {
            return match self.answer(response) {
                Ok(answer) => Err(answer.call.protocol("another stream than was asked for".to_owned())),
                Err(error) => Err(error),
            };
        }
        Ok((response, self))
    }

    /// Sends a body of any length. The server says first whether it wants it.
    fn upload(self, body: impl Read + 'static) -> Result<Answer<'c>, ClientError> {
        let request = self
            .request()
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::EXPECT, "100-continue");
        let agent = &self.client.agent;
        let body = SendBody::from_owned_reader(body);
        let answered = request.body(body).map_err(ureq::Error::from).and_then(|request| {
            let request = agent.configure_request(request);
            agent.run(request.timeout_recv_response(Some(self.patience)).build())
        });
        let response = answered.map_err(|error| self.failed(error))?;
        self.answer(response)
    }

    fn request(&self) -> request::Builder {
        Request::builder()
            .method(self.method.clone())
            .uri(&self.url)
            .header(header::AUTHORIZATION, &self.client.authorization)
    }

    fn failed(&self, error: ureq::Error) -> ClientError {
        use io::ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, InvalidData, NetworkUnreachable};
        const RUNS: &str = "is it running? (systemctl status scaleboxd)";
        const ADDRESS: &str = "is the address right?";
        const TLS: &str = "https needs a server that speaks it, with a certificate that this system trusts";
        match error {
            ureq::Error::Io(error) => match error.kind() {
                kind @ ConnectionRefused => self.unreachable(kind.to_string(), RUNS),
                kind @ (AddrNotAvailable | HostUnreachable | NetworkUnreachable) => {
                    self.unreachable(kind.to_string(), ADDRESS)
                }
                // rustls, in its handshake: no certificate, none that is trusted, or no TLS at all.
                InvalidData if self.url.starts_with("https:") => self.unreachable(error.to_string(), TLS),
                // The standard library has no kind for this, only the words.
                _ if error.to_string().starts_with("failed to lookup address information") => {
                    self.unreachable("no such host".to_owned(), ADDRESS)
                }
                _ => self.lost(error.to_string()),
            },
            ureq::Error::HostNotFound => self.unreachable("no such host".to_owned(), ADDRESS),
            ureq::Error::ConnectionFailed => self.unreachable("the connection failed".to_owned(), ADDRESS),
            ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
                let why = format!("no connection within {} s", CONNECT.as_secs());
                self.unreachable(why, "is the address right, and does a firewall let it through?")
            }
            ureq::Error::Timeout(_) => self.lost(format!("nothing within {} s", self.patience.as_secs())),
            error @ (ureq::Error::Tls(_) | ureq::Error::Rustls(_)) => self.unreachable(error.to_string(), TLS),
            error => self.protocol(format!("something that is not HTTP ({error})")),
        }
    }

    fn unreachable(&self, why: String, hint: &'static str) -> ClientError {
        ClientError::Unreachable {
            url: self.client.base.clone(),
            why,
            hint,
        }
    }

    fn lost(&self, why: String) -> ClientError {
        let hint = if self.method == Method::GET {
            "try again"
        } else {
            "it may have been carried out all the same: look before you repeat it"
        };
        ClientError::Lost {
            call: self.to_string(),
            why,
            hint,
        }
    }

    fn protocol(&self, why: String) -> ClientError {
        ClientError::Protocol {
            call: self.to_string(),
            why,
        }
    }
}

/// `GET http://HOST:PORT/vms`.
impl fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.url)
    }
}

impl Answer<'_> {
    fn json<T: DeserializeOwned>(self) -> Result<T, ClientError> {
        serde_json::from_str(&self.body).map_err(|error| {
            self.call
                .protocol(format!("something that this client does not understand ({error})"))
        })
    }
}

/// The address without white space around it and a slash at its end, its scheme in lower case (RFC
/// 3986, section 3.1).
fn check_url(url: &str) -> Result<String, ClientError> {
    let url = url.trim();
    let refuse = |why| ClientError::Url {
        url: url.to_owned(),
        why,
    };
    if url.contains('@') {
        // Not repeated either: what stands before the @ may be a password.
        return Err(ClientError::Url {
            url: "…@…".to_owned(),
            why: "it names a user, and the API knows only tokens",
        });
    }
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    let scheme = scheme.to_ascii_lowercase();
    if !matches!(scheme.as_str(), "http" | "https") {
        return Err(refuse("it does not begin with http:// or https://"));
    }
    let url = &format!("{scheme}://{rest}");
    if rest.contains(['?', '#']) {
        return Err(refuse("it has a query or a fragment"));
    }
    let uri = url.parse::<ureq::http::Uri>().ok();
    let authority = uri.as_ref().and_then(|uri| uri.authority());
    // A port over 65535 is none to this parser, and the one of the scheme would be taken.
    let whole = |authority: &&Authority| authority.as_str() == authority.host() || authority.port_u16().is_some();
    match authority.filter(|authority| !authority.host().is_empty()).filter(whole) {
        Some(_) => Ok(url.trim_end_matches('/').to_owned()),
        None => Err(refuse("it names no host, or not in a form that is understood")),
    }
}

fn is_loopback(base: &str) -> bool {
    let uri = base.parse::<ureq::http::Uri>().unwrap_or_default();
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn template_path(name: &str, rest: &str) -> String {
    format!("/templates/{}{rest}", percent_encoded(name))
}

fn vm_path(id_or_name: &str) -> String {
    format!("/vms/{}", percent_encoded(id_or_name))
}

/// One segment of a path (RFC 3986, section 3.3): all but the unreserved characters encoded, so
/// that nothing in it is a separator.
fn percent_encoded(segment: &str) -> String {
    let mut encoded = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~' | b'.') {
            encoded.push(byte as char);
        } else {
            encoded += &format!("%{byte:02X}");
        }
    }
    encoded
}

//! A blocking client of the API, with one method per call.

use crate::error::ClientError;
use crate::event_stream::EventStream;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};
use scalebox_api::{
    CreateVm, CreateVmQuery, ErrorBody, Health, HostInfo, Job, JobList, PoolInfo, PullTemplate, ResizePool, Snapshot,
    SnapshotVm, Template, TemplateList, Trimmed, UpdateVm, Vm, VmList, VmSource,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::io::{self, Read};
use std::time::Duration;
use ureq::http::uri::Authority;
use ureq::http::{Method, Request, Response, header, request};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, SendBody, Timeout};

/// A client of one daemon. It is cheap to create.
///
/// Each call opens a new connection, so that a restart of the daemon between two calls is harmless.
#[derive(Clone)]
pub struct Client {
    agent: Agent,
    base: String,
    authorization: String,
}

/// Omits the token.
impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

/// Timeout to open a connection, including TLS.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of queries.
pub(crate) const QUERY_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of operations. It exceeds every timeout of the daemon (a guest's shutdown, the check of
/// a template), so that the client receives the result.
pub(crate) const OPERATION_TIMEOUT: Duration = Duration::from_secs(300);
/// Timeout of the response to an image that was sent completely: disk images are converted first.
const IMPORT_TIMEOUT: Duration = Duration::from_secs(3600);
/// Maximum silence on a stream. On a stream of events, the daemon sends data every 15 seconds.
const STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const IS_RUNNING: &str = "is it running? (systemctl status scaleboxd)";
const ADDRESS: &str = "check the address";
const TLS: &str = "https needs a server with TLS and a certificate that this system trusts";
/// Maximum size of a response: some ten thousand VMs.
const MAX_RESPONSE_BYTES: u64 = 16 << 20;

impl Client {
    /// Creates a client of the daemon at `url`: `http://HOST:PORT` or `https://HOST`, optionally
    /// with a path that a proxy strips. Sends nothing yet.
    ///
    /// # Errors
    /// Returns an error if the address or the token is invalid.
    pub fn new(url: &str, token: &str) -> Result<Self, ClientError> {
        let base = check_url(url)?;
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(ClientError::Token);
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // A redirect does not come from scaleboxd: following it would disclose the token.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .user_agent(concat!("scalebox-client/", env!("CARGO_PKG_VERSION")));
        // A proxy cannot reach this machine's loopback, so its environment variables are ignored.
        let config = if is_loopback(&base) { config.proxy(None) } else { config };
        Ok(Client {
            agent: config.build().new_agent(),
            base,
            authorization: format!("Bearer {token}"),
        })
    }

    /// Returns the value of the header `Authorization`.
    pub(crate) fn authorization(&self) -> &str {
        &self.authorization
    }

    /// Returns the daemon's address, without a trailing slash.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// Sends `GET /health`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn health(&self) -> Result<Health, ClientError> {
        self.get("/health")
    }

    /// Sends `POST /vms`. Returns when the machine has started; its guest is then still booting.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn create_vm(&self, request: &CreateVm) -> Result<Vm, ClientError> {
        self.create_vm_and_wait(request, CreateVmQuery::default())
    }

    /// Sends `POST /vms` with a query: `wait` returns only when the guest's agent responds, and
    /// `wait_seconds` bounds this wait, and that for the pull of an image.
    ///
    /// # Errors
    /// See [`ClientError`]. After a refusal with the code `timeout`, the VM exists, unless
    /// [`pending_pull`](ClientError::pending_pull) returns a job.
    pub fn create_vm_and_wait(&self, request: &CreateVm, query: CreateVmQuery) -> Result<Vm, ClientError> {
        let mut parameters = Vec::new();
        parameters.extend(query.wait.map(|wait| format!("wait={}", wait.as_str())));
        parameters.extend(query.wait_seconds.map(|seconds| format!("wait_seconds={seconds}")));
        let path = match parameters.is_empty() {
            true => "/vms".to_owned(),
            false => format!("/vms?{}", parameters.join("&")),
        };
        let waits = u32::from(matches!(request.source, VmSource::Image(_))) + u32::from(query.wait.is_some());
        let waiting = waits * query.max_wait();
        let mut call = ApiRequest::new(self, Method::POST, &path, OPERATION_TIMEOUT + waiting);
        call.idempotency_key = request.idempotency_key.as_ref().map(|key| format!("\"{key}\""));
        let body = serde_json::to_vec(request).map_err(|error| call.protocol(error.to_string()))?;
        call.run(Some(body))?.json()
    }

    /// Sends `GET /vms`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn vms(&self) -> Result<Vec<Vm>, ClientError> {
        self.get("/vms").map(|VmList { vms }| vms)
    }

    /// Sends `GET /vms/{id or name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn vm(&self, id_or_name: &str) -> Result<Vm, ClientError> {
        self.get(&vm_path(id_or_name))
    }

    /// Sends `DELETE /vms/{id or name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn delete_vm(&self, id_or_name: &str) -> Result<(), ClientError> {
        self.delete(&vm_path(id_or_name))
    }

    /// Sends `POST /vms/{id or name}/start`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn start_vm(&self, id_or_name: &str) -> Result<Vm, ClientError> {
        self.post(&(vm_path(id_or_name) + "/start"))
    }

    /// Sends `POST /vms/{id or name}/stop`: shuts the guest down, and kills it after a timeout.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stop_vm(&self, id_or_name: &str) -> Result<Vm, ClientError> {
        self.post(&(vm_path(id_or_name) + "/stop"))
    }

    /// Sends `POST /vms/{id or name}/restart`: stops a running VM like [`Client::stop_vm`], and
    /// starts it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn restart_vm(&self, id_or_name: &str) -> Result<Vm, ClientError> {
        self.post(&(vm_path(id_or_name) + "/restart"))
    }

    /// Sends `PATCH /vms/{id or name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn update_vm(&self, id_or_name: &str, request: &UpdateVm) -> Result<Vm, ClientError> {
        self.send_json(Method::PATCH, &vm_path(id_or_name), request)
    }

    /// Sends `POST /vms/{id or name}/trim`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn trim_vm(&self, id_or_name: &str) -> Result<Trimmed, ClientError> {
        self.post(&(vm_path(id_or_name) + "/trim"))
    }

    /// Sends `POST /vms/{id or name}/snapshot`. Returns when the template is ready to use.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn snapshot_vm(&self, id_or_name: &str, request: &SnapshotVm) -> Result<Snapshot, ClientError> {
        self.send_json(Method::POST, &(vm_path(id_or_name) + "/snapshot"), request)
    }

    /// Sends `GET /templates`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn templates(&self) -> Result<Vec<Template>, ClientError> {
        self.get("/templates").map(|TemplateList { templates }| templates)
    }

    /// Sends `GET /templates/{name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn template(&self, name: &str) -> Result<Template, ClientError> {
        self.get(&template_path(name, ""))
    }

    /// Sends `POST /templates/{name}/pull`. Returns the job, which has just started.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn pull_template(&self, name: &str, request: &PullTemplate) -> Result<Job, ClientError> {
        self.send_json(Method::POST, &template_path(name, "/pull"), request)
    }

    /// Sends `GET /jobs`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn jobs(&self) -> Result<Vec<Job>, ClientError> {
        self.get("/jobs").map(|JobList { jobs }| jobs)
    }

    /// Sends `GET /jobs/{job}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn job(&self, id: &str) -> Result<Job, ClientError> {
        self.get(&job_path(id))
    }

    /// Sends `DELETE /jobs/{job}`, which cancels a running job.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn cancel_job(&self, id: &str) -> Result<(), ClientError> {
        self.delete(&job_path(id))
    }

    /// Sends `DELETE /templates/{name}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn delete_template(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&template_path(name, ""))
    }

    /// Sends `GET /templates/{name}/export`. Returns the template's image, compressed with zstd.
    ///
    /// # Errors
    /// See [`ClientError`]. The reader reports later failures.
    pub fn export_template(&self, name: &str) -> Result<Export, ClientError> {
        let call = ApiRequest::new(self, Method::GET, &template_path(name, "/export"), QUERY_TIMEOUT);
        let (response, call) = call.begin("application/zstd", None, Some(STREAM_IDLE_TIMEOUT))?;
        let image_bytes = response
            .headers()
            .get("Scalebox-Image-Bytes")
            .and_then(|size| size.to_str().ok()?.parse().ok())
            .ok_or_else(|| call.protocol("a file without the header Scalebox-Image-Bytes".to_owned()))?;
        Ok(Export {
            image_bytes,
            compressed: Box::new(response.into_body().into_reader()),
        })
    }

    /// Sends `POST /templates/{name}/import`: creates a template from an image, whose kind the
    /// daemon recognises by its content. `replace` allows it to replace an existing one.
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
        ApiRequest::new(self, Method::POST, &path, IMPORT_TIMEOUT)
            .upload(image, None)?
            .json()
    }

    /// Sends `GET /pool`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn pool(&self) -> Result<PoolInfo, ClientError> {
        self.get("/pool")
    }

    /// Sends `POST /pool/grow`. Without a size, the pool grows to 80 % of the space available to it
    /// on the host disk.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn grow_pool(&self, size_gib: Option<u64>) -> Result<PoolInfo, ClientError> {
        self.send_json(Method::POST, "/pool/grow", &ResizePool { size_gib })
    }

    /// Sends `POST /pool/shrink`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn shrink_pool(&self, size_gib: u64) -> Result<PoolInfo, ClientError> {
        self.send_json(
            Method::POST,
            "/pool/shrink",
            &ResizePool {
                size_gib: Some(size_gib),
            },
        )
    }

    /// Sends `POST /pool/trim`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn trim_pool(&self) -> Result<Trimmed, ClientError> {
        self.send_json(Method::POST, "/pool/trim", &serde_json::json!({}))
    }

    /// Sends `GET /events`. Returns new events, or those after the event `since` (0 starts with the
    /// oldest that the daemon has). Without `follow`, the stream ends after the past events.
    ///
    /// # Errors
    /// See [`ClientError`]. The stream reports later failures.
    pub fn events(&self, since: Option<u64>, follow: bool) -> Result<EventStream, ClientError> {
        let since = since.map_or_else(String::new, |since| format!("&since={since}"));
        let path = format!("/events?follow={follow}{since}");
        ApiRequest::new(self, Method::GET, &path, QUERY_TIMEOUT).stream()
    }

    /// Sends `GET /info`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn info(&self) -> Result<HostInfo, ClientError> {
        self.get("/info")
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        ApiRequest::new(self, Method::GET, path, QUERY_TIMEOUT)
            .run(None)?
            .json()
    }

    fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        ApiRequest::new(self, Method::POST, path, OPERATION_TIMEOUT)
            .run(None)?
            .json()
    }

    pub(crate) fn delete(&self, path: &str) -> Result<(), ClientError> {
        ApiRequest::new(self, Method::DELETE, path, OPERATION_TIMEOUT)
            .run(None)
            .map(drop)
    }

    pub(crate) fn send_json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let call = ApiRequest::new(self, method, path, OPERATION_TIMEOUT);
        let body = serde_json::to_vec(body).map_err(|error| call.protocol(error.to_string()))?;
        call.run(Some(body))?.json()
    }
}

/// The stream of a template's image.
pub struct Export {
    /// Size of the uncompressed image.
    pub image_bytes: u64,
    /// The image, compressed with zstd. It is complete if it decompresses to
    /// [`Export::image_bytes`].
    pub compressed: Box<dyn Read + Send>,
}

/// A request to the API.
pub(crate) struct ApiRequest<'c> {
    client: &'c Client,
    method: Method,
    url: String,
    timeout: Duration,
    /// The value of the header, with quotes.
    idempotency_key: Option<String>,
}

/// A response with a status under 300.
pub(crate) struct ApiResponse<'c> {
    request: ApiRequest<'c>,
    body: String,
}

impl<'c> ApiRequest<'c> {
    pub(crate) fn new(client: &'c Client, method: Method, path: &str, timeout: Duration) -> Self {
        ApiRequest {
            client,
            method,
            url: format!("{}{path}", client.base),
            timeout,
            idempotency_key: None,
        }
    }

    /// Sends the request with a JSON body, or without one.
    pub(crate) fn run(self, body: Option<Vec<u8>>) -> Result<ApiResponse<'c>, ClientError> {
        let response = self.transmit(body).map_err(|error| self.failed(error))?;
        self.read(response)
    }

    /// Reads the body; returns an error for an error status.
    fn read(self, mut response: Response<Body>) -> Result<ApiResponse<'c>, ClientError> {
        let status = response.status();
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_RESPONSE_BYTES)
            .read_to_string();
        let body = text.map_err(|error| self.failed(error))?;
        if status.is_success() {
            return Ok(ApiResponse { request: self, body });
        }
        match serde_json::from_str::<ErrorBody>(&body) {
            Ok(refusal) if status.as_u16() >= 400 => Err(ClientError::Refused {
                status: status.as_u16(),
                message: self.with_hint(refusal.error.clone()),
                body: Box::new(refusal),
            }),
            _ => Err(self.protocol(match response.headers().get(header::LOCATION) {
                Some(location) => format!(
                    "{status}, a redirect to {}",
                    String::from_utf8_lossy(location.as_bytes())
                ),
                None => format!("{status} without an error of the API"),
            })),
        }
    }

    /// Adds a hint to "no such route" errors if the address has a path, which may be the cause.
    fn with_hint(&self, error: String) -> String {
        let host = self.client.base.split_once("://").map_or("", |(_, rest)| rest);
        match host.split_once('/') {
            Some((_, path)) if error.starts_with("there is no route") => {
                let base = &self.client.base;
                format!("{error}; the address {base} has the path /{path}: remove it unless a proxy strips it")
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
        let timeout = Some(self.timeout);
        // For a POST without a body, ureq would announce a chunked one, so it gets an empty body.
        if body.is_none() && self.method != Method::POST {
            let request = request.body(())?;
            return agent.run(agent.configure_request(request).timeout_global(timeout).build());
        }
        let request = match &body {
            Some(_) => request.header(header::CONTENT_TYPE, "application/json"),
            None => request,
        };
        let request = request.body(body.unwrap_or_default())?;
        agent.run(agent.configure_request(request).timeout_global(timeout).build())
    }

    /// Sends the request, and returns the response as a stream of events without a total timeout.
    fn stream(self) -> Result<EventStream, ClientError> {
        let (response, request) = self.begin("text/event-stream", None, Some(STREAM_IDLE_TIMEOUT))?;
        Ok(EventStream::new(
            response.into_body().into_reader(),
            request.to_string(),
        ))
    }

    /// Sends the request, optionally with a JSON body, and returns the response before its body was
    /// read. Reading the body fails after a silence of `idle`.
    pub(crate) fn begin(
        self,
        accept: &str,
        body: Option<Vec<u8>>,
        idle: Option<Duration>,
    ) -> Result<(Response<Body>, Self), ClientError> {
        let request = self.request().header(header::ACCEPT, accept);
        let agent = &self.client.agent;
        let timeout = Some(self.timeout);
        let result = match body {
            None => request.body(()).map_err(ureq::Error::from).and_then(|request| {
                let request = agent.configure_request(request).timeout_recv_response(timeout);
                agent.run(request.timeout_per_read(idle).build())
            }),
            Some(body) => {
                let request = request.header(header::CONTENT_TYPE, "application/json");
                request.body(body).map_err(ureq::Error::from).and_then(|request| {
                    let request = agent.configure_request(request).timeout_recv_response(timeout);
                    agent.run(request.timeout_per_read(idle).build())
                })
            }
        };
        let response = result.map_err(|error| self.failed(error))?;
        if !response.status().is_success() {
            return match self.read(response) {
                Ok(response) => Err(response.request.protocol("an unexpected response".to_owned())),
                Err(error) => Err(error),
            };
        }
        Ok((response, self))
    }

    /// Sends a body of the given length, or of any length, after the server has accepted the head
    /// (`100 Continue`). A body that ends before its length is an error of the connection.
    pub(crate) fn upload(self, body: impl Read + 'static, length: Option<u64>) -> Result<ApiResponse<'c>, ClientError> {
        let mut request = self
            .request()
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::EXPECT, "100-continue");
        if let Some(length) = length {
            request = request.header(header::CONTENT_LENGTH, length);
        }
        let agent = &self.client.agent;
        let body = SendBody::from_owned_reader(body);
        let result = request.body(body).map_err(ureq::Error::from).and_then(|request| {
            let request = agent.configure_request(request);
            agent.run(request.timeout_recv_response(Some(self.timeout)).build())
        });
        let response = result.map_err(|error| self.failed(error))?;
        self.read(response)
    }

    fn request(&self) -> request::Builder {
        Request::builder()
            .method(self.method.clone())
            .uri(&self.url)
            .header(header::AUTHORIZATION, &self.client.authorization)
    }

    /// Returns the address, with path and query.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Describes an error of a connection.
    pub(crate) fn io_error(&self, error: io::Error) -> ClientError {
        use io::ErrorKind::{
            AddrNotAvailable, ConnectionRefused, HostUnreachable, InvalidData, NetworkUnreachable, TimedOut,
        };
        match error.kind() {
            kind @ ConnectionRefused => self.unreachable(kind.to_string(), IS_RUNNING),
            kind @ (AddrNotAvailable | HostUnreachable | NetworkUnreachable | TimedOut) => {
                self.unreachable(kind.to_string(), ADDRESS)
            }
            // rustls failed in the handshake: the server has no trusted certificate, or no TLS.
            InvalidData if self.url.starts_with("https:") => self.tls_error(&error),
            // The standard library has no error kind for this, only the message.
            _ if error.to_string().starts_with("failed to lookup address information") => {
                self.unreachable("no such host".to_owned(), ADDRESS)
            }
            _ => self.lost(error.to_string()),
        }
    }

    /// Describes an error of TLS.
    pub(crate) fn tls_error(&self, error: &impl fmt::Display) -> ClientError {
        self.unreachable(error.to_string(), TLS)
    }

    fn failed(&self, error: ureq::Error) -> ClientError {
        match error {
            ureq::Error::Io(error) => self.io_error(error),
            ureq::Error::HostNotFound => self.unreachable("no such host".to_owned(), ADDRESS),
            ureq::Error::ConnectionFailed => self.unreachable("the connection failed".to_owned(), ADDRESS),
            ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
                let why = format!("no connection within {} s", CONNECT_TIMEOUT.as_secs());
                self.unreachable(why, "check the address and firewalls")
            }
            ureq::Error::Timeout(_) => self.lost(format!("timed out after {} s", self.timeout.as_secs())),
            error @ (ureq::Error::Tls(_) | ureq::Error::Rustls(_)) => self.tls_error(&error),
            error => self.protocol(format!("something that is not HTTP ({error})")),
        }
    }

    pub(crate) fn unreachable(&self, why: String, hint: &'static str) -> ClientError {
        ClientError::Unreachable {
            url: self.client.base.clone(),
            why,
            hint,
        }
    }

    pub(crate) fn lost(&self, why: String) -> ClientError {
        let hint = if self.method == Method::GET {
            "try again"
        } else {
            "the request may have succeeded: check before you repeat it"
        };
        ClientError::Lost {
            call: self.to_string(),
            why,
            hint,
        }
    }

    pub(crate) fn protocol(&self, why: String) -> ClientError {
        ClientError::Protocol {
            call: self.to_string(),
            why,
        }
    }
}

/// Formats as `GET http://HOST:PORT/vms`.
impl fmt::Display for ApiRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.url)
    }
}

impl ApiResponse<'_> {
    pub(crate) fn json<T: DeserializeOwned>(self) -> Result<T, ClientError> {
        serde_json::from_str(&self.body).map_err(|error| {
            self.request
                .protocol(format!("a body that this client does not understand ({error})"))
        })
    }
}

/// Checks and normalizes the address. Strips white space and trailing slashes, and puts the scheme
/// into lower case (RFC 3986, section 3.1).
fn check_url(url: &str) -> Result<String, ClientError> {
    let url = url.trim();
    let invalid = |why| ClientError::Url {
        url: url.to_owned(),
        why,
    };
    if url.contains('@') {
        // The address is not shown: the part before the @ may contain a password.
        return Err(ClientError::Url {
            url: "…@…".to_owned(),
            why: "it contains a user, but the API accepts only tokens",
        });
    }
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    let scheme = scheme.to_ascii_lowercase();
    if !matches!(scheme.as_str(), "http" | "https") {
        return Err(invalid("it does not begin with http:// or https://"));
    }
    let url = &format!("{scheme}://{rest}");
    if rest.contains(['?', '#']) {
        return Err(invalid("it has a query or a fragment"));
    }
    let uri = url.parse::<ureq::http::Uri>().ok();
    let authority = uri.as_ref().and_then(|uri| uri.authority());
    // The parser ignores a port over 65535, and the default port would be used.
    let has_valid_port =
        |authority: &&Authority| authority.as_str() == authority.host() || authority.port_u16().is_some();
    let is_valid = |authority: &&Authority| !authority.host().is_empty() && has_valid_port(authority);
    match authority.filter(is_valid) {
        Some(_) => Ok(url.trim_end_matches('/').to_owned()),
        None => Err(invalid("its host or port is missing or invalid")),
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

fn job_path(id: &str) -> String {
    format!("/jobs/{}", percent_encoded(id))
}

pub(crate) fn vm_path(id_or_name: &str) -> String {
    format!("/vms/{}", percent_encoded(id_or_name))
}

/// Unreserved characters stay; all others are encoded. A segment of a path then contains no
/// separator (RFC 3986, section 3.3).
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'~').remove(b'.');

pub(crate) fn percent_encoded(segment: &str) -> PercentEncode<'_> {
    utf8_percent_encode(segment, ENCODED)
}

//! Requests and responses.

use crate::server::Failure;
use bytes::Bytes;
use futures::Stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::StatusCode;
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use percent_encoding::percent_decode_str;
use scalebox_agent_api::FailureCode;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

pub(crate) type Request = hyper::Request<Incoming>;
pub(crate) type Response = hyper::Response<BoxBody<Bytes, io::Error>>;

/// Maximum size of a JSON body, in bytes: an exec with the largest arguments, escaped.
const MAX_JSON: usize = 8 << 20;

/// Returns a response with a JSON body.
pub(crate) fn json<T: Serialize>(value: &T) -> Response {
    // Serialization of the protocol's types cannot fail: they have no maps with other keys than
    // strings.
    let body = serde_json::to_vec(value).unwrap_or_default();
    let mut response = hyper::Response::new(Full::new(Bytes::from(body)).map_err(|never| match never {}).boxed());
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Returns the response for an error.
pub(crate) fn failed(failure: &Failure) -> Response {
    let status = StatusCode::from_u16(failure.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(&failure.0);
    *response.status_mut() = status;
    response
}

/// Returns the failure for a method and path that the protocol does not have.
pub(crate) fn no_route(request: &Request) -> Failure {
    let (method, path) = (request.method(), request.uri().path());
    let error = format!("this agent does not support {method} {path}");
    Failure::new(FailureCode::Unsupported, error)
}

/// Returns a successful response without content.
pub(crate) fn no_content() -> Response {
    let mut response = hyper::Response::new(Full::default().map_err(|never| match never {}).boxed());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// Returns a response whose body is a stream. An error of the stream resets it, so that the host
/// does not treat it as complete.
pub(crate) fn stream<S>(bytes: S) -> Response
where
    S: Stream<Item = io::Result<Bytes>> + Send + Sync + 'static,
{
    use futures::StreamExt;
    hyper::Response::new(BodyExt::boxed(StreamBody::new(
        bytes.map(|piece| piece.map(Frame::data)),
    )))
}

/// Reads a JSON body.
///
/// # Errors
/// [`FailureCode::Invalid`] for a malformed or oversized body.
pub(crate) async fn read_json<T: DeserializeOwned>(request: Request) -> Result<T, Failure> {
    let invalid = |why: String| Failure::new(FailureCode::Invalid, format!("the request's body is invalid: {why}"));
    let body = Limited::new(request.into_body(), MAX_JSON).collect().await;
    let body = body.map_err(|error| invalid(error.to_string()))?.to_bytes();
    serde_json::from_slice(&body).map_err(|error| invalid(error.to_string()))
}

/// The query of a request.
pub(crate) struct Query(Vec<(String, Vec<u8>)>);

impl Query {
    /// Parses the query of `request`. Values are percent-decoded and may be any bytes; a plus sign
    /// is a plus sign.
    pub(crate) fn of(request: &Request) -> Query {
        let query = request.uri().query().unwrap_or_default();
        Query(
            query
                .split('&')
                .filter_map(|pair| pair.split_once('='))
                .map(|(name, value)| (name.to_owned(), percent_decode_str(value).collect()))
                .collect(),
        )
    }

    fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_slice())
    }

    /// Returns a value that must be UTF-8.
    ///
    /// # Errors
    /// [`FailureCode::Invalid`].
    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, Failure> {
        let Some(value) = self.bytes(name) else {
            return Ok(None);
        };
        let invalid = |_| Failure::new(FailureCode::Invalid, format!("the parameter {name} is not UTF-8"));
        std::str::from_utf8(value).map(Some).map_err(invalid)
    }

    /// Returns a value, parsed.
    ///
    /// # Errors
    /// [`FailureCode::Invalid`].
    pub(crate) fn parsed<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Failure> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        let invalid = |_| Failure::new(FailureCode::Invalid, format!("the parameter {name}={text} is invalid"));
        text.parse().map(Some).map_err(invalid)
    }

    /// Returns `true` if the value is `true`, and `false` if it is absent or `false`.
    ///
    /// # Errors
    /// [`FailureCode::Invalid`].
    pub(crate) fn flag(&self, name: &str) -> Result<bool, Failure> {
        Ok(self.parsed(name)?.unwrap_or(false))
    }

    /// Returns an absolute path in the guest.
    ///
    /// # Errors
    /// [`FailureCode::Invalid`] for an absent or relative path, one with a zero byte, or one with a
    /// component `..`.
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf, Failure> {
        let invalid = |why| {
            Err(Failure::new(
                FailureCode::Invalid,
                format!("the parameter {name} {why}"),
            ))
        };
        let Some(bytes) = self.bytes(name) else {
            return invalid("is missing");
        };
        match bytes {
            _ if bytes.contains(&0) => invalid("contains a zero byte"),
            _ if bytes.len() >= 4096 => invalid("is longer than 4095 bytes"),
            [b'/', ..] if bytes.split(|&byte| byte == b'/').any(|part| part == b"..") => {
                invalid("contains the component ..")
            }
            [b'/', ..] => Ok(PathBuf::from(OsString::from_vec(bytes.to_vec()))),
            _ => invalid("is not an absolute path"),
        }
    }
}

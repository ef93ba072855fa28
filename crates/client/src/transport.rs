//! Opens the connection of an attachment: TCP, TLS for `https`, and the WebSocket handshake.

use crate::error::ClientError;
use crate::http::{ApiRequest, CONNECT_TIMEOUT, QUERY_TIMEOUT};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use rustls_platform_verifier::ConfigVerifierExt;
use scalebox_api::attach::{MAX_MESSAGE_BYTES, SUBPROTOCOL};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use tungstenite::WebSocket;
use tungstenite::client::IntoClientRequest;
use tungstenite::handshake::HandshakeError;
use tungstenite::handshake::client::Request;
use tungstenite::http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};
use tungstenite::http::{HeaderValue, Uri};
use tungstenite::protocol::WebSocketConfig;

/// A WebSocket whose stream does not block.
pub(crate) type Socket = WebSocket<Stream>;

/// A TCP connection, with TLS for `https`.
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Stream::Plain(tcp) => tcp,
            Stream::Tls(tls) => &tls.sock,
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp().as_fd()
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(tcp) => tcp.read(buffer),
            Stream::Tls(tls) => tls.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(tcp) => tcp.write(bytes),
            Stream::Tls(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(tcp) => tcp.flush(),
            Stream::Tls(tls) => tls.flush(),
        }
    }
}

/// Connects to the address of `call`.
///
/// # Errors
/// [`ClientError::Protocol`] if the server responds without a WebSocket.
pub(crate) fn connect(call: &ApiRequest<'_>, authorization: &str) -> Result<Socket, ClientError> {
    let request = request(call, authorization)?;
    let tcp = open(call, request.uri())?;
    let failed = |error: io::Error| call.lost(error.to_string());
    tcp.set_nodelay(true).map_err(failed)?;
    tcp.set_read_timeout(Some(QUERY_TIMEOUT)).map_err(failed)?;
    tcp.set_write_timeout(Some(QUERY_TIMEOUT)).map_err(failed)?;
    let stream = match call.url().starts_with("https:") {
        true => Stream::Tls(Box::new(secure(call, tcp, request.uri())?)),
        false => Stream::Plain(tcp),
    };
    let config = WebSocketConfig::default()
        .max_message_size(Some(4 * MAX_MESSAGE_BYTES))
        .max_frame_size(Some(4 * MAX_MESSAGE_BYTES));
    match tungstenite::client::client_with_config(request, stream, Some(config)) {
        Ok((socket, _)) => {
            socket.get_ref().tcp().set_nonblocking(true).map_err(failed)?;
            Ok(socket)
        }
        Err(HandshakeError::Failure(tungstenite::Error::Http(response))) => {
            Err(call.protocol(format!("{} instead of a WebSocket", response.status())))
        }
        Err(HandshakeError::Failure(tungstenite::Error::Io(error))) => Err(call.lost(error.to_string())),
        Err(HandshakeError::Failure(error)) => Err(call.protocol(format!("an invalid handshake ({error})"))),
        Err(HandshakeError::Interrupted(_)) => Err(call.lost("the handshake timed out".to_owned())),
    }
}

fn request(call: &ApiRequest<'_>, authorization: &str) -> Result<Request, ClientError> {
    // http becomes ws, and https becomes wss.
    let url = call.url().replacen("http", "ws", 1);
    let invalid = |why: String| call.protocol(why);
    let mut request = url.into_client_request().map_err(|error| invalid(error.to_string()))?;
    let mut authorization = HeaderValue::from_str(authorization).map_err(|error| invalid(error.to_string()))?;
    authorization.set_sensitive(true);
    request.headers_mut().insert(AUTHORIZATION, authorization);
    let protocol = HeaderValue::from_static(SUBPROTOCOL);
    request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, protocol);
    Ok(request)
}

fn open(call: &ApiRequest<'_>, uri: &Uri) -> Result<TcpStream, ClientError> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(match uri.scheme_str() {
        Some("wss") => 443,
        _ => 80,
    });
    let addresses = (host, port).to_socket_addrs().map_err(|error| call.io_error(error))?;
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the host has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(call.io_error(last))
}

/// Starts TLS. The certificate is checked in the handshake, before the token is sent.
fn secure(
    call: &ApiRequest<'_>,
    tcp: TcpStream,
    uri: &Uri,
) -> Result<StreamOwned<ClientConnection, TcpStream>, ClientError> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let failed = |error: rustls::Error| call.tls_error(&error);
    let name = ServerName::try_from(host).map_err(|error| call.tls_error(&error))?;
    let config = ClientConfig::with_platform_verifier().map_err(failed)?;
    let connection = ClientConnection::new(Arc::new(config), name).map_err(failed)?;
    let mut stream = StreamOwned::new(connection, tcp);
    while stream.conn.is_handshaking() {
        stream
            .conn
            .complete_io(&mut stream.sock)
            .map_err(|error| call.io_error(error))?;
    }
    Ok(stream)
}

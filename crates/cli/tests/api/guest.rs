//! A fake server with a fake guest. It serves HTTP and the WebSocket of an attached command, and
//! each test plays the command.

use super::{Request, read_request, vm, write};
use scalebox_api::{AttachMessage, ExecEnd, Signal};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use tungstenite::handshake::server::{Callback, ErrorResponse, Request as Upgrade, Response};
use tungstenite::{Message, WebSocket};

pub(crate) const EXEC: &str = "exec-0123456789ab";

/// The connection of an attached client.
pub(crate) type Socket = WebSocket<Connection>;

/// A connection whose first bytes have been read already.
pub(crate) struct Connection(Cursor<Vec<u8>>, TcpStream);

impl Connection {
    pub(crate) fn set_nonblocking(&self, is_nonblocking: bool) {
        self.1.set_nonblocking(is_nonblocking).unwrap();
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self.0.read(buffer)? {
            0 => self.1.read(buffer),
            read => Ok(read),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.1.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.1.flush()
    }
}

struct AcceptProtocol;

impl Callback for AcceptProtocol {
    fn on_request(self, request: &Upgrade, mut response: Response) -> Result<Response, ErrorResponse> {
        let protocol = request.headers()["sec-websocket-protocol"].clone();
        response.headers_mut().insert("sec-websocket-protocol", protocol);
        Ok(response)
    }
}

/// Status and body for each request line.
type Responses = BTreeMap<String, (u16, Vec<u8>)>;

/// A host with one VM, `box`.
#[derive(Clone)]
pub(crate) struct Guest {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    /// Responses by request line; all other requests get a 404.
    responses: Arc<Mutex<Responses>>,
}

impl Guest {
    /// Starts a host on which `command` plays each attachment. Its first argument is the number of
    /// earlier attachments.
    pub(crate) fn new(command: impl Fn(usize, &mut Socket) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let guest = Guest {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
            responses: Arc::default(),
        };
        guest.respond(&format!("POST /vms/{}/exec", "box"), 202, json!({ "exec": EXEC }));
        let (served, command) = (guest.clone(), Arc::new(command));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (served, command) = (served.clone(), command.clone());
                std::thread::spawn(move || served.serve(stream, &*command));
            }
        });
        guest
    }

    /// Sets the response to a request line.
    pub(crate) fn respond(&self, line: &str, status: u16, body: Value) {
        self.respond_bytes(line, status, body.to_string().into_bytes());
    }

    pub(crate) fn respond_bytes(&self, line: &str, status: u16, body: Vec<u8>) {
        self.responses.lock().unwrap().insert(line.to_owned(), (status, body));
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.requests().into_iter().map(|request| request.line).collect()
    }

    /// Returns the body of the first request with this line.
    pub(crate) fn body(&self, line: &str) -> Value {
        let requests = self.requests();
        let request = requests.iter().find(|request| request.line == line);
        serde_json::from_slice(&request.unwrap().bytes).unwrap()
    }

    fn serve(&self, stream: TcpStream, command: &(impl Fn(usize, &mut Socket) + Sync)) {
        let Ok((request, head)) = read_request(&stream) else {
            return;
        };
        let line = request.line.clone();
        let attached = {
            let mut requests = self.requests.lock().unwrap();
            requests.push(request);
            requests
                .iter()
                .filter(|request| request.line.contains("/attach"))
                .count()
        };
        let response = self.responses.lock().unwrap().get(&line).cloned();
        if line.contains("/attach?") && response.is_none() {
            let connection = Connection(Cursor::new(head), stream);
            let mut socket = tungstenite::accept_hdr(connection, AcceptProtocol).unwrap();
            command(attached, &mut socket);
            return;
        }
        let (status, body) = response.unwrap_or_else(|| not_found(&line));
        let _closed = write(&stream, status, &body);
    }
}

fn not_found(line: &str) -> (u16, Vec<u8>) {
    let body = json!({ "error": format!("nothing at {line}"), "code": "not_found" });
    (404, body.to_string().into_bytes())
}

pub(crate) fn send(socket: &mut Socket, message: &AttachMessage) {
    socket.send(Message::Binary(message.encode().into())).unwrap();
}

pub(crate) fn out(socket: &mut Socket, text: &str) {
    send(socket, &AttachMessage::Stdout(text.as_bytes().to_vec()));
}

/// Returns the next message of the client.
pub(crate) fn receive(socket: &mut Socket) -> AttachMessage {
    loop {
        if let Message::Binary(bytes) = socket.read().unwrap() {
            return AttachMessage::decode(&bytes).unwrap();
        }
    }
}

/// Returns the client's standard input up to its end.
pub(crate) fn stdin(socket: &mut Socket) -> Vec<u8> {
    let mut input = Vec::new();
    loop {
        match receive(socket) {
            AttachMessage::Stdin(bytes) => input.extend(bytes),
            AttachMessage::CloseStdin => return input,
            _ => {}
        }
    }
}

/// Ends the command with an exit status.
pub(crate) fn exit(socket: &mut Socket, code: i32) {
    end(socket, Some(code), None, false);
}

pub(crate) fn end(socket: &mut Socket, exit_code: Option<i32>, signal: Option<Signal>, timed_out: bool) {
    let end = ExecEnd {
        exit_code,
        signal,
        timed_out,
        duration_ms: 5,
    };
    send(socket, &AttachMessage::End(end));
    // Waits until the client has read everything: closing earlier could reset the connection.
    while socket.read().is_ok() {}
}

/// Adds the responses for `run`: a template, and a VM that can be created and deleted.
pub(crate) fn for_run(guest: &Guest, name: &str) {
    let template = json!({"name": "debian-base", "size_bytes": 1, "used_bytes": 1, "created_at": "2026-01-02T03:04:05Z",
                          "used_by": 0, "protected": true});
    guest.respond("GET /templates", 200, json!({ "templates": [template] }));
    guest.respond(
        "POST /vms?wait=agent&wait_seconds=120",
        201,
        vm(json!({ "name": name })),
    );
    guest.respond(&format!("POST /vms/{name}/exec"), 202, json!({ "exec": EXEC }));
    guest.respond_bytes(&format!("DELETE /vms/{name}"), 204, Vec::new());
}

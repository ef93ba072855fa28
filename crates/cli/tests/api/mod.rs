//! A fake API server on loopback with canned responses, and `scalebox` in a home directory of its
//! own.

pub(crate) mod guest;

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

pub(crate) const TOKEN: &str = "s3cret-token";

/// A request that the server received.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// `GET /vms`
    pub line: String,
    /// `Bearer …`
    pub authorization: String,
    pub body: String,
    /// The body as it was received.
    pub bytes: Vec<u8>,
}

/// A server with canned responses. Its thread runs until the test process ends.
pub(crate) struct Server {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Starts a server. Each response is given by request line, status and body. Several responses
    /// to the same line are sent in order, and the last one is repeated. Other requests get a 404.
    pub(crate) fn new(responses: Vec<(&str, u16, Value)>) -> Self {
        let mut responses: Vec<(String, u16, Value)> = responses
            .into_iter()
            .map(|(line, status, body)| (line.to_owned(), status, body))
            .collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Some tests close the connection early.
                let Ok((request, _)) = read_request(&stream) else {
                    continue;
                };
                let (status, body) = next_response(&mut responses, &request.line);
                seen.lock().unwrap().push(request);
                let _ = write(&stream, status, &text_of(status, &body));
            }
        });
        Server { address, requests }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

fn next_response(responses: &mut Vec<(String, u16, Value)>, line: &str) -> (u16, Value) {
    let matching: Vec<usize> = (0..responses.len()).filter(|&i| responses[i].0 == line).collect();
    match matching[..] {
        [] => (404, json!({"error": format!("nothing at {line}")})),
        [only] => (responses[only].1, responses[only].2.clone()),
        [first, ..] => {
            let (_, status, body) = responses.remove(first);
            (status, body)
        }
    }
}

/// Reads a request, with a body of a known length or in chunks. Returns it with its head.
fn read_request(mut stream: &TcpStream) -> std::io::Result<(Request, Vec<u8>)> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    reader.read_line(&mut head)?;
    let line = head.trim().trim_end_matches(" HTTP/1.1").to_owned();
    let (mut length, mut authorization, mut is_chunked) = (0, String::new(), false);
    loop {
        let start = head.len();
        reader.read_line(&mut head)?;
        match head[start..].trim().split_once(": ") {
            None => break,
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.parse().unwrap(),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => authorization = value.to_owned(),
            Some((name, _)) if name.eq_ignore_ascii_case("transfer-encoding") => is_chunked = true,
            Some((name, _)) if name.eq_ignore_ascii_case("expect") => {
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            Some(_) => {}
        }
    }
    let bytes = match is_chunked {
        true => read_chunks(&mut reader)?,
        false => read_exactly(&mut reader, length)?,
    };
    let body = String::from_utf8_lossy(&bytes).into_owned();
    let request = Request {
        line,
        authorization,
        body,
        bytes,
    };
    Ok((request, head.into_bytes()))
}

fn read_exactly(reader: &mut impl Read, length: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_chunks(reader: &mut impl BufRead) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut size = String::new();
        reader.read_line(&mut size)?;
        let size = usize::from_str_radix(size.trim(), 16).map_err(std::io::Error::other)?;
        body.extend(read_exactly(reader, size)?);
        read_exactly(reader, 2)?;
        if size == 0 {
            return Ok(body);
        }
    }
}

fn text_of(status: u16, body: &Value) -> Vec<u8> {
    match body {
        _ if status == 204 => Vec::new(),
        // Sent unchanged, for responses that are not JSON.
        Value::String(text) => text.clone().into_bytes(),
        other => other.to_string().into_bytes(),
    }
}

fn write(mut stream: &TcpStream, status: u16, body: &[u8]) -> std::io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    )?;
    stream.write_all(body)
}

/// An empty home directory in which `scalebox` runs, without this machine's environment.
pub(crate) struct Home(TempDir);

impl Home {
    pub(crate) fn new() -> Self {
        Home(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file under the home directory, with `mode`.
    pub(crate) fn file(&self, name: &str, text: &str, mode: u32) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    /// Returns a `scalebox` command without any settings.
    pub(crate) fn bare(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_scalebox"));
        command.args(arguments).env_clear().env("HOME", self.path());
        command
    }

    /// Returns a `scalebox` command with the server's address and token in its environment.
    pub(crate) fn scalebox(&self, server: &Server, arguments: &[&str]) -> Command {
        self.at(&server.url(), arguments)
    }

    /// Returns a `scalebox` command with this address and the token in its environment.
    pub(crate) fn at(&self, url: &str, arguments: &[&str]) -> Command {
        let mut command = self.bare(arguments);
        command.env("SCALEBOX_URL", url).env("SCALEBOX_TOKEN", TOKEN);
        command
    }
}

/// A command's exit code and output.
#[derive(Debug)]
pub(crate) struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

pub(crate) fn run(command: &mut Command) -> Ran {
    let Output { status, stdout, stderr } = command.output().unwrap();
    Ran {
        code: status.code().unwrap(),
        out: String::from_utf8(stdout).unwrap(),
        err: String::from_utf8(stderr).unwrap(),
    }
}

/// Returns a VM in the API's form, with the fields in `changes` replaced.
pub(crate) fn vm(changes: Value) -> Value {
    let mut vm = json!({
        "id": "vm-0123456789ab", "name": "calm-red-fox", "template": "debian-base", "ip": "127.0.0.1", "ssh_port": 22001,
        "ssh": "ssh -p 22001 user@127.0.0.1", "url": null, "status": "running", "created_at": "2026-01-02T03:04:05Z",
        "vcpu_count": 1, "mem_size_mib": 512, "disk_size_gib": 10, "autostart": true,
    });
    for (field, value) in changes.as_object().unwrap() {
        vm[field] = value.clone();
    }
    vm
}

/// Returns a response to `GET /pool`: 100 GiB, of which 60 GiB are free.
pub(crate) fn pool() -> Value {
    const GIB: u64 = 1 << 30;
    json!({
        "path": "/var/lib/scalebox", "file_system": "btrfs", "device": "/dev/loop3", "image": "/var/lib/scalebox.img", "capacity_bytes": 100 * GIB, "free_bytes": 60 * GIB,
        "used_bytes": 25 * GIB, "committed_bytes": 120 * GIB, "commitment_limit_bytes": 400 * GIB, "overcommit_ratio": 4.0,
        "reserved_bytes": 0, "buffer_bytes": 2 * GIB, "pool_free_bytes": 75 * GIB, "host_free_bytes": 60 * GIB,
        "unallocated_bytes": 70 * GIB, "metadata_bytes": GIB, "metadata_used_bytes": GIB / 2,
        "vms_exclusive_bytes": 15 * GIB, "templates_exclusive_bytes": 2 * GIB, "shared_bytes": 7 * GIB, "other_bytes": GIB,
        "measured_at": "2026-01-02T03:04:05.000Z", "days_left": 12.5, "cleanups_pending": 0,
    })
}

/// Returns a response to `GET /info`.
pub(crate) fn info() -> Value {
    json!({
        "version": "0.1.0", "hostname": "big-iron", "host_ip": "192.0.2.7", "uptime_seconds": 7300, "vmm": "qemu", "accel": "tcg",
        "storage": pool(), "memory": {"total_bytes": 8u64 << 30, "available_bytes": 3u64 << 29},
        "cpu": {"count": 2, "model": "Some CPU"}, "vms": {"total": 3, "running": 2, "stopped": 0, "paused": 0, "failed": 1},
        "templates": 1, "limits": {"default_disk_size_gib": 2, "max_disk_size_gib": 100, "default_vcpu_count": 1,
        "max_vcpu_count": 2, "default_mem_size_mib": 512, "min_mem_size_mib": 128, "max_mem_size_mib": 7000},
    })
}

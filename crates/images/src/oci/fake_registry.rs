//! A registry for tests that can send any response, without encryption, on loopback.

use crate::oci::digest::Digest;
use crate::oci::hand_made::{Tar, gzip};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, spawn};

/// A request that a registry received.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
    /// The first byte of the requested range.
    pub(crate) from: Option<usize>,
}

/// The response of the fake registry.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// A status, headers and a body.
    Full(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// A body that ends before its announced length.
    Cut(Vec<u8>, usize),
    /// These bytes of a body, and then nothing until the client disconnects.
    Stall(Vec<u8>),
    /// A body that never ends.
    Endless,
}

impl Reply {
    pub(crate) fn ok(body: &[u8]) -> Reply {
        Reply::Full(200, Vec::new(), body.to_vec())
    }

    pub(crate) fn status(status: u16) -> Reply {
        Reply::Full(status, Vec::new(), Vec::new())
    }

    pub(crate) fn with(status: u16, header: &'static str, value: impl ToString) -> Reply {
        Reply::Full(status, vec![(header, value.to_string())], Vec::new())
    }
}

/// A running registry; dropping it ends it.
pub(crate) struct FakeRegistry {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Request>>>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FakeRegistry {
    pub(crate) fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> FakeRegistry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (seen, stopped) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (address, answer) = (listener.local_addr().unwrap(), Arc::new(answer));
        let thread = spawn({
            let (seen, stopped) = (Arc::clone(&seen), Arc::clone(&stopped));
            move || {
                for stream in listener.incoming() {
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                    // A client that hangs up does not fail the test.
                    spawn(move || stream.and_then(|stream| serve(stream, &seen, &*answer)));
                }
            }
        });
        FakeRegistry {
            address,
            seen,
            stopped,
            thread: Some(thread),
        }
    }

    /// Serves `image`, unless `first` returns another response.
    pub(crate) fn of(
        image: &FakeImage,
        first: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
    ) -> FakeRegistry {
        let contents = image.contents.clone();
        FakeRegistry::start(move |request| first(request).unwrap_or_else(|| served(&contents, request)))
    }

    /// Returns host and port.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    /// Returns the requests so far whose path contains `part`.
    pub(crate) fn seen(&self, part: &str) -> Vec<Request> {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|request| request.path.contains(part))
            .cloned()
            .collect()
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        let _woken = TcpStream::connect(self.address);
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

fn served(contents: &BTreeMap<String, Vec<u8>>, request: &Request) -> Reply {
    match (contents.get(&request.path), request.from) {
        (Some(body), Some(from)) => {
            let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
            Reply::Full(206, vec![("content-range", range)], body[from..].to_vec())
        }
        (Some(body), None) => Reply::ok(body),
        (None, _) if request.path == "/v2/" => Reply::ok(b"{}"),
        (None, _) => Reply::Full(404, Vec::new(), br#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#.to_vec()),
    }
}

fn serve(
    stream: TcpStream,
    seen: &Mutex<Vec<Request>>,
    answer: &(dyn Fn(&Request) -> Reply + Send + Sync),
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    // The first byte of TLS.
    if reader.fill_buf()?.first() == Some(&0x16) {
        return Ok(());
    }
    loop {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                break;
            }
            lines.push(line.trim().to_owned());
        }
        let header = |name: &str| {
            let of = |line: &String| {
                line.split_once(": ")
                    .filter(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.to_owned())
            };
            lines.iter().find_map(of)
        };
        let range = header("range").map(|range| {
            range
                .trim_start_matches("bytes=")
                .trim_end_matches('-')
                .parse()
                .unwrap()
        });
        let request = Request {
            path: lines[0].split(' ').nth(1).unwrap_or_default().to_owned(),
            authorization: header("authorization"),
            from: range,
        };
        seen.lock().unwrap().push(request.clone());
        send(&stream, &mut reader, answer(&request))?;
    }
}

fn send(mut stream: &TcpStream, reader: &mut BufReader<TcpStream>, reply: Reply) -> std::io::Result<()> {
    let hang_up = |stream: &TcpStream| {
        let _closed = stream.shutdown(std::net::Shutdown::Both);
        Err(std::io::ErrorKind::ConnectionAborted.into())
    };
    match reply {
        Reply::Full(status, headers, body) => {
            let headers: String = headers
                .iter()
                .map(|(name, value)| format!("{name}: {value}\r\n"))
                .collect();
            write!(
                stream,
                "HTTP/1.1 {status} X\r\n{headers}content-length: {}\r\n\r\n",
                body.len()
            )?;
            stream.write_all(&body)
        }
        Reply::Cut(body, length) => {
            write!(stream, "HTTP/1.1 200 X\r\ncontent-length: {length}\r\n\r\n")?;
            stream.write_all(&body)?;
            hang_up(stream)
        }
        Reply::Stall(body) => {
            write!(stream, "HTTP/1.1 200 X\r\ncontent-length: 1000000\r\n\r\n")?;
            stream.write_all(&body)?;
            let _until_it_hangs_up = reader.read(&mut [0])?;
            hang_up(stream)
        }
        Reply::Endless => {
            write!(stream, "HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n")?;
            loop {
                stream.write_all(b"1000\r\n")?;
                stream.write_all(&[b'x'; 4096])?;
                stream.write_all(b"\r\n")?;
            }
        }
    }
}

/// An image in a registry, with the name `box` and the tag `1`.
pub(crate) struct FakeImage {
    /// By path.
    pub(crate) contents: BTreeMap<String, Vec<u8>>,
    /// The digest of the manifest.
    pub(crate) digest: Digest,
    /// The path of the layer, and of the manifest.
    pub(crate) layer: String,
    pub(crate) manifest: String,
}

impl FakeImage {
    /// Creates an image with one layer, which holds `/hello` with a content of some hundred KiB.
    pub(crate) fn new() -> FakeImage {
        let content: Vec<u8> = (0..100_000_u32)
            .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        let tar = Tar::new().file("hello", &content).done();
        let layer = gzip(&tar);
        let config = json!({"os": "linux", "architecture": "amd64", "config": {"Cmd": ["/hello"]},
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(&tar).to_string()]}});
        let config = config.to_string().into_bytes();
        let descriptor = |kind: &str, blob: &[u8]| json!({"mediaType": kind, "digest": Digest::of(blob).to_string(), "size": blob.len()});
        let manifest = json!({"schemaVersion": 2,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layer)]});
        let manifest = manifest.to_string().into_bytes();
        let digest = Digest::of(&manifest);
        let blob = |blob: &[u8]| format!("/v2/box/blobs/{}", Digest::of(blob));
        let (layer_path, manifest_path) = (blob(&layer), "/v2/box/manifests/1".to_owned());
        let contents = [
            (blob(&config), config),
            (layer_path.clone(), layer),
            (manifest_path.clone(), manifest.clone()),
            (format!("/v2/box/manifests/{digest}"), manifest),
        ];
        FakeImage {
            contents: contents.into(),
            digest,
            layer: layer_path,
            manifest: manifest_path,
        }
    }

    pub(crate) fn layer_bytes(&self) -> Vec<u8> {
        self.contents[&self.layer].clone()
    }
}

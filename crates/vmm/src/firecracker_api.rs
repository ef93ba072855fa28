//! Firecracker's API socket: HTTP, a connection for each request, every one with a deadline.
//!
//! What is asked, and in which order, is here in one place; `tests/data/firecracker-*.json` holds
//! the same requests with the answers of a real Firecracker, and a test compares them.

use crate::jail;
use crate::machine::{DiskLimits, MachineSpec};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes as Body;
use hyper::client::conn::http1;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;

/// The longest that Firecracker may take to answer; it reads the kernel in `InstanceStart`.
pub(crate) const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// The most that an answer may hold, in bytes: the process is not trusted, for a guest may have
/// broken into it.
const ANSWER_LIMIT: usize = 256 << 10;
/// The drive that holds the root disk.
const ROOT_DRIVE: &str = "root";
/// The guest's address on its vsock: the first that is free for guests (vsock(7)). Each machine has
/// a vsock of its own.
const GUEST_CID: u32 = 3;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("no answer within {ANSWER_DEADLINE:?}")]
    Hung,
    #[error("{0}")]
    Refused(String),
}

/// The socket of one Firecracker.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    socket: PathBuf,
}

impl Api {
    pub(crate) fn at(socket: &Path) -> Api {
        Api {
            socket: socket.to_owned(),
        }
    }

    /// Describes the machine, one request for each of its parts.
    pub(crate) async fn configure(&self, spec: &MachineSpec) -> Result<(), ApiError> {
        self.put(
            "/machine-config",
            json!({ "vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_mib }),
        )
        .await?;
        let mut boot = json!({ "kernel_image_path": jail::KERNEL, "boot_args": cmdline(&spec.cmdline) });
        if spec.initrd.is_some() {
            boot["initrd_path"] = jail::INITRD.into();
        }
        self.put("/boot-source", boot).await?;
        // Writeback: a guest's flush reaches the disk. Its default would swallow it. The
        // synchronous engine is the one that every version supports for production.
        let mut root = json!({
            "drive_id": ROOT_DRIVE, "path_on_host": jail::ROOT, "is_root_device": false, "is_read_only": false,
            "cache_type": "Writeback", "io_engine": "Sync",
        });
        if spec.root_limits != DiskLimits::default() {
            root["rate_limiter"] = rate_limiter(spec.root_limits);
        }
        self.put("/drives/root", root).await?;
        let seed = json!({
            "drive_id": "seed", "path_on_host": jail::SEED, "is_root_device": false, "is_read_only": true,
            "cache_type": "Unsafe", "io_engine": "Sync",
        });
        self.put("/drives/seed", seed).await?;
        let nic = json!({ "iface_id": "net", "host_dev_name": spec.nic.tap, "guest_mac": spec.nic.mac });
        self.put("/network-interfaces/net", nic).await?;
        let agent = json!({ "guest_cid": GUEST_CID, "uds_path": jail::AGENT });
        self.put("/vsock", agent).await?;
        self.put("/entropy", json!({})).await
    }

    /// Lets the guest run for the first time.
    pub(crate) async fn start(&self) -> Result<(), ApiError> {
        self.put("/actions", json!({ "action_type": "InstanceStart" })).await
    }

    /// Presses the keys that a guest takes for the wish to restart.
    pub(crate) async fn ctrl_alt_del(&self) -> Result<(), ApiError> {
        self.put("/actions", json!({ "action_type": "SendCtrlAltDel" })).await
    }

    /// `Not started`, `Running` or `Paused`.
    pub(crate) async fn state(&self) -> Result<String, ApiError> {
        let info = self.ask(Method::GET, "/", None).await?;
        let state = info["state"].as_str().map(str::to_owned);
        state.ok_or_else(|| ApiError::Refused(format!("it tells no state: {info}")))
    }

    pub(crate) async fn pause(&self) -> Result<(), ApiError> {
        self.patch("/vm", json!({ "state": "Paused" })).await
    }

    pub(crate) async fn resume(&self) -> Result<(), ApiError> {
        self.patch("/vm", json!({ "state": "Resumed" })).await
    }

    /// Has the root disk looked at again; the guest hears of its new size.
    pub(crate) async fn root_has_grown(&self) -> Result<(), ApiError> {
        self.patch(
            "/drives/root",
            json!({ "drive_id": ROOT_DRIVE, "path_on_host": jail::ROOT }),
        )
        .await
    }

    pub(crate) async fn limit_root(&self, limits: DiskLimits) -> Result<(), ApiError> {
        let change = json!({ "drive_id": ROOT_DRIVE, "rate_limiter": rate_limiter(limits) });
        self.patch("/drives/root", change).await
    }

    async fn put(&self, path: &str, body: Value) -> Result<(), ApiError> {
        self.ask(Method::PUT, path, Some(body)).await.map(drop)
    }

    async fn patch(&self, path: &str, body: Value) -> Result<(), ApiError> {
        self.ask(Method::PATCH, path, Some(body)).await.map(drop)
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, ApiError> {
        match timeout(ANSWER_DEADLINE, self.exchange(method, path, body)).await {
            Ok(answer) => answer.map_err(|why| ApiError::Refused(why.to_string())),
            Err(_) => Err(ApiError::Hung),
        }
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, Failure> {
        let stream = jail::connect(&self.socket).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost");
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(Body::from(body)))?;
        let answered = async {
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let text = Limited::new(answer.into_body(), ANSWER_LIMIT)
                .collect()
                .await?
                .to_bytes();
            Ok::<_, Failure>((status, text))
        };
        tokio::pin!(answered);
        let (status, text) = tokio::select! {
            answer = &mut answered => answer?,
            // It is driven until it ends; what it has received by then is still to be had.
            ended = connection => {
                ended?;
                answered.await?
            }
        };
        let value = match text.as_ref() {
            b"" => Value::Null,
            text => serde_json::from_slice(text)?,
        };
        match status.is_success() {
            true => Ok(value),
            false => Err(value["fault_message"]
                .as_str()
                .unwrap_or(status.as_str())
                .to_owned()
                .into()),
        }
    }
}

/// A bucket of each kind, refilled once a second. An empty one is Firecracker's word for no limit;
/// one that is left out would stay as it is.
fn rate_limiter(limits: DiskLimits) -> Value {
    let bucket = |size: Option<u64>| match size {
        Some(size) => json!({ "size": size, "refill_time": 1000 }),
        None => json!({ "size": 0, "refill_time": 0 }),
    };
    json!({ "bandwidth": bucket(limits.bytes_per_second), "ops": bucket(limits.iops.map(u64::from)) })
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The guest's restart is the only end that Firecracker notices, and it notices it by the keyboard
/// controller (`reboot=k`).
fn cmdline(line: &str) -> String {
    format!("{line} reboot=k")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Nic;
    use scalebox_units::DiskLocation;
    use std::collections::VecDeque;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};

    /// Requests with the answers that a jailed Firecracker 1.17.0-dev gave to them, in order.
    const RECORDED: &str = include_str!("../tests/data/firecracker-1.17.0-dev.json");

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "vm-0123456789ab".parse().unwrap(),
            vcpus: 2,
            memory_mib: 128,
            kernel: "/kernel".into(),
            initrd: Some("/initrd".into()),
            cmdline: "console=ttyS0 panic=1 root=/dev/vda rw".into(),
            root: DiskLocation::File("/root".into()),
            root_limits: DiskLimits::default(),
            seed: "/seed".into(),
            nic: Nic {
                tap: "fcrec0".into(),
                mac: "52:54:00:12:34:56".into(),
            },
            run_dir: "/run".into(),
            console_log: "/console".into(),
            run_as: None,
        }
    }

    /// Reads one request: its line, and its body by its length.
    async fn request(stream: &mut UnixStream) -> (String, String) {
        let mut read = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&read).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head
                    .lines()
                    .filter_map(|line| {
                        line.to_ascii_lowercase()
                            .strip_prefix("content-length:")?
                            .trim()
                            .parse()
                            .ok()
                    })
                    .next()
                    .unwrap_or(0usize);
                if body.len() >= length {
                    let line = head.lines().next().unwrap().rsplit_once(' ').unwrap().0.to_owned();
                    return (line, body.to_owned());
                }
            }
            let mut buffer = [0; 4096];
            let more = stream.read(&mut buffer).await.unwrap();
            assert!(more > 0, "closed in the middle of {text:?}");
            read.extend(&buffer[..more]);
        }
    }

    /// Answers as recorded, and fails at the first request that is not the recorded one.
    async fn replay(listener: UnixListener, mut recorded: VecDeque<Value>) {
        while let Some(expected) = recorded.pop_front() {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (line, body) = request(&mut stream).await;
            let recorded_line = format!(
                "{} {}",
                expected["method"].as_str().unwrap(),
                expected["path"].as_str().unwrap()
            );
            assert_eq!(line, recorded_line);
            let body: Value = serde_json::from_str(&body).unwrap_or(Value::Null);
            assert_eq!(body, expected["body"], "{line}");
            let answer = expected["answer"].as_str().unwrap();
            let status = expected["status"].as_u64().unwrap();
            let text = format!(
                "HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n{}\r\n{answer}",
                match answer {
                    "" => String::new(),
                    _ => format!("Content-Type: application/json\r\nContent-Length: {}\r\n", answer.len()),
                }
            );
            stream.write_all(text.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn the_exchange_is_the_one_recorded_with_a_real_firecracker() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let recorded: VecDeque<Value> = serde_json::from_str(RECORDED).unwrap();
        assert!(recorded.len() > 10, "{}", recorded.len());
        let server = tokio::spawn(replay(listener, recorded));

        let api = Api::at(&socket);
        assert_eq!(api.state().await.unwrap(), "Not started");
        api.configure(&spec()).await.unwrap();
        api.start().await.unwrap();
        assert_eq!(api.state().await.unwrap(), "Running");
        api.pause().await.unwrap();
        assert_eq!(api.state().await.unwrap(), "Paused");
        api.resume().await.unwrap();
        api.root_has_grown().await.unwrap();
        api.limit_root(DiskLimits {
            iops: Some(100),
            bytes_per_second: None,
        })
        .await
        .unwrap();
        api.ctrl_alt_del().await.unwrap();
        // A refusal: the machine is started already.
        let refusal = api.start().await.unwrap_err().to_string();
        assert!(refusal.contains("not supported after starting"), "{refusal}");
        server.await.unwrap();
    }
}

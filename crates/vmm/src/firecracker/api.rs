//! Firecracker's API socket: HTTP, one connection per request; every request has a timeout.
//!
//! All requests and their order are defined here. `tests/data/firecracker-*.json` holds the same
//! requests with the responses of a real Firecracker, and a test compares them.

use crate::firecracker::jail;
use crate::spec::{DiskLimits, MachineSpec};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes as Body;
use hyper::client::conn::http1;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;

/// Timeout of one request. In `InstanceStart` Firecracker reads the kernel.
pub(crate) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of a response. The process is not trusted, because a guest may have broken into it.
const MAX_RESPONSE_BYTES: usize = 256 << 10;
/// Id of the drive that holds the root disk.
const ROOT_DRIVE: &str = "root";
/// The guest's vsock address: the first one available to guests (vsock(7)). Each machine has a
/// vsock of its own.
const GUEST_CID: u32 = 3;

/// The error of a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("no response within {RESPONSE_TIMEOUT:?}")]
    TimedOut,
    #[error("{0}")]
    Refused(String),
}

/// The API socket of one Firecracker process.
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

    /// Configures the machine, one request per part.
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
        // Writeback: a guest's flush reaches the disk; the default would ignore it. The synchronous
        // engine is the only one that every version supports in production.
        let mut root = json!({
            "drive_id": ROOT_DRIVE, "path_on_host": jail::ROOT, "is_root_device": false, "is_read_only": false,
            "cache_type": "Writeback", "io_engine": "Sync",
        });
        if spec.root_limits != DiskLimits::default() {
            root["rate_limiter"] = rate_limiter(spec.root_limits);
        }
        self.put("/drives/root", root).await?;
        self.put("/drives/seed", read_only_drive("seed", jail::SEED)).await?;
        if spec.modules.is_some() {
            self.put("/drives/modules", read_only_drive("modules", jail::MODULES))
                .await?;
        }
        let nic = json!({ "iface_id": "net", "host_dev_name": spec.nic.tap, "guest_mac": spec.nic.mac.to_string() });
        self.put("/network-interfaces/net", nic).await?;
        let vsock = json!({ "guest_cid": GUEST_CID, "uds_path": jail::VSOCK });
        self.put("/vsock", vsock).await?;
        self.put("/entropy", json!({})).await
    }

    /// Starts the guest.
    pub(crate) async fn start(&self) -> Result<(), ApiError> {
        self.put("/actions", json!({ "action_type": "InstanceStart" })).await
    }

    /// Sends Ctrl+Alt+Del, which a guest treats as a request to reboot.
    pub(crate) async fn ctrl_alt_del(&self) -> Result<(), ApiError> {
        self.put("/actions", json!({ "action_type": "SendCtrlAltDel" })).await
    }

    /// Returns `Not started`, `Running` or `Paused`.
    pub(crate) async fn state(&self) -> Result<String, ApiError> {
        let info = self.request(Method::GET, "/", None).await?;
        let state = info["state"].as_str().map(str::to_owned);
        state.ok_or_else(|| ApiError::Refused(format!("the response has no state: {info}")))
    }

    pub(crate) async fn pause(&self) -> Result<(), ApiError> {
        self.patch("/vm", json!({ "state": "Paused" })).await
    }

    pub(crate) async fn resume(&self) -> Result<(), ApiError> {
        self.patch("/vm", json!({ "state": "Resumed" })).await
    }

    /// Makes Firecracker re-read the root disk's size and notify the guest.
    pub(crate) async fn rescan_root(&self) -> Result<(), ApiError> {
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
        self.request(Method::PUT, path, Some(body)).await.map(drop)
    }

    async fn patch(&self, path: &str, body: Value) -> Result<(), ApiError> {
        self.request(Method::PATCH, path, Some(body)).await.map(drop)
    }

    async fn request(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, ApiError> {
        match timeout(RESPONSE_TIMEOUT, self.send(method, path, body)).await {
            Ok(response) => response.map_err(|why| ApiError::Refused(why.to_string())),
            Err(_) => Err(ApiError::TimedOut),
        }
    }

    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, SendError> {
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
        let response = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let text = Limited::new(response.into_body(), MAX_RESPONSE_BYTES)
                .collect()
                .await?
                .to_bytes();
            Ok::<_, SendError>((status, text))
        };
        tokio::pin!(response);
        let (status, text) = tokio::select! {
            result = &mut response => result?,
            // The connection is driven until it ends; a response received by then is still
            // available.
            ended = connection => {
                ended?;
                response.await?
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

fn read_only_drive(id: &str, path: &str) -> Value {
    json!({
        "drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": true,
        "cache_type": "Unsafe", "io_engine": "Sync",
    })
}

/// Returns token buckets that are refilled once a second. An empty bucket means no limit; an
/// omitted bucket would keep its previous limit.
fn rate_limiter(limits: DiskLimits) -> Value {
    let bucket = |size: Option<u64>| match size {
        Some(size) => json!({ "size": size, "refill_time": 1000 }),
        None => json!({ "size": 0, "refill_time": 0 }),
    };
    json!({ "bandwidth": bucket(limits.bytes_per_second), "ops": bucket(limits.iops.map(u64::from)) })
}

type SendError = Box<dyn std::error::Error + Send + Sync>;

/// Adds `reboot=k`, which makes a reboot of the guest a reset by the keyboard controller.
/// Firecracker detects no other end of a guest.
fn cmdline(line: &str) -> String {
    format!("{line} reboot=k")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Nic;
    use scalebox_units::DiskLocation;
    use std::collections::VecDeque;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};

    /// Requests and responses of a jailed Firecracker 1.17.0-dev, in order.
    const RECORDED: &str = include_str!("../../tests/data/firecracker-1.17.0-dev.json");

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "vm-0123456789ab".parse().unwrap(),
            vcpus: 2,
            memory_mib: 128,
            kernel: "/kernel".into(),
            initrd: Some("/initrd".into()),
            modules: None,
            cmdline: "console=ttyS0 panic=1 root=/dev/vda rw".into(),
            root: DiskLocation::File("/root".into()),
            root_limits: DiskLimits::default(),
            seed: "/seed".into(),
            nic: Nic {
                tap: "fcrec0".into(),
                mac: "52:54:00:12:34:56".parse().unwrap(),
            },
            run_dir: "/run".into(),
            console_log: "/console".into(),
            run_as: None,
        }
    }

    /// Reads one request; returns its request line and its body.
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

    /// Replays the recorded responses; panics on a request that differs from the recorded one.
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
    async fn requests_match_those_recorded_with_a_real_firecracker() {
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
        api.rescan_root().await.unwrap();
        api.limit_root(DiskLimits {
            iops: Some(100),
            bytes_per_second: None,
        })
        .await
        .unwrap();
        api.ctrl_alt_del().await.unwrap();
        // Firecracker rejects this, because the machine is already started.
        let error = api.start().await.unwrap_err().to_string();
        assert!(error.contains("not supported after starting"), "{error}");
        server.await.unwrap();
    }
}

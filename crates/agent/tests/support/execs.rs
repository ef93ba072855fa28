//! Execs, as a host uses them.

use crate::support::{Host, bytes, failure};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, StatusCode};
use scalebox_agent_api::frame::{Decoder, Frame};
use scalebox_agent_api::{ExecEnd, ExecStatus, FailureCode, StartExec, Terminal, WindowSize};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Returns a command with an id of its own, to be read from the start.
pub(crate) fn exec(argv: &[&str]) -> StartExec {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    StartExec {
        id: format!("exec-{:012x}", NEXT.fetch_add(1, Ordering::Relaxed)),
        argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
        env: Vec::new(),
        cwd: None,
        user: None,
        tty: None,
        stdin: false,
        timeout_ms: None,
        buffer: None,
        attached: true,
    }
}

/// Returns a shell script as a command.
pub(crate) fn script(text: &str) -> StartExec {
    exec(&["/bin/sh", "-c", text])
}

/// Returns a terminal of 24 rows and 80 columns.
pub(crate) fn terminal() -> Option<Terminal> {
    let size = WindowSize { rows: 24, cols: 80 };
    Some(Terminal { size, term: None })
}

/// The whole output of an exec.
#[derive(Debug, Default)]
pub(crate) struct Ran {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) lost: u64,
    /// The offset after the last byte.
    pub(crate) offset: u64,
    /// None if the stream has ended without one.
    pub(crate) end: Option<ExecEnd>,
}

impl Ran {
    /// Adds a frame, whose offset must follow the ones before.
    pub(crate) fn add(&mut self, frame: Frame) {
        assert_eq!(self.end, None, "a frame after the end: {frame:?}");
        match frame {
            Frame::Stdout { offset, bytes } => {
                assert_eq!(offset, self.offset);
                self.offset += bytes.len() as u64;
                self.stdout.extend(bytes);
            }
            Frame::Stderr { offset, bytes } => {
                assert_eq!(offset, self.offset);
                self.offset += bytes.len() as u64;
                self.stderr.extend(bytes);
            }
            Frame::Lost { offset, count } => {
                assert_eq!(offset, self.offset);
                self.offset += count;
                self.lost += count;
            }
            Frame::End { offset, end } => {
                assert_eq!(offset, self.offset);
                self.end = Some(end);
            }
        }
    }

    pub(crate) fn stdout(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8(self.stderr.clone()).unwrap()
    }

    pub(crate) fn exit_code(&self) -> Option<i32> {
        self.end.unwrap().exit_code
    }

    pub(crate) fn signal(&self) -> Option<i32> {
        self.end.unwrap().signal
    }
}

/// The frames of a response.
pub(crate) struct Frames {
    body: Incoming,
    decoder: Decoder,
    decoded: VecDeque<Frame>,
}

impl Frames {
    /// Returns the next frame; none at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        while self.decoded.is_empty() {
            let bytes = self.body.frame().await?.unwrap().into_data().unwrap();
            let mut decoded = Vec::new();
            self.decoder.push(&bytes, &mut decoded).unwrap();
            self.decoded.extend(decoded);
        }
        self.decoded.pop_front()
    }

    /// Adds all frames up to the end of the stream to `ran`.
    pub(crate) async fn rest(mut self, ran: &mut Ran) {
        while let Some(frame) = self.next().await {
            ran.add(frame);
        }
        assert!(self.decoder.is_at_boundary());
    }

    /// Adds frames to `ran` until its stdout contains `text`.
    pub(crate) async fn until(&mut self, ran: &mut Ran, text: &str) {
        while !String::from_utf8_lossy(&ran.stdout).contains(text) {
            ran.add(self.next().await.expect("more output"));
        }
    }
}

impl Host {
    /// Starts an exec.
    pub(crate) async fn start(&self, request: &StartExec) -> ExecStatus {
        let (status, body) = self.json(Method::POST, "/v1/execs", request).await;
        assert_eq!(status, StatusCode::OK, "{}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).unwrap()
    }

    /// Starts an exec, which must fail. Returns the code.
    pub(crate) async fn refused(&self, request: &StartExec) -> FailureCode {
        let (status, body) = self.json(Method::POST, "/v1/execs", request).await;
        assert!(!status.is_success(), "{}", String::from_utf8_lossy(&body));
        let failure = failure(&body);
        assert_eq!(status.as_u16(), failure.code.status());
        failure.code
    }

    /// Returns the output of an exec from `since` on.
    pub(crate) async fn output(&self, id: &str, since: u64, follow: bool) -> Frames {
        let path = format!("/v1/execs/{id}/output?since={since}&follow={follow}");
        let response = self.send(Method::GET, &path, bytes(Vec::new())).await;
        assert_eq!(response.status(), StatusCode::OK);
        Frames {
            body: response.into_body(),
            decoder: Decoder::default(),
            decoded: VecDeque::new(),
        }
    }

    /// Runs an exec to its end.
    pub(crate) async fn run(&self, request: &StartExec) -> Ran {
        self.start(request).await;
        self.finish(&request.id).await
    }

    /// Reads an exec's output from the start to the end.
    pub(crate) async fn finish(&self, id: &str) -> Ran {
        let mut ran = Ran::default();
        self.output(id, 0, true).await.rest(&mut ran).await;
        assert!(ran.end.is_some());
        ran
    }

    /// Sends a request about an exec. Returns the code of its failure.
    pub(crate) async fn ask(&self, id: &str, what: &str, body: Vec<u8>) -> Result<(), FailureCode> {
        let path = format!("/v1/execs/{id}/{what}");
        let response = self.send(Method::POST, &path, bytes(body)).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        match status {
            StatusCode::NO_CONTENT => Ok(()),
            _ => Err(failure(&body).code),
        }
    }

    /// Returns the state of an exec.
    pub(crate) async fn state(&self, id: &str) -> ExecStatus {
        self.get(&format!("/v1/execs/{id}")).await
    }

    /// Waits until an exec has ended, without reading its output.
    pub(crate) async fn ended(&self, id: &str) -> ExecStatus {
        let started = Instant::now();
        loop {
            let state = self.state(id).await;
            if state.end.is_some() {
                return state;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "{state:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

//! Tests with guests that violate the protocol. Each costs the host a bounded amount of memory and
//! time, and results in a clear error.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use bytes::Bytes;
use futures::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use scalebox_agent_api::{FailureCode, StartExec};
use scalebox_guest::{AgentConnection, AgentError};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Maximum number of bytes that a host reads from a guest that floods it, with the buffers of the
/// sockets.
const MAX_FLOOD: usize = 6 << 20;

/// Sends the same bytes until the host closes the connection. Counts the bytes.
async fn flood(mut stream: UnixStream, first: Vec<u8>, again: Vec<u8>, sent: Arc<AtomicUsize>) {
    let many = again.repeat((64 << 10) / again.len().max(1) + 1);
    // The settings are the first frame of a server.
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    wait_for_request(&mut stream).await;
    let (mut reader, mut writer) = stream.split();
    let write = async {
        let mut next = &first;
        while writer.write_all(next).await.is_ok() {
            sent.fetch_add(next.len(), Ordering::Relaxed);
            next = &many;
        }
    };
    let mut ignored = [0; 4096];
    let read = async { while reader.read(&mut ignored).await.is_ok_and(|read| read > 0) {} };
    tokio::join!(write, read);
}

async fn flooded(first: Vec<u8>, again: Vec<u8>) -> (AgentError, usize) {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let connection = connect(|stream| flood(stream, first, again, count)).await.unwrap();
    let error = timeout(Duration::from_secs(60), connection.info())
        .await
        .unwrap()
        .unwrap_err();
    (error, sent.load(Ordering::Relaxed))
}

#[tokio::test]
async fn floods_of_frames_end_the_connection() {
    let half = frame(HEADERS, 0, FIRST, STATUS_200);
    let open = frame(HEADERS, END_HEADERS, FIRST, STATUS_200);
    let header = [&[0x40, 1, b'x', 127, 0x81, 0x7f][..], &[b'y'; 254]].concat();
    for (name, first, again) in [
        ("garbage", vec![], vec![0xff; 100]),
        ("zeros", vec![], vec![0; 100]),
        ("pings", vec![], frame(PING, 0, 0, &[0; 8])),
        ("settings", vec![], frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100])),
        ("resets", vec![], frame(RST_STREAM, 0, FIRST, &[0, 0, 0, 0])),
        ("windows", vec![], frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])),
        ("unknown frames", vec![], frame(77, 0, 0, &[0; 100])),
        ("endless headers", half.clone(), frame(CONTINUATION, 0, FIRST, &header)),
        ("empty headers", half, frame(CONTINUATION, 0, FIRST, &[])),
        ("empty data", open.clone(), frame(DATA, 0, FIRST, &[])),
        ("another stream", open, frame(DATA, 0, FIRST + 2, b"x")),
        ("pushed streams", vec![], frame(HEADERS, END_HEADERS, 2, STATUS_200)),
        (
            "a huge frame",
            vec![0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1],
            vec![b'x'; 100],
        ),
    ] {
        let (error, sent) = flooded(first, again).await;
        println!("{name}: {error} after {sent} bytes");
        assert!(
            matches!(error, AgentError::Malformed { .. } | AgentError::Unreachable { .. }),
            "{name}: {error:?}"
        );
        assert!(sent < MAX_FLOOD, "{name}: {sent} bytes");
    }
}

/// Connects to a guest that sends `bytes` after the hello, and then nothing. Returns the error.
async fn stalls_after(bytes: Vec<u8>) -> AgentError {
    let connection = connect(|mut stream| async move {
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        wait_for_request(&mut stream).await;
        stream.write_all(&bytes).await.unwrap();
        let mut ignored = [0; 4096];
        while stream.read(&mut ignored).await.is_ok_and(|read| read > 0) {}
    });
    connection.await.unwrap().info().await.unwrap_err()
}

#[tokio::test(start_paused = true)]
async fn guests_that_stall_time_out() {
    for (name, bytes) in [
        ("before the response", vec![]),
        ("in a frame", frame(HEADERS, 0, FIRST, STATUS_200)[..5].to_vec()),
        ("in the headers", frame(HEADERS, 0, FIRST, STATUS_200)),
        (
            "in the body",
            [
                frame(HEADERS, END_HEADERS, FIRST, STATUS_200),
                frame(DATA, 0, FIRST, b"{\"version\":"),
            ]
            .concat(),
        ),
    ] {
        let begun = tokio::time::Instant::now();
        let error = stalls_after(bytes).await;
        // A body ends with the connection, whose ping had no response.
        let is_lost = name == "in the body" && matches!(error, AgentError::Unreachable { .. });
        assert!(
            is_lost || matches!(error, AgentError::Timeout { .. }),
            "{name}: {error:?}"
        );
        assert!(
            begun.elapsed() <= Duration::from_secs(10),
            "{name}: {:?}",
            begun.elapsed()
        );
    }
}

type Body = BoxBody<Bytes, Infallible>;

fn text(text: &str) -> Body {
    Full::new(Bytes::from(text.to_owned())).boxed()
}

/// Returns an endless body, which counts the bytes that were taken.
fn endless(taken: Arc<AtomicUsize>) -> Body {
    let piece = Bytes::from(vec![b'"'; 16 << 10]);
    StreamBody::new(stream::repeat_with(move || {
        taken.fetch_add(piece.len(), Ordering::Relaxed);
        Ok(Frame::data(piece.clone()))
    }))
    .boxed()
}

/// Connects to an agent that uses HTTP/2, but whose responses violate the protocol.
async fn served(respond: impl Fn(&str) -> (u16, Body) + Send + Sync + 'static) -> AgentConnection {
    let respond = Arc::new(respond);
    let connection = connect(move |stream| async move {
        let service = service_fn(move |request: Request<Incoming>| {
            let (status, body) = respond(request.uri().path());
            async move { Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap()) }
        });
        let http = http2::Builder::new(TokioExecutor::new());
        let _ = http.serve_connection(TokioIo::new(stream), service).await;
    });
    connection.await.unwrap()
}

#[tokio::test]
async fn endless_responses_are_cut_off() {
    for status in [200, 404, 500] {
        let taken = Arc::new(AtomicUsize::new(0));
        let count = taken.clone();
        let connection = served(move |_| (status, endless(count.clone()))).await;
        let error = connection.execs().await.unwrap_err();
        assert!(matches!(error, AgentError::Malformed { .. }), "{status}: {error:?}");
        assert!(error.to_string().contains("a response of more than"), "{error}");
        assert!(taken.load(Ordering::Relaxed) < 16 << 20, "{status}");
    }
}

#[tokio::test]
async fn errors_of_the_agent_have_one_line_of_bounded_length() {
    let long = format!(
        "{{\"error\": \"a\\n\\u001b[31m{}\", \"code\": \"no_space\"}}",
        "x".repeat(5000)
    );
    let connection = served(move |path| match path {
        "/v1/info" => (507, text(&long)),
        "/v1/stats" => (302, text("")),
        _ => (500, text("<html>")),
    })
    .await;
    let AgentError::Refused(failure) = connection.info().await.unwrap_err() else {
        panic!("not refused");
    };
    assert_eq!(failure.code, FailureCode::NoSpace);
    assert!(
        failure.error.len() <= 1000 && !failure.error.contains(char::is_control),
        "{}",
        failure.error
    );
    for error in [
        connection.stats().await.unwrap_err(),
        connection.execs().await.unwrap_err(),
    ] {
        assert!(matches!(error, AgentError::Malformed { .. }), "{error:?}");
    }
}

fn status(id: &str, end: &str) -> String {
    format!(
        r#"{{"id": "{id}", "argv": ["true"], "pid": 1, "started_at_ms": 0, "duration_ms": 1, "tty": false,
            "output_start": 0, "output_end": 0, "end": {end}}}"#
    )
}

#[tokio::test]
async fn the_state_of_another_exec_and_impossible_numbers_are_rejected() {
    let id = "exec-0123456789ab";
    let exec = StartExec {
        id: id.to_owned(),
        argv: vec!["true".to_owned()],
        env: vec![],
        cwd: None,
        user: None,
        tty: None,
        stdin: false,
        timeout_ms: None,
        buffer: None,
        attached: false,
    };
    let connection = served(move |_| (200, text(&status(id, "null")))).await;
    assert_eq!(connection.start_exec(&exec).await.unwrap().id, id);
    for (of, end) in [
        ("exec-ba9876543210", "null"),
        (id, r#"{"exit_code": 256}"#),
        (id, r#"{"exit_code": -1}"#),
        (id, r#"{"signal": 0}"#),
        (id, r#"{"exit_code": 0, "signal": 9}"#),
        (id, "{}"),
    ] {
        let connection = served(move |_| (200, text(&status(of, end)))).await;
        for error in [connection.start_exec(&exec).await, connection.exec(id).await] {
            let error = error.unwrap_err();
            assert!(matches!(error, AgentError::Malformed { .. }), "{of} {end}: {error:?}");
        }
    }
    let many = format!("[{}]", vec![status(id, "null"); 2000].join(","));
    let connection = served(move |_| (200, text(&many))).await;
    assert!(matches!(connection.execs().await, Err(AgentError::Malformed { .. })));
}

#[tokio::test]
async fn output_that_is_not_in_order_is_rejected() {
    use scalebox_agent_api::frame::Frame as Output;
    let encode = |frames: &[Output]| {
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        bytes
    };
    let stdout = |offset, length| Output::Stdout {
        offset,
        bytes: vec![b'x'; length],
    };
    for (name, bytes, good) in [
        ("a gap", encode(&[stdout(5, 2), stdout(8, 1)]), 1),
        ("an overlap", encode(&[stdout(5, 2), stdout(6, 1)]), 1),
        ("another start", encode(&[stdout(0, 1)]), 0),
        ("an unknown frame", [encode(&[stdout(5, 3)]), vec![9; 13]].concat(), 1),
        (
            "a huge frame",
            vec![1, 5, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            0,
        ),
        ("a frame cut off", encode(&[stdout(5, 3)])[..14].to_vec(), 0),
    ] {
        let body = bytes.clone();
        let connection = served(move |_| (200, Full::new(Bytes::from(body.clone())).boxed())).await;
        let mut output = connection.output("exec-0123456789ab", 5, true).await.unwrap();
        for _ in 0..good {
            output.next().await.unwrap().unwrap();
        }
        let error = output.next().await.unwrap().unwrap_err();
        assert!(matches!(error, AgentError::Malformed { .. }), "{name}: {error:?}");
        assert!(output.next().await.is_none(), "{name}");
    }
}

#[tokio::test]
async fn closing_a_connection_ends_its_streams_at_once() {
    let taken = Arc::new(AtomicUsize::new(0));
    let count = taken.clone();
    let connection = served(move |_| (200, endless(count.clone()))).await;
    let mut download = connection.read_tar(b"/x").await.unwrap();
    download.next().await.unwrap().unwrap();
    // The host does not read: the agent can send no more than the window.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(taken.load(Ordering::Relaxed) < 2 << 20);
    connection.close();
    let error = loop {
        match download.next().await.unwrap() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, AgentError::Unreachable { .. }), "{error:?}");
    timeout(Duration::from_secs(5), connection.closed()).await.unwrap();
    assert!(connection.is_closed());
    assert!(matches!(connection.info().await, Err(AgentError::Unreachable { .. })));
}

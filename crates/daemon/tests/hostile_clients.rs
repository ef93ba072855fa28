//! Clients that open connections and do not read do not affect other clients.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use support::{Host, Options, TOKEN, eventually, run, text};

fn connect(host: &Host) -> TcpStream {
    let stream = TcpStream::connect(host.url.strip_prefix("http://").unwrap()).unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size(&stream, 4096).unwrap();
    stream
}

fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n")
}

/// Sends until the daemon accepts no more, and reads nothing.
fn fill(stream: &mut TcpStream, path: &str) {
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let requests = request(path).repeat(1000);
    while stream.write_all(requests.as_bytes()).is_ok() {}
}

fn sockets(host: &Host) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", host.daemon_pid())).unwrap();
    let is_socket = |target: std::path::PathBuf| text(&target).starts_with("socket:");
    descriptors
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| is_socket(target.clone()))
        .count()
}

#[test]
fn unauthenticated_connections_close_after_their_first_response() {
    let host = Host::with_tiny_template(&Options::default());
    for (request, status) in [
        ("GET /health HTTP/1.1\r\nHost: x\r\n\r\n", "200"),
        ("GET /vms HTTP/1.1\r\nHost: x\r\n\r\n", "401"),
    ] {
        let mut stream = connect(&host);
        stream.write_all(request.repeat(3).as_bytes()).unwrap();
        let mut answers = Vec::new();
        // Unread further requests make the kernel reset the connection.
        let _cut = stream.read_to_end(&mut answers);
        let answers = String::from_utf8_lossy(&answers);
        assert_eq!(answers.matches(&format!("HTTP/1.1 {status}")).count(), 1, "{answers}");
        assert_eq!(answers.matches("HTTP/1.1").count(), 1, "{answers}");
    }
}

#[test]
fn connections_of_a_client_that_does_not_read_are_closed() {
    let host = Host::with_tiny_template(&Options::default());
    let before = sockets(&host);
    let mut connections: Vec<_> = (0..8).map(|_| connect(&host)).collect();
    for stream in &mut connections {
        fill(stream, "/openapi.json");
    }
    assert!(sockets(&host) >= before + connections.len());
    eventually("them to be closed", || (sockets(&host) <= before).then_some(()));
    assert!(host.client().vms().is_ok());
}

#[test]
fn unread_exports_delay_neither_other_requests_nor_the_shutdown() {
    let mut host = Host::new(&Options::default());
    // The export has more data than fits into any buffer.
    let (folder, image) = (host.folder.join("root"), host.folder.join("image"));
    fs::create_dir(&folder).unwrap();
    let noise = folder.join("noise");
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={}", text(&noise)),
            "bs=1M",
            "count=24",
            "status=none",
        ],
    );
    run(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", text(&folder), text(&image), "64M"],
    );
    host.scaleboxd_ok(&["template", "import", "noise", text(&image)]);
    host.serve();

    let mut connections = Vec::new();
    for _ in 0..8 {
        let mut stream = connect(&host);
        stream.write_all(request("/templates/noise/export").as_bytes()).unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        connections.push(stream);
    }
    let (status, body) = host.send("GET", "/templates/noise/export", b"");
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("try again later"), "{body}");
    // A response to HEAD compresses nothing.
    assert_eq!(host.send("HEAD", "/templates/noise/export", b"").0, 200);
    assert_eq!(host.client().templates().unwrap().len(), 1);
    // The daemon must end before the time limit for operations in progress.
    let signalled = std::time::Instant::now();
    assert_eq!(host.terminate().code(), Some(0));
    assert!(
        !host.log().contains("some operations did not end in time"),
        "after {:?}",
        signalled.elapsed()
    );
    drop(connections);
}

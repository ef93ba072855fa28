//! Tests the client against a fake server that records the request.
#![allow(clippy::unwrap_used)] // clippy does not count helper functions as tests

use scalebox_api::CreateVm;
use scalebox_client::{Client, ClientError};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::thread::JoinHandle;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9S me@laptop";
const TOKEN: &str = "s3cret-token";
const VM: &str = r#"{"id":"vm-0123456789ab","name":"calm-red-fox","template":"debian-base","ip":"192.0.2.7","ssh_port":22001,
    "ssh":"ssh -p 22001 user@192.0.2.7","url":null,"status":"running","created_at":"2026-01-02T03:04:05Z","vcpu_count":1,
    "mem_size_mib":512,"disk_size_gib":10}"#;

/// Sends `response` unchanged on one connection; the thread returns the request.
fn serve_once(response: String) -> (SocketAddr, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
        while !is_complete(&request) {
            let n = stream.read(&mut buffer).unwrap();
            assert_ne!(n, 0, "the client closed the connection");
            request.extend_from_slice(&buffer[..n]);
        }
        stream.write_all(response.as_bytes()).unwrap();
        String::from_utf8(request).unwrap()
    });
    (address, server)
}

fn is_complete(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    body.len() >= length.map_or(0, |length| length.parse().unwrap())
}

fn response(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn client(address: SocketAddr) -> Client {
    Client::new(&format!("http://{address}/"), TOKEN).unwrap()
}

#[test]
fn create_sends_the_token_and_the_request_and_returns_the_vm() {
    let (address, server) = serve_once(response("201 Created", VM));
    let mut request = CreateVm::new("debian-base".parse().unwrap(), Some(KEY.parse().unwrap()));
    request.disk_size_gib = Some(10);
    let vm = client(address).create_vm(&request).unwrap();
    assert_eq!((vm.id.as_str(), vm.disk_size_gib), ("vm-0123456789ab", 10));
    let sent = server.join().unwrap();
    assert!(sent.starts_with("POST /vms HTTP/1.1\r\n"), "{sent}");
    assert!(
        sent.to_lowercase()
            .contains(&format!("\r\nauthorization: bearer {TOKEN}\r\n")),
        "{sent}"
    );
    assert!(
        sent.to_lowercase().contains("\r\ncontent-type: application/json\r\n"),
        "{sent}"
    );
    let body = sent.split("\r\n\r\n").nth(1).unwrap();
    assert_eq!(
        body,
        format!(r#"{{"template":"debian-base","ssh_public_key":"{KEY}","disk_size_gib":10,"start":true}}"#)
    );
}

#[test]
fn names_are_percent_encoded_in_paths() {
    let (address, server) = serve_once(response("204 No Content", ""));
    client(address).delete_vm("../pool?x=1#/ ü%").unwrap();
    let sent = server.join().unwrap();
    assert!(
        sent.starts_with("DELETE /vms/..%2Fpool%3Fx%3D1%23%2F%20%C3%BC%25 HTTP/1.1\r\n"),
        "{sent}"
    );
}

#[test]
fn calls_without_a_body_send_a_content_length_of_zero() {
    let (address, server) = serve_once(response("200 OK", VM));
    client(address).stop_vm("calm-red-fox").unwrap();
    let sent = server.join().unwrap();
    assert!(sent.starts_with("POST /vms/calm-red-fox/stop HTTP/1.1\r\n"), "{sent}");
    assert!(sent.to_lowercase().contains("\r\ncontent-length: 0\r\n"), "{sent}");
    assert!(!sent.to_lowercase().contains("transfer-encoding"), "{sent}");
}

#[test]
fn refusals_have_the_daemons_message() {
    let sentence = "Insufficient storage: 5GB available, need 12GB";
    let (address, server) = serve_once(response(
        "507 Insufficient Storage",
        &format!(r#"{{"error":"{sentence}"}}"#),
    ));
    let refused = client(address).pool().unwrap_err();
    assert_eq!((refused.status(), refused.to_string().as_str()), (Some(507), sentence));
    server.join().unwrap();
}

#[test]
fn responses_of_other_servers_are_protocol_errors() {
    for (reply, why) in [
        (
            response("502 Bad Gateway", "<html>"),
            "502 Bad Gateway without an error",
        ),
        (
            response("200 OK", "<html>"),
            "a body that this client does not understand",
        ),
        (response("200 OK", "{}"), "missing field"),
        ("SSH-2.0-OpenSSH_9.2\r\n".to_owned(), "not HTTP"),
    ] {
        let (address, server) = serve_once(reply);
        let error = client(address).info().unwrap_err();
        assert!(matches!(error, ClientError::Protocol { .. }), "{error:?}");
        let shown = error.to_string();
        assert!(
            shown.starts_with(&format!("GET http://{address}/info returned ")),
            "{shown}"
        );
        assert!(shown.contains(why), "{shown}");
        server.join().unwrap();
    }
}

#[test]
fn redirects_are_not_followed() {
    let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let location = format!("http://{}/info", elsewhere.local_addr().unwrap());
    let redirect = format!("HTTP/1.1 302 Found\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n");
    let (address, server) = serve_once(redirect);
    let error = client(address).info().unwrap_err().to_string();
    assert!(
        error.contains(&format!("302 Found, a redirect to {location}")),
        "{error}"
    );
    assert!(elsewhere.accept().is_err(), "the client followed the redirect");
    server.join().unwrap();
}

#[test]
fn an_incomplete_response_warns_that_the_request_may_have_succeeded() {
    let cut = "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"id\":";
    let (address, server) = serve_once(cut.to_owned());
    let error = client(address).start_vm("calm-red-fox").unwrap_err();
    assert!(matches!(error, ClientError::Lost { .. }), "{error:?}");
    assert!(error.to_string().contains("check before you repeat it"), "{error}");
    server.join().unwrap();
}

#[test]
fn unreachable_servers_are_reported_with_address_and_remedy() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = client(address).vms().unwrap_err();
    let expected = format!(
        "cannot reach scaleboxd at http://{address}: connection refused; is it running? (systemctl status scaleboxd)"
    );
    assert_eq!(error.to_string(), expected);
    let unknown = Client::new("http://no-such-host.invalid:8080", TOKEN)
        .unwrap()
        .vms()
        .unwrap_err();
    assert!(matches!(unknown, ClientError::Unreachable { .. }), "{unknown:?}");
}

#[test]
fn https_to_a_plain_server_fails_without_sending_the_token() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = [0; 4096];
        let n = stream.read(&mut hello).unwrap();
        // If the system has no root certificates, the client has already disconnected.
        let _ = stream.write_all(response("400 Bad Request", "").as_bytes());
        hello[..n].to_vec()
    });
    let error = Client::new(&format!("https://{address}"), TOKEN)
        .unwrap()
        .info()
        .unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("https needs a server with TLS"), "{error}");
    assert!(!String::from_utf8_lossy(&server.join().unwrap()).contains(TOKEN));
}

#[test]
fn invalid_addresses_and_tokens_are_rejected_without_a_request() {
    for url in [
        "",
        "localhost:8080",
        "ftp://host",
        "http://",
        "http:///x",
        "http://h?x=1",
        "http://h ost",
        "http://h:99999",
    ] {
        let error = Client::new(url, TOKEN).unwrap_err();
        assert!(matches!(error, ClientError::Url { .. }), "{url:?}: {error:?}");
    }
    for url in ["http://me:hunter2@host", "me:hunter2@host", "HTTPS://me:hunter2@host/"] {
        let error = Client::new(url, TOKEN).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }
    for token in ["", "a b", "a\n", "é"] {
        assert!(
            matches!(Client::new("http://h", token), Err(ClientError::Token)),
            "{token:?}"
        );
    }
}

#[test]
fn addresses_are_normalized() {
    for (url, base) in [
        ("HTTP://127.0.0.1:8080", "http://127.0.0.1:8080"),
        (" http://127.0.0.1:8080/\n", "http://127.0.0.1:8080"),
        ("\tHttps://Host.example//", "https://Host.example"),
        ("https://host.example/scalebox/", "https://host.example/scalebox"),
    ] {
        assert_eq!(Client::new(url, TOKEN).unwrap().url(), base);
    }
}

#[test]
fn debug_output_omits_the_token() {
    let client = Client::new("https://[::1]:8080/scalebox/", TOKEN).unwrap();
    let shown = format!("{client:?}");
    assert!(
        shown.contains("https://[::1]:8080/scalebox\"") && !shown.contains(TOKEN),
        "{shown}"
    );
}

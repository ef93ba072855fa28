//! Sends unusual requests, as people, proxies and other programs send them by mistake. No request
//! causes a 500, and each rejection has a JSON body with the cause. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use serde_json::{Value, json};
use std::fs;
use support::{Host, KEY, Options, TOKEN, run, text};

fn error_of(answer: &str) -> String {
    let body: Value = serde_json::from_str(answer).unwrap_or_else(|error| panic!("{error}: {answer:?}"));
    body["error"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

/// Returns a request head with the right token and more lines.
fn head(line: &str, more: &str) -> String {
    format!("{line}\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\n{more}\r\n")
}

fn with_body(line: &str, more: &str, body: &[u8]) -> Vec<u8> {
    let length = format!("Content-Length: {}\r\n{more}", body.len());
    [head(line, &length).as_bytes(), body].concat()
}

fn create(more: &Value) -> Vec<u8> {
    let mut body = json!({"template": "tiny", "ssh_public_key": KEY, "start": false});
    for (field, value) in more.as_object().unwrap() {
        body[field] = value.clone();
    }
    body.to_string().into_bytes()
}

#[test]
fn an_ssh_key_is_accepted_with_the_white_space_of_its_file() {
    let host = Host::with_tiny_template(&Options::default());
    for odd in ["\n", "\r\n", "\t", "\u{a0}", " \u{3000}\n\n", "\u{feff}"] {
        let key = match odd {
            "\u{feff}" => format!("{odd}{KEY}"),
            _ => format!("{KEY} me@laptop{odd}"),
        };
        let (status, answer) = host.send("POST", "/vms", &create(&json!({ "ssh_public_key": key })));
        assert_eq!(status, 201, "{odd:?}: {answer}");
        let vm: Value = serde_json::from_str(&answer).unwrap();
        // The seed drive is written before the missing kernel is noticed.
        let (status, answer) = host.send("POST", &format!("/vms/{}/start", vm["id"].as_str().unwrap()), b"");
        assert!(
            status == 503 && error_of(&answer).contains("no guest kernel"),
            "{odd:?}: {status} {answer}"
        );
    }
    let two = create(&json!({ "ssh_public_key": format!("{KEY} me {KEY}") }));
    let (status, answer) = host.send("POST", "/vms", &two);
    assert!(
        status == 400 && error_of(&answer).contains("must be one key"),
        "{status} {answer}"
    );
}

#[test]
fn malformed_heads_are_rejected_with_a_json_body() {
    let host = Host::with_tiny_template(&Options::default());
    let tls = [&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01][..], &[b'x'; 200], b"\r\n\r\n"].concat();
    let many: String = (0..150).map(|number| format!("X-{number}: a\r\n")).collect();
    for (request, status, expected) in [
        (b"hello\r\n\r\n".to_vec(), 400, "malformed HTTP/1.1"),
        (tls, 400, "malformed HTTP/1.1"),
        (b"GET /vms HTTP/3.0\r\n\r\n".to_vec(), 400, "malformed HTTP/1.1"),
        (head("GE\0T /vms HTTP/1.1", "").into(), 400, "malformed HTTP/1.1"),
        (
            head("GET /vms HTTP/1.1", "no colon\r\n").into(),
            400,
            "malformed HTTP/1.1",
        ),
        (
            head("POST /vms HTTP/1.1", "Content-Length: 2\r\nContent-Length: 3\r\n").into(),
            400,
            "length",
        ),
        (
            head("POST /vms HTTP/1.1", "Content-Length: -1\r\n").into(),
            400,
            "length",
        ),
        (
            head("POST /vms HTTP/1.1", "Transfer-Encoding: gzip\r\n").into(),
            400,
            "length",
        ),
        (
            head(&format!("GET /{} HTTP/1.1", "a".repeat(70_000)), "").into(),
            414,
            "65534 bytes",
        ),
        (head("GET /vms HTTP/1.1", &many).into(), 431, "100 header fields"),
        (
            head("GET /vms HTTP/1.1", &format!("X: {}\r\n", "a".repeat(2_000_000))).into(),
            431,
            "400 KiB",
        ),
    ] {
        let shown = String::from_utf8_lossy(&request[..request.len().min(60)]).into_owned();
        let (found, answer) = host.raw(&request);
        assert_eq!(found, status, "{shown:?}: {answer}");
        assert!(error_of(&answer).contains(expected), "{shown:?}: {answer}");
    }
    // The error also comes after another response on the same connection.
    let first = format!("GET /vms HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n");
    let (status, answers) = host.raw(format!("{first}nonsense\r\n\r\n").as_bytes());
    assert_eq!(status, 200);
    assert!(answers.starts_with("{\"vms\":[]}HTTP/1.1 400 "), "{answers}");
    assert!(
        answers.contains("for the body\",\"code\":\"invalid_request\"}"),
        "{answers}"
    );
}

#[test]
fn a_trailing_slash_in_a_path_is_ignored() {
    let host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", None);
    for path in [
        "/vms".to_owned(),
        format!("/vms/{}", vm.id),
        "/templates".into(),
        "/templates/tiny".into(),
        "/pool".into(),
        "/events?follow=false&since=0".into(),
    ] {
        let with_slash = path.replacen('?', "/?", 1);
        let with_slash = if path.contains('?') {
            with_slash
        } else {
            path.clone() + "/"
        };
        let (status, answer) = host.send("GET", &with_slash, b"");
        assert_eq!(status, 200, "{with_slash}: {answer}");
        if !path.starts_with("/events") && !path.starts_with("/pool") {
            assert_eq!(answer, host.send("GET", &path, b"").1);
        }
    }
    let (status, answer) = host.raw(b"GET /health/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!((status, answer.as_str()), (200, r#"{"status":"ok"}"#));
    assert_eq!(
        host.send("POST", "/vms/", &create(&json!({ "name": "slashed" }))).0,
        201
    );
    assert_eq!(host.send("DELETE", "/vms/slashed/", b"").0, 204);
    // A missing name does not mean all VMs.
    assert_eq!(host.send("DELETE", "/vms/", b"").0, 405);
    assert_eq!(host.send("GET", "//vms", b"").0, 404);
    assert_eq!(host.send("GET", "/", b"").0, 404);
}

#[test]
fn a_byte_order_mark_and_all_json_number_formats_are_accepted() {
    let host = Host::with_tiny_template(&Options::default());
    let marked = [b"\xef\xbb\xbf".as_slice(), &create(&json!({ "name": "marked" }))].concat();
    let (status, answer) = host.send("POST", "/vms", &marked);
    assert_eq!(status, 201, "{answer}");
    let sized = |size: &str| {
        let body =
            format!(r#"{{"template": "tiny", "ssh_public_key": "{KEY}", "start": false, "disk_size_gib": {size}}}"#);
        host.send("POST", "/vms", body.as_bytes())
    };
    for size in ["3", "3.0", "3e0", "0.3E+1", "30000000000000000e-16"] {
        let (status, answer) = sized(size);
        assert_eq!(status, 201, "{size}: {answer}");
        let vm: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(vm["disk_size_gib"], 3, "{size}");
        assert_eq!(
            host.send("DELETE", &format!("/vms/{}", vm["id"].as_str().unwrap()), b"")
                .0,
            204
        );
    }
    let range = "disk_size_gib must be between 1 and 100";
    for size in [
        "0",
        "-0",
        "-0.0",
        "1e400",
        "1e-1",
        "3.5",
        "1e999999999",
        "18446744073709551617",
        "9".repeat(5000).as_str(),
    ] {
        let (status, answer) = sized(size);
        assert_eq!((status, error_of(&answer).as_str()), (400, range), "{size}");
    }
    for not_json in ["03", "+3", "3.", ".3", "0x3", "NaN", "Infinity", "1_000", "3e", "--3"] {
        let (status, answer) = sized(not_json);
        assert!(
            status == 400 && error_of(&answer).starts_with("the body is not JSON"),
            "{not_json}: {answer}"
        );
    }
}

#[test]
fn unsupported_body_formats_are_rejected_by_name() {
    let host = Host::with_tiny_template(&Options::default());
    let packed = [0x1f, 0x8b, 8, 0];
    for (line, encoding) in [
        ("POST /vms", "gzip"),
        ("PATCH /vms/x", "br"),
        ("POST /pool/grow", "identity, GZIP"),
        ("POST /templates/new/import", "gzip"),
    ] {
        let request = with_body(
            &format!("{line} HTTP/1.1"),
            &format!("Content-Encoding: {encoding}\r\n"),
            &packed,
        );
        let (status, answer) = host.raw(&request);
        let named = encoding.rsplit(' ').next().unwrap().to_ascii_lowercase();
        assert!(
            status == 415 && error_of(&answer).contains(&named),
            "{line}: {status} {answer}"
        );
    }
    for (body, expected) in [
        (&b"\xff\xfe{\0}\0"[..], "the body is not JSON"),
        (b"{\"template\": \"\xff\"}", "the body is not JSON"),
        (
            b"{\"template\": \"tiny\", \"template\": \"tiny\"}",
            "\"template\" is given twice",
        ),
        (b"{} {}", "the body is not JSON"),
        (b"template=tiny", "the body is not JSON"),
        (
            b"{\"template\": \"a\\u0000b\", \"ssh_public_key\": \"x\"}",
            "template must be",
        ),
        (
            b"{\"template\": \"\\ud800\", \"ssh_public_key\": \"x\"}",
            "template must be",
        ),
        (&b"{\"a\":".repeat(50_000), "the body is not JSON"),
    ] {
        let (status, answer) = host.send("POST", "/vms", body);
        assert!(
            status == 400 && error_of(&answer).contains(expected),
            "{expected}: {status} {answer}"
        );
    }
    // The content type is ignored, because `curl -d` sends a wrong one.
    for kind in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-8",
        "nonsense",
    ] {
        let request = with_body(
            "POST /vms HTTP/1.1",
            &format!("Content-Type: {kind}\r\n"),
            &create(&json!({})),
        );
        assert_eq!(host.raw(&request).0, 201, "{kind}");
    }
}

#[test]
fn chunked_bodies_are_read_with_trailers_and_rejected_if_incomplete() {
    let host = Host::with_tiny_template(&Options::default());
    let body = String::from_utf8(create(&json!({ "name": "chunked" }))).unwrap();
    let (first, second) = body.split_at(9);
    let chunks = format!(
        "{:x};ext=1\r\n{first}\r\n{:X}\r\n{second}\r\n0\r\nX-Sum: 1\r\n\r\n",
        first.len(),
        second.len()
    );
    let chunked = |chunks: &str| {
        let head = head("POST /vms HTTP/1.1", "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n");
        host.raw(format!("{head}{chunks}").as_bytes())
    };
    assert_eq!(chunked(&chunks).0, 201);
    for broken in [
        "zz\r\n{}\r\n0\r\n\r\n",
        "-1\r\n",
        "fffffffffffffffff\r\n",
        "2\r\n{}0\r\n\r\n",
    ] {
        let (status, answer) = chunked(broken);
        assert!(
            status == 400 && error_of(&answer).starts_with("cannot read the body: "),
            "{broken:?}: {status} {answer}"
        );
    }
    let import = head("POST /templates/new/import HTTP/1.1", "Transfer-Encoding: chunked\r\n");
    let (status, answer) = host.raw(format!("{import}4\r\nabcd\r\nzz\r\n").as_bytes());
    assert!(
        status == 400 && error_of(&answer).contains("chunk"),
        "{status} {answer}"
    );
    assert_eq!(host.client().vms().unwrap().len(), 1);
}

#[test]
fn an_image_that_stops_arriving_is_a_408_and_leaves_nothing_behind() {
    let host = Host::with_tiny_template(&Options::default());
    let request = head("POST /templates/new/import HTTP/1.1", "Content-Length: 1000000\r\n");
    // The connection stays open, but no more data arrives.
    let (status, answer) = host.raw(format!("{request}the beginning").as_bytes());
    assert!(
        status == 408 && error_of(&answer).contains("no data received for 30 s"),
        "{status} {answer}"
    );
    assert_eq!(host.client().templates().unwrap().len(), 1);
    let left = fs::read_dir(host.folder.join("pool/templates")).unwrap();
    let mut left: Vec<_> = left
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name != ".grown")
        .collect();
    left.sort();
    assert_eq!(left, ["tiny.ext4", "tiny.json"]);
}

#[test]
fn duplicate_decisive_headers_are_rejected() {
    let host = Host::with_tiny_template(&Options::default());
    let body = create(&json!({}));
    let twice = "Idempotency-Key: one\r\nIdempotency-Key: two\r\n";
    let (status, answer) = host.raw(&with_body("POST /vms HTTP/1.1", twice, &body));
    assert!(
        status == 400 && error_of(&answer).contains("Idempotency-Key was sent more than once"),
        "{answer}"
    );
    let (status, answer) = host.raw(&with_body("POST /vms HTTP/1.1", "Host: y\r\n", &body));
    assert!(
        status == 400 && error_of(&answer).contains("Host was sent more than once"),
        "{answer}"
    );
    assert_eq!(host.client().vms().unwrap(), []);
}

#[test]
fn request_targets_in_every_form_are_accepted_or_rejected() {
    let host = Host::with_tiny_template(&Options::default());
    for (line, status) in [
        ("GET http://elsewhere.example/vms HTTP/1.1", 200),
        ("GET http://elsewhere.example/vms/?x=1#y HTTP/1.1", 200),
        ("GET /vms HTTP/1.0", 200),
        ("CONNECT elsewhere.example:443 HTTP/1.1", 404),
        ("OPTIONS * HTTP/1.1", 404),
        ("OPTIONS /vms HTTP/1.1", 405),
        ("FROBNICATE /vms HTTP/1.1", 405),
        ("GET /vms/%00 HTTP/1.1", 404),
        ("GET /vms/%0d%0aX-Evil:%201 HTTP/1.1", 404),
        ("GET /vms/%2e%2e%2f%2e%2e%2fetc HTTP/1.1", 404),
        ("GET /vms/%zz HTTP/1.1", 404),
        ("GET /vms/%ff%fe HTTP/1.1", 400),
        ("GET /templates/tiny%2fexport HTTP/1.1", 404),
        ("POST /templates/..%2fx/import HTTP/1.1", 400),
        ("GET /events?since=1&since=2&follow=false HTTP/1.1", 400),
        ("GET /events?since=%2B1&follow=false HTTP/1.1", 400),
        ("GET /events?since=18446744073709551615&follow=false HTTP/1.1", 400),
        ("GET /events?since=9007199254740991&follow=false HTTP/1.1", 200),
        ("GET /events?follow=1 HTTP/1.1", 400),
        ("POST /templates/new/import?replace=yes HTTP/1.1", 400),
        ("POST /templates/new/import?x=1 HTTP/1.1", 400),
    ] {
        let (found, answer) = host.raw(head(line, "").as_bytes());
        assert_eq!(found, status, "{line}: {answer}");
        if status >= 400 {
            error_of(&answer);
        }
    }
}

#[test]
fn long_names_are_truncated_in_responses_and_in_the_log() {
    let host = Host::with_tiny_template(&Options::default());
    let long = "a".repeat(60_000);
    for (method, path) in [
        ("GET", format!("/vms/{long}")),
        ("DELETE", format!("/templates/{long}")),
        ("POST", format!("/templates/{long}/import")),
        ("GET", format!("/{long}/{long}").split_off(60_000)),
        (&long[..5000], "/vms".to_owned()),
    ] {
        let (status, answer) = host.send(method, &path, b"");
        assert!(
            (400..500).contains(&status) && answer.len() < 400,
            "{status}: {} bytes",
            answer.len()
        );
        error_of(&answer);
    }
    let longest = host.log().lines().map(str::len).max().unwrap();
    assert!(longest < 2000, "a line of {longest} bytes");
}

#[test]
fn a_head_request_for_an_export_does_not_compress_the_image() {
    let host = Host::with_tiny_template(&Options::default());
    let request = head("HEAD /templates/tiny/export HTTP/1.1", "");
    let answer = run(
        "curl",
        &[
            "-sS",
            "--head",
            "-H",
            &format!("Authorization: Bearer {TOKEN}"),
            &format!("{}/templates/tiny/export", host.url),
        ],
    );
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    for line in [
        "content-type: application/zstd",
        "scalebox-image-bytes: 67108864",
        "tiny.ext4.zst",
    ] {
        assert!(answer.contains(line), "{line}: {answer}");
    }
    assert!(!answer.contains("content-length: 0"), "{answer}");
    assert_eq!(host.raw(request.as_bytes()), (200, String::new()));
    assert!(!host.log().contains("export ended early"), "the image was compressed");
    assert_eq!(
        host.raw(head("HEAD /templates/none/export HTTP/1.1", "").as_bytes()).0,
        404
    );
}

#[test]
fn an_image_with_content_encoding_zstd_is_imported() {
    let host = Host::with_tiny_template(&Options::default());
    let packed = host.folder.join("packed");
    run(
        "zstd",
        &["-q", text(&host.folder.join("tiny.image")), "-o", text(&packed)],
    );
    let request = with_body(
        "POST /templates/again/import HTTP/1.1",
        "Content-Encoding: zstd\r\n",
        &fs::read(&packed).unwrap(),
    );
    let (status, answer) = host.raw(&request);
    assert_eq!(status, 201, "{answer}");
}

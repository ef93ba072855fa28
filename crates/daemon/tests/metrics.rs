//! `GET /metrics`: correct values, in a format that Prometheus accepts without warnings. No guest
//! is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use std::io::{ErrorKind, Write};
use std::process::{Command, Stdio};
use support::{Host, Options, TOKEN, output_of};

#[test]
fn metrics_match_the_host_and_promtool_accepts_them() {
    let host = Host::with_tiny_template(&Options::default());
    host.create_stopped("tiny", Some(5));
    let second = host.create_stopped("tiny", None);
    host.client().delete_vm(&second.id).unwrap();
    assert_eq!(host.client().vm("nobody").unwrap_err().status(), Some(404));
    let too_much = scalebox_api::CreateVm {
        disk_size_gib: Some(100),
        ..host.stopped("tiny")
    };
    assert_eq!(host.client().create_vm(&too_much).unwrap_err().status(), Some(507));
    assert_eq!(host.send("BREW", "/made/up", b"").0, 404);
    let (status, _) = host.raw(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!(status, 401);

    let request = format!("GET /metrics HTTP/1.0\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n");
    let (status, text) = host.raw(request.as_bytes());
    assert_eq!(status, 200, "{text}");
    let count = "scalebox_http_request_duration_seconds_count";
    for line in [
        "scalebox_vms{status=\"stopped\"} 1".to_owned(),
        "scalebox_vms{status=\"running\"} 0".to_owned(),
        format!("scalebox_pool_capacity_bytes {}", 30u64 << 30),
        format!("scalebox_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
        "scalebox_storage_refusals_total 1".to_owned(),
        "scalebox_events_total 3".to_owned(),
        format!("{count}{{method=\"POST\",route=\"/vms\",status=\"201\"}} 2"),
        format!("{count}{{method=\"POST\",route=\"/vms\",status=\"507\"}} 1"),
        format!("{count}{{method=\"DELETE\",route=\"/vms/{{vm}}\",status=\"204\"}} 1"),
        format!("{count}{{method=\"GET\",route=\"/vms/{{vm}}\",status=\"404\"}} 1"),
        format!("{count}{{method=\"other\",route=\"none\",status=\"404\"}} 1"),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    let value = |name: &str| -> f64 {
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.expect(name).split(' ').nth(1).expect(name).parse().expect(name)
    };
    assert!(value("scalebox_pool_committed_bytes") >= (5u64 << 30) as f64);
    assert!(value("process_start_time_seconds") > 1.7e9);

    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut promtool = match promtool {
        Ok(promtool) => promtool,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            eprintln!("NOT RUN: promtool is not on the PATH (scripts/promtool.sh fetches it)");
            return;
        }
        Err(error) => panic!("promtool: {error}"),
    };
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let checked = promtool.wait_with_output().unwrap();
    assert!(
        checked.status.success() && output_of(&checked).is_empty(),
        "{}",
        output_of(&checked)
    );
}

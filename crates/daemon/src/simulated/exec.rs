//! Tests of commands and files in a guest, through the API, with the real agent. It runs the
//! commands on the host of the test, as the user of the test.

use crate::simulated::agent::scripted;
use crate::simulated::http::{attach, call, post, read_until, send, whole};
use crate::simulated::sim::{Sim, id};
use axum::body::Body;
use futures::future::join_all;
use futures::{SinkExt, StreamExt};
use scalebox_api::{AttachMessage, EventKind, WindowSize};
use scalebox_testkit::SimAgent;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use tokio::io::DuplexStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

const LINES: [(&str, &str); 1] = [("accept", "application/x-ndjson")];

/// Creates a host with a VM `box` whose agent is the real one.
fn sim() -> Sim {
    let sim = Sim::in_real_time();
    sim.vmm.set_guest(|guest| guest.agent = SimAgent::Real);
    sim.create("box");
    sim.wait(Duration::from_millis(50));
    sim
}

/// Returns the bytes of all lines with the key, without base64.
fn bytes_of(lines: &[Value], key: &str) -> Vec<u8> {
    use base64::Engine;
    let decode = |text: &str| base64::engine::general_purpose::STANDARD.decode(text).unwrap();
    lines
        .iter()
        .filter_map(|line| line[key].as_str())
        .flat_map(decode)
        .collect()
}

#[test]
fn a_command_returns_its_output_and_exit_status() {
    let sim = sim();
    sim.run(async |host| {
        let exec = async |body| post(&host, "/vms/box/exec", body).await.json();
        let result = exec(json!({ "command": "echo out; echo err >&2; exit 3" })).await;
        let expected = ("out\n", "err\n", 3, false);
        let found = (
            result["stdout"].as_str().unwrap(),
            result["stderr"].as_str().unwrap(),
            result["exit_code"].as_i64().unwrap(),
            result["truncated"].as_bool().unwrap(),
        );
        assert_eq!(found, expected, "{result}");
        assert!(result["exec"].as_str().unwrap().starts_with("exec-"));

        let result = exec(json!({ "argv": ["cat"], "stdin": "aGkK", "stdin_encoding": "base64" })).await;
        assert_eq!(result["stdout"], "hi\n", "{result}");
        let result = exec(json!({ "command": "printf '\\377'; kill -KILL $$" })).await;
        assert_eq!(
            (&result["stdout"], &result["stdout_encoding"]),
            (&json!("/w=="), &json!("base64"))
        );
        assert_eq!(
            (&result["exit_code"], &result["signal"]),
            (&Value::Null, &json!("KILL"))
        );
        let result = exec(json!({ "command": "echo $A; pwd", "env": { "A": "b c" }, "cwd": "/usr" })).await;
        assert_eq!(result["stdout"], "b c\n/usr\n", "{result}");
        let result = exec(json!({ "command": "sleep 60", "timeout_seconds": 1 })).await;
        assert_eq!(
            (&result["timed_out"], &result["signal"]),
            (&json!(true), &json!("KILL")),
            "{result}"
        );
        let result = exec(json!({ "command": "test -t 1 && stty size", "tty": { "rows": 7, "cols": 9 } })).await;
        assert_eq!(result["stdout"], "7 9\r\n", "{result}");
        let big = exec(json!({ "command": "head -c 3000000 /dev/zero | tr '\\0' x" })).await;
        assert_eq!(
            (big["stdout"].as_str().unwrap().len(), &big["truncated"]),
            (1 << 20, &json!(true))
        );
    });
    assert_eq!(sim.count(&EventKind::ExecStarted), 7);
    assert_eq!(sim.count(&EventKind::ExecEnded), 7);
}

#[test]
fn output_is_streamed_as_lines() {
    let sim = sim();
    sim.run(async |host| {
        let command = json!({ "command": "echo a; echo b >&2; sleep 0.1; echo c; exit 1" }).to_string();
        let streamed = send(&host, "POST", "/vms/box/exec", &LINES, Body::from(command)).await;
        assert_eq!(streamed.headers()["content-type"], "application/x-ndjson");
        let lines = whole(streamed).await.lines();
        assert!(lines[0]["exec"].is_string(), "{lines:?}");
        assert_eq!(bytes_of(&lines, "stdout"), b"a\nc\n");
        assert_eq!(bytes_of(&lines, "stderr"), b"b\n");
        assert_eq!(lines.last().unwrap()["exit"]["exit_code"], 1);
    });
}

#[test]
fn background_commands_are_listed_followed_and_signalled() {
    let mut sim = sim();
    let exec = sim.run(async |host| {
        let body = json!({ "command": "for i in 1 2 3; do read line; echo got $line; done; sleep 60",
                           "background": true, "open_stdin": true, "stdin": "one\n" });
        let started = post(&host, "/vms/box/exec", body).await;
        assert_eq!(started.status.as_u16(), 202, "{}", started.json());
        let exec = started.json()["exec"].as_str().unwrap().to_owned();
        let location = started.headers["location"].to_str().unwrap().to_owned();
        assert!(location.ends_with(&format!("/execs/{exec}")), "{location}");
        let written = call(&host, "POST", &format!("{location}/stdin"), "two\n").await;
        assert_eq!(written.status.as_u16(), 204, "{:?}", written.body);
        // Each of the two lines has 8 bytes.
        while call(&host, "GET", &location, "").await.json()["output_end"] != 16 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        exec
    });
    // Another daemon continues at the offset, on the same command.
    sim.restart();
    sim.run(async |host| {
        let path = format!("/vms/box/execs/{exec}");
        let output = call(&host, "GET", &format!("{path}/output?since=8"), "").await;
        assert_eq!(bytes_of(&output.lines(), "stdout"), b"got two\n");
        let one = call(&host, "GET", &path, "").await.json();
        assert_eq!(
            (&one["status"], &one["output_end"]),
            (&json!("running"), &json!(16)),
            "{one}"
        );
        let all = call(&host, "GET", "/vms/box/execs", "").await.json();
        assert_eq!(all["execs"][0]["exec"], json!(exec));
        let resized = post(&host, &format!("{path}/resize"), json!({ "rows": 1, "cols": 1 })).await;
        assert_eq!(resized.status.as_u16(), 409, "it has no terminal");
        let signalled = post(&host, &format!("{path}/signal"), json!({ "signal": "SIGTERM" })).await;
        assert_eq!(signalled.status.as_u16(), 204);
        let rest = call(&host, "GET", &format!("{path}/output?since=16&follow=true"), "").await;
        let exit = rest.lines().last().unwrap()["exit"].clone();
        assert_eq!(exit["signal"], "TERM", "{exit}");
        let late = post(&host, &format!("{path}/signal"), json!({ "signal": 9 })).await;
        assert_eq!(late.error(), (409, "wrong_state".to_owned()));
    });
}

/// Reads messages until the output contains `text`, or until the end. Returns the output and the
/// last message.
async fn attached_until(socket: &mut WebSocketStream<DuplexStream>, text: &str) -> (String, Option<AttachMessage>) {
    let mut output = String::new();
    while let Some(message) = socket.next().await {
        let Message::Binary(content) = message.unwrap() else {
            continue;
        };
        match AttachMessage::decode(&content).unwrap() {
            AttachMessage::Stdout(bytes) => output.push_str(std::str::from_utf8(&bytes).unwrap()),
            last => return (output, Some(last)),
        }
        if output.contains(text) {
            break;
        }
    }
    (output, None)
}

#[test]
fn clients_attach_to_a_terminal() {
    let sim = sim();
    sim.run(async |host| {
        let body = json!({ "argv": ["/bin/sh"], "tty": { "rows": 5, "cols": 50 }, "background": true });
        let started = post(&host, "/vms/box/exec", body).await.json();
        let path = format!("/vms/box/execs/{}/attach", started["exec"].as_str().unwrap());
        let plain = call(&host, "GET", &path, "").await;
        assert_eq!(plain.error(), (400, "invalid_request".to_owned()), "not a WebSocket");

        let (mut first, mut second) = (attach(&host, &path).await, attach(&host, &path).await);
        let send = async |socket: &mut WebSocketStream<DuplexStream>, message: AttachMessage| {
            socket.send(Message::binary(message.encode())).await.unwrap();
        };
        send(&mut first, AttachMessage::Stdin(b"echo $((40 + 2))\n".to_vec())).await;
        attached_until(&mut first, "42\r\n").await;
        attached_until(&mut second, "42\r\n").await;
        send(&mut second, AttachMessage::Resize(WindowSize { rows: 7, cols: 70 })).await;
        send(&mut second, AttachMessage::Stdin(b"stty size\n".to_vec())).await;
        attached_until(&mut second, "7 70\r\n").await;
        send(&mut second, AttachMessage::Stdin(b"exit 3\n".to_vec())).await;
        for socket in [&mut first, &mut second] {
            let (_, last) = attached_until(socket, "\0").await;
            let Some(AttachMessage::End(end)) = last else {
                panic!("{last:?}")
            };
            assert_eq!(end.exit_code, Some(3));
        }
        // Invalid messages end the connection, and not the command.
        let mut wrong = attach(&host, &path).await;
        wrong.send(Message::binary(vec![77])).await.unwrap();
        let last = loop {
            if let (_, Some(last)) = attached_until(&mut wrong, "\0").await {
                break last;
            }
        };
        assert!(
            matches!(last, AttachMessage::End(_) | AttachMessage::Failed(_)),
            "{last:?}"
        );
    });
}

#[test]
fn the_end_of_a_command_that_nobody_follows_is_published() {
    let sim = sim();
    sim.run(async |host| {
        let body = json!({ "command": "exit 5", "background": true });
        post(&host, "/vms/box/exec", body).await;
    });
    sim.wait_until("the end", |sim| sim.count(&EventKind::ExecEnded) == 1);
    assert_eq!(sim.host().execs.total(), 1);
}

#[test]
fn invalid_requests_name_the_field_and_start_nothing() {
    let sim = sim();
    sim.run(async |host| {
        let long = "x".repeat(140_000);
        for (body, field) in [
            (json!({ "argv": [] }), "argv"),
            (json!({ "argv": ["a\0b"] }), "argv"),
            (json!({ "argv": ["echo", long] }), "argv"),
            (json!({ "argv": vec!["x"; 20_000] }), "argv"),
            (json!({ "argv": ["true"], "command": "true" }), "command"),
            (json!({ "command": "true", "cwd": "tmp" }), "cwd"),
            (json!({ "command": "true", "cwd": "/tmp/../etc" }), "cwd"),
            (json!({ "command": "true", "env": { "A=B": "c" } }), "env"),
            (json!({ "command": "true", "timeout_seconds": 0 }), "timeout_seconds"),
            (
                json!({ "command": "true", "tty": { "rows": 0, "cols": 1 } }),
                "tty.rows",
            ),
            (json!({ "command": "true", "open_stdin": true }), "open_stdin"),
            (
                json!({ "command": "true", "stdin": "?", "stdin_encoding": "base64" }),
                "stdin",
            ),
        ] {
            let refused = post(&host, "/vms/box/exec", body).await;
            assert_eq!(refused.error(), (400, "invalid_request".to_owned()), "{field}");
            assert_eq!(refused.json()["field"], field);
        }
        for (path, field) in [
            ("files", "path"),
            ("files?path=etc", "path"),
            ("files?path=/etc/../root", "path"),
            ("files?path=/a%00", "path"),
            ("files?path=/a&list=yes", "list"),
            ("files?path=/a&format=zip", "format"),
            ("execs/exec-0123456789ab/output?since=-1", "since"),
            ("console?tail=x", "tail"),
        ] {
            let refused = call(&host, "GET", &format!("/vms/box/{path}"), "").await;
            assert_eq!(refused.error(), (400, "invalid_request".to_owned()), "{path}");
            assert_eq!(refused.json()["field"], field, "{path}");
        }
        // The agent's error names the program; it is cut.
        let long = post(&host, "/vms/box/exec", json!({ "argv": ["x".repeat(130_000)] })).await;
        assert!(
            long.status.is_client_error() && long.body.len() < 2000,
            "{:?}",
            long.body
        );
        let missing = post(&host, "/vms/box/exec", json!({ "argv": ["/no/such/program"] })).await;
        assert_eq!(missing.error(), (404, "not_found".to_owned()), "{}", missing.json());
        let missing = call(&host, "GET", "/vms/box/execs/exec-0123456789ab", "").await;
        assert_eq!(missing.error(), (404, "not_found".to_owned()));
    });
    assert_eq!(sim.count(&EventKind::ExecStarted), 0);
}

#[test]
fn files_are_written_read_listed_and_removed() {
    let sim = sim();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_str().unwrap().to_owned();
    sim.run(async |host| {
        let files = |query: &str| format!("/vms/box/files?path={root}{query}");
        let content: Vec<u8> = (0..=255).cycle().take(3_000_000).collect();
        let put = call(&host, "PUT", &files("/a/b%20c&mode=0640&parents=true"), content.clone()).await;
        assert_eq!(put.status.as_u16(), 200, "{:?}", put.body);
        assert_eq!(
            (&put.json()["size"], &put.json()["mode"]),
            (&json!(3_000_000), &json!("0640"))
        );
        let mode = fs::metadata(folder.path().join("a/b c")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);

        let got = call(&host, "GET", &files("/a/b+c"), "").await;
        assert!(got.body == content, "{} bytes", got.body.len());
        assert_eq!(got.headers["x-scalebox-mode"], "0640");
        assert_eq!(got.headers["content-length"], "3000000");
        let info = call(&host, "GET", &files("/a/b%20c&info=true"), "").await.json();
        assert_eq!((&info["kind"], &info["size"]), (&json!("file"), &json!(3_000_000)));
        let list = call(&host, "GET", &files("/a&list=true"), "").await.json();
        assert_eq!(
            (&list["entries"][0]["name"], &list["truncated"]),
            (&json!("b c"), &json!(false))
        );

        let made = post(
            &host,
            "/vms/box/files/mkdir",
            json!({ "path": format!("{root}/d"), "mode": "0700" }),
        )
        .await;
        assert_eq!(made.status.as_u16(), 200, "{:?}", made.body);
        let archive = call(&host, "GET", &files("/a&format=tar"), "").await;
        assert!(archive.body.len() > 3_000_000);
        let unpacked = call(&host, "PUT", &files("/d&format=tar"), archive.body).await;
        assert_eq!(unpacked.status.as_u16(), 200, "{:?}", unpacked.body);
        let renamed = json!({ "path": format!("{root}/a/b c"), "to": format!("{root}/e") });
        assert_eq!(post(&host, "/vms/box/files/rename", renamed).await.status.as_u16(), 200);
        assert!(fs::read(folder.path().join("e")).unwrap() == content);

        let full = call(&host, "DELETE", &files("/d"), "").await;
        assert_eq!(full.error(), (409, "wrong_state".to_owned()));
        assert_eq!(
            call(&host, "DELETE", &files("/d&recursive=true"), "")
                .await
                .status
                .as_u16(),
            204
        );
        assert!(!folder.path().join("d").exists());
        let gone = call(&host, "GET", &files("/d"), "").await;
        assert_eq!(gone.error(), (404, "not_found".to_owned()));
    });
}

#[test]
fn an_upload_that_ends_early_leaves_nothing() {
    let sim = sim();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("kept"), "before").unwrap();
    let path = format!("/vms/box/files?path={}/kept", folder.path().display());
    sim.run(async move |host| {
        let pieces = futures::stream::iter((0..100).map(|number| match number {
            99 => Err(std::io::Error::other("the client left")),
            _ => Ok(vec![b'x'; 10_000]),
        }));
        let answer = call(&host, "PUT", &path, Body::from_stream(pieces)).await;
        assert_eq!(answer.error(), (400, "invalid_request".to_owned()), "{:?}", answer.body);
    });
    sim.wait(Duration::from_millis(200));
    let left: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["kept"]);
    assert_eq!(fs::read_to_string(folder.path().join("kept")).unwrap(), "before");
}

#[test]
fn a_hundred_commands_with_a_mebibyte_of_output_take_little_memory() {
    let sim = sim();
    sim.run(async |host| {
        post(&host, "/vms/box/exec", json!({ "command": "true" })).await;
        let before = resident_kib();
        let command = json!({ "command": "head -c 1048576 /dev/zero | tr '\\0' x" }).to_string();
        let all = (0..100).map(|_| send(&host, "POST", "/vms/box/exec", &[], Body::from(command.clone())));
        let responses = join_all(all).await;
        let grown = resident_kib().saturating_sub(before);
        // The guest is in the same process, with a buffer of 64 KiB for each command.
        let (max, of_guest) = (32 << 10, 100 * 64);
        assert!(grown < max + of_guest, "the daemon has grown by {grown} KiB");
        for response in responses {
            let result = whole(response).await.json();
            assert_eq!(
                (result["stdout"].as_str().unwrap().len(), &result["truncated"]),
                (1 << 20, &json!(false))
            );
        }
    });
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn streams_end_with_an_error_when_their_vm_does() {
    let sim = sim();
    let vm = sim.host().vms.find("box").unwrap().id;
    sim.run(async |host| {
        let command = json!({ "command": "echo a; sleep 600" }).to_string();
        let streamed = send(&host, "POST", "/vms/box/exec", &LINES, Body::from(command)).await;
        let (_, mut rest) = read_until(streamed, "stdout").await;
        let begun = Instant::now();
        sim.vmm.machine(&vm).crash();
        let mut last = Vec::new();
        while let Some(piece) = rest.next().await {
            last = piece.unwrap().to_vec();
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        let last: Value = serde_json::from_slice(&last).unwrap();
        let code = last["code"].as_str().unwrap();
        assert!(["unreachable", "wrong_state"].contains(&code), "{last}");
    });
}

/// Returns the state of a running exec with any id.
fn running(exec: &str) -> String {
    json!({ "id": exec, "argv": ["x"], "pid": 1, "started_at_ms": 0, "duration_ms": 0, "tty": false,
            "output_start": 0, "output_end": 0 })
    .to_string()
}

#[test]
fn an_agent_that_answers_for_another_exec_or_ends_early_is_an_error() {
    let sim = Sim::in_real_time();
    sim.vmm
        .set_guest(|guest| guest.agent = scripted(|_| (200, running("exec-0123456789ab"))));
    let vm = sim.create("liar");
    sim.create("other");
    sim.run(async |host| {
        // JSON is no frame of output.
        let answer = post(&host, "/vms/other/exec", json!({ "command": "true" })).await;
        assert_eq!(answer.error(), (503, "unreachable".to_owned()));
        let background = json!({ "command": "true", "background": true });
        let answer = post(&host, "/vms/liar/exec", background).await;
        assert_eq!(answer.error(), (503, "unreachable".to_owned()));
        assert!(
            answer.json()["error"].as_str().unwrap().contains("another exec"),
            "{}",
            answer.json()
        );
        let output = call(&host, "GET", "/vms/liar/execs/exec-0123456789ab/output?follow=true", "").await;
        assert_eq!(output.lines().last().unwrap()["code"], "unreachable");
    });
    sim.vmm.machine(&id(&vm)).set_guest(|guest| {
        guest.agent = scripted(|path| match path.ends_with("/output") {
            true => (200, String::new()),
            false => (200, running("exec-0123456789ab")),
        });
    });
    sim.skip(Duration::from_secs(70));
    sim.run(async |host| {
        let output = call(&host, "GET", "/vms/liar/execs/exec-0123456789ab/output?follow=true", "").await;
        let last = output.lines().last().unwrap().clone();
        assert!(
            last["error"].as_str().unwrap().contains("ended the output early"),
            "{last}"
        );
    });
}

#[test]
fn the_console_is_readable_without_an_agent_and_of_stopped_vms() {
    let sim = Sim::in_real_time();
    let vm = sim.create_stopped("box");
    let log = sim.host().console_log(&id(&vm));
    fs::create_dir_all(log.parent().unwrap()).unwrap();
    fs::write(&log, "first\r\nsecond\x1b[1m\n").unwrap();
    sim.run(async |host| {
        let whole = call(&host, "GET", "/vms/box/console", "").await;
        assert_eq!(&whole.body[..], b"first\nsecond[1m\n");
        let tail = call(&host, "GET", "/vms/box/console?tail=4", "").await;
        assert_eq!(&tail.body[..], b"[1m\n");
        let follow = send(&host, "GET", "/vms/box/console?follow=true&tail=0", &[], Body::empty()).await;
        let append = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            fs::OpenOptions::new()
                .append(true)
                .open(&log)
                .and_then(|mut file| std::io::Write::write_all(&mut file, b"third\n"))
                .unwrap();
        };
        let ((_, mut rest), ()) = tokio::join!(read_until(follow, "third\n"), append);
        crate::vm::delete(&host, "box".to_owned()).await.unwrap();
        assert!(rest.next().await.is_none(), "the stream ends with the VM");
    });
}

//! Tests the commands that work inside a VM, against a fake guest.
#![allow(clippy::unwrap_used)] // clippy does not count the helper modules as tests

#[allow(dead_code, reason = "the other tests use more of it")]
mod api;

use api::guest::{EXEC, Guest, end, exit, for_run, out, receive, send, stdin};
use api::{Home, run, vm};
use scalebox_api::{AttachMessage, Signal, WindowSize};
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

/// Returns a command without standard input.
fn quiet(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null())
}

fn start(command: &mut Command) -> Child {
    let command = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn kill(child: &Child, signal: &str) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
}

#[test]
fn output_goes_to_the_same_streams_unchanged_and_the_exit_code_is_returned() {
    let guest = Guest::new(|_, socket| {
        assert_eq!(stdin(socket), b"");
        out(socket, "\x1b[1mout\x1b[0m\n");
        send(socket, &AttachMessage::Stderr(b"err\xff\n".to_vec()));
        exit(socket, 7);
    });
    let mut command = Home::new().at(&guest.url(), &["exec", "-e", "A=b", "-w", "/srv", "-u", "user"]);
    command.args(["--timeout", "9", "box", "--", "sh", "-c", "echo $A", "--json"]);
    let ran = quiet(&mut command).output().unwrap();
    assert_eq!(
        (ran.status.code(), ran.stdout.as_slice(), ran.stderr.as_slice()),
        (Some(7), &b"\x1b[1mout\x1b[0m\n"[..], &b"err\xff\n"[..])
    );
    assert_eq!(
        guest.body("POST /vms/box/exec"),
        json!({"argv": ["sh", "-c", "echo $A", "--json"], "env": {"A": "b"}, "cwd": "/srv", "user": "user",
               "timeout_seconds": 9, "background": true, "open_stdin": true})
    );
    assert_eq!(guest.lines()[1], format!("GET /vms/box/execs/{EXEC}/attach?since=0"));
}

#[test]
fn signals_timeouts_and_failures_have_the_exit_codes_of_docker() {
    for (exit_code, signal, timed_out, code) in [
        (Some(0), None, false, 0),
        (None, Some(Signal::KILL), false, 137),
        (None, Some(Signal::KILL), true, 124),
    ] {
        let guest = Guest::new(move |_, socket| end(socket, exit_code, signal, timed_out));
        let ran = run(quiet(&mut Home::new().at(&guest.url(), &["exec", "box", "true"])));
        assert_eq!((ran.code, ran.err.as_str()), (code, ""));
    }
    let guest = Guest::new(|_, socket| exit(socket, 0));
    let error = json!({"error": "VM box: its agent does not respond", "code": "unreachable"});
    guest.respond("POST /vms/box/exec", 503, error.clone());
    let ran = run(quiet(&mut Home::new().at(&guest.url(), &["exec", "box", "true"])));
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (125, "error: VM box: its agent does not respond\n")
    );
    let guest = Guest::new(|_, socket| exit(socket, 0));
    let attach = format!("GET /vms/box/execs/{EXEC}/attach?since=0");
    guest.respond(&attach, 503, error.clone());
    guest.respond(&format!("GET /vms/box/execs/{EXEC}"), 503, error);
    let ran = run(quiet(&mut Home::new().at(&guest.url(), &["exec", "box", "true"])));
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (125, "error: VM box: its agent does not respond\n")
    );
    let ran = run(quiet(&mut Home::new().at(&guest.url(), &["exec", "-t", "box", "true"])));
    assert!(ran.code == 125 && ran.err.contains("not a terminal"), "{ran:?}");
}

#[test]
fn standard_input_is_sent_up_to_its_end() {
    let guest = Guest::new(|_, socket| {
        let input = stdin(socket);
        out(
            socket,
            &format!("{} {}", input.len(), input.iter().all(|byte| *byte == b'x')),
        );
        exit(socket, 0);
    });
    let home = Home::new();
    let mut child = start(&mut home.at(&guest.url(), &["exec", "box", "--", "wc"]));
    let mut input = child.stdin.take().unwrap();
    std::thread::spawn(move || input.write_all(&vec![b'x'; 3_000_000]).unwrap());
    let ran = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(ran.stdout).unwrap(), "3000000 true");
}

#[test]
fn signals_are_forwarded_to_the_command() {
    for (signal, number) in [("-INT", Signal::INT), ("-TERM", Signal::TERM), ("-HUP", Signal::HUP)] {
        let guest = Guest::new(move |_, socket| {
            out(socket, "ready\n");
            loop {
                if let AttachMessage::Signal(received) = receive(socket) {
                    return end(socket, None, Some(received), false);
                }
            }
        });
        let home = Home::new();
        let mut child = start(&mut home.at(&guest.url(), &["exec", "box", "sleep", "9"]));
        let mut ready = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        kill(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(128 + number.number()));
    }
}

#[test]
fn a_lost_connection_is_resumed_at_the_next_byte() {
    let guest = Guest::new(|count, socket| match count {
        1 => {
            stdin(socket);
            out(socket, "one\n");
            send(socket, &AttachMessage::Stderr(b"two\n".to_vec()));
        }
        _ => {
            out(socket, "three\n");
            exit(socket, 3);
        }
    });
    let ran = run(quiet(&mut Home::new().at(&guest.url(), &["exec", "box", "count"])));
    assert_eq!((ran.code, ran.out.as_str()), (3, "one\nthree\n"));
    assert_eq!(ran.err, "two\nlost the connection to the server; reconnecting\n");
    assert_eq!(guest.lines()[2], format!("GET /vms/box/execs/{EXEC}/attach?since=8"));
}

#[test]
fn a_connection_that_is_lost_after_all_of_standard_input_was_received_is_resumed() {
    let guest = Guest::new(|count, socket| match count {
        1 => {
            assert_eq!(stdin(socket), b"input");
            out(socket, "one\n");
            // The socket responds to pings while it reads.
            socket.get_mut().set_nonblocking(true);
            while !matches!(socket.read(), Err(tungstenite::Error::Io(_))) {}
            socket.flush().unwrap();
        }
        _ => exit(socket, 3),
    });
    let home = Home::new();
    let mut child = start(&mut home.at(&guest.url(), &["exec", "box", "cat"]));
    child.stdin.take().unwrap().write_all(b"input").unwrap();
    let ran = child.wait_with_output().unwrap();
    let error = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(
        (ran.status.code(), ran.stdout.as_slice()),
        (Some(3), &b"one\n"[..]),
        "{error}"
    );
}

#[test]
fn a_connection_that_is_lost_while_standard_input_is_sent_is_an_error() {
    let guest = Guest::new(|_, socket| {
        receive(socket);
    });
    let home = Home::new();
    let mut child = start(&mut home.at(&guest.url(), &["exec", "box", "cat"]));
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"part").unwrap();
    let ran = child.wait_with_output().unwrap();
    drop(input);
    let error = String::from_utf8(ran.stderr).unwrap();
    assert_eq!(ran.status.code(), Some(125), "{error}");
    assert!(error.contains("scalebox exec --list"), "{error}");
}

#[test]
fn a_command_whose_reader_closed_the_pipe_receives_sigpipe() {
    let guest = Guest::new(|_, socket| {
        loop {
            out(socket, &"y\n".repeat(1000));
            socket.get_mut().set_nonblocking(true);
            while let Ok(tungstenite::Message::Binary(bytes)) = socket.read() {
                if let AttachMessage::Signal(signal) = AttachMessage::decode(&bytes).unwrap() {
                    socket.get_mut().set_nonblocking(false);
                    return end(socket, None, Some(signal), false);
                }
            }
            socket.get_mut().set_nonblocking(false);
        }
    });
    let home = Home::new();
    let mut child = start(&mut home.at(&guest.url(), &["exec", "box", "yes"]));
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

#[test]
fn commands_are_started_listed_and_attached_to_by_id() {
    let guest = Guest::new(|_, socket| {
        out(socket, "later\n");
        exit(socket, 0);
    });
    let exec = json!({"exec": EXEC, "argv": ["make", "\x1b[2J"], "status": "running", "tty": false,
        "started_at": "2026-01-02T03:04:05Z", "duration_ms": 61_000, "output_start": 2048, "output_end": 4096});
    guest.respond("GET /vms/box/execs", 200, json!({ "execs": [exec] }));
    guest.respond(&format!("GET /vms/box/execs/{EXEC}"), 200, exec);
    let home = Home::new();
    let started = run(quiet(&mut home.at(&guest.url(), &["exec", "-d", "box", "make"])));
    assert_eq!((started.code, started.out), (0, format!("{EXEC}\n")));
    let listed = run(&mut home.at(&guest.url(), &["exec", "--list", "box"]));
    let row = listed.out.lines().nth(1).unwrap();
    assert!(row.starts_with(&format!("{EXEC}  running")), "{}", listed.out);
    assert!(row.ends_with("1 min   4 KiB  make \u{fffd}[2J"), "{}", listed.out);
    let attached = run(quiet(&mut home.at(&guest.url(), &["exec", "--attach", EXEC, "box"])));
    assert_eq!((attached.code, attached.out.as_str()), (0, "later\n"));
    assert_eq!(attached.err, "the first 2 KiB of the output are no longer available\n");
    let last = guest.lines().pop().unwrap();
    assert_eq!(last, format!("GET /vms/box/execs/{EXEC}/attach?since=2048"));
}

#[test]
fn json_prints_the_result_and_exits_with_the_code_of_the_command() {
    let guest = Guest::new(|_, _| {});
    let result = json!({"exec": EXEC, "exit_code": 4, "signal": null, "timed_out": false, "stdout": "hi\n",
        "stderr": "", "truncated": false, "duration_ms": 3});
    guest.respond("POST /vms/box/exec", 200, result.clone());
    let ran = run(quiet(
        &mut Home::new().at(&guest.url(), &["--json", "exec", "box", "true"]),
    ));
    assert_eq!(ran.code, 4, "{}", ran.err);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&ran.out).unwrap(), result);
    assert_eq!(guest.body("POST /vms/box/exec"), json!({ "argv": ["true"] }));
}

/// Runs a shell script in a pseudo-terminal of 31 × 97 characters, and types the received keys.
/// Returns the output.
fn in_a_terminal(home: &Home, guest: &Guest, script: &str, keys: mpsc::Receiver<&'static str>) -> String {
    let binary = env!("CARGO_BIN_EXE_scalebox");
    let script = format!(
        "stty rows 31 cols 97; tty > $HOME/tty; {}",
        script.replace("scalebox", binary)
    );
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &script, "/dev/null"]);
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", home.path());
    command.env("TERM", "xterm").env("SHELL", "/bin/sh");
    command
        .env("SCALEBOX_URL", guest.url())
        .env("SCALEBOX_TOKEN", api::TOKEN);
    let mut child = start(&mut command);
    let mut input = child.stdin.take().unwrap();
    let typing = std::thread::spawn(move || {
        keys.iter().for_each(|keys| input.write_all(keys.as_bytes()).unwrap());
        input
    });
    let ran = child.wait_with_output().unwrap();
    drop(typing);
    String::from_utf8(ran.stdout).unwrap()
}

#[test]
fn a_terminal_is_raw_while_the_command_runs_and_follows_the_window() {
    let home = Home::new();
    let tty = home.path().join("tty");
    let (seen, sizes) = mpsc::channel();
    let (typed, keys) = mpsc::channel();
    let guest = Guest::new(move |_, socket| {
        seen.send(receive(socket)).unwrap();
        let tty = std::fs::read_to_string(&tty).unwrap();
        let resized = Command::new("stty")
            .args(["-F", tty.trim(), "rows", "40", "cols", "120"])
            .status();
        assert!(resized.unwrap().success());
        // stty changes rows and columns one after the other.
        let resized = AttachMessage::Resize(WindowSize { rows: 40, cols: 120 });
        while receive(socket) != resized {}
        // Ctrl-C, Ctrl-Z, Ctrl-D and the return key arrive as bytes.
        let keys = "\x03\x1a\x04\r";
        typed.send(keys).unwrap();
        let mut received = Vec::new();
        while received.len() < keys.len() {
            // The same size may be sent twice.
            if let AttachMessage::Stdin(bytes) = receive(socket) {
                received.extend(bytes);
            }
        }
        assert_eq!(received, keys.as_bytes());
        out(socket, "bye\r\n");
        exit(socket, 5);
    });
    let shown = in_a_terminal(&home, &guest, "scalebox exec -t box -- vi; echo code $?; stty -a", keys);
    assert!(shown.contains("bye\r\ncode 5\r\n"), "{shown}");
    let is_set = |setting: &str| shown.split_whitespace().any(|word| word == setting);
    for setting in ["isig", "icanon", "echo", "opost"] {
        assert!(is_set(setting), "{setting}: {shown}");
    }
    let first = AttachMessage::Resize(WindowSize { rows: 31, cols: 97 });
    assert_eq!(sizes.recv().unwrap(), first);
    let sent = guest.body("POST /vms/box/exec");
    assert_eq!(
        (&sent["tty"], &sent["env"]["TERM"]),
        (&json!({"rows": 31, "cols": 97}), &json!("xterm"))
    );
}

#[test]
fn a_terminal_is_restored_after_an_error() {
    let home = Home::new();
    let guest = Guest::new(|_, socket| {
        let error = json!({"error": "the VM stopped", "code": "wrong_state"});
        send(socket, &AttachMessage::Failed(serde_json::from_value(error).unwrap()));
    });
    let (_, keys) = mpsc::channel();
    let shown = in_a_terminal(&home, &guest, "scalebox shell box; echo code $?; stty -a", keys);
    assert!(
        shown.contains("the VM stopped") && shown.contains("code 125"),
        "{shown}"
    );
    assert!(shown.contains(" icanon") && shown.contains(" echo "), "{shown}");
    let sent = guest.body("POST /vms/box/exec");
    assert!(sent["argv"][2].as_str().unwrap().contains("/bin/bash -l"));
}

fn entry(name: &str, kind: &str, size: usize) -> serde_json::Value {
    json!({"name": name, "kind": kind, "size": size, "mode": "0640", "uid": 0, "gid": 0,
           "modified_at": "2026-01-02T03:04:05Z"})
}

#[test]
fn files_are_copied_into_directories_under_their_name() {
    let guest = Guest::new(|_, _| {});
    guest.respond(
        "GET /vms/box/files?path=%2Fsrv&info=true",
        200,
        entry("/srv", "directory", 0),
    );
    let put = "PUT /vms/box/files?path=%2Fsrv%2Fa%20b&mode=0600&user=user";
    guest.respond(put, 200, entry("/srv/a b", "file", 5));
    let home = Home::new();
    let file = home.file("a b", "hello", 0o600);
    let mut command = home.at(&guest.url(), &["cp", "--user", "user"]);
    let ran = run(command.arg(&file).arg("box:/srv"));
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(ran.out, format!("copied {} to box:/srv/a b (5 B)\n", file.display()));
    assert_eq!(guest.requests().last().unwrap().bytes, b"hello");
}

#[test]
fn files_are_copied_from_a_vm_to_a_file_or_standard_output() {
    let guest = Guest::new(|_, _| {});
    guest.respond("GET /vms/box/files?path=%2Fa&info=true", 200, entry("/a", "file", 6));
    guest.respond_bytes("GET /vms/box/files?path=%2Fa", 200, b"a\x1b[\xff\0b".to_vec());
    let home = Home::new();
    let ran = quiet(&mut home.at(&guest.url(), &["cp", "box:/a", "-"]))
        .output()
        .unwrap();
    assert_eq!(ran.stdout, b"a\x1b[\xff\0b");
    let mut command = home.at(&guest.url(), &["cp", "box:/a"]);
    let ran = run(command.arg(home.path()));
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(std::fs::read(home.path().join("a")).unwrap(), b"a\x1b[\xff\0b");
    let names = std::fs::read_dir(home.path()).unwrap().count();
    assert_eq!(names, 1, "no partial file is left");
}

#[test]
fn directories_are_copied_as_archives_both_ways() {
    let guest = Guest::new(|_, _| {});
    guest.respond_bytes("POST /vms/box/files/mkdir", 204, Vec::new());
    let put = "PUT /vms/box/files?path=%2Fsrv%2Fnew&format=tar";
    guest.respond(put, 200, entry("/srv/new", "directory", 0));
    let home = Home::new();
    home.file("from/deep/file", "content", 0o755);
    symlink("deep/file", home.path().join("from/link")).unwrap();
    let from = home.path().join("from");
    let refused = run(home.at(&guest.url(), &["cp"]).arg(&from).arg("box:/srv/new"));
    assert!(refused.code == 2 && refused.err.contains("--recursive"), "{refused:?}");
    let ran = run(home.at(&guest.url(), &["cp", "-r"]).arg(&from).arg("box:/srv/new"));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let archive = guest.requests().pop().unwrap().bytes;

    guest.respond(
        "GET /vms/box/files?path=%2Fsrv%2Fnew&info=true",
        200,
        entry("/srv/new", "directory", 0),
    );
    guest.respond_bytes("GET /vms/box/files?path=%2Fsrv%2Fnew&format=tar", 200, archive);
    let to = home.path().join("to");
    let ran = run(home.at(&guest.url(), &["cp", "-r", "box:/srv/new"]).arg(&to));
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(std::fs::read(to.join("link")).unwrap(), b"content");
    let mode = std::fs::metadata(to.join("deep/file")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
}

#[test]
fn archives_of_hostile_guests_write_nothing_outside_of_the_directory() {
    let home = Home::new();
    home.file("victim", "mine", 0o644);
    let mut archive = tar::Builder::new(Vec::new());
    let mut add = |kind, name: &str, link: Option<&str>, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o6755);
        header.set_size(content.len() as u64);
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        if let Some(link) = link {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        archive.append(&header, content).unwrap();
    };
    add(tar::EntryType::Regular, "../victim", None, b"theirs");
    add(tar::EntryType::Char, "device", None, b"");
    add(tar::EntryType::Regular, "setuid", None, b"x");
    let outside = home.path().to_str().unwrap().to_owned();
    let harmless = archive.into_inner().unwrap();
    let guest = Guest::new(|_, _| {});
    guest.respond(
        "GET /vms/box/files?path=%2Fd&info=true",
        200,
        entry("/d", "directory", 0),
    );
    let line = "GET /vms/box/files?path=%2Fd&format=tar";
    guest.respond_bytes(line, 200, harmless);
    let to = home.path().join("to");
    let ran = run(home.at(&guest.url(), &["cp", "-r", "box:/d"]).arg(&to));
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.err.contains("../victim was skipped") && ran.err.contains("device was skipped"),
        "{}",
        ran.err
    );
    assert!(!to.join("device").exists());
    assert_eq!(
        std::fs::metadata(to.join("setuid")).unwrap().permissions().mode() & 0o7777,
        0o755
    );

    let mut archive = tar::Builder::new(Vec::new());
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    archive.append_link(&mut link, "out", &outside).unwrap();
    let mut file = tar::Header::new_gnu();
    file.set_size(6);
    file.set_mode(0o644);
    archive.append_data(&mut file, "out/victim", &b"theirs"[..]).unwrap();
    guest.respond_bytes(line, 200, archive.into_inner().unwrap());
    let ran = run(home
        .at(&guest.url(), &["cp", "-r", "box:/d"])
        .arg(home.path().join("other")));
    assert_eq!(ran.code, 1, "{}", ran.err);
    assert_eq!(std::fs::read(home.path().join("victim")).unwrap(), b"mine");
}

#[test]
fn logs_are_printed_unchanged() {
    let guest = Guest::new(|_, _| {});
    guest.respond("GET /vms/box", 200, vm(json!({"name": "box"})));
    let line = "GET /vms/box/console?follow=false&tail=100";
    guest.respond_bytes(line, 200, b"[ 0.1] \x1b[32mok\x1b[0m\xff\n".to_vec());
    let ran = Home::new()
        .at(&guest.url(), &["logs", "--tail", "100", "box"])
        .output()
        .unwrap();
    assert_eq!(
        (ran.status.code(), ran.stdout.as_slice()),
        (Some(0), &b"[ 0.1] \x1b[32mok\x1b[0m\xff\n"[..])
    );
}

#[test]
fn logs_of_a_vm_with_a_main_process_are_its_output() {
    let guest = Guest::new(|_, socket| {
        out(socket, "more\n");
        exit(socket, 0);
    });
    let main = json!({"argv": ["nginx"], "restart": "always"});
    guest.respond("GET /vms/box", 200, vm(json!({"name": "box", "main": main})));
    let exec = json!({"exec": "main", "argv": ["nginx"], "status": "running", "started_at": "2026-01-02T03:04:05Z",
        "duration_ms": 5, "tty": false, "output_start": 100, "output_end": 106, "restarts": 2});
    guest.respond("GET /vms/box/execs/main", 200, exec);
    let lines = "{\"stdout\": \"b2sK\", \"offset\": 100}\n{\"stderr\": \"bm8K\", \"offset\": 103}\n";
    for since in [100, 103] {
        let line = format!("GET /vms/box/execs/main/output?since={since}&follow=false");
        guest.respond_bytes(&line, 200, lines.as_bytes().to_vec());
    }
    let home = Home::new();
    let ran = run(&mut home.at(&guest.url(), &["logs", "box"]));
    let dropped = "the first 100 B of the output are no longer available\n";
    let expected = format!("{dropped}no\n");
    assert_eq!(
        (ran.code, ran.out.as_str(), ran.err.as_str()),
        (0, "ok\n", expected.as_str())
    );
    let ran = run(&mut home.at(&guest.url(), &["logs", "--tail", "3", "box"]));
    assert_eq!((ran.code, ran.err.as_str()), (0, "no\n"));
    let ran = run(&mut home.at(&guest.url(), &["logs", "--follow", "box"]));
    assert_eq!((ran.code, ran.out.as_str()), (0, "more\n"));
    guest.respond_bytes("GET /vms/box/console?follow=false", 200, b"[ 0.1] Linux\n".to_vec());
    let ran = run(&mut home.at(&guest.url(), &["logs", "--console", "box"]));
    assert_eq!((ran.code, ran.out.as_str()), (0, "[ 0.1] Linux\n"));
}

#[test]
fn run_without_a_command_runs_that_of_the_image_instead_of_a_main_process() {
    let guest = Guest::new(|_, socket| exit(socket, 0));
    for_run(&guest, "job");
    let web = json!({"name": "web", "size_bytes": 1, "used_bytes": 1, "created_at": "2026-01-02T03:04:05Z",
        "used_by": 0, "protected": false, "init": "agent",
        "config": {"entrypoint": ["/entry"], "cmd": ["--serve", "80"], "env": ["A=1"]}});
    guest.respond("GET /templates", 200, json!({ "templates": [web.clone()] }));
    guest.respond("GET /templates/web", 200, web);
    guest.respond(
        "POST /vms?wait=agent&wait_seconds=120",
        201,
        vm(json!({"name": "job", "template": "web"})),
    );
    let home = Home::new();
    let ran = run(quiet(&mut home.at(&guest.url(), &["run", "--name", "job", "web"])));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let created = guest.body("POST /vms?wait=agent&wait_seconds=120");
    assert_eq!(created["main"], json!({"run": false}));
    assert_eq!(
        guest.body("POST /vms/job/exec")["argv"],
        json!(["/entry", "--serve", "80"])
    );
}

#[test]
fn statistics_are_a_table_and_vms_without_an_agent_have_a_warning() {
    let guest = Guest::new(|_, _| {});
    let stats = json!({"uptime_seconds": 7300.5, "load": [0.5, 0.25, 0.1], "cpu_busy_ms": 1000,
        "memory_total_bytes": 512u64 << 20, "memory_available_bytes": 128u64 << 20, "agent_memory_bytes": 1 << 20,
        "root_total_bytes": 10u64 << 30, "root_used_bytes": 1u64 << 30, "processes": 42,
        "network_received_bytes": 5 << 20, "network_sent_bytes": 1 << 10, "execs": 2,
        "agent": {"version": "0.1.0", "init": "system"}});
    guest.respond("GET /vms/box/stats", 200, stats.clone());
    let error = json!({"error": "VM old: its agent does not respond", "code": "unreachable"});
    guest.respond("GET /vms/old/stats", 503, error);
    let vms = [
        vm(json!({"name": "box"})),
        vm(json!({"name": "old"})),
        vm(json!({"name": "off", "status": "stopped"})),
    ];
    guest.respond("GET /vms", 200, json!({ "vms": vms }));
    let home = Home::new();
    let ran = run(&mut home.at(&guest.url(), &["stats"]));
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (0, "warning: VM old: its agent does not respond\n")
    );
    let lines: Vec<_> = ran.out.lines().collect();
    assert!(
        lines[1].starts_with("box   0 %  0.50  384 MiB of 512 MiB (75 %)  1 GiB of 10 GiB (10 %)"),
        "{}",
        ran.out
    );
    assert!(
        lines[1].ends_with("42      2  2 h") && lines[2].starts_with("old     -"),
        "{}",
        ran.out
    );
    let json = run(&mut home.at(&guest.url(), &["stats", "--json", "box"]));
    let printed: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(printed, json!({"vms": [{"name": "box", "stats": stats}]}));
    let failed = run(&mut home.at(&guest.url(), &["stats", "old"]));
    assert_eq!(
        (failed.code, failed.err.as_str()),
        (1, "error: VM old: its agent does not respond\n")
    );
}

#[test]
fn run_creates_a_vm_copies_folders_runs_the_command_and_deletes_the_vm() {
    let guest = Guest::new(|_, socket| {
        out(socket, "done\n");
        exit(socket, 9);
    });
    for_run(&guest, "job");
    guest.respond_bytes("POST /vms/job/files/mkdir", 204, Vec::new());
    let put = "PUT /vms/job/files?path=%2Fsrv&format=tar";
    guest.respond(put, 200, entry("/srv", "directory", 0));
    let home = Home::new();
    home.file("project/file", "content", 0o644);
    let volume = format!("{}:/srv", home.path().join("project").display());
    let arguments = [
        "run",
        "--name",
        "job",
        "--disk",
        "3",
        "--cpus",
        "2",
        "-v",
        &volume,
        "debian-base",
        "make",
    ];
    let ran = run(quiet(&mut home.at(&guest.url(), &arguments)));
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (9, "done\n", ""));
    let created = guest.body("POST /vms?wait=agent&wait_seconds=120");
    let expected = json!({"template": "debian-base", "name": "job", "vcpu_count": 2, "disk_size_gib": 3,
                          "autostart": false, "main": {"run": false}, "start": true});
    assert_eq!(created, expected);
    let lines = guest.lines();
    assert!(lines.contains(&put.to_owned()));
    assert_eq!(lines.last().unwrap(), "DELETE /vms/job");
}

#[test]
fn run_creates_a_vm_of_an_image_with_a_tag() {
    let home = Home::new();
    let guest = Guest::new(|_, socket| end(socket, Some(0), None, false));
    for_run(&guest, "job");
    let ran = run(quiet(
        &mut home.at(&guest.url(), &["run", "--name", "job", "team/box:1", "true"]),
    ));
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let created = guest.body("POST /vms?wait=agent&wait_seconds=120");
    let expected =
        json!({"image": "team/box:1", "name": "job", "autostart": false, "main": {"run": false}, "start": true});
    assert_eq!(created, expected);
    let lines = guest.lines();
    assert!(!lines.contains(&"GET /templates".to_owned()));
    assert_eq!(lines.last().unwrap(), "DELETE /vms/job");
}

#[test]
fn run_deletes_the_vm_after_errors_but_never_one_that_it_did_not_create() {
    let home = Home::new();
    let timeout = json!({"error": "the agent did not respond within 120 s", "code": "timeout"});
    let taken = json!({"error": "name job is in use", "code": "name_taken"});
    for (status, error, is_deleted) in [(504, timeout, true), (409, taken, false)] {
        let guest = Guest::new(|_, _| {});
        for_run(&guest, "job");
        guest.respond("POST /vms?wait=agent&wait_seconds=120", status, error);
        let ran = run(quiet(
            &mut home.at(&guest.url(), &["run", "--name", "job", "debian-base", "true"]),
        ));
        assert_eq!(ran.code, 125, "{}", ran.err);
        let deleted = guest.lines().contains(&"DELETE /vms/job".to_owned());
        assert_eq!(deleted, is_deleted);
    }
    let guest = Guest::new(|_, _| {});
    for_run(&guest, "job");
    guest.respond("GET /vms/job", 200, vm(json!({"name": "job"})));
    let ran = run(quiet(
        &mut home.at(&guest.url(), &["run", "--name", "job", "debian-base", "true"]),
    ));
    assert!(ran.code == 125 && ran.err.contains("in use"), "{}", ran.err);
    let ran = run(quiet(&mut home.at(&guest.url(), &["run", "debian-bass", "true"])));
    assert!(
        ran.code == 125 && ran.err.contains("the templates are debian-base"),
        "{}",
        ran.err
    );
    assert!(guest.lines().iter().all(|line| line.starts_with("GET ")));
}

#[test]
fn run_forwards_signals_to_the_command_and_then_deletes_the_vm() {
    let guest = Guest::new(|_, socket| {
        out(socket, "ready\n");
        loop {
            if let AttachMessage::Signal(signal) = receive(socket) {
                return end(socket, None, Some(signal), false);
            }
        }
    });
    for_run(&guest, "job");
    let home = Home::new();
    let mut child = start(&mut home.at(&guest.url(), &["run", "--name", "job", "debian-base", "sleep", "9"]));
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    kill(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(guest.lines().last().unwrap(), "DELETE /vms/job");
}

#[test]
fn run_keeps_the_vm_on_request_with_a_key_of_its_own() {
    let guest = Guest::new(|_, socket| exit(socket, 0));
    for_run(&guest, "job");
    let home = Home::new();
    let ran = run(quiet(
        &mut home.at(&guest.url(), &["run", "--keep", "--name", "job", "debian-base", "true"]),
    ));
    assert!(
        ran.code == 0 && ran.err.contains("scalebox vm delete job"),
        "{}",
        ran.err
    );
    assert!(!guest.lines().contains(&"DELETE /vms/job".to_owned()));
    let key = home.path().join(".config/scalebox/id_ed25519");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let public = std::fs::read_to_string(key.with_extension("pub")).unwrap();
    let created = guest.body("POST /vms?wait=agent&wait_seconds=120");
    assert_eq!(created["ssh_public_key"].as_str().unwrap(), public.trim());
}

#[test]
fn login_stores_a_checked_token_with_mode_600_and_logout_removes_it() {
    let guest = Guest::new(|_, _| {});
    let home = Home::new();
    let url = guest.url();
    let path = home.file(".config/scalebox/config", "# mine\nSCALEBOX_TOKEN=old\n", 0o644);
    let login = |token: &str| {
        let mut child = start(&mut home.bare(&["login", &url]));
        child.stdin.take().unwrap().write_all(token.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    guest.respond(
        "GET /info",
        401,
        json!({"error": "unauthorized", "code": "unauthorized"}),
    );
    let refused = login("wrong\n");
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "# mine\nSCALEBOX_TOKEN=old\n");
    guest.respond("GET /info", 200, api::info());
    let accepted = login("s3cret-token\n");
    let shown = String::from_utf8(accepted.stdout).unwrap();
    assert!(
        shown.starts_with("logged in to big-iron at ") && !shown.contains("s3cret"),
        "{shown}"
    );
    let stored = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        stored,
        format!("# mine\nSCALEBOX_URL={url}\nSCALEBOX_TOKEN=s3cret-token\n")
    );
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(run(&mut home.bare(&["logout"])).code, 0);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "# mine\n");
}

#[test]
fn completions_know_the_names_of_vms_and_templates() {
    let guest = Guest::new(|_, _| {});
    for_run(&guest, "job");
    guest.respond(
        "GET /vms",
        200,
        json!({"vms": [vm(json!({"name": "box"})), vm(json!({"name": "other"}))]}),
    );
    let home = Home::new();
    let complete = |words: &[&str]| {
        let mut command = home.at(&guest.url(), &[&["--", "scalebox"], words].concat());
        command
            .env("COMPLETE", "bash")
            .env("_CLAP_COMPLETE_INDEX", words.len().to_string());
        command.env("_CLAP_IFS", "\n").env("_CLAP_COMPLETE_COMP_TYPE", "9");
        run(&mut command).out
    };
    assert_eq!(complete(&["vm", "get", "b"]).trim(), "box");
    assert_eq!(complete(&["exec", "o"]).trim(), "other");
    assert_eq!(complete(&["run", "deb"]).trim(), "debian-base");
    assert!(complete(&["cp", "bo"]).contains("box:/"));
}

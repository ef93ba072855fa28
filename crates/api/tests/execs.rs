//! Tests which execs are valid, and the message for each invalid one.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use scalebox_api::{CreateExec, Encoding, Exec, ExecResult, ExecStatus, Signal, SignalExec, Tty, WindowSize};
use serde_json::{Value, json};

fn parse(body: &Value) -> Result<CreateExec, String> {
    CreateExec::parse(body.to_string().as_bytes()).map_err(|invalid| invalid.to_string())
}

#[test]
fn a_program_or_a_command_line_is_enough() {
    let argv = parse(&json!({"argv": ["df", "-h", ""]})).unwrap();
    assert_eq!(argv, CreateExec::of_argv(["df", "-h", ""].map(str::to_owned).to_vec()));
    assert_eq!(argv.arguments(), ["df", "-h", ""]);
    let command = parse(&json!({"command": "echo $HOME | wc"})).unwrap();
    assert_eq!(command.arguments(), ["/bin/sh", "-c", "echo $HOME | wc"]);
    assert_eq!((command.stdin_bytes(), command.tty), (Ok(None), None));
}

#[test]
fn the_daemon_parses_what_the_client_serializes() {
    for request in [
        CreateExec::of_argv(vec!["true".to_owned()]),
        CreateExec {
            env: [("A".to_owned(), "b=c\n".to_owned())].into(),
            cwd: Some("/srv".parse().unwrap()),
            user: Some("user:users".parse().unwrap()),
            stdin: Some("AP8=".to_owned()),
            stdin_encoding: Encoding::Base64,
            tty: Some(Tty::Size(WindowSize { rows: 50, cols: 132 })),
            timeout_seconds: Some(604_800),
            background: true,
            open_stdin: true,
            ..CreateExec::of_command("cat")
        },
        CreateExec {
            tty: Some(Tty::Default(true)),
            ..CreateExec::of_command("top")
        },
    ] {
        let body = serde_json::to_vec(&request).unwrap();
        assert_eq!(CreateExec::parse(&body), Ok(request));
    }
    let request = parse(&json!({"argv": ["cat"], "stdin": "AP8=", "stdin_encoding": "base64"})).unwrap();
    assert_eq!(request.stdin_bytes(), Ok(Some(vec![0, 255])));
}

fn check_rejected(rows: &[(Value, &str)]) {
    for (body, message) in rows {
        assert_eq!(parse(body).unwrap_err(), *message, "{body:.100}");
    }
}

#[test]
fn invalid_commands_are_rejected_with_what_is_valid() {
    let long = "x".repeat(128 << 10);
    check_rejected(&[
        (
            json!({}),
            "argv is missing: send the program and its arguments, or a command line as command",
        ),
        (
            json!({"argv": ["a"], "command": "b"}),
            "command must not be sent together with argv",
        ),
        (json!({"argv": []}), "argv must begin with the name of a program"),
        (json!({"argv": [""]}), "argv must begin with the name of a program"),
        (
            json!({"argv": "df -h"}),
            "argv must be an array of strings, not a string",
        ),
        (
            json!({"argv": ["a", 1]}),
            "argv must be an array of strings; it contains a number",
        ),
        (json!({"argv": ["a\u{0}b"]}), "argv must not contain a zero byte"),
        (
            json!({"argv": ["a", long]}),
            "argv must not have a string of over 131071 bytes, the limit of Linux",
        ),
        (
            json!({"argv": vec!["a"; 20_000]}),
            "argv must have at most 16384 arguments",
        ),
        (json!({"command": " \n"}), "command must not be empty"),
        (json!({"command": null}), "command must be a string, not null"),
    ]);
    let unknown = parse(&json!({"argv": ["a"], "cmd": "b"})).unwrap_err();
    assert!(unknown.starts_with("unknown field \"cmd\""), "{unknown}");
}

#[test]
fn invalid_surroundings_are_rejected_with_what_is_valid() {
    check_rejected(&[
        (
            json!({"argv": ["a"], "env": []}),
            "env must be an object of strings, not an array",
        ),
        (
            json!({"argv": ["a"], "env": {"A": 1}}),
            "env must be an object of strings; it contains a number",
        ),
        (
            json!({"argv": ["a"], "env": {"A": "\u{0}"}}),
            "env must not contain a zero byte",
        ),
        (
            json!({"argv": ["a"], "env": {"A=B": ""}}),
            "env must not have the variable \"A=B\": a name is neither empty nor contains = or a zero byte",
        ),
        (
            json!({"argv": ["a"], "cwd": "tmp"}),
            "cwd must be an absolute path, which begins with /",
        ),
        (
            json!({"argv": ["a"], "user": "a:b:c"}),
            "user must be a user's name or number, optionally with a group, such as user, 1000 or user:users",
        ),
    ]);
    let twice = CreateExec::parse(br#"{"argv": ["a"], "env": {"A": "1", "A": "2"}}"#).unwrap_err();
    assert_eq!(twice.field(), Some("env.A"));
}

#[test]
fn invalid_streams_and_times_are_rejected_with_what_is_valid() {
    check_rejected(&[
        (
            json!({"argv": ["a"], "tty": "yes"}),
            "tty must be true, false or an object with rows and cols, not a string",
        ),
        (
            json!({"argv": ["a"], "tty": {"rows": 0, "cols": 80}}),
            "tty.rows must be a whole number between 1 and 65535",
        ),
        (
            json!({"argv": ["a"], "tty": {"rows": 24}}),
            "tty.cols is missing: send the number of columns of the terminal",
        ),
        (
            json!({"argv": ["a"], "timeout_seconds": 604_801}),
            "timeout_seconds must be a whole number between 1 and 604800",
        ),
        (
            json!({"argv": ["a"], "background": 1}),
            "background must be true or false, not a number",
        ),
        (
            json!({"argv": ["a"], "open_stdin": true}),
            "open_stdin is only valid together with \"background\": true",
        ),
        (
            json!({"argv": ["a"], "stdin_encoding": "base64"}),
            "stdin_encoding is only valid together with stdin",
        ),
        (
            json!({"argv": ["a"], "stdin": "x", "stdin_encoding": "hex"}),
            "stdin_encoding must be \"utf8\" or \"base64\"",
        ),
    ]);
    let base64 = parse(&json!({"argv": ["a"], "stdin": "?", "stdin_encoding": "base64"})).unwrap_err();
    assert!(base64.starts_with("stdin must be base64 with padding: "), "{base64}");
}

#[test]
fn arguments_and_environment_share_the_limit_of_the_kernel() {
    let half = "x".repeat(100 << 10);
    let arguments = vec!["a".to_owned(); 1]
        .into_iter()
        .chain(vec![half.clone(); 6])
        .collect::<Vec<_>>();
    assert!(parse(&json!({"argv": arguments})).is_ok());
    let env: Value = (0..6)
        .map(|i| (format!("V{i}"), json!(half)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let refused = parse(&json!({"argv": arguments, "env": env})).unwrap_err();
    assert!(
        refused.starts_with("env is too large: arguments and environment together"),
        "{refused}"
    );
}

#[test]
fn signals_are_names_or_numbers() {
    for body in [
        &br#"{"signal": "TERM"}"#[..],
        br#"{"signal": "sigterm"}"#,
        br#"{"signal": 15}"#,
        br#"{"signal": "15"}"#,
    ] {
        assert_eq!(SignalExec::parse(body), Ok(SignalExec { signal: Signal::TERM }));
    }
    for body in [
        &br#"{}"#[..],
        br#"{"signal": 0}"#,
        br#"{"signal": 1.5}"#,
        br#"{"signal": -1}"#,
        br#"{"signal": "NO"}"#,
        br#"{"signal": null}"#,
    ] {
        assert_eq!(SignalExec::parse(body).unwrap_err().field(), Some("signal"));
    }
}

#[test]
fn responses_have_the_documented_form() {
    let result = json!({"exec": "exec-0123456789ab", "exit_code": null, "signal": "KILL", "timed_out": true,
        "stdout": "hi\n", "stderr": "/w==", "stderr_encoding": "base64", "truncated": false, "duration_ms": 12});
    let read: ExecResult = serde_json::from_value(result.clone()).unwrap();
    assert_eq!(
        (read.signal, read.stderr_encoding),
        (Some(Signal::KILL), Encoding::Base64)
    );
    assert_eq!(serde_json::to_value(read).unwrap(), result);
    let exec = json!({"exec": "exec-0123456789ab", "argv": ["sleep", "9"], "status": "running", "tty": false,
        "started_at": "2026-01-02T03:04:05.678Z", "duration_ms": 12, "output_start": 0, "output_end": 7});
    let read: Exec = serde_json::from_value(exec.clone()).unwrap();
    assert_eq!(read.status, ExecStatus::Running);
    assert_eq!(serde_json::to_value(read).unwrap(), exec);
}

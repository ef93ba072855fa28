//! Commands: how they are started, and how they end.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

mod support;

use futures::future::join_all;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use scalebox_agent_api::exec::{MAX_ARGUMENT, MAX_ARGUMENTS, MAX_BUFFER, MAX_ENDED};
use scalebox_agent_api::{ExecEnd, ExecStatus, FailureCode, StartExec};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use support::execs::{Ran, exec, script, terminal};
use support::host;
use tokio::time::timeout;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: not root");
    }
    root
}

#[tokio::test]
async fn stdout_and_stderr_are_separated_and_in_order() {
    let host = host().await;
    let mut request = script("echo out; sleep 0.1; echo err >&2; sleep 0.1; echo out again; exit 7");
    request.argv.push("unused".to_owned());
    let status = host.start(&request).await;
    assert_eq!((status.id.as_str(), &status.argv), (request.id.as_str(), &request.argv));
    assert_eq!((status.end, status.tty), (None, false));
    // Each frame's offset is compared with the bytes before it.
    let ran = host.finish(&request.id).await;
    assert_eq!(
        (ran.stdout().as_str(), ran.stderr().as_str()),
        ("out\nout again\n", "err\n")
    );
    let end = ExecEnd {
        exit_code: Some(7),
        signal: None,
        timed_out: false,
    };
    assert_eq!((ran.end, ran.offset), (Some(end), 18));
    let state = host.state(&request.id).await;
    assert_eq!((state.end, state.output_start, state.output_end), (Some(end), 0, 18));
    assert!(state.duration_ms >= 200, "{}", state.duration_ms);
}

#[tokio::test]
async fn the_environment_is_the_requested_one_with_defaults() {
    let host = host().await;
    let mut request = exec(&["env"]);
    let variables = [("A", "1"), ("EMPTY", ""), ("A", "two = 2"), ("HOME", "/nowhere")];
    request.env = variables.map(|(name, value)| (name.into(), value.into())).into();
    let ran = host.run(&request).await.stdout();
    let mut lines: Vec<&str> = ran.lines().filter(|line| !line.starts_with("SHELL=")).collect();
    lines.sort_unstable();
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(
        lines,
        [
            "A=two = 2",
            "EMPTY=",
            "HOME=/nowhere",
            "LOGNAME=root",
            path,
            "USER=root"
        ]
    );
    let mut elsewhere = exec(&["env"]);
    elsewhere.env = vec![("PATH".into(), "/nowhere".into())];
    assert_eq!(host.refused(&elsewhere).await, FailureCode::NotFound);
}

#[tokio::test]
async fn commands_run_in_their_folder_and_as_their_user() {
    if !is_root() {
        return;
    }
    let host = host().await;
    let ran = host
        .run(&script("pwd; umask; id -u; id -G; cat /proc/self/oom_score_adj"))
        .await;
    assert_eq!(ran.stdout().lines().take(3).collect::<Vec<_>>(), ["/", "0022", "0"]);
    assert_eq!(ran.stdout().lines().last(), Some("0"));
    let mut request = script("pwd; id -u; id -g; id -G; echo $USER $HOME; echo reopened > /dev/stderr");
    (request.cwd, request.user) = (Some("/usr".into()), Some("nobody".into()));
    let ran = host.run(&request).await;
    let lines = ran.stdout();
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines[..4], ["/usr", "65534", "65534", "65534"]);
    assert!(lines[4].starts_with("nobody /"), "{lines:?}");
    assert_eq!(ran.stderr(), "reopened\n");
    let mut numbers = script("id -u; id -g; echo \"[$USER] $HOME\"; grep -i '^SigIgn\\|^SigBlk' /proc/self/status");
    numbers.user = Some("4242:4343".into());
    let ran = host.run(&numbers).await.stdout();
    let none = "0000000000000000";
    let expected = format!("4242\n4343\n[] /\nSigBlk:\t{none}\nSigIgn:\t{none}\n");
    assert_eq!(ran, expected);
}

#[tokio::test]
async fn stdin_is_written_in_order_and_closed() {
    let host = host().await;
    let mut request = exec(&["cat"]);
    request.stdin = true;
    host.start(&request).await;
    let text: String = (0..200_000).map(|number| format!("{number}\n")).collect();
    let (first, second) = text.split_at(700_000);
    let write = async {
        host.ask(&request.id, "stdin", first.into()).await.unwrap();
        host.ask(&request.id, "stdin?close=true", second.into()).await.unwrap();
        host.ask(&request.id, "stdin", b"more".to_vec()).await
    };
    let (late, ran) = tokio::join!(write, host.finish(&request.id));
    assert_eq!(late, Err(FailureCode::Ended));
    assert_eq!((ran.exit_code(), ran.stdout() == text), (Some(0), true));
    let without = host.run(&exec(&["cat"])).await;
    assert_eq!((without.exit_code(), without.offset), (Some(0), 0), "/dev/null");
}

#[tokio::test]
async fn a_command_that_does_not_read_its_stdin_stops_no_other() {
    let host = host().await;
    let mut stuck = Vec::new();
    for _ in 0..8 {
        let mut request = exec(&["sleep", "1000"]);
        request.stdin = true;
        host.start(&request).await;
        let (host, id) = (host.clone(), request.id.clone());
        stuck.push((
            request.id,
            tokio::spawn(async move { host.ask(&id, "stdin", vec![0; 2 << 20]).await }),
        ));
    }
    for _ in 0..3 {
        let mut request = exec(&["wc", "-c"]);
        request.stdin = true;
        host.start(&request).await;
        host.ask(&request.id, "stdin?close=true", vec![b'x'; 1 << 20])
            .await
            .unwrap();
        assert_eq!(host.finish(&request.id).await.stdout(), "1048576\n");
    }
    for (id, write) in stuck {
        assert!(!write.is_finished());
        host.ask(&id, "signal", br#"{"signal":15}"#.to_vec()).await.unwrap();
        assert_eq!(write.await.unwrap(), Err(FailureCode::Ended));
        assert_eq!(host.finish(&id).await.signal(), Some(15));
    }
    let mut closes = script("exec 0<&-; echo closed; sleep 1000");
    (closes.stdin, closes.timeout_ms) = (true, Some(20_000));
    host.start(&closes).await;
    let mut ran = Ran::default();
    host.output(&closes.id, 0, true).await.until(&mut ran, "closed").await;
    let written = host.ask(&closes.id, "stdin", b"x".to_vec()).await;
    assert_eq!(written, Err(FailureCode::Ended));
}

#[tokio::test]
async fn signals_reach_the_process_group_until_the_end() {
    let host = host().await;
    let request = script(
        "sh -c 'trap \"echo child; exit\" USR1; echo ready; while :; do sleep 0.05; done' & \
        trap 'echo parent; wait; exit 3' USR1; wait",
    );
    host.start(&request).await;
    let (mut frames, mut ran) = (host.output(&request.id, 0, true).await, Ran::default());
    frames.until(&mut ran, "ready").await;
    for invalid in ["0", "65", "-9"] {
        let body = format!("{{\"signal\":{invalid}}}").into();
        assert_eq!(host.ask(&request.id, "signal", body).await, Err(FailureCode::Invalid));
    }
    let usr1 = br#"{"signal":10}"#.to_vec();
    host.ask(&request.id, "signal", usr1.clone()).await.unwrap();
    frames.rest(&mut ran).await;
    assert_eq!(ran.exit_code(), Some(3));
    assert!(ran.stdout().contains("child") && ran.stdout().contains("parent"));
    assert_eq!(
        host.ask(&request.id, "signal", usr1.clone()).await,
        Err(FailureCode::Ended)
    );
    assert_eq!(
        host.ask("exec-nowhere", "signal", usr1).await,
        Err(FailureCode::NotFound)
    );
}

#[tokio::test]
async fn terminals_have_a_size_and_control_characters() {
    let host = host().await;
    let mut request = script("tty -s && echo $TERM; stty size; read -r line; echo \"got $line\"; stty size");
    request.tty = terminal();
    host.start(&request).await;
    let (mut frames, mut ran) = (host.output(&request.id, 0, true).await, Ran::default());
    frames.until(&mut ran, "xterm-256color\r\n24 80\r\n").await;
    host.ask(&request.id, "resize", br#"{"rows":50,"cols":132}"#.to_vec())
        .await
        .unwrap();
    host.ask(&request.id, "stdin", b"text\n".to_vec()).await.unwrap();
    frames.rest(&mut ran).await;
    assert!(ran.stdout().ends_with("got text\r\n50 132\r\n"), "{}", ran.stdout());
    assert_eq!(ran.exit_code(), Some(0));

    let mut sleep = exec(&["sleep", "1000"]);
    sleep.tty = terminal();
    host.start(&sleep).await;
    host.ask(&sleep.id, "stdin", b"\x03".to_vec()).await.unwrap();
    assert_eq!(host.finish(&sleep.id).await.signal(), Some(2));

    let mut cat = exec(&["cat"]);
    cat.tty = terminal();
    host.start(&cat).await;
    host.ask(&cat.id, "stdin?close=true", b"line\n".to_vec()).await.unwrap();
    let ran = host.finish(&cat.id).await;
    assert_eq!((ran.stdout().as_str(), ran.exit_code()), ("line\r\nline\r\n", Some(0)));

    let plain = exec(&["sleep", "1000"]);
    host.start(&plain).await;
    let size = br#"{"rows":1,"cols":1}"#.to_vec();
    assert_eq!(host.ask(&plain.id, "resize", size).await, Err(FailureCode::Ended));
    assert_eq!(host.ask(&plain.id, "stdin", Vec::new()).await, Err(FailureCode::Ended));
    host.ask(&plain.id, "signal", br#"{"signal":9}"#.to_vec())
        .await
        .unwrap();
}

#[tokio::test]
async fn long_input_reaches_a_terminal_whose_program_is_slow() {
    let host = host().await;
    let mut request = script("stty raw -echo; echo ready; sleep 0.3; head -c 300000 | wc -c");
    request.tty = terminal();
    host.start(&request).await;
    let (mut frames, mut ran) = (host.output(&request.id, 0, true).await, Ran::default());
    frames.until(&mut ran, "ready").await;
    host.ask(&request.id, "stdin", vec![b'x'; 300_000]).await.unwrap();
    frames.rest(&mut ran).await;
    assert!(ran.stdout().contains("300000"), "{}", ran.stdout());
}

#[tokio::test]
async fn the_timeout_kills_the_whole_process_group() {
    let host = host().await;
    let mut request = script("sleep 1000 & echo $!; wait");
    request.timeout_ms = Some(500);
    let ran = host.run(&request).await;
    let end = ExecEnd {
        exit_code: None,
        signal: Some(9),
        timed_out: true,
    };
    assert_eq!(ran.end, Some(end));
    let child = Pid::from_raw(ran.stdout().trim().parse().unwrap()).unwrap();
    // The child may have been reaped by process 1 already.
    if let Ok(child) = pidfd_open(child, PidfdFlags::empty()) {
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        let ended = poll(&mut [PollFd::new(&child, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(ended, 1, "the child lives");
    }
}

#[tokio::test]
async fn processes_that_are_left_behind_do_not_keep_an_exec_open() {
    let host = host().await;
    let file = tempfile::tempdir().unwrap();
    let left = file.path().join("left");
    mknodat(CWD, &left, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let request = script(&format!(
        "(sleep 2; echo dropped; echo dropped >&2; echo written > {}) & echo started",
        left.display()
    ));
    let started = Instant::now();
    let ran = host.run(&request).await;
    assert_eq!((ran.exit_code(), ran.stdout().as_str()), (Some(0), "started\n"));
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    // Reading the FIFO waits for the writer.
    let written = tokio::task::spawn_blocking(move || fs::read_to_string(left));
    let written = timeout(Duration::from_secs(30), written)
        .await
        .expect("its writes do not fail");
    assert_eq!(written.unwrap().unwrap(), "written\n");
    assert_eq!(host.state(&request.id).await.output_end, 8);
    let flood = host.run(&script("yes & echo $! >&2")).await;
    assert_eq!(flood.exit_code(), Some(0));
    let pid = flood.stderr().trim().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

async fn refused(change: impl FnOnce(&mut StartExec)) -> FailureCode {
    let host = host().await;
    let mut request = exec(&["true"]);
    change(&mut request);
    let code = host.refused(&request).await;
    let execs: Vec<ExecStatus> = host.get("/v1/execs").await;
    assert_eq!(execs, [], "nothing is left");
    code
}

#[tokio::test]
async fn malformed_requests_are_rejected() {
    let invalid = FailureCode::Invalid;
    for id in ["", "exec-1", "exec-00000000000g", "../../etc/passwd"] {
        assert_eq!(refused(|request| request.id = id.into()).await, invalid, "{id}");
    }
    assert_eq!(refused(|request| request.argv.clear()).await, invalid);
    assert_eq!(refused(|request| request.argv[0].clear()).await, invalid);
    assert_eq!(refused(|request| request.argv.push("a\0b".into())).await, invalid);
    for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "\0")] {
        let env = vec![(name.to_owned(), value.to_owned())];
        assert_eq!(refused(|request| request.env = env).await, invalid);
    }
    let long = "x".repeat(MAX_ARGUMENT + 1);
    assert_eq!(refused(|request| request.argv.push(long.clone())).await, invalid);
    assert_eq!(
        refused(|request| request.argv.resize(MAX_ARGUMENTS + 1, "x".into())).await,
        invalid
    );
    let large = |request: &mut StartExec| {
        let value = "x".repeat(100 << 10);
        request.env = (0..11).map(|number| (format!("N{number}"), value.clone())).collect();
    };
    assert_eq!(refused(large).await, invalid);
    assert_eq!(refused(|request| request.buffer = Some(MAX_BUFFER + 1)).await, invalid);
    assert_eq!(refused(|request| request.timeout_ms = Some(0)).await, invalid);
    assert_eq!(refused(|request| request.cwd = Some("usr".into())).await, invalid);
    assert_eq!(refused(|request| request.cwd = Some("/\0".into())).await, invalid);
    assert_eq!(refused(|request| request.user = Some("\0".into())).await, invalid);
    let host = host().await;
    let mut most = exec(&["true"]);
    most.argv.extend(vec!["x".repeat(MAX_ARGUMENT); 7]);
    assert_eq!(host.run(&most).await.exit_code(), Some(0));
}

#[tokio::test]
async fn commands_that_cannot_be_started_fail_with_the_cause() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str, mode: u32| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let none = file("none", "echo no interpreter\n", 0o755);
    let missing = file("missing", "#!/no/such/interpreter\n", 0o755);
    let plain = file("plain", "#!/bin/sh\n", 0o644);
    let beneath = format!("{plain}/program");
    let programs = [
        ("no-such-program", FailureCode::NotFound),
        ("/no/such/program", FailureCode::NotFound),
        ("/usr", FailureCode::WrongKind),
        (&none, FailureCode::Invalid),
        (&missing, FailureCode::NotFound),
        (&plain, FailureCode::Denied),
        (&beneath, FailureCode::WrongKind),
    ];
    for (program, code) in programs {
        let refused = refused(|request| request.argv = vec![program.to_owned()]).await;
        assert_eq!(refused, code, "{program}");
    }
    let cwd = |path: &str| {
        let path = path.to_owned();
        refused(move |request| request.cwd = Some(path))
    };
    assert_eq!(cwd("/no/such/folder").await, FailureCode::NotFound);
    assert_eq!(cwd(&plain).await, FailureCode::WrongKind);
    let user = |name: &'static str| refused(move |request| request.user = Some(name.into()));
    assert_eq!(user("no-such-user").await, FailureCode::NotFound);
    assert_eq!(user("root:no-such-group").await, FailureCode::NotFound);
    assert_eq!(user("").await, FailureCode::Invalid);
}

#[tokio::test]
async fn an_id_is_used_once() {
    let host = host().await;
    let request = exec(&["true"]);
    host.run(&request).await;
    assert_eq!(host.refused(&request).await, FailureCode::Exists);
    let at_once = exec(&["true"]);
    let attempts = (0..8).map(|_| host.json(hyper::Method::POST, "/v1/execs", &at_once));
    let started = join_all(attempts).await;
    assert_eq!(started.iter().filter(|(status, _)| status.is_success()).count(), 1);
}

#[tokio::test]
async fn five_hundred_execs_at_once_all_complete() {
    let host = host().await;
    let runs = (0..500).map(|number| {
        let host = host.clone();
        async move {
            let ran = host.run(&script(&format!("read x; echo {number}; exit 5"))).await;
            assert_eq!((ran.exit_code(), ran.stdout()), (Some(5), format!("{number}\n")));
        }
    });
    join_all(runs).await;
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn children() -> String {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let children = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default());
    children.collect()
}

#[tokio::test]
async fn ten_thousand_execs_leave_no_file_and_no_process() {
    let host = host().await;
    let first = exec(&["true"]);
    host.run(&first).await;
    let before = open_files();
    for _ in 0..10_000 / 30 + 1 {
        let runs = (0..30).map(async |number| {
            let mut request = exec(&["true"]);
            (request.stdin, request.tty) = (number % 3 == 1, if number % 3 == 2 { terminal() } else { None });
            assert_eq!(host.run(&request).await.exit_code(), Some(0));
        });
        join_all(runs).await;
    }
    assert_eq!((open_files(), children().trim()), (before, ""));
    let execs: Vec<ExecStatus> = host.get("/v1/execs").await;
    assert_eq!(execs.len(), MAX_ENDED);
    let forgotten = host.ask(&first.id, "signal", br#"{"signal":9}"#.to_vec()).await;
    assert_eq!(forgotten, Err(FailureCode::NotFound));
}

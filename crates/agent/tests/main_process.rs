//! The main process of a guest without an init: its restarts, its output, its end.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

mod support;

use hyper::{Method, StatusCode};
use scalebox_agent::Agent;
use scalebox_agent_api::{ExecStatus, FailureCode, InitKind, MainProcess, RestartPolicy, main_process};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use support::execs::{Ran, script};
use support::{Host, connect, nothing};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

const MAIN: &str = main_process::EXEC;

fn shell(text: &str, restart: RestartPolicy) -> MainProcess {
    MainProcess {
        argv: ["/bin/sh", "-c", text].map(str::to_owned).into(),
        env: vec![("COLOUR".into(), "red".into())],
        cwd: None,
        user: None,
        restart,
        stop_signal: None,
    }
}

/// Starts an agent with a main process.
async fn start(main: MainProcess, run_dir: &Path) -> (Host, Arc<Agent>) {
    let agent = Agent::new(InitKind::Agent);
    let (supervisor, folder) = (Arc::clone(&agent), run_dir.to_owned());
    tokio::spawn(async move { supervisor.supervise(main, &folder).await });
    (connect(&agent).await, agent)
}

/// Waits for a state of the main process.
async fn until(host: &Host, is_it: impl Fn(&ExecStatus) -> bool) -> ExecStatus {
    let wait = async {
        loop {
            let path = format!("/v1/execs/{MAIN}");
            let (status, body) = host.call(Method::GET, &path, nothing()).await;
            if status == StatusCode::OK {
                let state = serde_json::from_slice(&body).unwrap();
                if is_it(&state) {
                    return state;
                }
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(30), wait).await.unwrap()
}

fn run_dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[tokio::test]
async fn a_main_process_that_fails_is_started_again_and_its_output_goes_on() {
    let (folder, state) = (run_dir(), run_dir());
    let text = format!(
        "cd {}; n=$(ls | wc -l); : > run$n; echo \"run $n $COLOUR\"; echo warning >&2; [ $n = 3 ]",
        state.path().display()
    );
    let (host, _agent) = start(shell(&text, RestartPolicy::OnFailure), folder.path()).await;
    let seen = until(&host, |state| state.end.is_some_and(|end| end.exit_code == Some(0))).await;
    let restarts = seen.restarts.unwrap();
    assert_eq!((restarts.count, restarts.pending), (3, false));
    let ran = host.finish(MAIN).await;
    assert_eq!(ran.stdout(), "run 0 red\nrun 1 red\nrun 2 red\nrun 3 red\n");
    assert_eq!(ran.stderr(), "warning\n".repeat(4));
    assert_eq!(ran.exit_code(), Some(0));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing runs");
}

#[tokio::test]
async fn a_follower_sees_all_runs_of_a_main_process_that_is_always_started_again() {
    let folder = run_dir();
    let (host, _agent) = start(
        shell("echo started; exec sleep 600", RestartPolicy::Always),
        folder.path(),
    )
    .await;
    let mut pid = 0;
    until(&host, |state| state.pid != 0).await;
    let (mut frames, mut ran) = (host.output(MAIN, 0, true).await, Ran::default());
    for count in 1..=3 {
        frames.until(&mut ran, &"started\n".repeat(count)).await;
        let state = until(&host, |state| state.end.is_none() && state.pid != pid).await;
        pid = state.pid;
        assert_eq!(state.restarts.unwrap().count, count as u64 - 1);
        host.ask(MAIN, "signal", br#"{"signal":15}"#.to_vec()).await.unwrap();
    }
    let between = until(&host, |state| state.restarts.unwrap().pending).await;
    assert_eq!(between.end.unwrap().signal, Some(15));
    assert_eq!(
        host.ask(MAIN, "signal", br#"{"signal":15}"#.to_vec()).await,
        Err(FailureCode::Ended)
    );
    frames.until(&mut ran, &"started\n".repeat(4)).await;
    assert_eq!(ran.lost, 0);
    host.ask(MAIN, "signal", br#"{"signal":9}"#.to_vec()).await.unwrap();
}

#[tokio::test]
async fn what_a_run_leaves_behind_is_killed_before_the_next() {
    let folder = run_dir();
    let text = "sleep 600 & echo $!; exit 1";
    let (host, _agent) = start(shell(text, RestartPolicy::Always), folder.path()).await;
    until(&host, |state| state.pid != 0).await;
    let (mut frames, mut ran) = (host.output(MAIN, 0, true).await, Ran::default());
    while ran.stdout().lines().count() < 3 {
        ran.add(frames.next().await.unwrap());
    }
    let left = ran.stdout().lines().next().unwrap().to_owned();
    // An ended process that is not reaped yet has no command line.
    let line = fs::read(format!("/proc/{left}/cmdline")).unwrap_or_default();
    assert!(line.is_empty(), "{left} runs: {}", String::from_utf8_lossy(&line));
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_reported_in_the_output() {
    let folder = run_dir();
    let main = MainProcess {
        argv: vec!["no-such-program".into()],
        ..shell("", RestartPolicy::Never)
    };
    let (host, _agent) = start(main, folder.path()).await;
    let state = until(&host, |state| state.end.is_some()).await;
    assert_eq!((state.pid, state.end.unwrap().exit_code), (0, Some(127)));
    let ran = host.finish(MAIN).await;
    assert_eq!(
        ran.stderr(),
        "scalebox-agent: cannot run no-such-program: it is in no folder of PATH\n"
    );
    let nobody = MainProcess {
        user: Some("nobody-of-that-name".into()),
        ..shell("true", RestartPolicy::Never)
    };
    let (host, _agent) = start(nobody, folder.path()).await;
    until(&host, |state| state.end.is_some()).await;
    let ran = host.finish(MAIN).await;
    assert!(ran.stderr().contains("nobody-of-that-name"), "{}", ran.stderr());
}

#[tokio::test]
async fn the_main_process_is_never_forgotten_and_is_not_started_again_by_others() {
    let folder = run_dir();
    let (host, _agent) = start(shell("exit 3", RestartPolicy::Never), folder.path()).await;
    until(&host, |state| state.end.is_some()).await;
    for _ in 0..scalebox_agent_api::exec::MAX_ENDED + 8 {
        let request = script("exit 0");
        host.start(&request).await;
        host.ended(&request.id).await;
    }
    assert_eq!(host.state(MAIN).await.end.unwrap().exit_code, Some(3));
    let mut request = script("true");
    request.id = MAIN.to_owned();
    assert_eq!(host.refused(&request).await, FailureCode::Invalid);
}

#[tokio::test]
async fn a_guest_that_ends_does_not_start_its_main_process_again() {
    let folder = run_dir();
    let (host, _agent) = start(shell("exec sleep 600", RestartPolicy::Always), folder.path()).await;
    until(&host, |state| state.pid != 0).await;
    assert!(folder.path().join("main.pid").exists());
    fs::write(folder.path().join("ending"), "").unwrap();
    host.ask(MAIN, "signal", br#"{"signal":15}"#.to_vec()).await.unwrap();
    let ran = host.finish(MAIN).await;
    assert_eq!(ran.signal(), Some(15));
    let restarts = host.state(MAIN).await.restarts.unwrap();
    assert_eq!((restarts.count, restarts.pending), (0, false));
    assert!(!folder.path().join("main.pid").exists());
}

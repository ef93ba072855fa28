//! Tests the limits and the errors of runs with shell scripts.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

use rustix::fs::Mode;
use rustix::process::{Pid, test_kill_process};
use scalebox_programs::{Program, ProgramError, Run};
use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

const SHELL: Program = Program::new("sh", "dash").within(Duration::from_secs(60));
const KILL_TIMEOUT: Duration = Duration::from_millis(200);

fn shell(script: &str) -> Run {
    Run::of(SHELL).args(["-c", script])
}

/// Waits until the file holds a process id and a newline, and returns the id.
fn written_pid(file: &Path) -> Pid {
    let begun = Instant::now();
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        if text.ends_with('\n') {
            return Pid::from_raw(text.trim().parse().unwrap()).unwrap();
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "no process id in the file");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the process is gone, or a zombie that its new parent has not reaped.
fn expect_end(pid: Pid) {
    let begun = Instant::now();
    while test_kill_process(pid).is_ok() {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
        if stat.contains(") Z ") {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{pid:?} is still running");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn why(error: ProgramError) -> String {
    match error {
        ProgramError::Killed { why, .. } => why,
        other => panic!("not killed: {other}"),
    }
}

#[test]
fn a_missing_program_is_reported_with_its_package() {
    let error = Run::of(Program::new("no-such-program", "no-package")).stdout();
    let error = error.unwrap_err();
    assert!(
        matches!(
            error,
            ProgramError::Missing {
                program: "no-such-program",
                package: "no-package"
            }
        ),
        "{error:?}"
    );
}

#[test]
fn a_missing_folder_or_file_is_not_a_missing_package() {
    let folder = shell("true").folder(Path::new("/nonexistent")).stdout().unwrap_err();
    assert!(
        folder.to_string().starts_with("cannot run sh: No such file"),
        "{folder}"
    );
    let file = Run::of_file(Path::new("/nonexistent/tool"), KILL_TIMEOUT)
        .output()
        .unwrap_err();
    assert!(
        file.to_string()
            .starts_with("cannot run /nonexistent/tool: No such file"),
        "{file}"
    );
}

#[test]
fn a_failure_names_the_command_its_exit_status_and_both_streams() {
    let error = shell("echo out; echo err >&2; exit 3").stdout().unwrap_err();
    assert_eq!(
        error.to_string(),
        "sh -c echo out; echo err >&2; exit 3 failed (exit status: 3):\nout\nerr"
    );
    let silent = shell("exit 1").stdout().unwrap_err().to_string();
    assert!(silent.ends_with("failed (exit status: 1): "), "{silent:?}");
}

#[test]
fn a_failure_by_a_signal_names_the_signal() {
    let error = shell("kill -SEGV $$").stdout().unwrap_err().to_string();
    assert!(error.contains("failed (signal: 11 (SIGSEGV)"), "{error}");
}

#[test]
fn several_exit_codes_can_be_successes() {
    let run = |code: &str| shell(&format!("echo found; exit {code}")).stdout_accepting(&[0, 2]);
    assert_eq!(run("2").unwrap(), (2, "found\n".to_owned()));
    assert!(matches!(run("1"), Err(ProgramError::Failed { .. })));
}

#[test]
fn a_success_keeps_standard_error_for_the_caller_to_judge() {
    let output = shell("echo fine; echo 'e2fsck: Input/output error' >&2")
        .output()
        .unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, b"fine\n");
    assert_eq!(output.stderr, b"e2fsck: Input/output error\n");
}

#[test]
fn long_output_on_both_streams_is_collected() {
    let output = shell("seq 100000; seq 100000 >&2; exit 3").output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(output.stdout == output.stderr && output.stdout.ends_with(b"100000\n"));
}

#[test]
fn input_is_fed_while_output_is_read() {
    // The input is more than both pipes hold, and `cat` stops reading while its output is full.
    let input = "0123456789abcde\n".repeat(1 << 16);
    let output = shell("cat; cat >&2").input(input.clone()).stdout().unwrap();
    assert!(output == input, "{} of {} bytes", output.len(), input.len());
    assert_eq!(shell("cat").input("").stdout().unwrap(), "");
    assert_eq!(shell("cat").stdout().unwrap(), "");
}

#[test]
fn input_that_a_program_leaves_unread_is_not_a_failure() {
    let input = "x".repeat(1 << 20);
    assert_eq!(shell("exec 0<&-; echo done").input(input).stdout().unwrap(), "done\n");
}

#[test]
fn a_file_can_be_the_input() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("input");
    fs::write(&path, "script").unwrap();
    let read = shell("cat").input_file(File::open(&path).unwrap()).stdout().unwrap();
    assert_eq!(read, "script");
}

#[test]
fn the_time_limit_kills_a_program_that_ignores_signals() {
    let begun = Instant::now();
    let shell = Program::new("sh", "dash").within(KILL_TIMEOUT);
    let error = Run::of(shell).args(["-c", "trap '' TERM; exec sleep 1000"]).stdout();
    let error = error.unwrap_err();
    assert_eq!(
        error.to_string(),
        "sh -c trap '' TERM; exec sleep 1000 was killed: it did not end within 0.2 s"
    );
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[test]
fn the_time_limit_kills_the_whole_process_group() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    let script = format!("sleep 1000 & echo $! > {}; wait", file.display());
    let shell = Program::new("sh", "dash").within(Duration::from_secs(3));
    let error = Run::of(shell).args(["-c", &script]).stdout().unwrap_err();
    assert_eq!(why(error), "did not end within 3 s");
    expect_end(written_pid(&file));
}

#[test]
fn a_child_that_keeps_the_output_open_counts_as_not_ended() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    let script = format!("sleep 1000 & echo $! > {}", file.display());
    let shell = Program::new("sh", "dash").within(Duration::from_secs(3));
    let error = Run::of(shell).args(["-c", &script]).stdout().unwrap_err();
    assert_eq!(why(error), "did not end within 3 s");
    expect_end(written_pid(&file));
}

#[test]
fn too_much_output_kills_the_program() {
    assert_eq!(why(shell("exec yes").stdout().unwrap_err()), "wrote more than 16 MiB");
    let on_stderr = shell("exec yes >&2").max_output(1 << 20).output().unwrap_err();
    assert_eq!(why(on_stderr), "wrote more than 1 MiB");
    let exactly = shell("yes | head -c 1048576").max_output(1 << 20).stdout().unwrap();
    assert_eq!(exactly.len(), 1 << 20);
}

#[test]
fn lines_are_passed_on_in_order_and_returned() {
    let mut seen = Vec::new();
    let script = "echo one; echo two >&2; printf 'three \\n\\nlast'";
    let all = shell(script).lines(|line| seen.push(line.to_owned())).unwrap();
    assert_eq!(seen, ["one", "two", "three", "", "last"]);
    assert_eq!(all, "one\ntwo\nthree \n\nlast");
    let error = shell("echo why; exit 4").lines(|_| ()).unwrap_err().to_string();
    assert!(error.ends_with("failed (exit status: 4): why"), "{error}");
}

#[test]
fn lines_are_passed_on_while_the_program_runs() {
    let folder = tempfile::tempdir().unwrap();
    let seen = folder.path().join("seen");
    // The program ends only after its first line was passed on.
    let script = format!(
        "echo first; while ! test -e {0}; do sleep 0.01; done; echo second",
        seen.display()
    );
    let mut lines = 0;
    let run = shell(&script).lines(|_| {
        lines += 1;
        fs::write(&seen, "").unwrap();
    });
    run.unwrap();
    assert_eq!(lines, 2);
}

#[test]
fn dropping_the_stop_kills_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    let (run, stop) = shell(&format!("echo $$ > {}; exec sleep 1000", file.display()))
        .stoppable()
        .unwrap();
    let waiter = std::thread::spawn(move || run.stdout());
    let pid = written_pid(&file);
    drop(stop);
    assert_eq!(why(waiter.join().unwrap().unwrap_err()), "is no longer waited for");
    expect_end(pid);
}

#[test]
fn locale_and_path_are_fixed_and_the_environment_can_be_clean() {
    let print = "echo \"$LC_ALL|$PATH|${CARGO_MANIFEST_DIR:+inherited}|$EXTRA\"";
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let inherited = shell(print).env("EXTRA", "more").stdout().unwrap();
    assert_eq!(inherited, format!("C|{path}|inherited|more\n"));
    let clean = shell(print).clean_environment().stdout().unwrap();
    assert_eq!(clean, format!("C|{path}||\n"));
    let other = shell(print).env("LC_ALL", "C.UTF-8").stdout().unwrap();
    assert!(other.starts_with("C.UTF-8|"), "{other}");
    // A program that the caller found keeps the caller's path.
    let found = Run::of_file(Path::new("/bin/sh"), Duration::from_secs(60)).args(["-c", print]);
    let found = found.stdout().unwrap();
    assert!(found.contains(&std::env::var("PATH").unwrap()), "{found}");
}

#[test]
fn programs_run_in_their_folder_with_their_umask() {
    let folder = tempfile::tempdir().unwrap();
    let run = shell("pwd; touch made").folder(folder.path());
    let printed = run.umask(Mode::WGRP | Mode::WOTH | Mode::ROTH).stdout().unwrap();
    let real = folder.path().canonicalize().unwrap();
    assert_eq!(printed.trim_end(), real.to_str().unwrap());
    let made = fs::metadata(folder.path().join("made")).unwrap();
    assert_eq!(made.permissions().mode() & 0o777, 0o640);
}

#[test]
fn a_program_leads_a_process_group_unless_it_stays_in_the_caller_s() {
    let print = "cut -d' ' -f5 /proc/$$/stat; echo $$";
    let ids = |run: Run| -> Vec<i32> {
        run.stdout()
            .unwrap()
            .lines()
            .map(|line| line.parse().unwrap())
            .collect()
    };
    let own = ids(shell(print));
    assert_eq!(own[0], own[1]);
    let callers = rustix::process::getpgrp().as_raw_nonzero().get();
    assert_eq!(ids(shell(print).in_callers_group())[0], callers);
}

#[test]
fn a_program_that_cannot_be_executed_is_reported_with_the_cause() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tool");
    let plain = File::options().create_new(true).write(true).mode(0o600).open(&file);
    drop(plain.unwrap());
    let error = Run::of_file(&file, KILL_TIMEOUT).output().unwrap_err().to_string();
    assert_eq!(
        error,
        format!("cannot run {}: Permission denied (os error 13)", file.display())
    );
}

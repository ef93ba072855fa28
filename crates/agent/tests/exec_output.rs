//! The output of commands: buffers, followers, offsets, memory.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

mod support;

use futures::future::join_all;
use http_body_util::BodyExt;
use hyper::Method;
use rustix::io::FdFlags;
use scalebox_agent::Agent;
use scalebox_agent_api::exec::{MIN_BUFFER, TOTAL_BUFFER};
use scalebox_agent_api::frame::{Decoder, Frame};
use scalebox_agent_api::{FailureCode, InitKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};
use support::execs::{Ran, exec, script};
use support::{Host, bytes, connect, connect_to, host};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

/// Returns the output of `seq 1 LAST`.
fn numbers(last: u32) -> String {
    (1..=last).map(|number| format!("{number}\n")).collect()
}

#[tokio::test]
async fn a_second_connection_continues_where_the_first_one_broke() {
    let agent = Agent::new(InitKind::System);
    let first = connect(&agent).await;
    let mut request = script("i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo $i; done; sleep 1; echo end >&2");
    request.attached = false;
    first.start(&request).await;
    let (mut frames, mut ran) = (first.output(&request.id, 0, true).await, Ran::default());
    frames.until(&mut ran, "\n100\n").await;
    first.disconnect();
    let second = connect(&agent).await;
    assert!(second.state(&request.id).await.output_end >= ran.offset);
    second.output(&request.id, ran.offset, true).await.rest(&mut ran).await;
    assert_eq!((ran.lost, ran.exit_code()), (0, Some(0)));
    assert_eq!(ran.stdout(), numbers(3000));
    assert_eq!(ran.stderr(), "end\n");
    // Read again from an offset in the middle of a line, by two readers.
    for _ in 0..2 {
        let mut part = Ran {
            offset: 1000,
            ..Ran::default()
        };
        second.output(&request.id, 1000, false).await.rest(&mut part).await;
        assert_eq!(part.stdout(), numbers(3000)[1000..]);
        assert_eq!(part.end, ran.end, "an ended exec");
    }
}

#[tokio::test]
async fn the_oldest_output_is_dropped_and_reported_without_a_follower() {
    let host = host().await;
    let mut request = exec(&["seq", "1", "100000"]);
    (request.attached, request.buffer) = (false, Some(64 << 10));
    host.start(&request).await;
    let state = host.ended(&request.id).await;
    let all = numbers(100_000);
    assert_eq!(state.output_end, all.len() as u64);
    assert!(state.output_end - state.output_start <= 64 << 10);
    let mut ran = Ran::default();
    host.output(&request.id, 0, false).await.rest(&mut ran).await;
    assert_eq!(ran.lost, state.output_start);
    assert!(ran.stdout.len() > 16 << 10, "{}", ran.stdout.len());
    assert_eq!(ran.stdout(), all[ran.lost as usize..]);
    assert_eq!(ran.exit_code(), Some(0));
}

#[tokio::test]
async fn a_slow_follower_loses_nothing() {
    let host = host().await;
    let mut request = exec(&["seq", "1", "1200000"]);
    request.buffer = Some(64 << 10);
    host.start(&request).await;
    // The follower begins when the command has filled most of the buffer, which it then waits for.
    while host.state(&request.id).await.output_end < 32 << 10 {}
    let (mut frames, mut ran) = (host.output(&request.id, 0, true).await, Ran::default());
    while let Some(frame) = frames.next().await {
        ran.add(frame);
        // A request after each frame makes the follower slower than the command.
        host.state(&request.id).await;
    }
    assert_eq!((ran.lost, ran.exit_code()), (0, Some(0)));
    assert!(ran.stdout() == numbers(1_200_000));
}

#[tokio::test]
async fn several_followers_receive_the_same_output() {
    let host = host().await;
    let mut request = exec(&["seq", "1", "200000"]);
    request.buffer = Some(64 << 10);
    host.start(&request).await;
    let runs = join_all((0..3).map(|_| host.finish(&request.id))).await;
    // Later readers may miss output that the first one read before they connected.
    assert_eq!(runs[0].lost, 0);
    let all = numbers(200_000);
    assert!(runs.iter().all(|ran| ran.stdout() == all[ran.lost as usize..]));
}

#[tokio::test]
async fn output_is_read_without_following_while_the_command_runs() {
    let host = host().await;
    let mut request = script("echo first; read -r line; sleep 1000");
    request.stdin = true;
    host.start(&request).await;
    let started = Instant::now();
    let mut ran = Ran::default();
    while ran.offset == 0 {
        assert!(started.elapsed() < Duration::from_secs(30));
        host.output(&request.id, 0, false).await.rest(&mut ran).await;
    }
    assert_eq!((ran.stdout().as_str(), ran.end), ("first\n", None));
    let path = format!("/v1/execs/{}/output?since=7", request.id);
    let response = host.send(Method::GET, &path, bytes(Vec::new())).await;
    assert_eq!(
        response.status().as_u16(),
        FailureCode::Invalid.status(),
        "after the end"
    );
    host.ask(&request.id, "signal", br#"{"signal":9}"#.to_vec())
        .await
        .unwrap();
}

/// Starts the agent in its own process, so that a test can measure its memory. A socket pair serves
/// as its port. Needs root, because the agent calls chroot(2).
async fn start_agent() -> (Child, Host) {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_scalebox-agent"))
        .args(["serve", "--init=system", &format!("--port={}", theirs.as_raw_fd())])
        .current_dir("/")
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    drop(theirs);
    let stream = UnixStream::from_std(ours).unwrap();
    (child, connect_to(stream).await)
}

/// Returns the memory of a process without its files, in bytes.
fn memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Reads a stream of frames without keeping it. Returns the last frame, and the agent's largest
/// memory.
async fn discard(host: &Host, id: &str, agent: u32) -> (Frame, u64) {
    let path = format!("/v1/execs/{id}/output?follow=true");
    let mut body = host.send(Method::GET, &path, bytes(Vec::new())).await.into_body();
    let (mut decoder, mut last, mut most) = (Decoder::default(), None, 0);
    while let Some(piece) = body.frame().await {
        let mut frames = Vec::new();
        decoder.push(&piece.unwrap().into_data().unwrap(), &mut frames).unwrap();
        assert!(!frames.iter().any(|frame| matches!(frame, Frame::Lost { .. })));
        last = frames.pop().or(last);
        most = most.max(memory(agent));
    }
    (last.unwrap(), most)
}

#[tokio::test]
async fn a_hundred_outputs_of_a_mebibyte_take_little_memory() {
    let (agent, host) = start_agent().await;
    let pid = agent.id().unwrap();
    host.run(&exec(&["true"])).await;
    let before = memory(pid);
    let runs = (0..100).map(|_| {
        let host = host.clone();
        async move {
            let request = exec(&["head", "-c", "1048576", "/dev/zero"]);
            host.start(&request).await;
            let (last, most) = discard(&host, &request.id, pid).await;
            assert!(matches!(last, Frame::End { offset: 1_048_576, .. }), "{last:?}");
            most
        }
    });
    let most = join_all(runs).await.into_iter().max().unwrap();
    println!("{} KiB, before {} KiB", most >> 10, before >> 10);
    // The rest of 8 MiB is for the program itself.
    assert!(most < 7 << 20, "{most}");
}

#[tokio::test]
async fn full_buffers_are_cut_for_new_ones() {
    let host = host().await;
    let mut ids = Vec::new();
    for _ in 0..12 {
        let mut request = exec(&["head", "-c", "1048576", "/dev/zero"]);
        (request.attached, request.buffer) = (false, Some(1 << 20));
        host.start(&request).await;
        ids.push(request.id);
    }
    let mut kept = 0;
    for id in &ids {
        let state = host.ended(id).await;
        assert_eq!(state.output_end, 1 << 20);
    }
    for id in &ids {
        let state = host.state(id).await;
        let length = state.output_end - state.output_start;
        assert!(length > MIN_BUFFER, "{length}");
        kept += length;
    }
    assert!(kept <= TOTAL_BUFFER && kept > TOTAL_BUFFER / 2, "{kept}");
}

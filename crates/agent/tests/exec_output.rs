//! The output of commands: buffers, followers, offsets, memory.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that fails panics")]

mod support;

use futures::future::join_all;
use hyper::Method;
use scalebox_agent::Agent;
use scalebox_agent_api::exec::{MIN_BUFFER, TOTAL_BUFFER};
use scalebox_agent_api::frame::Frame;
use scalebox_agent_api::{FailureCode, InitKind};
use std::time::{Duration, Instant};
use support::execs::{Ran, exec, script};
use support::{bytes, connect, host};

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
    // Once more from an offset in the middle of a line, by two readers.
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
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (mut frames, mut ran) = (host.output(&request.id, 0, true).await, Ran::default());
    while let Some(frame) = frames.next().await {
        ran.add(frame);
        if ran.offset % 50 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
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
    // The later ones may miss what the first one had read before they came.
    assert_eq!(runs[0].lost, 0);
    let all = numbers(200_000);
    assert!(runs.iter().all(|ran| ran.stdout() == all[ran.lost as usize..]));
}

#[tokio::test]
async fn output_is_read_without_following_while_the_command_runs() {
    let host = host().await;
    let request = script("echo first; read -r line; sleep 1000");
    let mut request = request;
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
    assert_eq!(response.status().as_u16(), FailureCode::Invalid.status(), "after the end");
    host.ask(&request.id, "signal", br#"{"signal":9}"#.to_vec()).await.unwrap();
}

/// Returns the memory of this process, in bytes.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[tokio::test]
async fn a_hundred_outputs_of_a_mebibyte_take_little_memory() {
    let host = host().await;
    host.run(&exec(&["true"])).await;
    let before = memory();
    let runs = (0..100).map(|_| {
        let host = host.clone();
        async move {
            let request = exec(&["head", "-c", "1048576", "/dev/zero"]);
            host.start(&request).await;
            let (mut frames, mut length, mut most) = (host.output(&request.id, 0, true).await, 0, 0);
            while let Some(frame) = frames.next().await {
                most = most.max(memory());
                match frame {
                    Frame::Stdout { offset, bytes } => {
                        assert_eq!(offset, length);
                        length += bytes.len() as u64;
                    }
                    Frame::End { offset, .. } => assert_eq!(offset, length),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(length, 1 << 20);
            most
        }
    });
    let most = join_all(runs).await.into_iter().max().unwrap();
    let grown = most.saturating_sub(before);
    println!("grew by {} KiB from {} KiB", grown >> 10, before >> 10);
    // Both sides: the agent's buffers, and the host's window for the connection, 1 MiB.
    assert!(grown < TOTAL_BUFFER + (4 << 20), "{grown}");
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

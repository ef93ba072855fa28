//! The guest as a whole. Freeze, thaw, trim and growth are tested beside their code, on file
//! systems of their own: here they would freeze the machine that runs the tests.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

mod support;

use hyper::Method;
use scalebox_agent_api::{Clock, FailureCode, Info, InitKind, Stats};
use std::fs;
use support::{bytes, failure, host, nothing};

#[tokio::test]
async fn the_agent_describes_itself_and_its_guest() {
    let host = host().await;
    let info: Info = host.get("/v1/info").await;
    assert_eq!(info.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(info.init, InitKind::System);
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(info.boot_id, boot_id.trim());
}

#[tokio::test]
async fn statistics_are_those_of_the_kernel() {
    let host = host().await;
    let stats: Stats = host.get("/v1/stats").await;
    assert!(stats.uptime_seconds > 1.0 && stats.cpu_busy_ms > 0, "{stats:?}");
    assert!(
        stats.memory_available > 0 && stats.memory_available <= stats.memory_total,
        "{stats:?}"
    );
    assert!(
        stats.agent_memory > 1 << 20 && stats.agent_memory < stats.memory_total,
        "{stats:?}"
    );
    assert!(stats.root_used > 0 && stats.root_used < stats.root_total, "{stats:?}");
    assert!(
        stats.processes > 1 && stats.load.iter().all(|load| *load >= 0.0),
        "{stats:?}"
    );
    let later: Stats = host.get("/v1/stats").await;
    assert!(later.uptime_seconds >= stats.uptime_seconds && later.cpu_busy_ms >= stats.cpu_busy_ms);
}

#[tokio::test]
async fn times_that_the_kernel_does_not_have_are_refused() {
    let host = host().await;
    let (_, body) = host.json(Method::POST, "/v1/clock", &Clock { unix_ns: u64::MAX }).await;
    assert_eq!(failure(&body).code, FailureCode::Invalid);
    for url in ["/v1/clock", "/v1/shutdown"] {
        let error = host.fail(Method::POST, url, bytes(b"{}".to_vec())).await;
        assert_eq!(error.code, FailureCode::Invalid, "{url}");
    }
}

#[tokio::test]
async fn buffers_are_flushed() {
    let host = host().await;
    assert!(host.succeed(Method::POST, "/v1/sync", nothing()).await.is_empty());
}

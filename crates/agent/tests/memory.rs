//! The agent's memory while large files pass through it. Host and agent share this process.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

mod support;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::Method;
use std::fs;
use support::{host, nothing, pieces, query};

const SIZE: u64 = 256 << 20;
const PIECE: usize = 64 << 10;
const MAX_GROWTH: u64 = 8 << 20;

/// Returns the maximum memory (RSS) of this process since [`reset_max`], in bytes.
fn max_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Sets the maximum to the memory in use (proc(5), `clear_refs`).
fn reset_max() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

#[tokio::test]
async fn large_streams_need_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let host = host().await;
    let target = query(&folder.path().join("file"));
    let (file, tar) = (
        format!("/v1/files?path={target}"),
        format!("/v1/files/tar?path={target}"),
    );
    let unpacked = format!("/v1/files/tar?path={}", query(folder.path()));
    // The first request loads the code and buffers that all requests need.
    host.succeed(Method::PUT, &file, nothing()).await;
    reset_max();
    let before = max_memory();

    let piece = Bytes::from(vec![b'x'; PIECE]);
    let body = std::iter::repeat_n(piece, (SIZE / PIECE as u64) as usize).map(Ok);
    host.succeed(Method::PUT, &file, pieces(body)).await;
    for (url, more) in [(&file, 0), (&tar, 1024)] {
        let mut body = host.send(Method::GET, url, nothing()).await.into_body();
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            length += frame.unwrap().into_data().unwrap().len() as u64;
        }
        assert!(length >= SIZE + more, "{length}");
    }
    fs::remove_file(folder.path().join("file")).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_path("unpacked").unwrap();
    header.set_size(SIZE);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    let header = Bytes::copy_from_slice(header.as_bytes());
    let zeros = std::iter::repeat_n(Bytes::from(vec![0; PIECE]), (SIZE / PIECE as u64) as usize + 1);
    let body = std::iter::once(header).chain(zeros).map(Ok);
    host.succeed(Method::PUT, &unpacked, pieces(body)).await;
    assert_eq!(fs::metadata(folder.path().join("unpacked")).unwrap().len(), SIZE);

    let growth = max_memory() - before;
    println!("memory grew by {} KiB", growth >> 10);
    assert!(growth < MAX_GROWTH, "memory grew by {growth} bytes");
}

//! Files and directories of the guest. The tests run as root.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

mod support;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use rustix::fs::{CWD, FileType, Mode, OFlags, mkdirat, mknodat, openat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use scalebox_agent_api::files::MAX_ENTRIES;
use scalebox_agent_api::{FailureCode, FileInfo, FileKind, Listing, headers};
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use support::{Host, broken, bytes, host, nothing, query};
use tempfile::{TempDir, tempdir};

const PUT: Method = Method::PUT;
const GET: Method = Method::GET;
const POST: Method = Method::POST;
const DELETE: Method = Method::DELETE;

fn file(path: &Path) -> String {
    format!("/v1/files?path={}", query(path))
}

fn of(kind: &str, path: &Path) -> String {
    format!("/v1/files/{kind}?path={}", query(path))
}

fn parsed(body: &Bytes) -> FileInfo {
    serde_json::from_slice(body).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Waits until a folder has these entries: the agent cleans up after it noticed a broken stream.
async fn wait_for_names(folder: &Path, expected: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while names(folder) != expected {
        assert!(Instant::now() < deadline, "{:?}", names(folder));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn start() -> (Host, TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    (host().await, folder, path)
}

#[tokio::test]
async fn files_are_written_and_read_with_mode_and_owner() {
    let (host, _folder, path) = start().await;
    let target = path.join("new/deep er/f%");
    let content: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let put = format!("{}&mode=4750&user=12:34&parents=true", file(&target));
    let info = parsed(&host.succeed(PUT, &put, bytes(content.clone())).await);
    assert_eq!((info.kind, info.size, info.mode), (FileKind::File, 300_000, 0o4750));
    assert_eq!((info.uid, info.gid), (12, 34));
    assert_eq!(fs::metadata(target.parent().unwrap()).unwrap().uid(), 12);
    let response = host.send(GET, &file(&target), nothing()).await;
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header(headers::MODE), "4750");
    assert_eq!(
        (header(headers::UID), header(headers::GID)),
        ("12".to_owned(), "34".to_owned())
    );
    assert_eq!(header(headers::SIZE), "300000");
    assert_eq!(header(headers::MODIFIED_MS), info.modified_ms.to_string());
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), content);
    assert_eq!(names(target.parent().unwrap()), ["f%"], "no temporary file is left");
}

#[tokio::test]
async fn files_that_exist_keep_mode_and_owner() {
    let (host, _folder, path) = start().await;
    let target = path.join("file");
    fs::write(&target, "old").unwrap();
    fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&target, Some(5), Some(6)).unwrap();
    let info = parsed(&host.succeed(PUT, &file(&target), bytes(b"new".to_vec())).await);
    assert_eq!((info.mode, info.uid, info.gid), (0o640, 5, 6));
    let other = path.join("other");
    let info = parsed(&host.succeed(PUT, &file(&other), nothing()).await);
    assert_eq!((info.mode, info.uid, info.size), (0o644, 0, 0));
}

#[tokio::test]
async fn links_are_followed_to_the_file_that_is_replaced() {
    let (host, _folder, path) = start().await;
    fs::write(path.join("file"), "old").unwrap();
    symlink("file", path.join("link")).unwrap();
    symlink("absent", path.join("dangling")).unwrap();
    symlink("loop", path.join("loop")).unwrap();
    host.succeed(PUT, &file(&path.join("link")), bytes(b"new".to_vec()))
        .await;
    host.succeed(PUT, &file(&path.join("dangling")), bytes(b"made".to_vec()))
        .await;
    assert_eq!(fs::read(path.join("file")).unwrap(), b"new");
    assert_eq!(fs::read(path.join("absent")).unwrap(), b"made");
    assert!(path.join("link").is_symlink() && path.join("dangling").is_symlink());
    let error = host.fail(PUT, &file(&path.join("loop")), nothing()).await;
    assert_eq!(error.code, FailureCode::WrongKind);
    let info = parsed(&host.succeed(GET, &of("info", &path.join("link")), nothing()).await);
    assert_eq!((info.kind, info.target.as_deref()), (FileKind::Symlink, Some("file")));
}

#[tokio::test]
async fn uploads_that_end_early_leave_nothing() {
    let (host, _folder, path) = start().await;
    fs::write(path.join("kept"), "old").unwrap();
    for name in ["kept", "new"] {
        let folder = path.clone();
        // The temporary file exists.
        let body = broken(vec![b'x'; 100_000], move || names(&folder).len() == 2);
        host.send_broken(PUT, &file(&path.join(name)), body).await;
        wait_for_names(&path, &["kept"]).await;
    }
    assert_eq!(fs::read(path.join("kept")).unwrap(), b"old");
}

#[tokio::test]
async fn malformed_requests_are_refused() {
    let (host, _folder, path) = start().await;
    let long = "a".repeat(5000);
    for bad in [
        "",
        "?path=etc",
        "?path=",
        "?path=%2Fa%2F..%2Fb",
        "?path=%2Fa%00b",
        &format!("?path=%2F{long}"),
    ] {
        for method in [GET, PUT, DELETE] {
            let error = host.fail(method, &format!("/v1/files{bad}"), nothing()).await;
            assert_eq!(error.code, FailureCode::Invalid, "{bad}");
        }
    }
    let target = file(&path.join("file"));
    for bad in [
        "mode=9",
        "mode=77777",
        "mode=",
        "mode=-1",
        "user=",
        "user=a:",
        "parents=yes",
    ] {
        let error = host.fail(PUT, &format!("{target}&{bad}"), nothing()).await;
        assert_eq!(error.code, FailureCode::Invalid, "{bad}");
    }
    let error = host.fail(PUT, &format!("{target}&user=nobody-here"), nothing()).await;
    assert_eq!(error.code, FailureCode::NotFound);
    let error = host.fail(PUT, &file(&path.join("absent/file")), nothing()).await;
    assert_eq!(error.code, FailureCode::NotFound);
    for directory in [path.clone(), path.join("absent/"), PathBuf::from("/")] {
        let error = host.fail(PUT, &file(&directory), nothing()).await;
        assert_eq!(error.code, FailureCode::WrongKind, "{directory:?}");
    }
    assert!(names(&path).is_empty());
}

#[tokio::test]
async fn special_files_are_refused_without_waiting() {
    let (host, _folder, path) = start().await;
    let fifo = path.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let _listener = UnixListener::bind(path.join("socket")).unwrap();
    for special in [
        fifo,
        path.join("socket"),
        "/dev/null".into(),
        "/dev/tty".into(),
        path.clone(),
    ] {
        for (method, url) in [(GET, file(&special)), (PUT, file(&special))] {
            let error = tokio::time::timeout(Duration::from_secs(30), host.fail(method, &url, nothing()));
            assert_eq!(error.await.unwrap().code, FailureCode::WrongKind, "{special:?}");
        }
    }
    let info = parsed(&host.succeed(GET, &of("info", Path::new("/dev/null")), nothing()).await);
    assert_eq!(info.kind, FileKind::Other);
}

#[tokio::test]
async fn generated_files_are_read_up_to_a_limit() {
    let (host, _folder, _path) = start().await;
    let response = host.send(GET, &file(Path::new("/proc/version")), nothing()).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(!response.headers().contains_key(headers::SIZE));
    let content = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(content, fs::read("/proc/version").unwrap());
    if Path::new("/proc/kcore").exists() {
        let error = host.fail(GET, &file(Path::new("/proc/kcore")), nothing()).await;
        assert!(
            matches!(error.code, FailureCode::WrongKind | FailureCode::Denied),
            "{error:?}"
        );
    }
    let error = host.fail(GET, &of("tar", Path::new("/proc/self")), nothing()).await;
    assert_eq!(error.code, FailureCode::WrongKind);
}

#[tokio::test]
async fn files_that_change_while_they_are_read_end_at_their_size_or_with_an_error() {
    const SIZE: u64 = 8 << 20;
    let (host, _folder, path) = start().await;
    for (change, expected) in [(SIZE + 4096, Some(SIZE)), (1 << 20, None)] {
        let target = path.join("file");
        let opened = fs::File::create(&target).unwrap();
        opened.set_len(SIZE).unwrap();
        let mut body = host.send(GET, &file(&target), nothing()).await.into_body();
        let mut length = body.frame().await.unwrap().unwrap().into_data().unwrap().len() as u64;
        opened.set_len(change).unwrap();
        let mut ended = Some(());
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => length += frame.into_data().unwrap().len() as u64,
                Err(_) => {
                    ended = None;
                    break;
                }
            }
        }
        assert_eq!(ended.map(|()| length), expected);
    }
}

#[tokio::test]
async fn listings_are_sorted_and_names_are_any_bytes() {
    let (host, _folder, path) = start().await;
    let odd = OsStr::from_bytes(b"f\xfcr 100%");
    host.succeed(PUT, &file(&path.join(odd)), bytes(b"odd".to_vec())).await;
    symlink(odd, path.join("b")).unwrap();
    fs::create_dir(path.join("a")).unwrap();
    let listing: Listing = host.get(&of("list", &path)).await;
    let found: Vec<_> = listing
        .entries
        .iter()
        .map(|entry| (entry.name.as_str(), entry.kind))
        .collect();
    let expected = [
        ("a", FileKind::Directory),
        ("b", FileKind::Symlink),
        ("f%FCr 100%25", FileKind::File),
    ];
    assert_eq!(found, expected);
    assert_eq!(listing.entries[1].target.as_deref(), Some("f%FCr 100%25"));
    assert!(!listing.truncated);
    // The name is an encoded path, too.
    let again = format!("{}%2F{}", file(&path), listing.entries[2].name.replace(' ', "%20"));
    assert_eq!(host.succeed(GET, &again, nothing()).await, "odd");
    let empty: Listing = host.get(&of("list", &path.join("a"))).await;
    assert!(empty.entries.is_empty() && !empty.truncated);
    let error = host.fail(GET, &of("list", &path.join(odd)), nothing()).await;
    assert_eq!(error.code, FailureCode::WrongKind);
}

#[tokio::test]
async fn listings_have_a_limit() {
    let (host, _folder, path) = start().await;
    for n in 0..=MAX_ENTRIES {
        fs::write(path.join(format!("{n:06}")), "").unwrap();
    }
    let listing: Listing = host.get(&of("list", &path)).await;
    assert_eq!((listing.entries.len(), listing.truncated), (MAX_ENTRIES, true));
    assert_eq!(listing.entries[MAX_ENTRIES - 1].name, format!("{:06}", MAX_ENTRIES - 1));
}

#[tokio::test]
async fn deletions_do_not_follow_links() {
    let (host, _folder, path) = start().await;
    fs::create_dir_all(path.join("tree/sub")).unwrap();
    fs::create_dir(path.join("outside")).unwrap();
    fs::write(path.join("outside/file"), "kept").unwrap();
    symlink(path.join("outside"), path.join("tree/sub/link")).unwrap();
    let error = host.fail(DELETE, &file(&path.join("tree")), nothing()).await;
    assert_eq!(error.code, FailureCode::Exists);
    for name in ["tree", "outside/file"] {
        let url = format!("{}&recursive=true", file(&path.join(name)));
        let (status, _) = host.call(DELETE, &url, nothing()).await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        assert_eq!(
            names(&path.join("outside")),
            if name == "tree" { vec!["file"] } else { vec![] }
        );
    }
    let error = host.fail(DELETE, &file(&path.join("tree")), nothing()).await;
    assert_eq!(error.code, FailureCode::NotFound);
    for root in ["/", "//", "/."] {
        let url = format!("{}&recursive=true", file(Path::new(root)));
        assert_eq!(host.fail(DELETE, &url, nothing()).await.code, FailureCode::Invalid);
    }
}

#[tokio::test]
async fn trees_of_any_depth_are_deleted() {
    let (host, _folder, path) = start().await;
    fs::create_dir(path.join("deep")).unwrap();
    let open = |folder: &dyn std::os::fd::AsFd, name: &str| {
        openat(folder.as_fd(), name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
    };
    let mut here = open(&CWD, path.join("deep").to_str().unwrap());
    for _ in 0..3000 {
        mkdirat(&here, "d", Mode::RWXU).unwrap();
        mkdirat(&here, "e", Mode::RWXU).unwrap();
        here = open(&here, "d");
    }
    let url = format!("{}&recursive=true", file(&path.join("deep")));
    host.succeed(DELETE, &url, nothing()).await;
    assert!(names(&path).is_empty());
}

#[tokio::test]
async fn directories_are_made_and_files_renamed() {
    let (host, _folder, path) = start().await;
    let made = format!("{}&mode=1777&user=7", of("mkdir", &path.join("a")));
    let info = parsed(&host.succeed(POST, &made, nothing()).await);
    assert_eq!((info.kind, info.mode, info.uid), (FileKind::Directory, 0o1777, 7));
    assert_eq!(host.fail(POST, &made, nothing()).await.code, FailureCode::Exists);
    let info = parsed(&host.succeed(POST, &format!("{made}&parents=true"), nothing()).await);
    assert_eq!(info.mode, 0o1777);
    let deep = of("mkdir", &path.join("x/y/z"));
    assert_eq!(host.fail(POST, &deep, nothing()).await.code, FailureCode::NotFound);
    host.succeed(POST, &format!("{deep}&parents=true&mode=700"), nothing())
        .await;
    assert_eq!(fs::metadata(path.join("x/y/z")).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(fs::metadata(path.join("x/y")).unwrap().mode() & 0o7777, 0o755);
    fs::write(path.join("file"), "content").unwrap();
    let below_file = format!("{}&parents=true", of("mkdir", &path.join("file/b")));
    assert_eq!(
        host.fail(POST, &below_file, nothing()).await.code,
        FailureCode::WrongKind
    );
    let rename = |from: &str, to: &str| format!("{}&to={}", of("rename", &path.join(from)), query(&path.join(to)));
    let info = parsed(&host.succeed(POST, &rename("file", "x/moved"), nothing()).await);
    assert_eq!(info.size, 7);
    assert_eq!(
        host.fail(POST, &rename("file", "b"), nothing()).await.code,
        FailureCode::NotFound
    );
    assert_eq!(
        host.fail(POST, &rename("x", "x/y/inside"), nothing()).await.code,
        FailureCode::Invalid
    );
    assert_eq!(
        host.fail(POST, &rename("a", "x"), nothing()).await.code,
        FailureCode::Exists
    );
}

/// Mounts a small tmpfs that only this thread and its threads see.
fn mount_small(path: &Path) {
    // SAFETY: threads stop sharing only the mount table and the working directory, and nothing here
    // relies on sharing them.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("tmpfs", path, "tmpfs", MountFlags::empty(), c"size=256k").unwrap();
}

#[tokio::test]
async fn full_file_systems_are_reported_and_nothing_is_left() {
    let folder = tempdir().unwrap();
    let path = folder.path().to_owned();
    mount_small(&path);
    let host = host().await;
    let error = host
        .fail(PUT, &file(&path.join("large")), bytes(vec![1; 1 << 20]))
        .await;
    assert_eq!(error.code, FailureCode::NoSpace, "{}", error.error);
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1 << 20);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    archive
        .append_data(&mut header, "large", &vec![1; 1 << 20][..])
        .unwrap();
    let error = host
        .fail(PUT, &of("tar", &path), bytes(archive.into_inner().unwrap()))
        .await;
    assert_eq!(error.code, FailureCode::NoSpace, "{}", error.error);
    assert!(error.error.contains("large"), "{}", error.error);
    assert!(names(&path).is_empty());
    host.succeed(PUT, &file(&path.join("small")), bytes(vec![1; 1000]))
        .await;
}

#[tokio::test]
async fn mounts_below_a_directory_are_not_deleted() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("mounted");
    fs::create_dir(&path).unwrap();
    mount_small(&path);
    fs::write(path.join("kept"), "content").unwrap();
    let host = host().await;
    let url = format!("{}&recursive=true", file(folder.path()));
    assert_eq!(host.fail(DELETE, &url, nothing()).await.code, FailureCode::Busy);
    assert_eq!(names(&path), ["kept"]);
}

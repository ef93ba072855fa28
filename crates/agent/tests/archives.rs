//! Archives: packed from the guest and unpacked in it. The tests run as root.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

mod support;

use http_body_util::BodyExt;
use hyper::Method;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use scalebox_agent_api::{FailureCode, Listing};
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};
use support::{Host, broken, bytes, host, nothing, query};
use tar::{Builder, EntryType, Header};
use tempfile::{TempDir, tempdir};

fn tar_of(path: &Path) -> String {
    format!("/v1/files/tar?path={}", query(path))
}

fn list_of(path: &Path) -> String {
    format!("/v1/files/list?path={}", query(path))
}

async fn start() -> (Host, TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    (host().await, folder, path)
}

fn run(arguments: &[&str]) {
    let output = Command::new("tar").args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Fills a folder with everything that an archive keeps.
fn fill(folder: &Path) {
    fs::create_dir_all(folder.join("sub/empty")).unwrap();
    fs::write(folder.join("sub/file"), vec![b'x'; 200_000]).unwrap();
    fs::write(folder.join("setuid"), "content").unwrap();
    lchown(folder.join("setuid"), Some(70_000), Some(3_000_000)).unwrap();
    fs::set_permissions(folder.join("setuid"), Permissions::from_mode(0o4711)).unwrap();
    fs::hard_link(folder.join("sub/file"), folder.join("zz-same")).unwrap();
    symlink("../a//b/./c", folder.join("sub/link")).unwrap();
    symlink("t".repeat(300), folder.join("long-link")).unwrap();
    let long = folder.join("d".repeat(120));
    fs::create_dir(&long).unwrap();
    fs::write(long.join("n".repeat(200)), "long").unwrap();
    // Not UTF-8 from the first byte on, and too long for the header.
    let odd = folder.join(OsStr::from_bytes(&[0xff; 150]));
    fs::write(odd, "odd").unwrap();
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::File::open(folder.join("sub/file"))
        .unwrap()
        .set_modified(then)
        .unwrap();
    fs::set_permissions(folder.join("sub"), Permissions::from_mode(0o500)).unwrap();
    fs::File::open(folder.join("sub")).unwrap().set_modified(then).unwrap();
}

/// Describes all files below a folder.
fn describe(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut pending = vec![folder.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            let stat = fs::symlink_metadata(&path).unwrap();
            let content = match stat.file_type() {
                kind if kind.is_dir() => {
                    pending.push(path.clone());
                    String::new()
                }
                kind if kind.is_symlink() => format!("{:?}", fs::read_link(&path).unwrap()),
                _ => format!("{} bytes, {} names", fs::read(&path).unwrap().len(), stat.nlink()),
            };
            let inside = path.strip_prefix(folder).unwrap();
            let (mode, uid, gid, time) = (stat.mode(), stat.uid(), stat.gid(), stat.mtime());
            found.push(format!("{inside:?} {mode:o} {uid}:{gid} {time} {content}"));
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn trees_are_the_same_after_packing_and_unpacking() {
    let (host, _folder, path) = start().await;
    let [source, by_tar, by_agent, archive] = ["source", "by-tar", "by-agent", "archive"].map(|name| path.join(name));
    for folder in [&source, &by_tar, &by_agent] {
        fs::create_dir(folder).unwrap();
    }
    fill(&source);
    let expected = describe(&source);
    mknodat(CWD, source.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let packed = host.succeed(Method::GET, &tar_of(&source), nothing()).await;
    fs::write(&archive, &packed).unwrap();
    let [archive, source_text, by_tar_text] = [&archive, &source, &by_tar].map(|path| path.to_str().unwrap());
    run(&["-xpf", archive, "--numeric-owner", "-C", by_tar_text]);
    assert_eq!(describe(&by_tar), expected, "GNU tar reads what the agent packs");
    fs::remove_file(source.join("fifo")).unwrap();
    for format in ["gnu", "posix"] {
        let format = format!("--format={format}");
        run(&["-cf", archive, "--numeric-owner", &format, "-C", source_text, "."]);
        let made_by_tar = fs::read(archive).unwrap();
        for body in [packed.to_vec(), made_by_tar] {
            host.succeed(Method::PUT, &tar_of(&by_agent), bytes(body)).await;
            assert_eq!(describe(&by_agent), expected, "{format}");
        }
    }
    assert_eq!(
        fs::metadata(&by_agent).unwrap().mode() & 0o7777,
        0o755,
        "the folder itself"
    );
}

#[tokio::test]
async fn one_file_is_packed_by_its_name() {
    let (host, _folder, path) = start().await;
    fs::write(path.join("file"), "content").unwrap();
    let packed = host.succeed(Method::GET, &tar_of(&path.join("file")), nothing()).await;
    let mut archive = tar::Archive::new(&packed[..]);
    let names: Vec<_> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().into_owned())
        .collect();
    assert_eq!(names, [Path::new("file")]);
    let absent = host.fail(Method::GET, &tar_of(&path.join("absent")), nothing()).await;
    assert_eq!(absent.code, FailureCode::NotFound);
    let device = host.fail(Method::GET, &tar_of(Path::new("/dev/null")), nothing()).await;
    assert_eq!(device.code, FailureCode::WrongKind);
}

#[tokio::test]
async fn files_that_become_shorter_are_padded() {
    const SIZE: u64 = 8 << 20;
    let (host, _folder, path) = start().await;
    let target = path.join("file");
    fs::write(&target, vec![b'x'; SIZE as usize]).unwrap();
    let mut body = host.send(Method::GET, &tar_of(&path), nothing()).await.into_body();
    let mut packed = body.frame().await.unwrap().unwrap().into_data().unwrap().to_vec();
    fs::File::options()
        .write(true)
        .open(&target)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    packed.extend(body.collect().await.unwrap().to_bytes());
    let mut archive = tar::Archive::new(&packed[..]);
    let mut sizes = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        sizes.push(io::copy(&mut entry, &mut io::sink()).unwrap());
    }
    assert_eq!(sizes, [0, SIZE]);
}

/// Returns an archive with one entry, whose path and target are not checked.
fn hostile(kind: EntryType, path: &[u8], target: &[u8]) -> Vec<u8> {
    let mut archive = Builder::new(Vec::new());
    append(&mut archive, kind, path, target);
    archive.into_inner().unwrap()
}

fn append(archive: &mut Builder<Vec<u8>>, kind: EntryType, path: &[u8], target: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.as_old_mut().linkname[..target.len()].copy_from_slice(target);
    let content: &[u8] = if kind.is_file() { b"pwned" } else { b"" };
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    archive.append(&header, content).unwrap();
}

#[tokio::test]
async fn hostile_entries_are_refused_by_name_and_nothing_leaves_the_folder() {
    let (host, _folder, path) = start().await;
    let (root, outside) = (path.join("root"), path.join("outside"));
    fs::create_dir(&root).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    symlink(&outside, root.join("link")).unwrap();
    fs::write(root.join("plain"), "plain").unwrap();
    let absolute = outside.join("made");
    let absolute = absolute.as_os_str().as_bytes();
    let cases: [(EntryType, &[u8], &[u8]); 16] = [
        (EntryType::Regular, b"../outside/made", b""),
        (EntryType::Regular, b"a/../../outside/made", b""),
        (EntryType::Regular, absolute, b""),
        (EntryType::Regular, b"link/made", b""),
        (EntryType::Directory, b"link/made/", b""),
        (EntryType::Symlink, b"link/made", b"/etc"),
        (EntryType::Link, b"made", b"../outside/secret"),
        (EntryType::Link, b"made", b"link/secret"),
        (EntryType::Link, b"made", b"/etc/passwd"),
        (EntryType::Link, b"made", b"absent"),
        (EntryType::Symlink, b"made", b""),
        (EntryType::Regular, b"plain/made", b""),
        (EntryType::Char, b"device", b""),
        (EntryType::Block, b"device", b""),
        (EntryType::Fifo, b"fifo", b""),
        (EntryType::new(b'V'), b"label", b""),
    ];
    for (kind, name, target) in cases {
        let url = tar_of(&root);
        let error = host.fail(Method::PUT, &url, bytes(hostile(kind, name, target))).await;
        assert_eq!(error.code, FailureCode::Invalid, "{error:?}");
        let name = String::from_utf8_lossy(name).into_owned();
        assert!(error.error.contains(&name), "{name}: {}", error.error);
    }
    // A link that the archive itself contains.
    let mut archive = Builder::new(Vec::new());
    append(&mut archive, EntryType::Symlink, b"a", outside.as_os_str().as_bytes());
    append(&mut archive, EntryType::Regular, b"a/made", b"");
    let error = host
        .fail(Method::PUT, &tar_of(&root), bytes(archive.into_inner().unwrap()))
        .await;
    assert_eq!(error.code, FailureCode::Invalid);
    assert!(error.error.contains("a/made"), "{}", error.error);
    let directory = host
        .fail(
            Method::PUT,
            &tar_of(&root),
            bytes(hostile(EntryType::Directory, b"link", b"")),
        )
        .await;
    assert_eq!(directory.code, FailureCode::WrongKind);
    let mut left: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["a", "link", "plain"]);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
}

#[tokio::test]
async fn malformed_archives_are_refused_and_leave_no_partial_file() {
    let (host, _folder, path) = start().await;
    let mut large = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(1 << 20);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    large.append_data(&mut header, "file", &vec![1; 1 << 20][..]).unwrap();
    let mut cut = large.into_inner().unwrap();
    cut.truncate(300_000);
    let mut long_name = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(4 << 20);
    header.set_cksum();
    long_name.append(&header, &vec![b'a'; 4 << 20][..]).unwrap();
    let long_name = long_name.into_inner().unwrap();
    for body in [vec![b'x'; 5000], cut, long_name] {
        let error = host.fail(Method::PUT, &tar_of(&path), bytes(body)).await;
        assert_eq!(error.code, FailureCode::Invalid, "{}", error.error);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }
    let error = host.fail(Method::PUT, &tar_of(&path.join("absent")), nothing()).await;
    assert_eq!(error.code, FailureCode::NotFound);
}

#[tokio::test]
async fn uploads_of_archives_that_break_off_leave_no_partial_file() {
    let (host, _folder, path) = start().await;
    let mut archive = hostile(EntryType::Regular, b"first", b"");
    archive.truncate(1024);
    let mut second = Header::new_gnu();
    second.set_path("second").unwrap();
    second.set_size(1 << 20);
    second.set_mode(0o644);
    second.set_uid(0);
    second.set_gid(0);
    second.set_mtime(0);
    second.set_cksum();
    archive.extend_from_slice(second.as_bytes());
    archive.extend(vec![b'x'; 100_000]);
    let folder = path.clone();
    let body = broken(archive, move || {
        folder.join("first").exists() && describe(&folder).len() == 2
    });
    host.send_broken(Method::PUT, &tar_of(&path), body).await;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(30) {
        // Each response gives the agent the time to remove the unfinished file.
        let listed: Listing = host.get(&list_of(&path)).await;
        if listed.entries.iter().map(|entry| entry.name.as_str()).eq(["first"]) {
            return;
        }
    }
    panic!("{:?}", describe(&path));
}

#[tokio::test]
async fn archives_can_be_unpacked_for_a_user() {
    let (host, _folder, path) = start().await;
    let mut archive = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o6755);
    header.set_uid(0);
    header.set_gid(0);
    archive.append_data(&mut header, "made/program", &b"true"[..]).unwrap();
    let url = format!("{}&user=7:8&parents=true", tar_of(&path.join("new")));
    host.succeed(Method::PUT, &url, bytes(archive.into_inner().unwrap()))
        .await;
    for (name, mode) in [("new", 0o755), ("new/made", 0o755), ("new/made/program", 0o755)] {
        let stat = fs::metadata(path.join(name)).unwrap();
        assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (7, 8, mode), "{name}");
    }
}

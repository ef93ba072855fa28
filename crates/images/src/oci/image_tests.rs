//! Tests of layers, good and hostile, from their bytes to the resulting file system.

use crate::oci::digest::Digest;
use crate::oci::error::OciError;
use crate::oci::ext4;
use crate::oci::hand_made::{Tar, gzip};
use crate::oci::limits::Limits;
use crate::oci::task::Task;
use crate::oci::unpack::{StoredLayer, Unpacker};
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

/// An image that was made from layers, in a folder of its own.
struct Made {
    folder: tempfile::TempDir,
}

impl Made {
    fn image(&self) -> PathBuf {
        self.folder.path().join("image.ext4")
    }

    /// Runs a command of debugfs.
    fn ask(&self, command: &str) -> Vec<u8> {
        let mut debugfs = Command::new("debugfs");
        let output = debugfs.args(["-R", command]).arg(self.image()).output();
        output.unwrap().stdout
    }

    fn read(&self, path: &str) -> Vec<u8> {
        self.ask(&format!("cat \"{path}\""))
    }

    fn stat(&self, path: &str) -> String {
        String::from_utf8_lossy(&self.ask(&format!("stat \"{path}\""))).into_owned()
    }

    /// Returns the names in a folder, without `.` and `..`.
    fn names(&self, path: &str) -> Vec<String> {
        let listed = self.ask(&format!("ls -p \"{path}\""));
        let name = |line: &str| line.split('/').nth(5).map(str::to_owned);
        let mut names: Vec<String> = String::from_utf8_lossy(&listed).lines().filter_map(name).collect();
        names.retain(|name| name != "." && name != ".." && !name.is_empty());
        names.sort();
        names
    }

    fn exists(&self, path: &str) -> bool {
        self.stat(path).contains("Inode:")
    }
}

fn make_with(layers: &[&[u8]], limits: Limits) -> Result<Made, OciError> {
    let folder = tempfile::tempdir().unwrap();
    let task = Task::new(Arc::new(()), limits);
    let plain: Vec<Vec<u8>> = layers.iter().map(|layer| uncompressed(layer)).collect();
    let made = || {
        let total = layers.iter().map(|layer| layer.len() as u64).sum();
        let mut unpacker = Unpacker::new(&task, folder.path(), total)?;
        for (index, (layer, plain)) in layers.iter().zip(&plain).enumerate() {
            let stored = StoredLayer {
                data: Box::new(*layer),
                diff_id: Digest::of(plain),
            };
            unpacker.layer(index + 1, stored)?;
        }
        ext4::write(unpacker.finish(), &folder.path().join("image.ext4"), &task)
    };
    made().map(|()| Made { folder })
}

fn make(layers: &[Vec<u8>]) -> Result<Made, OciError> {
    let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    make_with(&layers, Limits::default())
}

fn uncompressed(layer: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    // Ignores the error of a damaged layer, and returns the part before the damage.
    let _damaged = match layer {
        [0x1f, 0x8b, ..] => flate2::read::GzDecoder::new(layer).read_to_end(&mut plain),
        [0x28, 0xb5, ..] => zstd::Decoder::new(layer).unwrap().read_to_end(&mut plain),
        mut other => other.read_to_end(&mut plain),
    };
    plain
}

/// Returns the error of an image that must be rejected.
fn refused(layers: &[Vec<u8>]) -> OciError {
    match make(layers) {
        Ok(_) => panic!("accepted"),
        Err(error) => error,
    }
}

#[test]
fn owners_modes_times_attributes_and_contents_come_out_as_in_the_layers() {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let big: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let layer = Tar::new()
        .entry(b'5', b"./", b"", b"", (0o755, 0))
        .entry(b'5', b"home/user/", b"", b"", (0o700, 1000))
        .entry(b'0', b"home/user/big", b"", &big, (0o640, 1000))
        .entry(b'0', b"usr/bin/su", b"", b"#!", (0o4755, 0))
        .entry(b'0', b"far", b"", b"x", (0o644, 100_000))
        .pax("SCHILY.xattr.security.capability", &capability)
        .pax("SCHILY.xattr.trusted.overlay.opaque", b"y")
        .file("usr/bin/ping", b"ping")
        .entry(b'0', b"odd \xff\"name", b"", b"odd", (0o644, 0))
        .symlink("etc/link", &"long/".repeat(100))
        .hard_link("etc/su", "usr/bin/su")
        .done();
    let made = make(&[gzip(&layer)]).unwrap();
    assert!(made.read("/home/user/big") == big);
    for (path, texts) in [
        (
            "/home/user",
            &["Mode:  0700", "User:  1000   Group:  1000", "directory"][..],
        ),
        ("/home/user/big", &["Mode:  0640", "User:  1000", "mtime: 0x6553f100"]),
        ("/usr/bin/su", &["Mode:  04755", "User:     0", "Links: 2"]),
        ("/far", &["User: 100000   Group: 100000"]),
        ("/etc/link", &["symlink", "Size: 500"]),
        ("/tmp", &["Mode:  01777"]),
        ("/proc", &["Mode:  0555"]),
    ] {
        let stat = made.stat(path);
        for text in texts {
            assert!(stat.contains(text), "{path}: {text} is not in {stat}");
        }
    }
    assert_eq!(made.read("/etc/su"), b"#!");
    assert_eq!(
        made.read("/odd \u{fffd}\"\"name"),
        b"",
        "not valid UTF-8, and not this name"
    );
    assert!(made.ask("ls -p /").windows(9).any(|window| window == b"odd \xff\"nam"));
    let attributes = made.ask("ea_list /usr/bin/ping");
    let attributes = String::from_utf8_lossy(&attributes);
    assert!(attributes.contains("security.capability (20)"), "{attributes}");
    assert!(!attributes.contains("trusted"), "{attributes}");
    assert_eq!(
        fs::read_dir(made.folder.path()).unwrap().count(),
        1,
        "only the image is left"
    );
}

#[test]
fn layers_are_merged_as_by_a_container_engine() {
    let base = Tar::new()
        .file("etc/a", b"1")
        .file("etc/b", b"1")
        .file("var/cache/old", b"1")
        .file("var/cache/deep/old", b"1")
        .file("opt/tool/bin", b"1")
        .symlink("bin", "usr/bin")
        .file("usr/bin/env", b"1")
        .file("was-file", b"1")
        .file("was-folder/x", b"1")
        .done();
    let top = Tar::new()
        .file("etc/.wh.a", b"")
        .file("etc/.wh.absent", b"")
        .file("absent/.wh.x", b"")
        .file("var/cache/new", b"2")
        .file("var/cache/.wh..wh..opq", b"")
        .file("var/cache/deep/new", b"2")
        .file(".wh..wh.plnk", b"")
        .folder("was-file")
        .file("was-folder", b"2")
        .file(".wh.opt", b"")
        .file("bin/env", b"2")
        .done();
    let made = make(&[base, gzip(&top)]).unwrap();
    assert_eq!(made.names("/etc"), ["b"]);
    assert_eq!(made.names("/var/cache"), ["deep", "new"]);
    assert_eq!(made.names("/var/cache/deep"), ["new"]);
    assert_eq!(made.names("/usr/bin"), ["env"]);
    assert_eq!(
        made.read("/usr/bin/env"),
        b"2",
        "written through the link, inside the image"
    );
    assert!(made.stat("/bin").contains("symlink"));
    assert!(made.stat("/was-file").contains("directory"));
    assert_eq!(made.read("/was-folder"), b"2");
    assert!(!made.exists("/opt") && !made.exists("/absent") && !made.exists("/.wh..wh.plnk"));
}

#[test]
fn links_lead_nowhere_outside_of_the_image() {
    let outside = tempfile::tempdir().unwrap();
    let host = outside.path().to_str().unwrap();
    let base = Tar::new()
        .symlink("a", "/etc")
        .symlink("b", "../../../../../..")
        .symlink("c", host)
        .folder("etc")
        .done();
    let top = Tar::new()
        .file("a/passwd", b"image")
        .file("b/below-root", b"image")
        .file("c/inside", b"image")
        .file("/absolute", b"image")
        .file("c/.wh.victim", b"")
        .done();
    fs::write(outside.path().join("victim"), "host").unwrap();
    let made = make(&[base, top]).unwrap();
    for path in ["/etc/passwd", "/below-root", "/absolute", &format!("{host}/inside")] {
        assert_eq!(made.read(path), b"image", "{path}");
    }
    let there: Vec<_> = fs::read_dir(outside.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(there, ["victim"], "the host is untouched");
}

#[test]
fn hard_links_share_a_file_and_never_leave_the_image() {
    let many = (0..300).fold(Tar::new().file("d/first", b"shared"), |tar, number| {
        tar.hard_link(&format!("d/{}-{number}", "x".repeat(240)), "d/first")
    });
    let top = Tar::new().hard_link("again", "d/first").file("d/.wh.first", b"").done();
    let made = make(&[many.done(), top]).unwrap();
    assert_eq!(made.read("/again"), b"shared");
    assert!(made.stat("/again").contains("Links: 301"), "{}", made.stat("/again"));
    assert_eq!(made.names("/d").len(), 300);

    for (target, why) in [
        ("/etc/shadow", "does not exist"),
        ("../../etc/shadow", "contains .."),
        ("etc", "is a folder"),
        ("/", "is the root"),
    ] {
        let error = refused(&[Tar::new().folder("etc").hard_link("x", target).done()]);
        assert!(
            matches!(&error, OciError::HardLink { reason, .. } if reason.contains(why)),
            "{target}: {error}"
        );
    }
}

#[test]
fn invalid_entries_are_refused_with_their_path() {
    let deep = format!("{}x", "d/".repeat(300));
    let name = "n".repeat(256);
    let long = format!("{}x", "0123456789/".repeat(400));
    for (path, why) in [
        ("../etc/passwd", "contains .."),
        ("a/../../b", "contains .."),
        ("two\nlines", "line break"),
        ("a/.wh...", "whiteout"),
        ("a/.wh.", "whiteout"),
        (deep.as_str(), "deep"),
        (name.as_str(), "255 bytes"),
        (long.as_str(), "too long"),
    ] {
        let error = refused(&[Tar::new().file(path, b"x").done()]);
        assert!(
            matches!(&error, OciError::Path { reason, .. } if reason.contains(why)),
            "{path}: {error}"
        );
    }
    let loops = Tar::new().symlink("a", "b").symlink("b", "a").file("a/x", b"").done();
    assert!(matches!(refused(&[loops]), OciError::Path { .. }));
    let through = Tar::new().file("a", b"").file("a/x", b"").done();
    assert!(matches!(refused(&[through]), OciError::Path { .. }));
    let newline = Tar::new().symlink("a", "b\nrm /etc/passwd").done();
    assert!(matches!(refused(&[newline]), OciError::Path { .. }));
}

#[test]
fn device_nodes_and_unknown_entries_are_refused_except_below_dev() {
    for (kind, what) in [(b'3', "character"), (b'4', "block"), (b'6', "FIFO"), (b'V', "unknown")] {
        let error = refused(&[Tar::new().entry(kind, b"etc/node", b"", b"", (0o600, 0)).done()]);
        let OciError::Kind { path, kind, .. } = &error else {
            panic!("{error}");
        };
        assert!(path == "etc/node" && kind.contains(what), "{error}");
    }
    let error = refused(&[Tar::new().pax("GNU.sparse.major", b"1").file("x", b"1").done()]);
    assert!(matches!(error, OciError::Kind { .. }), "{error}");
    let made = make(&[Tar::new().entry(b'3', b"dev/null", b"", b"", (0o666, 0)).done()]).unwrap();
    assert!(made.names("/dev").is_empty());
}

#[test]
fn damaged_and_truncated_layers_are_refused() {
    let content: Vec<u8> = (0..50_000_u32)
        .flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let layer = Tar::new().file("file", &content).done();
    let packed = gzip(&layer);
    let mut damaged = layer.clone();
    damaged[0] ^= 1;
    let cases = [
        packed[..packed.len() / 2].to_vec(),
        packed[..packed.len() - 1].to_vec(),
        layer[..100_000].to_vec(),
        layer[..300].to_vec(),
        damaged,
        zstd::encode_all(layer.as_slice(), 1).unwrap()[..5000].to_vec(),
        b"this is not a layer".repeat(100),
    ];
    for (index, case) in cases.into_iter().enumerate() {
        let error = refused(&[case]);
        assert!(matches!(error, OciError::Layer { layer: 1, .. }), "{index}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let task = Task::new(Arc::new(()), Limits::default());
    let mut unpacker = Unpacker::new(&task, folder.path(), 0).unwrap();
    let stored = StoredLayer {
        data: Box::new(layer.as_slice()),
        diff_id: Digest::of(b"other"),
    };
    assert!(matches!(unpacker.layer(1, stored), Err(OciError::WrongDigest { .. })));
}

#[test]
fn bombs_are_refused_by_size_ratio_entries_and_work() {
    let zeros = vec![0; 80 << 20];
    let bomb = zstd::encode_all(Tar::new().file("zeros", &zeros).done().as_slice(), 1).unwrap();
    let small = Limits {
        max_unpacked: scalebox_units::Bytes::from_mib(4),
        max_entries: 1000,
        ..Limits::default()
    };
    let with = |layer: &[u8], limits| make_with(&[layer], limits).err().unwrap();
    assert!(matches!(
        with(&bomb, Limits::default()),
        OciError::Ratio { limit: 200, .. }
    ));
    assert!(matches!(with(&bomb, small), OciError::TooLarge { .. }));
    let entries = (0..1001)
        .fold(Tar::new(), |tar, number| tar.file(&number.to_string(), b""))
        .done();
    assert!(matches!(with(&entries, small), OciError::TooMany { limit: 1000, .. }));
    // Each entry leads through a long chain of links.
    let chain = (0..35).fold(Tar::new(), |tar, number| {
        tar.symlink(&format!("l{number}"), &format!("{}l{}", "x/../".repeat(40), number + 1))
    });
    let chain = (0..500).fold(chain.folder("x").folder("l35"), |tar, number| {
        tar.file(&format!("l0/{number}"), b"")
    });
    assert!(matches!(with(&chain.done(), small), OciError::TooMany { .. }));
    let value = vec![b'x'; 4000];
    let large = Tar::new().pax("SCHILY.xattr.user.large", &value).file("x", b"").done();
    assert!(matches!(refused(&[large]), OciError::Xattrs { .. }));
}

#[test]
fn a_refused_reservation_and_a_cancellation_end_the_work() {
    struct Full;
    impl crate::oci::task::Supervisor for Full {
        fn reserve(
            &self,
            _: scalebox_units::Bytes,
        ) -> Result<crate::oci::Room, Box<dyn std::error::Error + Send + Sync>> {
            Err("the pool is full".into())
        }
        fn progress(&self, _: crate::oci::Phase, _: scalebox_units::Bytes, _: scalebox_units::Bytes) {}
    }
    let layer = Tar::new().file("x", b"content").done();
    let unpack = |task: &Task| {
        let folder = tempfile::tempdir().unwrap();
        let stored = StoredLayer {
            data: Box::new(layer.as_slice()),
            diff_id: Digest::of(&layer),
        };
        Unpacker::new(task, folder.path(), 0).unwrap().layer(1, stored)
    };
    let error = unpack(&Task::new(Arc::new(Full), Limits::default())).unwrap_err();
    assert_eq!(error.to_string(), "the pool is full");
    let task = Task::new(Arc::new(()), Limits::default());
    task.cancel();
    assert!(matches!(unpack(&task), Err(OciError::Cancelled)));
}

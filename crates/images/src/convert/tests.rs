//! Conversions of real disk images and hand-made archives.

use super::{HEAD_BYTES, Kind, convert, needs_conversion, recognise};
use crate::oci::hand_made::{Tar, gzip};
use crate::oci::{Digest, Limits, Made, OciError, Task};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

fn run(program: &str, args: &[&str], input: &str) {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{program} {args:?}");
}

/// A folder with a `work` folder in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.path("work")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    /// Makes an ext4 image with the file `/name`, which holds its own name.
    fn file_system(&self, name: &str, mib: u64) -> Vec<u8> {
        let (root, image) = (self.path(&format!("{name}.root")), self.path(&format!("{name}.ext4")));
        fs::create_dir(&root).unwrap();
        fs::write(root.join("name"), name).unwrap();
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        run(
            "mke2fs",
            &[
                "-q",
                "-F",
                "-t",
                "ext4",
                "-d",
                root.to_str().unwrap(),
                image.to_str().unwrap(),
            ],
            "",
        );
        fs::read(image).unwrap()
    }

    /// Makes a raw disk by a script for sfdisk; file systems begin at the given MiB.
    fn disk(&self, script: &str, contents: &[(u64, &[u8])]) -> PathBuf {
        let path = self.path("disk.raw");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        run("sfdisk", &["-q", path.to_str().unwrap()], script);
        for (mib, content) in contents {
            file.write_all_at(content, mib << 20).unwrap();
        }
        path
    }

    fn convert(&self, path: &Path) -> Result<Made, OciError> {
        convert(path, &self.path("work"), &Task::new(Arc::new(()), Limits::default()))
    }

    fn refused(&self, path: &Path) -> OciError {
        let error = self.convert(path).err().unwrap();
        assert_eq!(fs::read_dir(self.path("work")).unwrap().count(), 0, "nothing is left");
        error
    }
}

fn read(made: &Made, path: &str) -> String {
    let output = Command::new("debugfs")
        .args(["-R", &format!("cat {path}")])
        .arg(&made.image)
        .output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

const GPT: &str = "label: gpt\nstart=2048, size=16384, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\n\
                   start=18432, size=65536, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n\
                   start=83968, size=32768, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709\n";

#[test]
fn the_root_partition_is_found_by_type_or_else_by_size() {
    let place = Place::new();
    let (data, root) = (place.file_system("data", 24), place.file_system("root", 8));
    let disk = place.disk(GPT, &[(9, &data), (41, &root)]);
    assert_eq!(recognise(&disk).unwrap(), Kind::PartitionedDisk);
    let made = place.convert(&disk).unwrap();
    assert_eq!(read(&made, "/name"), "root");
    assert_eq!(
        made.image.metadata().unwrap().len(),
        16 << 20,
        "the size of the partition"
    );
    drop(made);
    let mbr = place.disk(
        "label: dos\nstart=2048, size=16384, type=83\nstart=18432, size=65536, type=83\n",
        &[(1, &root), (9, &data)],
    );
    assert_eq!(read(&place.convert(&mbr).unwrap(), "/name"), "data");
    let none = place.disk(GPT, &[]);
    assert!(place.refused(&none).to_string().contains("no partition has an ext4"));
}

#[test]
fn qcow2_images_are_converted_unless_they_refer_to_other_files() {
    let place = Place::new();
    let root = place.file_system("root", 8);
    place.disk(GPT, &[(41, &root)]);
    let (raw, qcow2) = (place.text("disk.raw"), place.text("disk.qcow2"));
    run("qemu-img", &["convert", "-c", "-O", "qcow2", &raw, &qcow2], "");
    assert_eq!(recognise(qcow2.as_ref()).unwrap(), Kind::Qcow2);
    assert_eq!(read(&place.convert(qcow2.as_ref()).unwrap(), "/name"), "root");

    let backed = place.text("backed.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", &backed],
        "",
    );
    assert!(place.refused(backed.as_ref()).to_string().contains("backing file"));
    let external = place.text("external.qcow2");
    let option = format!("data_file={}", place.text("data"));
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &option, &external, "1M"],
        "",
    );
    assert!(
        place
            .refused(external.as_ref())
            .to_string()
            .contains("external data file")
    );
    let huge = place.text("huge.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &huge, "200G"], "");
    assert!(matches!(place.refused(huge.as_ref()), OciError::TooLarge { .. }));
    let cut = place.write("cut.qcow2", &fs::read(&qcow2).unwrap()[..5000]);
    match place.refused(&cut) {
        OciError::Disk(reason) => assert!(!reason.contains("cut.qcow2"), "{reason}"),
        other => panic!("{other}"),
    }
}

/// Returns the layers of an image, its configuration, and the digests of both.
fn parts() -> (Vec<u8>, Vec<u8>) {
    let tar = Tar::new().file("name", b"image").done();
    let config = json!({"os": "linux", "architecture": "amd64", "config": {"Env": ["A=1"]},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&tar).to_string()]}});
    (tar, config.to_string().into_bytes())
}

fn blob(tar: Tar, content: &[u8]) -> Tar {
    tar.file(&format!("blobs/sha256/{}", Digest::of(content).hex()), content)
}

fn descriptor(kind: &str, content: &[u8]) -> Value {
    json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": Digest::of(content).to_string(), "size": content.len()})
}

#[test]
fn oci_archives_are_read_in_place_and_verified() {
    let place = Place::new();
    let (tar, config) = parts();
    let layer = gzip(&tar);
    let manifest = json!({"schemaVersion": 2, "config": descriptor("config.v1+json", &config),
        "layers": [descriptor("layer.v1.tar+gzip", &layer)]});
    let manifest = manifest.to_string().into_bytes();
    let index = json!({"schemaVersion": 2, "manifests": [descriptor("manifest.v1+json", &manifest)]}).to_string();
    let archive = |config: &[u8], layer: &[u8]| {
        let tar = blob(Tar::new(), &manifest).file("./oci-layout", b"{\"imageLayoutVersion\": \"1.0.0\"}");
        let names = [parts().1, gzip(&parts().0)].map(|content| format!("blobs/sha256/{}", Digest::of(&content).hex()));
        let tar = tar.file(&names[0], config).file(&names[1], layer);
        tar.file("index.json", index.as_bytes()).done()
    };
    let good = place.write("good.tar", &archive(&config, &layer));
    assert_eq!(recognise(&good).unwrap(), Kind::OciArchive);
    let made = place.convert(&good).unwrap();
    assert_eq!(read(&made, "/name"), "image");
    assert_eq!(made.config.as_ref().unwrap().env, ["A=1"]);
    assert_eq!(made.digest, Some(Digest::of(&manifest)));
    drop(made);
    let other = gzip(&Tar::new().file("name", b"other").done());
    for forged in [archive(&config, &other), archive(b"{}", &layer)] {
        let path = place.write("forged.tar", &forged);
        assert!(matches!(place.refused(&path), OciError::WrongDigest { .. }));
    }
    let whole = archive(&config, &layer);
    let cut = place.write("cut.tar", &whole[..whole.len() - 3000]);
    place.refused(&cut);
}

#[test]
fn docker_save_archives_of_one_image_are_accepted() {
    let place = Place::new();
    let (tar, config) = parts();
    let entry = json!({"Config": "config.json", "RepoTags": ["box:1"], "Layers": ["a/layer.tar"]});
    let archive = |images: Value| {
        let archive = Tar::new()
            .file("config.json", &config)
            .symlink("a/layer.tar", "../b/layer.tar")
            .file("b/layer.tar", &tar);
        archive.file("manifest.json", images.to_string().as_bytes()).done()
    };
    let good = place.write("saved.tar", &archive(json!([entry])));
    assert_eq!(recognise(&good).unwrap(), Kind::DockerArchive);
    let made = place.convert(&good).unwrap();
    assert_eq!(
        (read(&made, "/name").as_str(), made.reference.as_deref()),
        ("image", Some("box:1"))
    );
    drop(made);
    let two = place.write("two.tar", &archive(json!([entry, entry])));
    assert!(place.refused(&two).to_string().contains("has 2 images"));
    let outside = json!({"Config": "config.json", "Layers": ["../../etc/passwd"]});
    let outside = place.write("outside.tar", &archive(json!([outside])));
    assert!(place.refused(&outside).to_string().contains("missing"));
}

#[test]
fn other_files_are_not_taken_for_images() {
    let place = Place::new();
    let archive = Tar::new().file("etc/passwd", b"x").done();
    let cases: [(&[u8], Kind); 5] = [
        (b"", Kind::Unknown),
        (b"QFI\xfb", Kind::Qcow2),
        (&[0x28, 0xb5, 0x2f, 0xfd, 0], Kind::Compressed),
        (&archive, Kind::Tar),
        (&[0; 4096], Kind::Unknown),
    ];
    for (content, kind) in cases {
        let path = place.write("file", content);
        assert_eq!(recognise(&path).unwrap(), kind);
        let head = &content[..content.len().min(HEAD_BYTES)];
        assert_eq!(needs_conversion(head), matches!(kind, Kind::Qcow2 | Kind::Tar));
        place.refused(&path);
    }
    let ext4 = place.file_system("plain", 8);
    assert_eq!(recognise(&place.write("file", &ext4)).unwrap(), Kind::Ext4);
}

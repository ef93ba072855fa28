//! Template export and import, over the API and by the command line. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

#[path = "../../images/tests/support/registry.rs"]
#[allow(dead_code, reason = "the tests of pulls use the rest")]
mod registry;
mod support;

use registry::small;
use scalebox_api::Init;
use scalebox_client::ClientError;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use support::guest::scalebox;
use support::{Host, KEY, Options, TOKEN, eventually, output_of, run, text};

/// Creates an ext4 image that contains incompressible data.
fn image(folder: &Path, name: &str, size: &str, data_mib: usize) -> PathBuf {
    let (root, image) = (folder.join(format!("{name}.root")), folder.join(name));
    fs::create_dir(&root).unwrap();
    let mut random = vec![0; data_mib << 20];
    File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
    fs::write(root.join("data"), random).unwrap();
    run("mke2fs", &["-q", "-t", "ext4", "-d", text(&root), text(&image), size]);
    image
}

fn template(host: &Host, name: &str) -> PathBuf {
    host.folder.join(format!("pool/templates/{name}.ext4"))
}

/// Counts the partial files in the templates folder.
fn partial_files(host: &Host) -> usize {
    let entries = fs::read_dir(host.folder.join("pool/templates")).unwrap();
    entries
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .file_name()
                .to_string_lossy()
                .contains("partial")
        })
        .count()
}

/// Counts the folders with files of conversions.
fn work_files(host: &Host) -> usize {
    fs::read_dir(host.folder.join("pool/build")).map_or(0, Iterator::count)
}

fn rejection(error: ClientError) -> (u16, String) {
    (error.status().unwrap_or_else(|| panic!("{error}")), error.to_string())
}

#[test]
fn an_exported_template_is_imported_unchanged() {
    let host = Host::with_tiny_template(&Options::default());
    let client = host.client();
    let mut packed = Vec::new();
    let mut export = client.export_template("tiny").unwrap();
    assert_eq!(export.image_bytes, 64 << 20);
    export.compressed.read_to_end(&mut packed).unwrap();
    assert!(packed.len() < 1 << 20, "{} bytes", packed.len());

    // Any zstd can decompress it, to the same image.
    let (file, unpacked) = (host.folder.join("tiny.zst"), host.folder.join("unpacked"));
    fs::write(&file, &packed).unwrap();
    run("zstd", &["-q", "-d", text(&file), "-o", text(&unpacked)]);
    run("cmp", &[text(&unpacked), text(&template(&host, "tiny"))]);

    let made = client
        .import_template("second", std::io::Cursor::new(packed.clone()), false)
        .unwrap();
    assert_eq!((made.name.as_str(), made.size_bytes), ("second", 64 << 20));
    assert!(made.used_bytes < 8 << 20, "holes stay holes: {made:?}");
    run("e2fsck", &["-fn", text(&template(&host, "second"))]);
    // An uncompressed image works too, and an existing template is replaced only on request.
    let bare = || File::open(&unpacked).unwrap();
    let (status, message) = rejection(client.import_template("second", bare(), false).unwrap_err());
    assert!(status == 409 && message.contains("exists already"), "{message}");
    client.import_template("second", bare(), true).unwrap();
    let vm = host.create_stopped("second", Some(1));
    run("e2fsck", &["-fn", text(&host.disk(&vm))]);
    assert_eq!(partial_files(&host), 0);

    assert_eq!(rejection(client.export_template("nothing").err().unwrap()).0, 404);
    assert_eq!(rejection(client.export_template("../state").err().unwrap()).0, 404);
}

#[test]
fn failed_imports_leave_nothing_behind() {
    let host = Host::with_tiny_template(&Options {
        env: &[("MAX_DISK_SIZE_GIB", "2")],
        ..Options::default()
    });
    let client = host.client();
    let import = |name: &str, bytes: Vec<u8>| {
        let made = client.import_template(name, std::io::Cursor::new(bytes), false);
        rejection(made.unwrap_err())
    };
    let image = image(&host.folder, "image", "100M", 40);
    let bytes = fs::read(&image).unwrap();
    let (status, message) = import("debian-base", bytes.clone());
    assert!(status == 403 && message.contains("protected"), "{message}");
    for (bytes, why) in [
        (b"just a text".to_vec(), "contains no file system"),
        (Vec::new(), "contains no file system"),
        (vec![0x1f, 0x8b, 8, 0], "compressed with gzip"),
        (vec![0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3], "cannot become a template"),
        (bytes[..30 << 20].to_vec(), "cannot become a template"),
    ] {
        let (status, message) = import("broken", bytes);
        assert!(status == 400 && message.contains(why), "{message}");
    }
    assert_eq!(import("../x", b"x".to_vec()).0, 400);

    // Zeros compress to almost nothing, and decompress to more than the maximum disk size.
    let bomb = host.folder.join("bomb");
    run("truncate", &["-s", "3G", text(&bomb)]);
    let packed = host.folder.join("bomb.zst");
    run("zstd", &["-q", text(&bomb), "-o", text(&packed)]);
    let (status, message) = import("bomb", fs::read(&packed).unwrap());
    assert!(
        status == 400 && message.contains("larger than the maximum disk size of 2 GiB"),
        "{message}"
    );

    // The pool is nearly full: the import is rejected with the same message as a VM.
    let ballast = host.folder.join("pool/vms/ballast");
    let free = client.pool().unwrap().free_bytes;
    run("fallocate", &["-l", &(free - (2200 << 20)).to_string(), text(&ballast)]);
    let (status, message) = import("large", bytes.clone());
    assert!(
        status == 507 && message.starts_with("Insufficient storage: "),
        "{message}"
    );
    fs::remove_file(&ballast).unwrap();
    run("btrfs", &["filesystem", "sync", text(&host.folder.join("pool"))]);

    // A client that disconnects in the middle.
    let mut stream = TcpStream::connect(host.url.strip_prefix("http://").unwrap()).unwrap();
    let head = format!(
        "POST /templates/cut/import HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {}\r\n\r\n",
        bytes.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&bytes[..20 << 20]).unwrap();
    eventually("the import to begin", || (partial_files(&host) == 1).then_some(()));
    drop(stream);
    eventually("the partial file to be removed", || {
        (partial_files(&host) == 0).then_some(())
    });

    let names: Vec<_> = client
        .templates()
        .unwrap()
        .into_iter()
        .map(|template| template.name)
        .collect();
    assert_eq!(names, ["tiny"]);
    assert_eq!(client.pool().unwrap().reserved_bytes, 0);
    client
        .import_template("large", File::open(&image).unwrap(), false)
        .unwrap();
}

#[test]
fn both_kinds_of_import_have_the_same_maximum_and_name_the_rejected_format() {
    let host = Host::with_tiny_template(&Options {
        env: &[("MAX_DISK_SIZE_GIB", "2")],
        ..Options::default()
    });
    let image = host.folder.join("large");
    run("mke2fs", &["-q", "-t", "ext4", text(&image), "3G"]);
    let packed = host.folder.join("large.zst");
    run("zstd", &["-q", text(&image), "-o", text(&packed)]);
    for file in [&image, &packed] {
        let printed = host.scaleboxd_fails(&["template", "import", "large", text(file)]);
        assert!(
            printed.contains("larger than the maximum disk size of 2 GiB"),
            "{printed}"
        );
        let sent = host.client().import_template("large", File::open(file).unwrap(), false);
        let (status, message) = rejection(sent.unwrap_err());
        assert!(
            status == 400 && message.contains("larger than the maximum disk size of 2 GiB"),
            "{message}"
        );
    }
    // The bodies of curl -F and of tar.
    let form = b"--x1\r\nContent-Disposition: form-data; name=\"f\"\r\n\r\n";
    let (status, message) = host.send("POST", "/templates/form/import", form);
    assert!(
        status == 400 && message.contains("send the image itself as the request body"),
        "{message}"
    );
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    let (status, message) = host.send("POST", "/templates/tar/import", &tar);
    assert!(status == 400 && message.contains("a tar archive"), "{message}");
    assert_eq!(partial_files(&host), 0);
}

/// Creates a disk with a partition table, and an ext4 file system in its only partition.
fn disk(host: &Host, label: &str) -> PathBuf {
    let (root, disk) = (host.folder.join("root.ext4"), host.folder.join(label));
    if !root.exists() {
        image(&host.folder, "root.ext4", "30M", 4);
    }
    run("truncate", &["-s", "40M", text(&disk)]);
    let script = host.folder.join("script");
    fs::write(&script, format!("label: {label}\nstart=2048, size=61440\n")).unwrap();
    let command = format!("sfdisk -q {} <{}", text(&disk), text(&script));
    run("sh", &["-c", &command]);
    run(
        "dd",
        &[
            "status=none",
            "bs=1M",
            "seek=1",
            "conv=notrunc",
            &format!("if={}", text(&root)),
            &format!("of={}", text(&disk)),
        ],
    );
    disk
}

#[test]
fn disk_images_and_archives_are_imported_over_http_by_their_content() {
    let host = Host::with_tiny_template(&Options::default());
    let client = host.client();
    let path = |name: &str| host.folder.join(name);
    let (gpt, mbr) = (disk(&host, "gpt"), disk(&host, "dos"));
    let qcow2 = path("qcow2");
    run("qemu-img", &["convert", "-c", "-O", "qcow2", text(&gpt), text(&qcow2)]);
    let layout = small();
    let (oci, docker) = (path("oci"), path("docker"));
    for target in [
        format!("oci-archive:{}", text(&oci)),
        format!("docker-archive:{}:box:1", text(&docker)),
    ] {
        run("skopeo", &["copy", "-q", &layout.image(), &target]);
    }
    for (file, is_container) in [
        (&gpt, false),
        (&mbr, false),
        (&qcow2, false),
        (&oci, true),
        (&docker, true),
    ] {
        let name = file.file_name().unwrap().to_str().unwrap();
        let made = client.import_template(name, File::open(file).unwrap(), false).unwrap();
        assert_eq!((made.name.as_str(), made.source.as_deref()), (name, Some("import")));
        assert_eq!(
            made.config.is_some_and(|config| config.cmd == ["/bin/tool"]),
            is_container
        );
        assert_eq!(made.init == Some(Init::Agent), is_container, "{name}");
        run("e2fsck", &["-fn", text(&template(&host, name))]);
        let taken = client.import_template(name, File::open(file).unwrap(), false);
        assert_eq!(rejection(taken.unwrap_err()).0, 409);
    }
    let vm = host.create_stopped("docker", Some(1));
    assert_eq!(vm.template, "docker");
    client
        .import_template("gpt", File::open(&qcow2).unwrap(), true)
        .unwrap();
    // Both commands take the same files.
    host.scaleboxd_ok(&["template", "import", "own", text(&qcow2)]);
    let imported = scalebox(&host, &["template", "import", "sent", text(&oci)]);
    assert!(imported.status.success(), "{}", output_of(&imported));
    assert_eq!(work_files(&host), 0);
}

#[test]
fn disk_images_and_archives_that_are_unusable_leave_nothing() {
    let host = Host::with_tiny_template(&Options {
        env: &[("MAX_DISK_SIZE_GIB", "1"), ("DEFAULT_DISK_SIZE_GIB", "1")],
        ..Options::default()
    });
    let client = host.client();
    let disk = fs::read(disk(&host, "dos")).unwrap();
    let layout = small();
    let archive = host.folder.join("oci");
    run(
        "skopeo",
        &[
            "copy",
            "-q",
            &layout.image(),
            &format!("oci-archive:{}", text(&archive)),
        ],
    );
    let archive = fs::read(archive).unwrap();
    let mut forged = archive.clone();
    // In the data of a layer, after the header of gzip.
    let layer = forged.windows(3).position(|bytes| bytes == [0x1f, 0x8b, 8]).unwrap();
    forged[layer + 12] ^= 1;
    let huge = host.folder.join("huge");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&huge), "2G"]);
    let qcow2 = fs::read(&huge).unwrap();
    for (bytes, why) in [
        (disk[..20 << 20].to_vec(), "no partition has an ext4"),
        (b"QFI\xfb, and nothing else".to_vec(), "cannot use the disk image"),
        (qcow2, "larger than"),
        (archive[..archive.len() / 2].to_vec(), ""),
        (forged, ""),
    ] {
        let sent = client.import_template("broken", std::io::Cursor::new(bytes), false);
        let (status, message) = rejection(sent.unwrap_err());
        assert!(status == 400 && message.contains(why), "{status} {message}");
        assert!(!message.contains(text(&host.folder)), "{message}");
    }
    // Zeros need no space, and are too many nevertheless.
    let endless = std::io::Cursor::new(disk.clone()).chain(std::io::repeat(0).take(2 << 30));
    let (status, message) = rejection(client.import_template("broken", endless, false).unwrap_err());
    assert!(status == 400 && message.contains("larger than 2 GiB"), "{message}");

    // A client that disconnects in the middle.
    let mut stream = TcpStream::connect(host.url.strip_prefix("http://").unwrap()).unwrap();
    let head = format!(
        "POST /templates/cut/import HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {}\r\n\r\n",
        disk.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&disk[..20 << 20]).unwrap();
    eventually("the import to begin", || (work_files(&host) == 1).then_some(()));
    drop(stream);
    eventually("the file to be removed", || (work_files(&host) == 0).then_some(()));
    assert_eq!(client.templates().unwrap().len(), 1);
    assert_eq!(client.pool().unwrap().reserved_bytes, 0);
    assert_eq!(partial_files(&host), 0);
}

#[test]
fn a_growth_that_ext4_does_not_support_is_rejected_with_the_reason() {
    let host = Host::with_tiny_template(&Options::default());
    let image = host.folder.join("clusters");
    run("mke2fs", &["-q", "-t", "ext4", "-O", "bigalloc", text(&image), "1G"]);
    host.scaleboxd_ok(&["template", "import", "clusters", text(&image)]);
    let vm = host.create_stopped("clusters", Some(1));
    let create = format!(
        "{{\"template\": \"clusters\", \"ssh_public_key\": \"{KEY}\", \"disk_size_gib\": 2, \"start\": false}}"
    );
    for (method, path, body) in [
        ("POST", "/vms".to_owned(), create.as_str()),
        ("PATCH", format!("/vms/{}", vm.id), r#"{"disk_size_gib": 2}"#),
    ] {
        let (status, printed) = host.send(method, &path, body.as_bytes());
        assert!(
            status == 400 && printed.contains("disk_size_gib cannot be 2") && printed.contains("bigalloc"),
            "{status} {printed}"
        );
    }
    let vms = host.client().vms().unwrap();
    assert_eq!((vms.len(), vms[0].disk_size_gib), (1, 1));
    assert_eq!(fs::metadata(host.disk(&vm)).unwrap().len(), 1 << 30);
    assert_eq!(fs::read_dir(host.folder.join("pool/vms")).unwrap().count(), 1);
}

#[test]
fn the_command_line_exports_a_complete_file_and_imports_it() {
    let host = Host::with_tiny_template(&Options::default());
    let file = host.folder.join("tiny.ext4.zst");
    let cli = |args: &[&str]| {
        let output = scalebox(&host, args);
        (output.status.code().unwrap(), output_of(&output))
    };
    let (code, printed) = cli(&["template", "export", "tiny", text(&file)]);
    assert!(
        code == 0 && printed.contains("exported the template tiny to ") && printed.contains(": 64 MiB, compressed to "),
        "{printed}"
    );
    let (code, printed) = cli(&["template", "export", "tiny", text(&file)]);
    assert!(code == 2 && printed.contains("already exists"), "{printed}");
    let (code, printed) = cli(&["template", "import", "copy", text(&file)]);
    assert!(
        code == 0 && printed.contains("created the template copy: 64 MiB,"),
        "{printed}"
    );
    run("e2fsck", &["-fn", text(&template(&host, "copy"))]);
    let (code, printed) = cli(&["template", "import", "copy", text(&file)]);
    assert!(code == 1 && printed.contains("exists already"), "{printed}");
    let (code, printed) = cli(&["template", "import", "copy", text(&file), "--replace", "--json"]);
    assert!(code == 0 && printed.contains("\"size_bytes\": 67108864"), "{printed}");
    // The daemon's own command accepts compressed images too.
    host.scaleboxd_ok(&["template", "import", "third", text(&file)]);
    assert!(!host.folder.join("tiny.ext4.zst.partial").exists());
}

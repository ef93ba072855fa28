//! Tests the daemon on unusual hosts. They have system files in other encodings, a read-only
//! `/etc`, an unmounted pool, or foreign files in the pool.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use support::{Host, Options, eventually, output_of, run, text};

/// Returns `scaleboxd` in its own mount namespace, which `script` prepares first with `argument` as
/// `$0`.
fn in_namespace(host: &Host, script: &str, argument: &Path, args: &[&str]) -> Command {
    let daemon = host.scaleboxd(args);
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "sh",
            "-ec",
            &format!("{script}; exec \"$@\""),
            text(argument),
        ])
        .arg(daemon.get_program())
        .args(daemon.get_args())
        .stdin(Stdio::null());
    for (key, value) in daemon.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command
}

/// Waits until a daemon is ready, and returns its log.
fn ready(daemon: &mut Child, log: &Path) -> String {
    eventually("the daemon", || {
        let printed = String::from_utf8_lossy(&fs::read(log).unwrap()).into_owned();
        if let Some(status) = daemon.try_wait().unwrap() {
            panic!("the daemon ended with {status}:\n{printed}");
        }
        printed.lines().any(|line| line.contains(" ready ")).then_some(printed)
    })
}

#[test]
fn a_daemon_starts_with_any_content_of_resolv_conf() {
    let host = Host::new(&Options::default());
    for (content, warned) in [
        (&b"# f\xfcr das B\xfcro\nnameserver 192.0.2.53\n"[..], false),
        (b"", true),
        (b"nameserver fe80::1%eth0\n", true),
        (b"nameserver 169.254.169.254\n", false),
    ] {
        let file = host.folder.join("resolv.conf");
        fs::write(&file, content).unwrap();
        let log = host.folder.join("odd.log");
        // Hides the file of systemd-resolved too.
        let script = "mount --bind \"$0\" /etc/resolv.conf; mount -t tmpfs none /run/systemd 2>/dev/null || true";
        let mut daemon = in_namespace(&host, script, &file, &["serve"])
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let logged = ready(&mut daemon, &log);
        assert_eq!(
            logged.contains("has no resolver that guests can reach"),
            warned,
            "{:?}: {logged}",
            String::from_utf8_lossy(content)
        );
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }
}

#[test]
fn pool_init_only_warns_if_etc_is_read_only() {
    let mut host = Host::new(&Options::default());
    host.scaleboxd_ok(&["down"]);
    host.set("FSTAB", "/etc/fstab");
    let before = fs::read("/etc/fstab").ok();
    // The pool is mounted, used and unmounted inside the namespace.
    let script = "mount --bind /etc /etc; mount -o remount,bind,ro /etc; \"$@\"; set -- \"$1\" down --config /dev/null";
    let output = in_namespace(&host, script, &host.folder, &["pool", "init"])
        .output()
        .unwrap();
    let printed = output_of(&output);
    assert!(output.status.success(), "{printed}");
    let line = format!(
        "{} {} btrfs",
        text(&host.folder.join("pool.img")),
        text(&host.folder.join("pool"))
    );
    assert!(
        printed.contains("The pool is ready at")
            && printed.contains("warning: cannot register the pool in /etc/fstab")
            && printed.contains(&line),
        "{printed}"
    );
    assert_eq!(fs::read("/etc/fstab").ok(), before);
    let script = "mount --bind /etc /etc; mount -o remount,bind,ro /etc; \"$1\" pool init --config /dev/null 2>&1";
    let output = in_namespace(&host, script, &host.folder, &["doctor"]).output().unwrap();
    let printed = output_of(&output);
    assert!(printed.contains("ok       pool"), "{printed}");
}

#[test]
fn contradictory_settings_are_rejected_by_all_commands() {
    let host = Host::new(&Options::default());
    let image = host.folder.join("pool/pool.img");
    // With exit status 78, systemd does not restart the service.
    for (args, status) in [(&["pool", "init"][..], 1), (&["serve"], 78), (&["doctor"], 1)] {
        let output = host.scaleboxd(args).env("POOL_IMAGE", &image).output().unwrap();
        let printed = output_of(&output);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {printed}");
        assert!(
            printed.contains("POOL_IMAGE=") && printed.contains("must not be in DATA_DIR"),
            "{args:?}: {printed}"
        );
    }
}

#[test]
fn an_unmounted_pool_is_not_replaced_by_a_new_one() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", None);
    assert!(host.terminate().success());
    let (pool, image, away) = (
        host.folder.join("pool"),
        host.folder.join("pool.img"),
        host.folder.join("away.img"),
    );
    run("umount", &[text(&pool)]);
    fs::rename(&image, &away).unwrap();

    // With this exit status, systemd restarts the daemon.
    let printed = host.scaleboxd_fails(&["serve"]);
    assert!(
        printed.contains("the state has 1 VMs")
            && printed.contains("do not create a new one")
            && printed.contains("once it is mounted"),
        "{printed}"
    );
    let printed = host.scaleboxd_fails(&["pool", "init"]);
    assert!(printed.contains("1 VM disks should be in it"), "{printed}");
    assert!(!image.exists());

    fs::rename(&away, &image).unwrap();
    run("mount", &["-o", "loop", text(&image), text(&pool)]);
    host.serve();
    assert_eq!(host.client().vm(&vm.id).unwrap().status, vm.status);
}

#[test]
fn requests_to_an_unmounted_pool_get_503() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", None);
    let pool = host.folder.join("pool");
    run("umount", &["--lazy", text(&pool)]);
    let body = format!(
        r#"{{"template": "tiny", "ssh_public_key": "{}", "start": false}}"#,
        support::KEY
    );
    for (method, path, body) in [
        ("POST", "/vms", body.as_str()),
        ("GET", "/templates", ""),
        ("GET", "/templates/tiny", ""),
        ("GET", "/templates/tiny/export", ""),
        ("DELETE", "/templates/tiny", ""),
        ("PATCH", "/vms/VM", r#"{"disk_size_gib": 5}"#),
        ("POST", "/pool/grow", r#"{"size_gib": 32}"#),
        ("POST", "/pool/trim", ""),
    ] {
        let (status, answer) = host.send(method, &path.replace("VM", &vm.id), body.as_bytes());
        assert!(
            status == 503 && answer.contains("no pool is mounted at"),
            "{method} {path}: {status} {answer}"
        );
    }
    assert_eq!(host.send("GET", "/health", b"").0, 200);
    // Mounts it again, so that the next daemon finds it.
    assert!(host.terminate().success());
    host.scaleboxd_ok(&["pool", "init"]);
    host.serve();
    assert_eq!(host.client().vm(&vm.id).unwrap().id, vm.id);
    host.client().delete_vm(&vm.id).unwrap();
}

#[test]
fn a_daemon_ignores_foreign_files_in_its_pool() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", None);
    assert!(host.terminate().success());
    let pool = host.folder.join("pool");
    let folder = pool.join("vms/x.ext4");
    fs::create_dir(&folder).unwrap();
    run(
        "mkfifo",
        &[
            text(&pool.join("vms/pipe.ext4")),
            text(&pool.join("templates/pipe.partial")),
        ],
    );
    std::os::unix::fs::symlink("/etc/passwd", pool.join("vms/link.ext4")).unwrap();
    let name = pool.join("vms").join(OsStr::from_bytes(b"f\xfcr.ext4"));
    fs::File::create(&name).unwrap().write_all(b"kept").unwrap();
    host.serve();
    let log = host.log();
    for odd in [
        &folder,
        &pool.join("vms/pipe.ext4"),
        &pool.join("templates/pipe.partial"),
    ] {
        assert!(
            odd.exists() && log.contains(&format!("path={}", odd.display())),
            "{}: {log}",
            odd.display()
        );
    }
    assert!(name.exists() && pool.join("vms/link.ext4").symlink_metadata().is_ok());
    assert_eq!(host.client().vms().unwrap().len(), 1);
    host.client().delete_vm(&vm.id).unwrap();
    host.create_stopped("tiny", Some(2));
}

//! The daemon on hosts that are not like most: system files in other encodings, a read-only `/etc`,
//! a pool that is not there, odd entries in it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use support::{Host, Options, eventually, run, said, text};

/// `scaleboxd` in a mount namespace of its own, which `script` makes odd first; what it is given as
/// `$0` is `argument`.
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

/// Waits until a daemon is ready, and returns its log so far.
fn ready(daemon: &mut Child, log: &Path) -> String {
    eventually("the daemon", || {
        let said = String::from_utf8_lossy(&fs::read(log).unwrap()).into_owned();
        if let Some(status) = daemon.try_wait().unwrap() {
            panic!("the daemon ended with {status}:\n{said}");
        }
        said.lines().any(|line| line.contains(" ready ")).then_some(said)
    })
}

#[test]
fn a_daemon_starts_whatever_the_hosts_resolv_conf_holds() {
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
        // Without systemd-resolved's file, too.
        let script = "mount --bind \"$0\" /etc/resolv.conf; mount -t tmpfs none /run/systemd 2>/dev/null || true";
        let mut daemon = in_namespace(&host, script, &file, &["serve"])
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let logged = ready(&mut daemon, &log);
        assert_eq!(
            logged.contains("names no resolver that guests can reach"),
            warned,
            "{:?}: {logged}",
            String::from_utf8_lossy(content)
        );
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }
}

#[test]
fn a_read_only_etc_costs_a_warning_and_no_pool() {
    let mut host = Host::new(&Options::default());
    host.scaleboxd_ok(&["down"]);
    host.set("FSTAB", "/etc/fstab");
    let before = fs::read("/etc/fstab").ok();
    // In the namespace: the pool is mounted, used, and unmounted again.
    let script = "mount --bind /etc /etc; mount -o remount,bind,ro /etc; \"$@\"; set -- \"$1\" down --config /dev/null";
    let output = in_namespace(&host, script, &host.folder, &["pool", "init"])
        .output()
        .unwrap();
    let told = said(&output);
    assert!(output.status.success(), "{told}");
    let line = format!(
        "{} {} btrfs",
        text(&host.folder.join("pool.img")),
        text(&host.folder.join("pool"))
    );
    assert!(
        told.contains("The pool is ready at")
            && told.contains("warning: cannot register the pool in /etc/fstab")
            && told.contains(&line),
        "{told}"
    );
    assert_eq!(fs::read("/etc/fstab").ok(), before);
    let script = "mount --bind /etc /etc; mount -o remount,bind,ro /etc; \"$1\" pool init --config /dev/null 2>&1";
    let output = in_namespace(&host, script, &host.folder, &["doctor"]).output().unwrap();
    let told = said(&output);
    assert!(told.contains("ok       pool"), "{told}");
}

#[test]
fn settings_that_contradict_each_other_are_refused_by_all_commands() {
    let host = Host::new(&Options::default());
    let image = host.folder.join("pool/pool.img");
    // 78: systemd does not start a service again whose configuration is wrong.
    for (args, status) in [(&["pool", "init"][..], 1), (&["serve"], 78), (&["doctor"], 1)] {
        let output = host.scaleboxd(args).env("POOL_IMAGE", &image).output().unwrap();
        let told = said(&output);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {told}");
        assert!(
            told.contains("POOL_IMAGE=") && told.contains("it must not lie in DATA_DIR"),
            "{args:?}: {told}"
        );
    }
}

#[test]
fn a_pool_that_is_not_mounted_is_waited_for_and_not_made_anew() {
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

    // A status that systemd takes for one that may pass.
    let told = host.scaleboxd_fails(&["serve"]);
    assert!(
        told.contains("the state knows 1 VMs")
            && told.contains("do not make a new one")
            && told.contains("as soon as it is mounted"),
        "{told}"
    );
    let told = host.scaleboxd_fails(&["pool", "init"]);
    assert!(told.contains("1 VM disks should be in it"), "{told}");
    assert!(!image.exists());

    fs::rename(&away, &image).unwrap();
    run("mount", &["-o", "loop", text(&image), text(&pool)]);
    host.serve();
    assert_eq!(host.client().vm(&vm.id).unwrap().status, vm.status);
}

#[test]
fn requests_below_an_unmounted_pool_are_answered_503() {
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
    // As it was mounted: the daemon that comes next finds it so.
    assert!(host.terminate().success());
    host.scaleboxd_ok(&["pool", "init"]);
    host.serve();
    assert_eq!(host.client().vm(&vm.id).unwrap().id, vm.id);
    host.client().delete_vm(&vm.id).unwrap();
}

#[test]
fn a_daemon_starts_with_odd_entries_in_its_pool_and_leaves_them() {
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

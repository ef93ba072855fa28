//! Builds the real template, or takes it from the cache, and checks its content. The cache is
//! `SCALEBOX_CACHE`, by default a directory next to the test binaries. The daemon's tests boot the
//! template.
#![allow(clippy::unwrap_used, clippy::panic, reason = "an error fails the test")]

use scalebox_images::{Artifacts, Recipe, build};
use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let all = [output.stdout, output.stderr].concat();
    let all = String::from_utf8_lossy(&all).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {all}");
    all
}

/// Reads an ext4 image without mounting it.
struct Image<'a>(&'a str);

impl Image<'_> {
    fn query(&self, request: &str) -> String {
        output("debugfs", &["-R", request, self.0])
    }

    fn cat(&self, path: &str) -> String {
        let text = self.query(&format!("cat {path}"));
        assert!(!text.contains("File not found"), "{path}: {text}");
        // debugfs writes its version to standard error; standard output comes before it.
        text.split("debugfs 1.").next().unwrap().to_owned()
    }

    fn has(&self, path: &str) -> bool {
        !self.query(&format!("stat {path}")).contains("File not found")
    }

    fn stat(&self, path: &str) -> String {
        let stat = self.query(&format!("stat {path}"));
        assert!(!stat.contains("File not found"), "{path}: {stat}");
        stat
    }
}

fn template() -> Artifacts {
    // As scaleboxd does: permissions in the guest must not depend on the umask.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let target_tmp = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let cache = env::var_os("SCALEBOX_CACHE").map_or(target_tmp.join("scalebox-cache"), PathBuf::from);
    let work = tempfile::tempdir_in(&target_tmp).unwrap();
    let made = build(&Recipe::default(), work.path(), Some(&cache), &mut ()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        fs::read_dir(work.path()).unwrap().count(),
        0,
        "the build leaves nothing in its work directory"
    );
    made
}

#[test]
fn the_template_is_complete_and_has_no_identity() {
    let made = template();
    let path = made.rootfs.to_str().unwrap();
    let image = Image(path);

    check_file_system(&made.rootfs);
    check_account(&image);
    check_no_identity(&image);
    check_units_and_modules(&image);
    check_boot_files(&made);
}

fn check_file_system(rootfs: &Path) {
    let path = rootfs.to_str().unwrap();
    output("e2fsck", &["-f", "-n", path]);
    let size = fs::metadata(rootfs).unwrap();
    assert_eq!(size.len(), 2 << 30);
    assert!(size.blocks() * 512 < 400 << 20, "{} MiB on disk", size.blocks() / 2048);
    let header = output("dumpe2fs", &["-h", path]);
    for line in ["scalebox-root", "noinit_itable", "resize_inode"] {
        assert!(header.contains(line), "{line}: {header}");
    }
    assert!(
        header
            .lines()
            .any(|line| line.starts_with("Filesystem state:") && line.ends_with("clean"))
    );

    // The image is grown without a check in between, like a VM's disk.
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let disk = disk.to_str().unwrap();
    output("cp", &["--sparse=always", path, disk]);
    output("resize2fs", &[disk, "100G"]);
    output("e2fsck", &["-f", "-n", disk]);
}

fn check_account(image: &Image) {
    let passwd = image.cat("/etc/passwd");
    assert!(passwd.contains("user:x:1000:1000::/home/user:/bin/bash"), "{passwd}");
    assert!(image.cat("/etc/shadow").contains("user:*:"), "the password is locked");
    assert!(image.stat("/etc/sudoers.d/scalebox").contains("Mode:  0440"));
    let sshd = image.cat("/etc/ssh/sshd_config.d/scalebox.conf");
    for line in [
        "PasswordAuthentication no",
        "PermitRootLogin no",
        "/run/scalebox/authorized_keys/%u",
    ] {
        assert!(sshd.contains(line), "{line}: {sshd}");
    }
}

fn check_no_identity(image: &Image) {
    assert!(!image.query("ls -p /etc/ssh").contains("ssh_host_"), "host keys");
    assert_eq!(image.cat("/etc/machine-id"), "");
    for path in [
        "/etc/hostname",
        "/var/lib/dbus/machine-id",
        "/var/lib/systemd/random-seed",
        "/var/lib/scalebox/instance-id",
        "/var/log/journal",
        "/home/user/.ssh",
    ] {
        assert!(!image.has(path), "{path}");
    }
    let resolver = image.stat("/etc/resolv.conf");
    assert!(resolver.contains("../run/scalebox/resolv.conf"), "{resolver}");
}

fn check_units_and_modules(image: &Image) {
    for (path, content) in [
        ("/usr/lib/systemd/system/scalebox-seed.service", "apply-seed"),
        ("/usr/lib/scalebox/apply-seed", "cidata"),
        ("/usr/lib/udev/rules.d/90-scalebox-grow-root.rules", "RESIZE"),
        (
            "/usr/lib/udev/rules.d/90-scalebox-agent-vsock.rules",
            "scalebox-agent-vsock.service",
        ),
        ("/usr/lib/systemd/system/scalebox-agent-vsock.service", "vsock-listen"),
        (
            "/usr/lib/systemd/system/scalebox-poweroff.service",
            "SuccessAction=reboot-force",
        ),
        ("/usr/lib/tmpfiles.d/scalebox-static-nodes.conf", "/dev/net/tun"),
    ] {
        assert!(image.cat(path).contains(content), "{path}");
    }
    for wanted in [
        "/etc/systemd/system/sysinit.target.wants/scalebox-seed.service",
        "/etc/systemd/system/sysinit.target.wants/ssh.service",
        "/etc/systemd/system/multi-user.target.wants/systemd-networkd.service",
        "/etc/systemd/system/multi-user.target.wants/scalebox-grow-root.service",
        "/etc/systemd/system/poweroff.target.wants/scalebox-poweroff.service",
        "/usr/sbin/qemu-ga",
        "/usr/sbin/sshd",
    ] {
        assert!(image.has(wanted), "{wanted}");
    }
    let masked = image.stat("/etc/systemd/system/apt-daily.timer");
    assert!(masked.contains("/dev/null"), "{masked}");

    let modules = image.query("ls -p /usr/lib/modules");
    let version = modules
        .split('/')
        .find(|word| word.contains("-cloud-amd64"))
        .unwrap_or_else(|| panic!("{modules}"));
    for file in [
        "modules.dep.bin",
        "kernel/fs/overlayfs/overlay.ko",
        "kernel/drivers/net/virtio_net.ko",
    ] {
        assert!(image.has(&format!("/usr/lib/modules/{version}/{file}")), "{file}");
    }
    for (path, mode) in [
        (format!("/usr/lib/modules/{version}"), "Mode:  0755"),
        (format!("/usr/lib/modules/{version}/modules.dep.bin"), "Mode:  0644"),
        ("/etc/systemd/system/sysinit.target.wants".to_owned(), "Mode:  0755"),
        ("/etc/systemd/system/dbus.service.d".to_owned(), "Mode:  0755"),
        ("/var/lib/scalebox".to_owned(), "Mode:  0755"),
    ] {
        let stat = image.stat(&path);
        assert!(stat.contains(mode), "all users may read {path}: {stat}");
    }
}

fn check_boot_files(made: &Artifacts) {
    assert!(
        fs::read(&made.kernel).unwrap().starts_with(b"\x7fELF"),
        "the kernel is decompressed"
    );
    let list = Command::new("cpio")
        .args(["--list", "--quiet"])
        .stdin(fs::File::open(&made.initrd).unwrap())
        .output()
        .unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let modules = Command::new("debugfs")
        .args(["-R", "ls -p /", made.modules.to_str().unwrap()])
        .output()
        .unwrap();
    let modules = String::from_utf8_lossy(&modules.stdout).into_owned();
    assert!(
        modules.contains("/modules.dep.bin/") && modules.contains("/kernel/"),
        "{modules}"
    );
    for file in [
        "dev/console",
        "modules/order",
        "modules/virtio_blk.ko",
        "modules/vmw_vsock_virtio_transport.ko",
        "modules/vfat.ko",
    ] {
        assert!(list.lines().any(|line| line == file), "{file}: {list}");
    }
}

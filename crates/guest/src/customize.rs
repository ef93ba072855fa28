//! Making the installed Debian a guest: account, units, drivers, and nothing that belongs to one
//! machine only.

use crate::command::{Program, run};
use crate::embedded;
use crate::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

/// Units of ours, and of Debian's that are off by default, that start with a guest.
const ENABLED_UNITS: [&str; 5] = [
    "scalebox-poweroff.service",
    "scalebox-seed.service",
    "scalebox-grow-root.service",
    "systemd-networkd.service",
    "ssh.service",
];

/// What the build or its packages leave that would be the same in every clone, or is of no use in
/// one.
const REMOVED: [&str; 13] = [
    // Made at the first boot.
    "etc/hostname",
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
    // mmdebstrap's own; ours is beside it.
    "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "etc/apt/apt.conf.d/99mmdebstrap",
    // Its presence makes the journal persistent.
    "var/log/journal",
    // Points modules-load.d at the empty /etc/modules: a unit run for nothing at each boot.
    "etc/modules-load.d/modules.conf",
    // The message of the day: programs run before each login's first prompt.
    "etc/motd",
    "etc/update-motd.d/10-uname",
    "var/log/apt",
    "var/log/dpkg.log",
    "var/log/alternatives.log",
    "var/log/bootstrap.log",
];

/// Turns the root below `root` into a guest's. `kernel` holds the unpacked kernel package with the
/// modules of `version`.
pub(crate) fn furnish(root: &Path, kernel: &Path, version: &str) -> Result<(), Error> {
    install_modules(root, kernel, version)?;
    for file in embedded::IN_GUEST {
        write(root, file.path, file.mode, file.content)?;
    }
    add_account(root)?;
    for path in REMOVED {
        remove(&root.join(path))?;
    }
    remove_host_keys(root)?;
    write(root, "etc/machine-id", 0o444, "")?;
    link("../run/scalebox/resolv.conf", &root.join("etc/resolv.conf"))?;
    make_dir(&root.join("var/lib/scalebox"))?;
    choose_units(root)?;
    // systemd compares these with /usr and would run sysusers, ldconfig and others in every clone's
    // first boot.
    write(root, "etc/.updated", 0o644, "")?;
    write(root, "var/.updated", 0o644, "")
}

fn install_modules(root: &Path, kernel: &Path, version: &str) -> Result<(), Error> {
    let target = root.join("usr/lib/modules").join(version);
    make_dir(&root.join("usr/lib/modules"))?;
    let source = kernel.join("lib/modules").join(version);
    fs::rename(&source, &target).map_err(Error::io("move the modules to", &target))?;
    chroot(root, &["depmod", "-a", version])?;
    let list = target.join("modules.devname");
    let devname = fs::read_to_string(&list).map_err(Error::io("read", &list))?;
    write(
        root,
        "usr/lib/tmpfiles.d/scalebox-static-nodes.conf",
        0o644,
        &static_nodes(&devname),
    )
}

/// The device nodes by which a module is loaded when they are opened (`/dev/fuse`, `/dev/net/tun`),
/// as tmpfiles.d(5) lines: what `kmod static-nodes` prints for the kernel that runs, for the one
/// that will. Lines of `modules.devname` are `MODULE NAME {c|b}MAJOR:MINOR`.
fn static_nodes(devname: &str) -> String {
    let mut lines = String::from("# Made of modules.devname; stands in for kmod-static-nodes.service.\n");
    for line in devname.lines().filter(|line| !line.starts_with('#')) {
        let mut fields = line.split_whitespace().skip(1);
        let (Some(name), Some(numbers)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (kind, numbers) = numbers.split_at(1);
        if let Some((dir, _)) = name.rsplit_once('/') {
            lines.push_str(&format!("d /dev/{dir} 0755 - - -\n"));
        }
        lines.push_str(&format!("{kind}! /dev/{name} 0600 - - - {numbers}\n"));
    }
    lines
}

/// `user`: logs in by key alone (`*` is no password's hash, yet does not lock the account for PAM),
/// may become root, may read the journal.
fn add_account(root: &Path) -> Result<(), Error> {
    chroot(
        root,
        &[
            "useradd",
            "--create-home",
            "--uid=1000",
            "--shell=/bin/bash",
            "--password=*",
            "--groups=adm,sudo,systemd-journal",
            "user",
        ],
    )
}

fn remove_host_keys(root: &Path) -> Result<(), Error> {
    let dir = root.join("etc/ssh");
    for entry in fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
        let entry = entry.map_err(Error::io("read", &dir))?;
        if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn choose_units(root: &Path) -> Result<(), Error> {
    let units = root.join("etc/systemd/system");
    for unit in embedded::entries(embedded::MASKED_UNITS) {
        link("/dev/null", &units.join(unit))?;
    }
    let generators = root.join("etc/systemd/system-generators");
    make_dir(&generators)?;
    for generator in embedded::entries(embedded::MASKED_GENERATORS) {
        link("/dev/null", &generators.join(generator))?;
    }
    // The package has enabled its own ssh.service, which ours replaces and wants elsewhere.
    remove(&units.join("multi-user.target.wants/ssh.service"))?;
    let mut enable = vec!["systemctl", "--quiet", "enable"];
    enable.extend(ENABLED_UNITS);
    chroot(root, &enable)?;
    chroot(root, &["systemctl", "--quiet", "set-default", "multi-user.target"])
}

fn chroot(root: &Path, argv: &[&str]) -> Result<(), Error> {
    let args = std::iter::once(root.as_os_str()).chain(argv.iter().map(|arg| arg.as_ref()));
    run(Program::Chroot, args)?;
    Ok(())
}

/// A folder of the guest, with those on the way to it: for everybody in the guest, whatever this
/// process' umask.
fn make_dir(path: &Path) -> Result<(), Error> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    fs::create_dir(path).map_err(Error::io("create", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(Error::io("set the mode of", path))
}

fn write(root: &Path, path: &str, mode: u32, content: &str) -> Result<(), Error> {
    let path = root.join(path);
    if let Some(dir) = path.parent() {
        make_dir(dir)?;
    }
    // A link there would be followed, and an absolute one leads out of the guest's root.
    remove(&path)?;
    fs::write(&path, content).map_err(Error::io("write", &path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(Error::io("set the mode of", &path))
}

fn link(target: &str, path: &Path) -> Result<(), Error> {
    remove(path)?;
    symlink(target, path).map_err(Error::io("link", path))
}

/// Removes a file, link or directory of the guest's root; it need not be there.
fn remove(path: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(path) {
        Ok(what) if what.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn static_nodes_are_those_that_kmod_would_print() {
        let devname = "# Device nodes to trigger on-demand module loading.\nfuse fuse c10:229\ntun net/tun c10:200\n";
        let lines: Vec<String> = static_nodes(devname).lines().skip(1).map(str::to_owned).collect();
        assert_eq!(
            lines,
            [
                "c! /dev/fuse 0600 - - - 10:229",
                "d /dev/net 0755 - - -",
                "c! /dev/net/tun 0600 - - - 10:200"
            ]
        );
    }
}

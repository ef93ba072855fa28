//! Turns the installed Debian into a guest: account, units, drivers, and no state of a single
//! machine.

use crate::embedded;
use crate::error::Error;
use crate::programs::{CHROOT, run};
use crate::scrub;
use rustix::fs::Mode;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Units that are enabled in a guest: our own, and Debian's that are disabled by default.
const ENABLED_UNITS: [&str; 5] = [
    "scalebox-poweroff.service",
    "scalebox-seed.service",
    "scalebox-grow-root.service",
    "systemd-networkd.service",
    "ssh.service",
];

/// Files that the build or its packages leave, and that are useless in a guest. Those of one
/// machine only are in [`scrub`].
const REMOVED_PATHS: [&str; 10] = [
    // mmdebstrap's file; ours is next to it.
    "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "etc/apt/apt.conf.d/99mmdebstrap",
    // The presence of this folder makes the journal persistent.
    "var/log/journal",
    // Makes modules-load.d read the empty /etc/modules: a useless unit at each boot.
    "etc/modules-load.d/modules.conf",
    // The message of the day: runs programs before the first prompt of each login.
    "etc/motd",
    "etc/update-motd.d/10-uname",
    "var/log/apt",
    "var/log/dpkg.log",
    "var/log/alternatives.log",
    "var/log/bootstrap.log",
];

/// Turns the installation below `root` into a guest's root file system. `kernel` is the unpacked
/// kernel package with the modules of `version`.
pub(crate) fn customize(root: &Path, kernel: &Path, version: &str) -> Result<(), Error> {
    install_modules(root, kernel, version)?;
    for file in embedded::GUEST_FILES {
        write(root, file.path, file.mode, file.content)?;
    }
    add_account(root)?;
    for path in REMOVED_PATHS {
        remove(&root.join(path))?;
    }
    remove_identity(root)?;
    write(root, "etc/machine-id", 0o444, "")?;
    link("../run/scalebox/resolv.conf", &root.join("etc/resolv.conf"))?;
    make_dir(&root.join("var/lib/scalebox"))?;
    choose_units(root)?;
    // systemd compares the time stamps of these files with /usr, and would run sysusers, ldconfig
    // and others at the first boot of every clone.
    write(root, "etc/.updated", 0o644, "")?;
    write(root, "var/.updated", 0o644, "")
}

/// Returns the folder of the modules of `version` below `root`.
pub(crate) fn modules_dir(root: &Path, version: &str) -> PathBuf {
    root.join("usr/lib/modules").join(version)
}

fn install_modules(root: &Path, kernel: &Path, version: &str) -> Result<(), Error> {
    let target = modules_dir(root, version);
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

/// Returns tmpfiles.d(5) lines for device nodes that load a module when opened (`/dev/fuse`,
/// `/dev/net/tun`). `kmod static-nodes` prints them for the running kernel; this function does so
/// for the guest's. Lines of `modules.devname` are `MODULE NAME {c|b}MAJOR:MINOR`.
fn static_nodes(devname: &str) -> String {
    let mut lines = String::from("# Generated from modules.devname; replaces kmod-static-nodes.service.\n");
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

/// Adds the account `user`. It logs in by key only (the password `*` matches no hash, but does not
/// lock the account for PAM), may use sudo and may read the journal.
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

/// Removes the files that belong to one machine only, and would be identical in every clone.
fn remove_identity(root: &Path) -> Result<(), Error> {
    for path in scrub::REMOVED_FILES {
        remove(&inside(root, path))?;
    }
    for (folder, prefixes) in scrub::REMOVED_BY_PREFIX {
        let dir = inside(root, folder);
        for entry in fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
            let entry = entry.map_err(Error::io("read", &dir))?;
            let name = entry.file_name();
            if prefixes.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                remove(&entry.path())?;
            }
        }
    }
    Ok(())
}

/// Returns the path below `root` of an absolute path in the guest.
fn inside(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
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
    // The package enabled its own ssh.service for another target; ours replaces it.
    remove(&units.join("multi-user.target.wants/ssh.service"))?;
    let mut enable = vec!["systemctl", "--quiet", "enable"];
    enable.extend(ENABLED_UNITS);
    chroot(root, &enable)?;
    chroot(root, &["systemctl", "--quiet", "set-default", "multi-user.target"])
}

fn chroot(root: &Path, argv: &[&str]) -> Result<(), Error> {
    // Files that it creates belong to the guest and must be readable by all users there.
    let mask = Mode::WGRP | Mode::WOTH;
    run(CHROOT).umask(mask).args([root]).args(argv).stdout()?;
    Ok(())
}

/// Creates a folder of the guest and its parents, readable by all users of the guest. The modes do
/// not depend on this process' umask.
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
    // Writing would follow a symbolic link, and an absolute one leads out of the guest's root.
    remove(&path)?;
    fs::write(&path, content).map_err(Error::io("write", &path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(Error::io("set the mode of", &path))
}

fn link(target: &str, path: &Path) -> Result<(), Error> {
    remove(path)?;
    symlink(target, path).map_err(Error::io("link", path))
}

/// Removes a file, link or directory of the guest's root, if it exists.
fn remove(path: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
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
    fn static_nodes_match_the_output_of_kmod() {
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

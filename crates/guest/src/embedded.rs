//! The files that go into a guest, as they lie under `files/` in this crate: every one can be read,
//! checked and edited there.

/// A file of the guest.
#[derive(Debug)]
pub(crate) struct GuestFile {
    /// Where it goes, from the guest's root.
    pub(crate) path: &'static str,
    /// Its permissions; it belongs to root.
    pub(crate) mode: u32,
    pub(crate) content: &'static str,
}

macro_rules! in_guest {
    ($mode:literal $path:literal) => {
        GuestFile {
            path: $path,
            mode: $mode,
            content: include_str!(concat!("../files/root/", $path)),
        }
    };
    ($mode:literal $path:literal = $source:expr) => {
        GuestFile {
            path: $path,
            mode: $mode,
            content: $source,
        }
    };
}

/// Puts a unit behind sshd and the network.
const BEHIND_SSH: &str = include_str!("../files/behind-ssh.conf");

/// What dpkg leaves out of packages: when the template is built, and in the guest from then on.
pub(crate) const DPKG_OPTIONS: &str = include_str!("../files/root/etc/dpkg/dpkg.cfg.d/scalebox");

/// All files that are put into the guest beside those of its packages.
pub(crate) const IN_GUEST: &[GuestFile] = &[
    in_guest!(0o644 "etc/default/locale"),
    in_guest!(0o644 "etc/dpkg/dpkg.cfg.d/scalebox" = DPKG_OPTIONS),
    in_guest!(0o644 "etc/fstab"),
    in_guest!(0o644 "etc/hosts"),
    in_guest!(0o644 "etc/modprobe.d/scalebox-agent-vsock.conf"),
    in_guest!(0o644 "etc/ssh/sshd_config.d/scalebox.conf"),
    in_guest!(0o440 "etc/sudoers.d/scalebox"),
    in_guest!(0o644 "etc/systemd/journald.conf.d/scalebox.conf"),
    in_guest!(0o644 "etc/systemd/system/dbus.service.d/scalebox.conf" = BEHIND_SSH),
    in_guest!(0o644 "etc/systemd/system/qemu-guest-agent.service.d/scalebox.conf" = BEHIND_SSH),
    in_guest!(0o644 "etc/systemd/system/ssh.service"),
    in_guest!(0o644 "etc/systemd/system/systemd-logind.service.d/scalebox.conf" = BEHIND_SSH),
    in_guest!(0o644 "etc/systemd/system/systemd-tmpfiles-setup.service.d/scalebox.conf" = BEHIND_SSH),
    in_guest!(0o644 "etc/systemd/system/systemd-udev-trigger.service.d/scalebox.conf"),
    in_guest!(0o644 "etc/tmpfiles.d/systemd-nologin.conf"),
    in_guest!(0o755 "usr/lib/scalebox/apply-seed"),
    in_guest!(0o755 "usr/lib/scalebox/grow-root"),
    in_guest!(0o644 "usr/lib/systemd/system/scalebox-agent-vsock.service"),
    in_guest!(0o644 "usr/lib/systemd/system/scalebox-grow-root.service"),
    in_guest!(0o644 "usr/lib/systemd/system/scalebox-poweroff.service"),
    in_guest!(0o644 "usr/lib/systemd/system/scalebox-seed.service"),
    in_guest!(0o644 "usr/lib/udev/rules.d/90-scalebox-agent-vsock.rules"),
    in_guest!(0o644 "usr/lib/udev/rules.d/90-scalebox-grow-root.rules"),
];

/// The packages of a guest beyond Debian's `minbase`.
pub(crate) const PACKAGES: &str = include_str!("../files/packages");
/// The units that do not run in a guest.
pub(crate) const MASKED_UNITS: &str = include_str!("../files/masked-units");
/// The generators that do not run in a guest.
pub(crate) const MASKED_GENERATORS: &str = include_str!("../files/masked-generators");
/// The hook of mmdebstrap that fetches kernel and busybox.
pub(crate) const FETCH_KERNEL: &str = include_str!("../files/fetch-kernel");
/// `/init` of the initramfs.
pub(crate) const INITRAMFS_INIT: &str = include_str!("../files/initramfs/init");
/// The kernel modules of the initramfs, in load order.
pub(crate) const INITRAMFS_MODULES: &str = include_str!("../files/initramfs/modules");

/// What decides, beside [`IN_GUEST`], on what comes out of a build.
pub(crate) const BUILD_INPUTS: &[&str] = &[
    PACKAGES,
    MASKED_UNITS,
    MASKED_GENERATORS,
    FETCH_KERNEL,
    INITRAMFS_INIT,
    INITRAMFS_MODULES,
];

/// The entries of a list of this crate: a line each, `#` starts a comment.
pub(crate) fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    fn collect(dir: &Path, root: &Path, into: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, root, into);
            } else {
                into.insert(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }

    #[test]
    fn every_file_of_the_guest_s_root_goes_into_the_guest() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("files/root");
        let mut there = BTreeSet::new();
        collect(&root, &root, &mut there);
        let table: BTreeSet<String> = IN_GUEST.iter().map(|file| file.path.to_owned()).collect();
        assert_eq!(table.len(), IN_GUEST.len(), "a path stands twice in the table");
        let forgotten: Vec<_> = there.difference(&table).collect();
        assert!(forgotten.is_empty(), "not in IN_GUEST: {forgotten:?}");
    }

    #[test]
    fn lists_are_read_without_their_comments() {
        let modules: Vec<_> = entries(INITRAMFS_MODULES).collect();
        assert_eq!(modules[..4], ["virtio_ring", "virtio", "virtio_mmio", "virtio_blk"]);
        assert!(entries(PACKAGES).all(|package| !package.contains([' ', '#'])));
    }
}

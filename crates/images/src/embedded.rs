//! Embeds the files under `files/` of this crate, where they can be read, checked and edited.

/// A file of the guest.
#[derive(Debug)]
pub(crate) struct GuestFile {
    /// Path below the guest's root.
    pub(crate) path: &'static str,
    /// Permissions; the owner is root.
    pub(crate) mode: u32,
    pub(crate) content: &'static str,
}

macro_rules! guest_file {
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

/// A drop-in that orders a unit after sshd and the network.
const AFTER_SSH: &str = include_str!("../files/after-ssh.conf");

/// Parts of packages that dpkg does not install, when the template is built and later in the guest.
pub(crate) const DPKG_OPTIONS: &str = include_str!("../files/root/etc/dpkg/dpkg.cfg.d/scalebox");

/// All files that are added to those of the guest's packages.
pub(crate) const GUEST_FILES: &[GuestFile] = &[
    guest_file!(0o644 "etc/default/locale"),
    guest_file!(0o644 "etc/dpkg/dpkg.cfg.d/scalebox" = DPKG_OPTIONS),
    guest_file!(0o644 "etc/fstab"),
    guest_file!(0o644 "etc/hosts"),
    guest_file!(0o644 "etc/modprobe.d/scalebox-agent-vsock.conf"),
    guest_file!(0o644 "etc/ssh/sshd_config.d/scalebox.conf"),
    guest_file!(0o440 "etc/sudoers.d/scalebox"),
    guest_file!(0o644 "etc/systemd/journald.conf.d/scalebox.conf"),
    guest_file!(0o644 "etc/systemd/system/dbus.service.d/scalebox.conf" = AFTER_SSH),
    guest_file!(0o644 "etc/systemd/system/qemu-guest-agent.service.d/scalebox.conf" = AFTER_SSH),
    guest_file!(0o644 "etc/systemd/system/ssh.service"),
    guest_file!(0o644 "etc/systemd/system/systemd-logind.service.d/scalebox.conf" = AFTER_SSH),
    guest_file!(0o644 "etc/systemd/system/systemd-tmpfiles-setup.service.d/scalebox.conf" = AFTER_SSH),
    guest_file!(0o644 "etc/systemd/system/systemd-udev-trigger.service.d/scalebox.conf"),
    guest_file!(0o644 "etc/tmpfiles.d/systemd-nologin.conf"),
    guest_file!(0o755 "usr/lib/scalebox/apply-seed"),
    guest_file!(0o755 "usr/lib/scalebox/grow-root"),
    guest_file!(0o644 "usr/lib/systemd/system/scalebox-agent-vsock.service"),
    guest_file!(0o644 "usr/lib/systemd/system/scalebox-grow-root.service"),
    guest_file!(0o644 "usr/lib/systemd/system/scalebox-poweroff.service"),
    guest_file!(0o644 "usr/lib/systemd/system/scalebox-seed.service"),
    guest_file!(0o644 "usr/lib/udev/rules.d/90-scalebox-agent-vsock.rules"),
    guest_file!(0o644 "usr/lib/udev/rules.d/90-scalebox-grow-root.rules"),
];

/// The packages of a guest in addition to Debian's `minbase`.
pub(crate) const PACKAGES: &str = include_str!("../files/packages");
/// The additional packages of the template `debian-dev`.
pub(crate) const DEV_PACKAGES: &str = include_str!("../files/packages-dev");
/// Units that do not run in a guest.
pub(crate) const MASKED_UNITS: &str = include_str!("../files/masked-units");
/// Generators that do not run in a guest.
pub(crate) const MASKED_GENERATORS: &str = include_str!("../files/masked-generators");
/// The mmdebstrap hook that downloads the kernel.
pub(crate) const FETCH_KERNEL: &str = include_str!("../files/fetch-kernel");
/// The kernel modules of the initramfs, in load order.
pub(crate) const INITRAMFS_MODULES: &str = include_str!("../files/initramfs/modules");

/// Inputs of a build in addition to [`GUEST_FILES`].
pub(crate) const BUILD_INPUTS: &[&str] = &[
    PACKAGES,
    MASKED_UNITS,
    MASKED_GENERATORS,
    FETCH_KERNEL,
    INITRAMFS_MODULES,
];

/// Returns the entries of a list: one per line, without comments (`#`).
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
    fn every_file_under_root_is_listed() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("files/root");
        let mut there = BTreeSet::new();
        collect(&root, &root, &mut there);
        let table: BTreeSet<String> = GUEST_FILES.iter().map(|file| file.path.to_owned()).collect();
        assert_eq!(table.len(), GUEST_FILES.len(), "a path is listed twice");
        let missing: Vec<_> = there.difference(&table).collect();
        assert!(missing.is_empty(), "not in GUEST_FILES: {missing:?}");
    }

    #[test]
    fn lists_are_parsed_without_comments() {
        let modules: Vec<_> = entries(INITRAMFS_MODULES).collect();
        assert_eq!(modules[..4], ["virtio_ring", "virtio", "virtio_mmio", "virtio_blk"]);
        for list in [PACKAGES, DEV_PACKAGES] {
            assert!(entries(list).all(|package| !package.contains([' ', '#'])));
        }
    }
}

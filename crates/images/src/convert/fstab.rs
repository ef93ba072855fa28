//! The mounts of a disk image, of which only the root partition becomes a template.

/// The file with the mounts of a system, in its root file system.
pub const FSTAB: &str = "/etc/fstab";

/// The root disk of every VM.
const ROOT_DEVICE: &str = "/dev/vda";

/// Before a line that is no longer used.
const COMMENT: &str = "# not imported: ";

/// Ways to name a file system that work on every disk, because they are part of it.
const BY_CONTENT: [&str; 4] = ["UUID=", "LABEL=", "/dev/disk/by-uuid/", "/dev/disk/by-label/"];
/// Ways to name a partition.
const BY_PARTITION: [&str; 3] = ["PARTUUID=", "PARTLABEL=", "/dev/"];

/// Returns a line of [`FSTAB`] for a disk that has only the root file system. Mounts of other
/// partitions become comments, because systemd would wait for them and then stop the boot; a root
/// that is named by its partition becomes `/dev/vda`.
pub fn without_partitions(line: &[u8]) -> Option<Vec<u8>> {
    Some(changed(line).unwrap_or_else(|| line.to_vec()))
}

fn changed(line: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(line).ok()?;
    let mut fields = text.split_ascii_whitespace();
    let (source, target) = (fields.next()?, fields.next()?);
    let plain = source.replace('"', "");
    let starts = |ways: &[&str]| ways.iter().any(|way| plain.starts_with(way));
    let is_by_content = starts(&BY_CONTENT);
    if source.starts_with('#') || !(is_by_content || starts(&BY_PARTITION)) {
        return None;
    }
    match target {
        "/" if is_by_content || source == ROOT_DEVICE => None,
        "/" => Some(text.replacen(source, ROOT_DEVICE, 1).into_bytes()),
        _ => Some([COMMENT.as_bytes(), line].concat()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(line: &str) -> String {
        let once = without_partitions(line.as_bytes()).unwrap();
        assert_eq!(
            without_partitions(&once).unwrap(),
            once,
            "a second pass changes nothing"
        );
        String::from_utf8(once).unwrap()
    }

    #[test]
    fn mounts_of_other_partitions_become_comments() {
        for line in [
            "PARTUUID=2c9b7d0e-01 /boot/efi vfat defaults 0 0\n",
            "LABEL=UEFI\t/boot/efi\tvfat\tumask=0077\t0 1\n",
            "UUID=\"0a1b\" none swap sw 0 0\n",
            "/dev/sda5 /home ext4 defaults 0 2",
            "/dev/mapper/vg-var /var ext4 defaults 0 2\n",
        ] {
            assert_eq!(left(line), format!("# not imported: {line}"));
        }
    }

    #[test]
    fn a_root_is_named_by_its_content_or_its_disk() {
        let options = "/ ext4 rw,discard,errors=remount-ro,x-systemd.growfs 0 1\n";
        for source in ["PARTUUID=2c9b7d0e-01", "PARTLABEL=root", "/dev/sda1", "/dev/vda"] {
            assert_eq!(left(&format!("{source} {options}")), format!("/dev/vda {options}"));
        }
        for source in ["LABEL=cloudimg-rootfs", "UUID=0a1b", "/dev/disk/by-uuid/0a1b"] {
            let line = format!("{source} {options}");
            assert_eq!(left(&line), line);
        }
    }

    #[test]
    fn other_lines_stay() {
        for line in [
            "# PARTUUID=1 /boot/efi vfat\n",
            "\n",
            "PARTUUID=1\n",
            "tmpfs /tmp tmpfs nosuid 0 0\n",
            "server:/export /srv nfs _netdev 0 0\n",
            "/swapfile none swap sw 0 0\n",
        ] {
            assert_eq!(left(line), line);
        }
        assert_eq!(
            without_partitions(b"UUID=\xff / ext4\n").unwrap(),
            b"UUID=\xff / ext4\n"
        );
    }
}

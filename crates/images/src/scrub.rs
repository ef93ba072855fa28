//! Lists the parts of a disk that belong to one machine only. They must not be in a template.
//!
//! Both kinds of templates use these lists: templates built from packages, which [`customize`]
//! prepares, and templates made from a VM's disk.
//!
//! [`customize`]: crate::customize

/// Files to remove: the guest creates them again at its first boot or when needed.
pub const REMOVED_FILES: [&str; 13] = [
    "/etc/hostname",
    "/etc/machine-info",
    "/etc/mailname",
    "/etc/hostid",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/var/lib/scalebox/instance-id",
    "/var/lib/NetworkManager/secret_key",
    // Files that cloud-init created from the old seed.
    "/etc/netplan/50-cloud-init.yaml",
    "/etc/network/interfaces.d/50-cloud-init",
    "/etc/systemd/network/10-cloud-init-eth0.network",
    "/var/lib/urandom/random-seed",
];

/// Files to truncate. An empty machine id makes systemd generate a new one.
pub const EMPTIED_FILES: [&str; 4] = ["/etc/machine-id", "/var/log/wtmp", "/var/log/btmp", "/var/log/lastlog"];

/// Files to remove by folder and name prefix.
pub const REMOVED_BY_PREFIX: [(&str, &[&str]); 2] = [
    ("/etc/ssh", &["ssh_host_"]),
    (
        "/var/log",
        &[
            "syslog",
            "messages",
            "secure",
            "auth.log",
            "daemon.log",
            "kern.log",
            "user.log",
            "cloud-init",
            "dmesg",
            "boot.log",
        ],
    ),
];

/// Folders to recreate empty, because their blocks contain names. The journal's are machine ids.
pub const RECREATED_FOLDERS: [&str; 5] = [
    "/var/log/journal",
    "/var/lib/dhcp",
    "/var/lib/dhclient",
    "/var/lib/cloud/instances",
    "/var/lib/cloud/sem",
];

/// The rest of cloud-init's state, which would make it skip the setup of a new guest.
pub const REMOVED_TREES: [&str; 2] = ["/var/lib/cloud/instance", "/var/lib/cloud/data"];

/// The file with the guest's host name.
pub const HOSTS: &str = "/etc/hosts";

/// The files with the guest's public SSH key; cloud images write it there. `*` stands for every
/// user.
pub const AUTHORIZED_KEYS: [&str; 2] = ["/root/.ssh/authorized_keys", "/home/*/.ssh/authorized_keys"];

/// Names in `/etc/hosts` of every machine; a guest's own host name can be one of them.
const COMMON_NAMES: [&str; 9] = [
    "localhost",
    "localhost4",
    "localhost6",
    "ip6-localhost",
    "ip6-loopback",
    "ip6-localnet",
    "ip6-mcastprefix",
    "ip6-allnodes",
    "ip6-allrouters",
];

fn short_name(name: &[u8]) -> &[u8] {
    name.split(|byte| *byte == b'.').next().unwrap_or_default()
}

/// Removes the guest's host name from a line of [`HOSTS`]; `None` if it has no other names.
pub fn without_host(line: &[u8], host: &[u8]) -> Option<Vec<u8>> {
    let is_common = COMMON_NAMES
        .iter()
        .any(|name| name.as_bytes().eq_ignore_ascii_case(host));
    let is_host = |name: &[u8]| !host.is_empty() && !is_common && short_name(name).eq_ignore_ascii_case(host);
    let (entry, comment) = match line.iter().position(|&byte| byte == b'#') {
        Some(at) => line.split_at(at),
        None => (line, &[][..]),
    };
    let words = |text: &'_ [u8]| -> Vec<Vec<u8>> {
        let words = text.split(|byte| byte.is_ascii_whitespace() || *byte == b'#');
        words.filter(|word| !word.is_empty()).map(<[u8]>::to_vec).collect()
    };
    let (names, remarks) = (words(entry), words(comment));
    if !names.iter().skip(1).chain(&remarks).any(|word| is_host(word)) {
        return Some(line.to_vec());
    }
    let left: Vec<Vec<u8>> = names
        .into_iter()
        .enumerate()
        .filter(|(nth, name)| *nth == 0 || !is_host(name))
        .map(|(_, name)| name)
        .collect();
    (left.len() > 1).then(|| [left.join(&b' '), b"\n".to_vec()].concat())
}

/// Returns a line of [`AUTHORIZED_KEYS`]; `None` if it has the key, however its type and comment
/// are spelled. `key` is a public key as in the file `id_ed25519.pub`.
pub fn without_key(line: &[u8], key: &str) -> Option<Vec<u8>> {
    // The key itself is the second word.
    let key = key.split_whitespace().nth(1).unwrap_or_default();
    let has_key = !key.is_empty() && line.windows(key.len()).any(|window| window == key.as_bytes());
    (!has_key).then(|| line.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_s_names_are_removed_from_hosts_and_common_names_stay() {
        let left = |line: &str, host: &str| {
            let left = without_host(line.as_bytes(), host.as_bytes());
            left.map(|line| String::from_utf8(line).unwrap())
        };
        let same = |line: &str, host: &str| assert_eq!(left(line, host).as_deref(), Some(line), "{host}");
        assert_eq!(left("127.0.1.1 box.lan box\n", "box"), None);
        assert_eq!(left("127.0.1.1\tBox", "box"), None);
        assert_eq!(left("# this is box\n", "box"), None);
        assert_eq!(
            left("127.0.0.1 localhost box box.lan # box\n", "box").unwrap(),
            "127.0.0.1 localhost\n"
        );
        for host in ["localhost", "ip6-localhost", "LOCALHOST", ""] {
            same("127.0.0.1 localhost\n", host);
            same("::1\tlocalhost ip6-localhost  ip6-loopback # all\n", host);
        }
        same("192.0.2.9 boxes other\n", "box");
        same("\n", "box");
    }

    #[test]
    fn only_lines_with_the_key_are_removed() {
        let key = "ssh-ed25519 AAAAC3Nza me@laptop";
        assert_eq!(without_key(b"ssh-ed25519   AAAAC3Nza other comment\n", key), None);
        let other = b"ssh-ed25519 AAAAC3Nzb me@laptop\n";
        assert_eq!(without_key(other, key).unwrap(), other);
        assert_eq!(without_key(other, "").unwrap(), other);
    }
}

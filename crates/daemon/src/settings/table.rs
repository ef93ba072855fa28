//! The table of all settings. Parsing, error messages, `scaleboxd settings`, the README and the
//! installer take keys, defaults and meanings from it.

use std::ops::RangeInclusive;

/// A setting: its name, its default, its form and its meaning.
#[derive(Debug)]
pub(super) struct Setting {
    /// Name in the environment and in the file.
    pub key: &'static str,
    /// The value that applies if the setting is not set.
    pub default: DefaultValue,
    /// The form of its values.
    pub form: Form,
    /// The meaning, for people; code is in backticks.
    pub meaning: &'static str,
}

/// The value that applies if a setting is not set.
#[derive(Debug)]
pub(super) enum DefaultValue {
    /// A fixed value, which is parsed like a value that is set.
    Fixed(&'static str),
    /// No fixed value; describes the value that applies.
    Depends(&'static str),
}

impl DefaultValue {
    /// Returns the value, or the description of the value that applies.
    pub(super) fn text(&self) -> &'static str {
        match self {
            DefaultValue::Fixed(text) | DefaultValue::Depends(text) => text,
        }
    }
}

/// The form of a setting's values.
#[derive(Debug)]
pub(super) enum Form {
    /// A whole number in this range.
    Number(RangeInclusive<u64>),
    /// A value must be one of these words.
    Word(&'static [&'static str]),
    /// An absolute path. Where the meaning mentions it, `none` is valid too.
    Path,
    /// Text with a parser of its own: a description.
    Text(&'static str),
}

impl Form {
    /// Describes the form, to complete "must be …".
    pub(super) fn describe(&self) -> String {
        match self {
            Form::Number(range) => format!("a whole number from {} to {}", range.start(), range.end()),
            Form::Word(words) => format!("one of {}", words.join(", ")),
            Form::Path => "an absolute path, starting with /".to_owned(),
            Form::Text(description) => (*description).to_owned(),
        }
    }
}

/// The minimum memory, in MiB, with which the Debian guest boots to a login.
pub(super) const MIN_MEM_MIB: u64 = 128;

/// The key of the token, the only setting whose value is never shown.
pub(super) const SECRET: &str = "API_TOKEN";

/// All settings, in the order in which they are listed.
pub(super) static SETTINGS: [Setting; 32] = [
    Setting {
        key: "STORAGE_SIZE",
        default: DefaultValue::Depends("80 % of the free space"),
        form: Form::Text("a size such as 100G or 1T"),
        meaning: "size of a new pool, such as `100G` or `1T`",
    },
    Setting {
        key: "POOL_AUTO_GROW",
        default: DefaultValue::Depends("`on`; `off` if `STORAGE_SIZE` is set"),
        form: Form::Word(&["on", "off"]),
        meaning: "`on` grows the pool automatically, up to 80 % of its host disk",
    },
    Setting {
        key: "POOL_LOW_WATER_GIB",
        default: DefaultValue::Fixed("10"),
        form: Form::Number(0..=65536),
        meaning: "free space below which the pool grows automatically",
    },
    Setting {
        key: "DEFAULT_DISK_SIZE_GIB",
        default: DefaultValue::Fixed("2"),
        form: Form::Number(1..=65536),
        meaning: "default size of a VM's disk",
    },
    Setting {
        key: "MAX_DISK_SIZE_GIB",
        default: DefaultValue::Fixed("100"),
        form: Form::Number(1..=65536),
        meaning: "maximum size of a VM's disk",
    },
    Setting {
        key: "STORAGE_BUFFER_GIB",
        default: DefaultValue::Fixed("2"),
        form: Form::Number(0..=65536),
        meaning: "space that is always kept free",
    },
    Setting {
        key: "OVERCOMMIT_RATIO",
        default: DefaultValue::Fixed("4"),
        form: Form::Text("a number such as 1 or 4"),
        meaning: "multiple of the pool's capacity that may be committed; 1 backs every committed byte",
    },
    Setting {
        key: "ACCOUNTING_SECONDS",
        default: DefaultValue::Fixed("60"),
        form: Form::Number(1..=86400),
        meaning: "how often disk usage is measured",
    },
    Setting {
        key: "DATA_DIR",
        default: DefaultValue::Fixed("/var/lib/scalebox"),
        form: Form::Path,
        meaning: "mount point of the pool",
    },
    Setting {
        key: "POOL_IMAGE",
        default: DefaultValue::Fixed("/var/lib/scalebox.img"),
        form: Form::Path,
        meaning: "backing image of the pool; `none` uses a folder on an existing btrfs or XFS",
    },
    Setting {
        key: "POOL_DEVICE",
        default: DefaultValue::Depends("none"),
        form: Form::Path,
        meaning: "a whole block device instead of an image, such as `/dev/disk/by-id/…`",
    },
    Setting {
        key: "STATE_DIR",
        default: DefaultValue::Fixed("/var/lib/scaleboxd"),
        form: Form::Path,
        meaning: "folder of the daemon's state",
    },
    Setting {
        key: "RUN_DIR",
        default: DefaultValue::Fixed("/run/scaleboxd"),
        form: Form::Path,
        meaning: "folder for the sockets of machines",
    },
    Setting {
        key: "FSTAB",
        default: DefaultValue::Fixed("/etc/fstab"),
        form: Form::Path,
        meaning: "file in which the pool's mount is registered; `none` leaves that to you",
    },
    Setting {
        key: "API_BIND",
        default: DefaultValue::Fixed("127.0.0.1"),
        form: Form::Text("an address such as 127.0.0.1 or 0.0.0.0"),
        meaning: "address that the API listens on; put a TLS proxy in front of it before you expose it",
    },
    Setting {
        key: "API_PORT",
        default: DefaultValue::Fixed("8080"),
        form: Form::Number(0..=65535),
        meaning: "port that the API listens on",
    },
    Setting {
        key: SECRET,
        default: DefaultValue::Depends("none: required"),
        form: Form::Text("printable ASCII without spaces, because it is sent in an HTTP header"),
        meaning: "the bearer token",
    },
    Setting {
        key: "HOST_IP",
        default: DefaultValue::Depends("address of the default route's interface"),
        form: Form::Text("an IPv4 address at which clients reach this host, such as 192.0.2.10"),
        meaning: "IPv4 address shown to clients",
    },
    Setting {
        key: "BRIDGE",
        default: DefaultValue::Fixed("scalebox0"),
        form: Form::Text("the name of a network interface"),
        meaning: "bridge of the guests' network",
    },
    Setting {
        key: "SUBNET",
        default: DefaultValue::Fixed("172.16.0.0/16"),
        form: Form::Text("a network such as 172.16.0.0/16"),
        meaning: "addresses of the guests' network",
    },
    Setting {
        key: "PORT_MIN",
        default: DefaultValue::Fixed("22001"),
        form: Form::Number(1024..=65535),
        meaning: "first host port for SSH",
    },
    Setting {
        key: "PORT_MAX",
        default: DefaultValue::Fixed("32000"),
        form: Form::Number(1024..=65535),
        meaning: "last host port for SSH",
    },
    Setting {
        key: "GUEST_DNS",
        default: DefaultValue::Depends("the host's resolvers"),
        form: Form::Text("IPv4 addresses, separated by commas"),
        meaning: "resolvers for guests, IPv4 addresses separated by commas; an address of the host itself works too",
    },
    Setting {
        key: "GUEST_DENY",
        default: DefaultValue::Fixed("private"),
        form: Form::Text("private, none, or networks such as 10.0.0.0/8, separated by commas"),
        meaning: "networks that guests cannot reach, in addition to the host, each other and link-local addresses: \
                  `private` for private networks, networks such as `10.0.0.0/8`, or `none`",
    },
    Setting {
        key: "VMM",
        default: DefaultValue::Fixed("auto"),
        form: Form::Word(&["auto", "qemu", "firecracker"]),
        meaning: "hypervisor: `qemu`, `firecracker`, or `auto` for the best one available",
    },
    Setting {
        key: "ACCEL",
        default: DefaultValue::Fixed("auto"),
        form: Form::Word(&["auto", "kvm", "tcg"]),
        meaning: "`kvm`, `tcg` (emulation), or `auto` for KVM if it works and emulation otherwise",
    },
    Setting {
        key: "DEFAULT_VCPU_COUNT",
        default: DefaultValue::Fixed("1"),
        form: Form::Number(1..=1024),
        meaning: "default number of processors of a VM",
    },
    Setting {
        key: "DEFAULT_MEM_SIZE_MIB",
        default: DefaultValue::Fixed("512"),
        form: Form::Number(MIN_MEM_MIB..=1 << 24),
        meaning: "default memory of a VM",
    },
    Setting {
        key: "GUEST_TRIM_INTERVAL_MINUTES",
        default: DefaultValue::Fixed("1440"),
        form: Form::Number(0..=525_600),
        meaning: "how often each guest discards the blocks of deleted files; 0 for never",
    },
    Setting {
        key: "REGISTRY_MIRRORS",
        default: DefaultValue::Depends("none"),
        form: Form::Text("REGISTRY=URL pairs such as docker.io=https://mirror.example:5000, separated by spaces"),
        meaning: "mirrors that images are pulled from before their registry, such as \
                  `docker.io=https://mirror.example:5000`, separated by spaces",
    },
    Setting {
        key: "LOG_FORMAT",
        default: DefaultValue::Fixed("text"),
        form: Form::Word(&["text", "json"]),
        meaning: "format of the log on standard error; `json` for programs",
    },
    Setting {
        key: "LOG_LEVEL",
        default: DefaultValue::Fixed("info"),
        form: Form::Text("one of error, warn, info, debug, trace, or a filter such as info,scalebox_net=debug"),
        meaning: "`error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,scalebox_net=debug`",
    },
];

/// Returns the keys of all settings.
pub(crate) fn keys() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().map(|setting| setting.key)
}

/// Returns the setting with this key.
pub(super) fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// Returns the form that a value must have, for an error message.
pub(super) fn requirement(key: &str) -> String {
    find(key).map_or_else(String::new, |setting| format!("must be {}", setting.form.describe()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    const HEAD: &str = "| setting | default | meaning |\n|---|---|---|\n";

    /// Returns the table as the README has it: values in backticks, except numbers.
    fn markdown() -> String {
        let row = |setting: &Setting| {
            let default = match setting.default {
                DefaultValue::Fixed(number) if number.parse::<f64>().is_ok() => number.to_owned(),
                DefaultValue::Fixed(value) => format!("`{value}`"),
                DefaultValue::Depends(description) => description.to_owned(),
            };
            format!("| `{}` | {default} | {} |\n", setting.key, setting.meaning)
        };
        HEAD.to_owned() + &SETTINGS.iter().map(row).collect::<String>()
    }

    #[test]
    fn the_readme_lists_all_settings() {
        let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
        let text = fs::read_to_string(readme).unwrap();
        let section = text.split("\n## Settings\n").nth(1).unwrap();
        let start = section
            .find(HEAD)
            .unwrap_or_else(|| panic!("no table in the section Settings"));
        let table = section[start..]
            .split_inclusive('\n')
            .take_while(|line| line.starts_with('|'));
        let expected = markdown();
        assert!(
            table.collect::<String>() == expected,
            "the table in README.md, section Settings, should be:\n\n{expected}"
        );
    }

    #[test]
    fn keys_are_unique() {
        for setting in &SETTINGS {
            assert_eq!(keys().filter(|key| *key == setting.key).count(), 1, "{}", setting.key);
        }
    }
}

//! Reads the identity of the guest from its seed drive.

use crate::init::files::cannot;
use crate::init::root::mount_at;
use crate::init::switch::ensure_dir;
use rustix::mount::{MountFlags, UnmountFlags, unmount};
use scalebox_agent_api::main_process;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

/// The seed drive: the machine's second disk.
pub(crate) const DEVICE: &str = "/dev/vdb";

/// The folder of the initramfs on which the seed drive is mounted while it is read.
const TARGET: &str = "/seed";

/// The content of the seed drive: the guest's identity, from the file `scalebox` with a `KEY=VALUE`
/// per line, and its main process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) hostname: Option<String>,
    /// Address and prefix length.
    pub(crate) address: Option<(Ipv4Addr, u8)>,
    pub(crate) gateway: Option<Ipv4Addr>,
    pub(crate) dns: Vec<Ipv4Addr>,
    /// The file `main`: the main process, as JSON.
    pub(crate) main: Option<String>,
}

/// Reads the facts. A failure is reported on the console, and the guest starts without them.
pub(crate) fn read(device: &Path) -> Facts {
    try_read(device).unwrap_or_else(|error| {
        eprintln!("scalebox-agent: cannot read the seed drive: {error}; the guest has no host name and no network");
        Facts::default()
    })
}

fn try_read(device: &Path) -> Result<Facts, String> {
    let target = Path::new(TARGET);
    ensure_dir(target)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at(&device.to_string_lossy(), target, "vfat", flags, "")?;
    let text = fs::read_to_string(target.join("scalebox")).map_err(cannot("read", target));
    // Absent if the guest has no main process.
    let main = fs::read_to_string(target.join(main_process::SEED_FILE)).ok();
    let unmounted = unmount(target, UnmountFlags::empty());
    unmounted.map_err(|error| cannot("unmount", target)(error.into()))?;
    Ok(Facts { main, ..parse(&text?) })
}

fn parse(text: &str) -> Facts {
    let mut facts = Facts::default();
    for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
        match key {
            "hostname" => facts.hostname = Some(value.to_owned()),
            "address" => {
                facts.address = value
                    .split_once('/')
                    .and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok()?)));
            }
            "gateway" => facts.gateway = value.parse().ok(),
            "dns" => facts.dns.extend(value.parse::<Ipv4Addr>().ok()),
            _ => {}
        }
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_and_unknown_ones_ignored() {
        let text = "instance_id=vm-0123456789ab\nhostname=very-silly-penguin\naddress=172.16.0.2/16\n\
                    gateway=172.16.0.1\ndns=172.16.0.1\ndns=9.9.9.9\nnew=thing\nnoise\n";
        let facts = parse(text);
        assert_eq!(facts.hostname.as_deref(), Some("very-silly-penguin"));
        assert_eq!(facts.address, Some((Ipv4Addr::new(172, 16, 0, 2), 16)));
        assert_eq!(facts.gateway, Some(Ipv4Addr::new(172, 16, 0, 1)));
        assert_eq!(facts.dns.len(), 2);
        assert_eq!(parse("address=nonsense/99\ndns=x\n"), Facts::default());
    }
}

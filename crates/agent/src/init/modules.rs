//! Loads the drivers that the initramfs holds.

use rustix::io::Errno;
use rustix::system::finit_module;
use std::fs::{self, File};
use std::path::Path;

/// The modules in load order: each after those that it depends on. A module followed by a virtio
/// device id (virtio 1.2, section 5) is loaded only if the machine has that device.
const ORDER: &str = "/modules/order";

/// The devices of the machine.
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";

/// Loads the modules. A failure is reported on the console only: if the driver is needed, a later
/// step fails.
pub(crate) fn load() {
    let order = match fs::read_to_string(ORDER) {
        Ok(order) => order,
        Err(error) => return eprintln!("scalebox-agent: cannot read {ORDER}: {error}"),
    };
    for line in order.lines() {
        let (name, device) = line.split_once(' ').unwrap_or((line, ""));
        if !device.is_empty() && !has_device(device) {
            continue;
        }
        if let Err(error) = load_one(name) {
            eprintln!("scalebox-agent: cannot load the module {name}: {error}");
        }
    }
}

fn load_one(name: &str) -> std::io::Result<()> {
    let file = File::open(Path::new("/modules").join(format!("{name}.ko")))?;
    match finit_module(&file, c"", 0) {
        Err(Errno::EXIST) => Ok(()),
        other => Ok(other?),
    }
}

fn has_device(id: &str) -> bool {
    let Ok(devices) = fs::read_dir(VIRTIO_DEVICES) else {
        return false;
    };
    devices
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("device")).ok())
        .any(|found| found.trim_end() == id)
}

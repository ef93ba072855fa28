//! Builds QEMU's argument vector from a [`MachineSpec`].
//!
//! This is a pure function: facts about the host (does the disk support direct I/O?) are
//! parameters. Devices and disks are written as JSON, so that no character of a path has a special
//! meaning. Where QEMU accepts only `key=value`, commas are doubled.

use crate::accel::Accel;
use crate::error::{Error, Result};
use crate::machine::Channel;
use crate::run_dir::RunDir;
use crate::spec::MachineSpec;
use scalebox_units::VmId;
use serde_json::{Value, json};
use std::path::Path;

/// Name of the root disk's block node; `block_resize` refers to it.
pub(crate) const ROOT_NODE: &str = "root";

/// Id of the root disk's device; the I/O throttle refers to it.
pub(crate) const ROOT_DEVICE: &str = "root-device";

/// The virtio-serial port on which `qemu-guest-agent` listens in the guest.
const QGA_PORT_NAME: &str = "org.qemu.guest_agent.0";

/// Id of the device of that port; events name it.
pub(crate) const QGA_PORT: &str = "agent-port";

/// Id of the device of our own agent's port.
const AGENT_PORT: &str = "scalebox-port";

/// Size of QEMU's cache of translated code. QEMU's default is an eighth of the host's memory, up to
/// 1 GiB, for every machine.
pub(crate) const TRANSLATION_CACHE_MIB: u64 = 256;

/// The mode in which QEMU accesses the root disk's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskIo {
    /// Bypasses the host's page cache, with Linux native asynchronous I/O.
    Direct,
    /// Uses the page cache and a thread pool, for file systems without `O_DIRECT`. A guest's flush
    /// still reaches the disk.
    Buffered,
}

/// Returns the complete argument vector, without the program.
///
/// The machine starts stopped (`-S`): the guest's first instruction runs once the control and
/// console sockets are connected. QEMU stays alive after the guest powers off (`-no-shutdown`)
/// until it receives `quit`. Without that, the reason would be lost whenever no daemon is
/// connected. A guest reboot resets the machine as on hardware: there is no `-no-reboot`.
pub(crate) fn arguments(spec: &MachineSpec, dir: &RunDir, accel: Accel, io: DiskIo) -> Result<Vec<String>> {
    let [name, control] = identifying_arguments(&spec.id, dir)?;
    let mut argv = Argv::default();
    // The name comes first, so that `ps` shows it. A process name holds 15 bytes: exactly one
    // machine id.
    argv.pair("-name", name);
    argv.words(&["-nodefaults", "-no-user-config", "-no-shutdown", "-S"]);
    argv.words(&["-display", "none", "-rtc", "base=utc,clock=host"]);
    argv.processor(accel);
    argv.pair("-smp", spec.vcpus.to_string());
    argv.pair("-m", format!("{}M", spec.memory_mib));
    argv.boot(spec)?;
    argv.disks(spec, io)?;
    argv.network(spec);
    argv.words(&["-object", "rng-builtin,id=rng"]);
    argv.json("-device", json!({ "driver": "virtio-rng-device", "rng": "rng" }));
    argv.json("-device", json!({ "driver": "virtio-serial-device" }));
    for channel in [Channel::Qga, Channel::Agent] {
        argv.port(channel, &utf8(&spec.id, "run_dir", &dir.channel(channel))?);
    }
    argv.console(&utf8(&spec.id, "run_dir", &dir.console())?);
    argv.pair("-chardev", control);
    argv.words(&["-mon", "chardev=control,mode=control"]);
    argv.confine(spec);
    Ok(argv.0)
}

/// Returns the two arguments that identify a machine's QEMU process: its name and its control
/// socket.
pub(crate) fn identifying_arguments(id: &VmId, dir: &RunDir) -> Result<[String; 2]> {
    Ok([
        format!("guest={id},process={id},debug-threads=on"),
        socket_chardev("control", &utf8(id, "run_dir", &dir.control())?),
    ])
}

/// Returns the device of the root disk. On a host I/O error the guest is paused (`werror`,
/// `rerror`) and the request is repeated on resume. This covers all errors, not only ENOSPC: a
/// layer below that runs out of space (a pool image, a loop device) reports other errors.
fn root_device() -> Value {
    json!({
        "driver": "virtio-blk-device", "id": ROOT_DEVICE, "drive": ROOT_NODE, "serial": "root", "bootindex": 1,
        "write-cache": "on", "werror": "stop", "rerror": "stop",
        "discard": true, "write-zeroes": true, "physical_block_size": 4096, "discard_granularity": 4096,
    })
}

fn root_node(spec: &MachineSpec, io: DiskIo) -> Result<Value> {
    let file = utf8(&spec.id, "root", spec.root_file()?)?;
    let (direct, aio) = match io {
        DiskIo::Direct => (true, "native"),
        DiskIo::Buffered => (false, "threads"),
    };
    Ok(json!({
        "node-name": ROOT_NODE, "driver": "raw", "discard": "unmap", "cache": { "direct": direct, "no-flush": false },
        "file": {
            "driver": "file", "filename": file, "aio": aio, "discard": "unmap",
            "cache": { "direct": direct, "no-flush": false },
        },
    }))
}

fn read_only_node(name: &str, file: String) -> Value {
    json!({ "node-name": name, "driver": "raw", "read-only": true,
            "file": { "driver": "file", "filename": file, "read-only": true } })
}

/// Returns a socket on which QEMU listens. QEMU does not wait for a client, and drops output while
/// no client is connected.
fn socket_chardev(id: &str, path: &str) -> String {
    format!("socket,id={id},path={},server=on,wait=off", path.replace(',', ",,"))
}

fn utf8(id: &VmId, what: &'static str, path: &Path) -> Result<String> {
    let invalid = |why| Error::Spec {
        id: id.clone(),
        what,
        why: format!("{path:?} {why}"),
    };
    if !path.is_absolute() {
        return Err(invalid("is not an absolute path"));
    }
    path.to_str().map(str::to_owned).ok_or_else(|| invalid("is not UTF-8"))
}

#[derive(Default)]
struct Argv(Vec<String>);

impl Argv {
    fn words(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(|&word| word.to_owned()));
    }

    fn pair(&mut self, flag: &str, value: String) {
        self.0.extend([flag.to_owned(), value]);
    }

    fn json(&mut self, flag: &str, value: Value) {
        self.pair(flag, value.to_string());
    }

    fn processor(&mut self, accel: Accel) {
        let machine = |clock| format!("microvm,acpi=on,rtc=on,{clock},mem-merge=off,dump-guest-core=off");
        match accel {
            Accel::Kvm => {
                self.words(&["-accel", "kvm", "-cpu", "host"]);
                self.pair("-M", machine("pit=off,pic=off"));
            }
            // An emulated guest cannot calibrate its clock without a PIT and a PIC.
            Accel::Tcg => {
                self.pair("-accel", format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"));
                self.words(&["-cpu", "max"]);
                self.pair("-M", machine("pit=on,pic=on"));
            }
        }
    }

    fn boot(&mut self, spec: &MachineSpec) -> Result<()> {
        self.pair("-kernel", utf8(&spec.id, "kernel", &spec.kernel)?);
        if let Some(initrd) = &spec.initrd {
            self.pair("-initrd", utf8(&spec.id, "initrd", initrd)?);
        }
        self.pair("-append", spec.cmdline.clone());
        Ok(())
    }

    fn disks(&mut self, spec: &MachineSpec, io: DiskIo) -> Result<()> {
        // Only modern virtio defines its byte order and negotiates flushes correctly.
        self.words(&["-global", "virtio-mmio.force-legacy=false"]);
        self.json("-blockdev", root_node(spec, io)?);
        self.json("-device", root_device());
        self.read_only_disk("seed", utf8(&spec.id, "seed", &spec.seed)?);
        if let Some(modules) = &spec.modules {
            self.read_only_disk("modules", utf8(&spec.id, "modules", modules)?);
        }
        Ok(())
    }

    fn read_only_disk(&mut self, name: &str, file: String) {
        self.json("-blockdev", read_only_node(name, file));
        self.json(
            "-device",
            json!({ "driver": "virtio-blk-device", "drive": name, "serial": name }),
        );
    }

    fn network(&mut self, spec: &MachineSpec) {
        let netdev = format!("tap,id=net,ifname={},script=no,downscript=no", spec.nic.tap);
        self.pair("-netdev", netdev);
        self.json(
            "-device",
            json!({ "driver": "virtio-net-device", "netdev": "net", "mac": spec.nic.mac.to_string() }),
        );
    }

    /// Adds the port of a channel, on the serial device added before it.
    fn port(&mut self, channel: Channel, socket: &str) {
        let (chardev, id, name) = match channel {
            Channel::Qga => ("agent", QGA_PORT, QGA_PORT_NAME),
            Channel::Agent => ("scalebox", AGENT_PORT, scalebox_agent_api::PORT_NAME),
        };
        self.pair("-chardev", socket_chardev(chardev, socket));
        // QEMU emits VSERPORT_CHANGE only for a port that has an id.
        self.json(
            "-device",
            json!({ "driver": "virtserialport", "id": id, "chardev": chardev, "name": name }),
        );
    }

    fn console(&mut self, socket: &str) {
        self.pair("-chardev", socket_chardev("console", socket));
        self.words(&["-serial", "chardev:console"]);
    }

    /// Adds the seccomp filter: no new programs, no obsolete calls, no priority changes.
    ///
    /// QEMU loads it before it drops its account, so changing accounts must stay allowed if
    /// `run_as` is set. Afterwards the process cannot change accounts anyway: it holds no
    /// capability, and every filter sets `no_new_privs`.
    fn confine(&mut self, spec: &MachineSpec) {
        let elevate = if spec.run_as.is_some() { "allow" } else { "deny" };
        self.pair(
            "-sandbox",
            format!("on,obsolete=deny,elevateprivileges={elevate},spawn=deny,resourcecontrol=deny"),
        );
        if let Some(account) = spec.run_as {
            self.pair("-runas", format!("{}:{}", account.uid, account.gid));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{DiskLimits, Nic, RunAs};
    use scalebox_units::DiskLocation;

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "vm-0123456789ab".parse().unwrap(),
            vcpus: 2,
            memory_mib: 512,
            kernel: "/k,ernel".into(),
            initrd: Some("/initrd".into()),
            modules: None,
            cmdline: "root=/dev/vda console=ttyS0,115200".into(),
            root: DiskLocation::File("/pool/a,b=c\"d.ext4".into()),
            root_limits: DiskLimits::default(),
            seed: "/seed".into(),
            nic: Nic {
                tap: "tap0".into(),
                mac: "52:54:00:12:34:56".parse().unwrap(),
            },
            run_dir: "/run/x,y".into(),
            console_log: "/log".into(),
            run_as: None,
        }
    }

    fn argv(spec: &MachineSpec, accel: Accel, io: DiskIo) -> Vec<String> {
        arguments(spec, &RunDir::at(&spec.run_dir), accel, io).unwrap()
    }

    fn value_after<'a>(argv: &'a [String], flag: &str) -> &'a str {
        &argv[argv.iter().position(|word| word == flag).unwrap() + 1]
    }

    #[test]
    fn special_characters_in_paths_do_not_become_options() {
        let argv = argv(&spec(), Accel::Tcg, DiskIo::Direct);
        let control = argv.iter().find(|word| word.starts_with("socket,id=control")).unwrap();
        assert!(control.starts_with("socket,id=control,path=/run/x,,y/"), "{control}");
        let root: Value = serde_json::from_str(value_after(&argv, "-blockdev")).unwrap();
        assert_eq!(root["file"]["filename"], "/pool/a,b=c\"d.ext4");
        assert_eq!(value_after(&argv, "-append"), "root=/dev/vda console=ttyS0,115200");
    }

    #[test]
    fn relative_paths_are_rejected() {
        let relative = MachineSpec {
            seed: "seed".into(),
            ..spec()
        };
        let dir = RunDir::at(&relative.run_dir);
        let error = arguments(&relative, &dir, Accel::Tcg, DiskIo::Direct)
            .unwrap_err()
            .to_string();
        assert!(error.contains("seed: \"seed\" is not an absolute path"), "{error}");
    }

    #[test]
    fn the_modules_drive_is_the_third_disk_and_read_only() {
        let with_modules = MachineSpec {
            modules: Some("/modules.img".into()),
            ..spec()
        };
        let argv = argv(&with_modules, Accel::Tcg, DiskIo::Direct);
        let nodes: Vec<Value> = argv
            .iter()
            .zip(&argv[1..])
            .filter(|(flag, _)| *flag == "-blockdev")
            .map(|(_, node)| serde_json::from_str(node).unwrap())
            .collect();
        let names: Vec<_> = nodes.iter().map(|node| node["node-name"].as_str().unwrap()).collect();
        assert_eq!(names, [ROOT_NODE, "seed", "modules"]);
        assert_eq!(
            (&nodes[2]["read-only"], &nodes[2]["file"]["filename"]),
            (&json!(true), &json!("/modules.img"))
        );
    }

    #[test]
    fn buffered_io_still_flushes_to_the_disk() {
        let argv = argv(&spec(), Accel::Tcg, DiskIo::Buffered);
        let root: Value = serde_json::from_str(value_after(&argv, "-blockdev")).unwrap();
        assert_eq!(root["file"]["aio"], "threads");
        assert_eq!(root["file"]["cache"], json!({ "direct": false, "no-flush": false }));
    }

    #[test]
    fn each_agent_has_a_port_and_a_socket_of_its_own() {
        let argv = argv(&spec(), Accel::Kvm, DiskIo::Direct);
        let ports: Vec<Value> = argv
            .iter()
            .filter_map(|word| serde_json::from_str::<Value>(word).ok())
            .filter(|device| device["driver"] == "virtserialport")
            .collect();
        let names: Vec<_> = ports.iter().map(|port| port["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["org.qemu.guest_agent.0", "scalebox.agent.0"]);
        assert_ne!(ports[0]["id"], ports[1]["id"]);
        for (port, socket) in ports.iter().zip(["agent.sock", "scalebox.sock"]) {
            let id = port["chardev"].as_str().unwrap();
            let chardev = argv.iter().find(|word| word.starts_with(&format!("socket,id={id},")));
            assert!(chardev.is_some_and(|word| word.contains(socket)), "{chardev:?}");
        }
    }

    #[test]
    fn privileges_are_dropped_only_if_an_account_is_given() {
        let own = argv(&spec(), Accel::Kvm, DiskIo::Direct);
        assert!(value_after(&own, "-sandbox").contains("elevateprivileges=deny"));
        assert!(!own.contains(&"-runas".to_owned()));
        let dropped = argv(
            &MachineSpec {
                run_as: Some(RunAs { uid: 7, gid: 8 }),
                ..spec()
            },
            Accel::Kvm,
            DiskIo::Direct,
        );
        assert_eq!(value_after(&dropped, "-runas"), "7:8");
    }
}

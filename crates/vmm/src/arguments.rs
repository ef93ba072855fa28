//! A [`MachineSpec`] as QEMU's argument vector.
//!
//! Pure: what it says about the host (does the disk take direct I/O?) comes in as an argument.
//! Devices and disks are written as JSON, so that no character of a path means anything; where QEMU
//! has only `key=value`, commas are doubled.

use crate::accel::Accel;
use crate::machine::{MachineId, MachineSpec};
use crate::run_dir::RunDir;
use crate::{Error, Result};
use scalebox_units::DiskLocation;
use serde_json::{Value, json};
use std::path::Path;

/// The name of the root disk's block node, by which it is resized.
pub(crate) const ROOT_NODE: &str = "root";

/// The name of the root disk's device, by which it is limited.
pub(crate) const ROOT_DEVICE: &str = "root-device";

/// The virtio-serial port on which `qemu-guest-agent` listens in the guest.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// QEMU's cache of translated code. The default is an eighth of the host's memory, at most 1 GiB,
/// for every machine.
pub(crate) const TRANSLATION_CACHE_MIB: u64 = 256;

/// How the root disk's file is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskIo {
    /// Past the host's page cache, by Linux' asynchronous I/O.
    Direct,
    /// Through the page cache, by threads: on file systems without `O_DIRECT`. A guest's flush
    /// still reaches the disk.
    Buffered,
}

/// The whole argument vector, without the program.
///
/// The machine starts stopped (`-S`): its first instruction runs when the control and console
/// sockets are connected. On the guest's power-off QEMU stays (`-no-shutdown`) until it is told to
/// quit, so that the reason is not lost when no daemon is there to hear it. The guest's reboot is a
/// reset of the machine, as on hardware: there is no `-no-reboot`.
pub(crate) fn arguments(spec: &MachineSpec, dir: &RunDir, accel: Accel, io: DiskIo) -> Result<Vec<String>> {
    let text = |what, path: &Path| utf8(&spec.id, what, path);
    let mut argv = Argv::default();

    // First, where `ps` shows it. The process' own name holds 15 bytes: exactly an id.
    argv.pair("-name", identity(&spec.id, dir)?[0].clone());
    argv.many(&["-nodefaults", "-no-user-config", "-no-shutdown", "-S"]);
    argv.many(&["-display", "none", "-rtc", "base=utc,clock=host"]);
    match accel {
        Accel::Kvm => {
            argv.many(&["-accel", "kvm", "-cpu", "host"]);
            argv.many(&[
                "-M",
                "microvm,acpi=on,rtc=on,pit=off,pic=off,mem-merge=off,dump-guest-core=off",
            ]);
        }
        // Without a PIT and a PIC an emulated guest cannot calibrate its clock.
        Accel::Tcg => {
            argv.pair("-accel", format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"));
            argv.many(&["-cpu", "max"]);
            argv.many(&[
                "-M",
                "microvm,acpi=on,rtc=on,pit=on,pic=on,mem-merge=off,dump-guest-core=off",
            ]);
        }
    }
    argv.pair("-smp", spec.vcpus.to_string());
    argv.pair("-m", format!("{}M", spec.memory_mib));

    argv.pair("-kernel", text("kernel", &spec.kernel)?);
    if let Some(initrd) = &spec.initrd {
        argv.pair("-initrd", text("initrd", initrd)?);
    }
    argv.pair("-append", spec.cmdline.clone());

    // Modern virtio only: it is the one with a defined byte order and a working flush negotiation.
    argv.many(&["-global", "virtio-mmio.force-legacy=false"]);
    argv.json("-blockdev", root_node(spec, io)?);
    argv.json("-device", root_device());
    argv.json("-blockdev", seed_node(text("seed", &spec.seed)?));
    argv.json(
        "-device",
        json!({ "driver": "virtio-blk-device", "drive": "seed", "serial": "seed" }),
    );

    argv.pair(
        "-netdev",
        format!("tap,id=net,ifname={},script=no,downscript=no", spec.nic.tap),
    );
    argv.json(
        "-device",
        json!({ "driver": "virtio-net-device", "netdev": "net", "mac": spec.nic.mac }),
    );

    argv.many(&["-object", "rng-builtin,id=rng"]);
    argv.json("-device", json!({ "driver": "virtio-rng-device", "rng": "rng" }));

    argv.pair("-chardev", socket_chardev("agent", &text("run_dir", &dir.agent())?));
    argv.json("-device", json!({ "driver": "virtio-serial-device" }));
    // Of a port without an id QEMU does not tell that the guest opened it.
    argv.json(
        "-device",
        json!({ "driver": "virtserialport", "id": "agent-port", "chardev": "agent", "name": AGENT_PORT }),
    );

    argv.pair("-chardev", socket_chardev("console", &text("run_dir", &dir.console())?));
    argv.many(&["-serial", "chardev:console"]);
    argv.pair("-chardev", identity(&spec.id, dir)?[1].clone());
    argv.many(&["-mon", "chardev=control,mode=control"]);

    argv.confine(spec);
    Ok(argv.0)
}

/// The two arguments by which a machine's QEMU is told from every other process: its name and its
/// control socket.
pub(crate) fn identity(id: &MachineId, dir: &RunDir) -> Result<[String; 2]> {
    Ok([
        format!("guest={id},process={id},debug-threads=on"),
        socket_chardev("control", &utf8(id, "run_dir", &dir.control())?),
    ])
}

/// A refused write or read stops the guest instead of failing its request (`werror`, `rerror`): it
/// is repeated on resume. Not only for want of space, because what runs out of it below (a pool's
/// image, a loop device) reports other errors.
fn root_device() -> Value {
    json!({
        "driver": "virtio-blk-device", "id": ROOT_DEVICE, "drive": ROOT_NODE, "serial": "root", "bootindex": 1,
        "write-cache": "on", "werror": "stop", "rerror": "stop",
        "discard": true, "write-zeroes": true, "physical_block_size": 4096, "discard_granularity": 4096,
    })
}

fn root_node(spec: &MachineSpec, io: DiskIo) -> Result<Value> {
    let file = utf8(&spec.id, "root", root_file(spec)?)?;
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

fn seed_node(file: String) -> Value {
    json!({ "node-name": "seed", "driver": "raw", "read-only": true,
            "file": { "driver": "file", "filename": file, "read-only": true } })
}

/// The file that holds the root disk.
pub(crate) fn root_file(spec: &MachineSpec) -> Result<&Path> {
    match &spec.root {
        DiskLocation::File(path) => Ok(path),
        other => Err(Error::Spec {
            id: spec.id.clone(),
            what: "root",
            why: format!("this driver takes files, not {other:?}"),
        }),
    }
}

/// QEMU listens, does not wait, and drops what nobody is connected to read.
fn socket_chardev(id: &str, path: &str) -> String {
    format!("socket,id={id},path={},server=on,wait=off", path.replace(',', ",,"))
}

fn utf8(id: &MachineId, what: &'static str, path: &Path) -> Result<String> {
    let wrong = |why| Error::Spec {
        id: id.clone(),
        what,
        why: format!("{path:?} {why}"),
    };
    if !path.is_absolute() {
        return Err(wrong("is not an absolute path"));
    }
    path.to_str().map(str::to_owned).ok_or_else(|| wrong("is not UTF-8"))
}

#[derive(Default)]
struct Argv(Vec<String>);

impl Argv {
    fn many(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(|&word| word.to_owned()));
    }

    fn pair(&mut self, flag: &str, value: String) {
        self.0.extend([flag.to_owned(), value]);
    }

    fn json(&mut self, flag: &str, value: Value) {
        self.pair(flag, value.to_string());
    }

    /// The seccomp filter: no new programs, no obsolete calls, no priorities. It is loaded before
    /// QEMU drops its account, so changing accounts has to stay allowed where it does; afterwards
    /// it is out of reach anyway, for the process holds no capability and, with any filter, has
    /// `no_new_privs` set.
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
    use crate::machine::{DiskLimits, Nic, RunAs};

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "vm-0123456789ab".parse().unwrap(),
            vcpus: 2,
            memory_mib: 512,
            kernel: "/k,ernel".into(),
            initrd: Some("/initrd".into()),
            cmdline: "root=/dev/vda console=ttyS0,115200".into(),
            root: DiskLocation::File("/pool/a,b=c\"d.ext4".into()),
            root_limits: DiskLimits::default(),
            seed: "/seed".into(),
            nic: Nic {
                tap: "tap0".into(),
                mac: "52:54:00:12:34:56".into(),
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
    fn no_character_of_a_path_becomes_an_option() {
        let argv = argv(&spec(), Accel::Tcg, DiskIo::Direct);
        let control = argv.iter().find(|word| word.starts_with("socket,id=control")).unwrap();
        assert!(control.starts_with("socket,id=control,path=/run/x,,y/"), "{control}");
        let root: Value = serde_json::from_str(value_after(&argv, "-blockdev")).unwrap();
        assert_eq!(root["file"]["filename"], "/pool/a,b=c\"d.ext4");
        assert_eq!(value_after(&argv, "-append"), "root=/dev/vda console=ttyS0,115200");
    }

    #[test]
    fn a_relative_path_is_refused() {
        let relative = MachineSpec {
            seed: "seed".into(),
            ..spec()
        };
        let dir = RunDir::at(&relative.run_dir);
        let refusal = arguments(&relative, &dir, Accel::Tcg, DiskIo::Direct)
            .unwrap_err()
            .to_string();
        assert!(refusal.contains("seed: \"seed\" is not an absolute path"), "{refusal}");
    }

    #[test]
    fn without_direct_io_a_flush_still_reaches_the_disk() {
        let argv = argv(&spec(), Accel::Tcg, DiskIo::Buffered);
        let root: Value = serde_json::from_str(value_after(&argv, "-blockdev")).unwrap();
        assert_eq!(root["file"]["aio"], "threads");
        assert_eq!(root["file"]["cache"], json!({ "direct": false, "no-flush": false }));
    }

    #[test]
    fn the_account_is_dropped_only_when_one_is_named() {
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

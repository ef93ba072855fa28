//! Writes the seed drive: a small FAT image with the volume label `cidata` that contains a guest's
//! identity.
//!
//! It has several readers. cloud-init (data source NoCloud) reads `meta-data`, `user-data` and
//! `network-config`, written as JSON, which is a subset of YAML. The guest's own unit
//! (`files/root/usr/lib/scalebox/apply-seed`) reads the file `scalebox`: lines of `KEY=VALUE`,
//! where the value extends unquoted to the end of the line. `dns` may occur several times. Where
//! the agent is process 1, it reads that file too, and the main process from the file `main`.

use crate::error::SeedError;
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use ipnet::Ipv4Net;
use scalebox_agent_api::{MainProcess, main_process};
use scalebox_units::{Mac, SshPublicKey, VmName};
use serde_json::{Value, json};
use std::fmt::Display;
use std::io::{self, Cursor, Write};
use std::net::Ipv4Addr;
use std::path::Path;
use tempfile::NamedTempFile;

/// The volume label by which a guest finds the drive, as defined by NoCloud.
const LABEL: [u8; 11] = *b"cidata     ";

/// 1 MiB, hundreds of times the content's size.
const IMAGE_BYTES: usize = 1 << 20;

/// The identity of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedDrive {
    /// The machine's permanent id: 1 to 128 letters, digits, `-`, `_` and `.`. A guest that reads
    /// another id than at its last boot is a clone, and creates new host keys and a new machine id.
    pub instance_id: String,
    /// The guest's host name.
    pub hostname: VmName,
    /// The key that the account `user` accepts; without one it accepts no login.
    pub ssh_public_key: Option<SshPublicKey>,
    /// MAC of the network interface that gets the address, in transmission order.
    pub mac: Mac,
    /// The guest's address, with the prefix length of its network.
    pub address: Ipv4Net,
    /// The default route: another address of the same network.
    pub gateway: Ipv4Addr,
    /// Name servers, in order of preference.
    pub dns: Vec<Ipv4Addr>,
    /// The main process, for a guest whose first process is the agent.
    pub main: Option<MainProcess>,
}

impl SeedDrive {
    /// Writes the image to `path` with mode 0600, replacing an existing file. It is written to a
    /// temporary file and renamed, so a reader sees either the old or the new image. It is not
    /// flushed, because it is written again at each start of its machine.
    ///
    /// # Errors
    /// [`SeedError::Field`] for an invalid field, before anything is written; [`SeedError::Io`].
    pub fn write(&self, path: &Path) -> Result<(), SeedError> {
        self.check()?;
        let image = self.image().map_err(SeedError::io("write", path))?;
        let dir = path.parent().unwrap_or(Path::new("."));
        // The file is created with mode 0600.
        let mut file = NamedTempFile::new_in(dir).map_err(SeedError::io("create a file in", dir))?;
        file.write_all(&image).map_err(SeedError::io("write", path))?;
        file.persist(path)
            .map_err(|error| SeedError::io("write", path)(error.error))?;
        Ok(())
    }

    fn image(&self) -> io::Result<Vec<u8>> {
        let mut image = vec![0; IMAGE_BYTES];
        fatfs::format_volume(Cursor::new(&mut image), FormatVolumeOptions::new().volume_label(LABEL))?;
        let volume = FileSystem::new(Cursor::new(&mut image), FsOptions::new())?;
        for (name, content) in [
            ("meta-data", self.meta_data()),
            ("user-data", self.user_data()),
            ("network-config", self.network_config()),
            ("scalebox", self.facts()),
        ] {
            volume.root_dir().create_file(name)?.write_all(content.as_bytes())?;
        }
        if let Some(main) = &self.main {
            let mut file = volume.root_dir().create_file(main_process::SEED_FILE)?;
            file.write_all(&serde_json::to_vec(main)?)?;
        }
        volume.unmount()?;
        Ok(image)
    }

    fn meta_data(&self) -> String {
        json!({ "instance-id": self.instance_id, "local-hostname": self.hostname.as_str() }).to_string()
    }

    fn user_data(&self) -> String {
        let config = json!({
            "hostname": self.hostname.as_str(),
            "manage_etc_hosts": true,
            "disable_root": true,
            "ssh_pwauth": false,
            "users": [{
                "name": "user",
                "uid": 1000,
                "shell": "/bin/bash",
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "lock_passwd": true,
                "ssh_authorized_keys": self.ssh_public_key.iter().map(SshPublicKey::as_str).collect::<Vec<_>>(),
            }],
            "growpart": { "mode": "auto", "devices": ["/"] },
            "resize_rootfs": true,
        });
        // The first line identifies the type of the user-data to cloud-init.
        format!("#cloud-config\n{config}\n")
    }

    fn network_config(&self) -> String {
        let interface: Value = json!({
            "match": { "macaddress": self.mac.to_string() },
            "addresses": [self.address.to_string()],
            "routes": [{ "to": "0.0.0.0/0", "via": self.gateway }],
            "nameservers": { "addresses": self.dns },
        });
        json!({ "version": 2, "ethernets": { "eth0": interface } }).to_string()
    }

    fn facts(&self) -> String {
        let mut facts = String::new();
        let mut fact = |key: &str, value: &dyn Display| {
            facts.push_str(&format!("{key}={value}\n"));
        };
        fact("instance-id", &self.instance_id);
        fact("hostname", &self.hostname);
        if let Some(key) = &self.ssh_public_key {
            fact("ssh-key", key);
        }
        fact("mac", &self.mac);
        fact("address", &self.address);
        fact("gateway", &self.gateway);
        for server in &self.dns {
            fact("dns", server);
        }
        facts
    }

    fn check(&self) -> Result<(), SeedError> {
        let word = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let id = &self.instance_id;
        check(
            "instance_id",
            id,
            "must be 1 to 128 letters, digits, '-', '_' and '.'",
            (1..=128).contains(&id.len()) && id.bytes().all(word),
        )?;
        let main = serde_json::to_vec(&self.main).map_or(usize::MAX, |json| json.len());
        check(
            "main",
            &format!("of {main} bytes"),
            "must have at most 256 KiB as JSON",
            main <= main_process::MAX_BYTES,
        )?;
        let own = self.address.addr();
        let edges = [self.address.network(), self.address.broadcast()];
        check(
            "address",
            &self.address.to_string(),
            "must be a host address with a prefix length of at most 30",
            self.address.prefix_len() <= 30 && !edges.contains(&own),
        )?;
        check(
            "gateway",
            &self.gateway.to_string(),
            "must be another host address in the guest's network",
            self.address.contains(&self.gateway) && self.gateway != own && !edges.contains(&self.gateway),
        )
    }
}

fn check(field: &'static str, value: &str, reason: &'static str, valid: bool) -> Result<(), SeedError> {
    if valid {
        return Ok(());
    }
    Err(SeedError::Field {
        field,
        value: value.to_owned(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use scalebox_agent_api::RestartPolicy;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9S";

    fn main() -> MainProcess {
        MainProcess {
            argv: vec!["nginx".into(), "-g".into(), "daemon off;".into()],
            env: vec![("GREETING".into(), "grüß\n\"dich\"".into())],
            cwd: Some("/srv".into()),
            user: None,
            restart: RestartPolicy::OnFailure,
            stop_signal: Some(3),
        }
    }

    fn drive() -> SeedDrive {
        SeedDrive {
            instance_id: "vm-0123456789ab".into(),
            hostname: "very-silly-penguin".parse().unwrap(),
            ssh_public_key: Some(format!("{KEY} some: \"one\" # 'here' $(x) `y`").parse().unwrap()),
            mac: Mac::new([0x52, 0x54, 0x00, 0xab, 0xcd, 0x01]),
            address: "172.16.3.4/16".parse().unwrap(),
            gateway: Ipv4Addr::new(172, 16, 0, 1),
            dns: vec![Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)],
            main: Some(main()),
        }
    }

    fn output(program: &str, args: &[&str]) -> String {
        let output = Command::new(program).args(args).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn standard_tools_read_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.img");
        let (drive, image) = (drive(), path.to_str().unwrap());
        drive.write(&path).unwrap();
        drive.write(&path).unwrap();

        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary file is left"
        );
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            output("blkid", &["-p", "-o", "value", "-s", "LABEL", image]).trim(),
            "cidata"
        );
        assert_eq!(
            output("blkid", &["-p", "-o", "value", "-s", "TYPE", image]).trim(),
            "vfat"
        );
        output("fsck.fat", &["-n", image]);

        let facts = output("mtype", &["-i", image, "::scalebox"]);
        let ssh_public_key = drive.ssh_public_key.unwrap();
        let key = format!("ssh-key={ssh_public_key}");
        for line in [
            "instance-id=vm-0123456789ab",
            "hostname=very-silly-penguin",
            &key,
            "mac=52:54:00:ab:cd:01",
            "address=172.16.3.4/16",
            "gateway=172.16.0.1",
            "dns=192.0.2.1",
            "dns=192.0.2.2",
        ] {
            assert!(facts.lines().any(|it| it == line), "{line}: {facts}");
        }

        let read = |name: &str| -> Value {
            let text = output("mtype", &["-i", image, &format!("::{name}")]);
            serde_json::from_str(text.trim_start_matches("#cloud-config\n")).unwrap()
        };
        assert_eq!(read("meta-data")["instance-id"], "vm-0123456789ab");
        assert_eq!(read("meta-data")["local-hostname"], "very-silly-penguin");
        let user = &read("user-data")["users"][0];
        assert_eq!(user["ssh_authorized_keys"][0], ssh_public_key.as_str());
        assert_eq!(user["uid"], 1000);
        let interface = &read("network-config")["ethernets"]["eth0"];
        assert_eq!(interface["match"]["macaddress"], "52:54:00:ab:cd:01");
        assert_eq!(interface["addresses"][0], "172.16.3.4/16");
        assert_eq!(interface["routes"][0]["via"], "172.16.0.1");
        assert_eq!(interface["nameservers"]["addresses"][1], "192.0.2.2");
        let read: MainProcess = serde_json::from_str(&output("mtype", &["-i", image, "::main"])).unwrap();
        assert_eq!(read, main());
    }

    #[test]
    fn a_guest_without_a_key_accepts_no_login() {
        let drive = SeedDrive {
            ssh_public_key: None,
            ..drive()
        };
        assert!(!drive.facts().contains("ssh-key"));
        let user_data: Value = serde_json::from_str(drive.user_data().trim_start_matches("#cloud-config\n")).unwrap();
        assert_eq!(user_data["users"][0]["ssh_authorized_keys"], json!([]));
    }

    #[test]
    fn ambiguous_fields_are_rejected_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.img");
        let check_rejected = |field: &str, change: &dyn Fn(&mut SeedDrive)| {
            let mut drive = drive();
            change(&mut drive);
            match drive.write(&path) {
                Err(SeedError::Field { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
            assert!(!path.exists());
        };
        check_rejected("instance_id", &|drive| drive.instance_id.clear());
        check_rejected("instance_id", &|drive| drive.instance_id = "a\nhostname=b".into());
        check_rejected("address", &|drive| drive.address = "172.16.0.0/16".parse().unwrap());
        check_rejected("gateway", &|drive| drive.gateway = Ipv4Addr::new(10, 0, 0, 1));
        check_rejected("gateway", &|drive| drive.gateway = drive.address.addr());
        check_rejected("main", &|drive| {
            drive.main = Some(MainProcess {
                argv: vec!["x".repeat(main_process::MAX_BYTES)],
                ..main()
            });
        });
    }
}

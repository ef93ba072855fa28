//! The four ways to make a disk: the original's commands, two bare system calls, our library, our
//! API.

use crate::daemon::Daemon;
use crate::measure::timed;
use crate::{Outcome, Setup};
use rustix::fs::ioctl_ficlone;
use scalebox_client::{Client, CreateVm, SshPublicKey};
use scalebox_storage::{Backing, Bounds, Pool};
use scalebox_units::{Gib, TemplateName, VmId};
use serde::Serialize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The template all disks are made from.
pub const TEMPLATE: &str = "debian-base";
/// A key nobody has.
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1v9rM4jKkZxV2x3y6wqg2m0m8m2k7n5qJY0u1b6J6R bench";

/// A way to make a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// `cp --reflink`, `truncate`, `e2fsck`, `resize2fs`, mount, key, umount: `bench/seed.sh`. Not
    /// durable.
    Seed,
    /// `FICLONE` of the grown template, `fsync` of the file and of its folder: what durable costs
    /// at least.
    Bare,
    /// `Pool::admit` and `Pool::create_disk`.
    Library,
    /// `POST /vms {start: false}`.
    Api,
}

impl Way {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Way::Seed => "seed's sequence",
            Way::Bare => "FICLONE + 2 fsync",
            Way::Library => "library",
            Way::Api => "POST /vms",
        }
    }
}

/// Where disks are made.
pub struct Workshop<'a> {
    setup: &'a Setup,
    daemon: &'a Daemon,
    pool: Pool,
    template: TemplateName,
    key: SshPublicKey,
}

impl<'a> Workshop<'a> {
    /// Opens the pool beside the daemon. Its books are its own, and empty: what it makes is removed
    /// again.
    pub fn open(setup: &'a Setup, daemon: &'a Daemon) -> Outcome<Workshop<'a>> {
        let bounds = Bounds {
            buffer: Gib::new(2),
            overcommit_ratio: 100.0,
        };
        fs::write(setup.scratch.join("key.pub"), KEY)?;
        Ok(Workshop {
            setup,
            daemon,
            pool: Pool::open(&setup.pool, &Backing::Device(setup.device.clone()), bounds)?,
            template: TEMPLATE.parse()?,
            key: KEY.parse()?,
        })
    }

    /// Makes a disk, tells how long that took, and what to give to [`Workshop::remove`].
    pub fn make(&self, way: Way, number: usize, size_gib: u64) -> Outcome<(Duration, String)> {
        let id = format!("vm-{number:012x}");
        match way {
            Way::Seed => {
                let mount_point = self.setup.scratch.join("mnt").join(&id);
                fs::create_dir_all(&mount_point)?;
                let mut command = Command::new("bench/seed.sh");
                command
                    .arg(self.setup.pool.join("templates").join(format!("{TEMPLATE}.ext4")))
                    .arg(self.path(&id))
                    .arg(size_gib.to_string())
                    .arg(&mount_point)
                    .arg(self.setup.scratch.join("key.pub"))
                    .stdin(Stdio::null());
                let (time, status) = timed(|| Ok(command.status()?))?;
                fs::remove_dir(&mount_point)?;
                if !status.success() {
                    return Err(format!("bench/seed.sh: {status}").into());
                }
                Ok((time, id))
            }
            Way::Bare => {
                let source = File::open(self.grown(size_gib)?)?;
                let (time, ()) = timed(|| {
                    let disk = File::create_new(self.path(&id))?;
                    ioctl_ficlone(&disk, &source)?;
                    disk.sync_all()?;
                    Ok(File::open(self.setup.pool.join("vms"))?.sync_all()?)
                })?;
                Ok((time, id))
            }
            Way::Library => {
                let name: VmId = id.parse()?;
                let (time, ()) = timed(|| {
                    let admitted = self.pool.admit(Gib::new(size_gib).bytes())?;
                    self.pool.create_disk(&name, &self.template, &admitted)?;
                    admitted.commit();
                    Ok(())
                })?;
                Ok((time, id))
            }
            Way::Api => {
                let mut request = CreateVm::new(TEMPLATE.parse()?, self.key.clone());
                (request.disk_size_gib, request.start) = (Some(size_gib), false);
                let (time, vm) = timed(|| Ok(self.daemon.client().create_vm(&request)?))?;
                Ok((time, vm.id))
            }
        }
    }

    /// Removes a disk that was made in this way, of that size.
    pub fn remove(&self, way: Way, id: &str, size_gib: u64) -> Outcome<()> {
        match way {
            Way::Api => Ok(self.daemon.client().delete_vm(id)?),
            Way::Seed | Way::Bare => Ok(fs::remove_file(self.path(id))?),
            Way::Library => {
                fs::remove_file(self.path(id))?;
                self.pool.release(Gib::new(size_gib).bytes());
                Ok(())
            }
        }
    }

    /// The time of one admission decision alone.
    pub fn admit(&self) -> Outcome<Duration> {
        timed(|| Ok(self.pool.admit(Gib::new(10).bytes())?)).map(|(time, _admitted)| time)
    }

    /// A client of the daemon.
    pub fn client(&self) -> &Client {
        self.daemon.client()
    }

    /// The key a guest is given.
    pub fn key(&self) -> &SshPublicKey {
        &self.key
    }

    fn path(&self, id: &str) -> PathBuf {
        self.setup.pool.join("vms").join(format!("{id}.ext4"))
    }

    /// The template, grown to a size that was asked for before.
    fn grown(&self, size_gib: u64) -> Outcome<PathBuf> {
        let templates = self.setup.pool.join("templates");
        let is_of_size = |path: &Path| fs::metadata(path).is_ok_and(|meta| meta.len() == size_gib << 30);
        let original = templates.join(format!("{TEMPLATE}.ext4"));
        if is_of_size(&original) {
            return Ok(original);
        }
        let mut clones = fs::read_dir(templates.join(".grown"))?;
        let found = clones.find_map(|entry| Some(entry.ok()?.path()).filter(|path| is_of_size(path)));
        found.ok_or_else(|| format!("there is no template grown to {size_gib} GiB yet").into())
    }
}

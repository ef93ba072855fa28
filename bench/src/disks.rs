//! Four methods to create a disk: the original system's commands, bare system calls, the library
//! and the API.

use crate::daemon::Daemon;
use crate::measure::timed;
use crate::outcome::Outcome;
use crate::setup::Setup;
use rustix::fs::ioctl_ficlone;
use scalebox_api::{CreateVm, SshPublicKey};
use scalebox_client::Client;
use scalebox_storage::{Backing, Bounds, Pool};
use scalebox_units::{Gib, TemplateName, VmId};
use serde::Serialize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The template of all disks.
pub(crate) const TEMPLATE: &str = "debian-base";

/// A method to create a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Method {
    /// `cp --reflink`, `truncate`, `e2fsck`, `resize2fs`, mount, key, umount: `bench/seed.sh`. Not
    /// durable.
    Seed,
    /// The minimum cost of a durable disk: `FICLONE` of the resized base image, `fsync` of the file
    /// and its folder.
    Bare,
    /// `Pool::admit` and `Pool::create_disk`.
    Library,
    /// `POST /vms {start: false}`.
    Api,
}

impl Method {
    /// Returns the name of the method in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Method::Seed => "seed's sequence",
            Method::Bare => "FICLONE + 2 fsync",
            Method::Library => "library",
            Method::Api => "POST /vms",
        }
    }
}

/// Creates and removes disks with each method.
pub(crate) struct DiskFactory<'a> {
    setup: &'a Setup,
    daemon: &'a Daemon,
    pool: Pool,
    template: TemplateName,
    key: SshPublicKey,
}

impl<'a> DiskFactory<'a> {
    /// Opens the pool in this process, while the daemon also has it open. Admission here does not
    /// count the daemon's disks, and the disks it admits are removed again.
    pub(crate) fn open(setup: &'a Setup, daemon: &'a Daemon) -> Outcome<DiskFactory<'a>> {
        let bounds = Bounds {
            buffer: Gib::new(2),
            overcommit_ratio: 100.0,
        };
        let key = fs::read_to_string(setup.scratch.join("key.pub"))?;
        Ok(DiskFactory {
            setup,
            daemon,
            pool: Pool::open(&setup.pool, &Backing::Device(setup.device.clone()), bounds)?,
            template: TEMPLATE.parse()?,
            key: key.trim().parse()?,
        })
    }

    /// Creates a disk. Returns the time it took and the id for [`DiskFactory::remove`].
    pub(crate) fn create(&self, method: Method, number: usize, size_gib: u64) -> Outcome<(Duration, String)> {
        let id = format!("vm-{number:012x}");
        match method {
            Method::Seed => {
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
            Method::Bare => {
                let source = File::open(self.base_image(size_gib)?)?;
                let (time, ()) = timed(|| {
                    let disk = File::create_new(self.path(&id))?;
                    ioctl_ficlone(&disk, &source)?;
                    disk.sync_all()?;
                    Ok(File::open(self.setup.pool.join("vms"))?.sync_all()?)
                })?;
                Ok((time, id))
            }
            Method::Library => {
                let name: VmId = id.parse()?;
                let (time, ()) = timed(|| {
                    let reservation = self.pool.admit(Gib::new(size_gib).bytes())?;
                    self.pool.create_disk(&name, &self.template, &reservation)?;
                    reservation.commit();
                    Ok(())
                })?;
                Ok((time, id))
            }
            Method::Api => {
                let mut request = CreateVm::new(TEMPLATE.parse()?, Some(self.key.clone()));
                (request.disk_size_gib, request.start) = (Some(size_gib), false);
                let (time, vm) = timed(|| Ok(self.daemon.client().create_vm(&request)?))?;
                Ok((time, vm.id))
            }
        }
    }

    /// Removes a disk that was created with `method` and `size_gib`.
    pub(crate) fn remove(&self, method: Method, id: &str, size_gib: u64) -> Outcome<()> {
        match method {
            Method::Api => Ok(self.daemon.client().delete_vm(id)?),
            Method::Seed | Method::Bare => Ok(fs::remove_file(self.path(id))?),
            Method::Library => {
                fs::remove_file(self.path(id))?;
                self.pool.release(Gib::new(size_gib).bytes());
                Ok(())
            }
        }
    }

    /// Returns the time of one admission decision.
    pub(crate) fn admit(&self) -> Outcome<Duration> {
        timed(|| Ok(self.pool.admit(Gib::new(10).bytes())?)).map(|(time, _reservation)| time)
    }

    /// Returns a client of the daemon.
    pub(crate) fn client(&self) -> &Client {
        self.daemon.client()
    }

    /// Returns the public key for guests.
    pub(crate) fn key(&self) -> &SshPublicKey {
        &self.key
    }

    fn path(&self, id: &str) -> PathBuf {
        self.setup.pool.join("vms").join(format!("{id}.ext4"))
    }

    /// Returns the path of the template, or of its existing base image of this size.
    fn base_image(&self, size_gib: u64) -> Outcome<PathBuf> {
        let templates = self.setup.pool.join("templates");
        let is_of_size = |path: &Path| fs::metadata(path).is_ok_and(|meta| meta.len() == size_gib << 30);
        let original = templates.join(format!("{TEMPLATE}.ext4"));
        if is_of_size(&original) {
            return Ok(original);
        }
        let mut clones = fs::read_dir(templates.join(".grown"))?;
        let found = clones.find_map(|entry| Some(entry.ok()?.path()).filter(|path| is_of_size(path)));
        found.ok_or_else(|| format!("no base image of {size_gib} GiB exists yet").into())
    }
}

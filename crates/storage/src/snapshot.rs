//! Snapshots, which turn a disk into a template.
//!
//! [`Pool::begin_snapshot`] reserves a name and space, [`Pool::take_snapshot`] clones the disk, and
//! [`Pool::finish_snapshot`] turns the clone into a template. Only [`Pool::take_snapshot`] needs
//! the disk paused, and it copies no data; the rest works on the clone.

use crate::admission::Reservation;
use crate::error::StorageError;
use crate::image::scrub::Scrub;
use crate::local::files::allocated_of;
use crate::local::files::{self, PARTIAL};
use crate::pool::Pool;
use crate::publish::NewTemplate;
use crate::record::TemplateSource;
use crate::template::Template;
use scalebox_fault_points::{crash_point, fault_point};
use scalebox_programs::ProgramError;
use scalebox_units::{Bytes, ImageConfig, Init, KernelId, TemplateName, VmId};
use std::fs::File;
use std::path::PathBuf;

/// Maximum data written while scrubbing an image: the new journal, and the metadata blocks that it
/// no longer shares.
pub(crate) const MAX_SCRUB_WRITES: Bytes = Bytes::from_mib(256);

/// A template that is being made from a disk. Dropping it before it is finished removes it.
#[derive(Debug)]
#[must_use = "dropping an unfinished snapshot removes it"]
pub struct PendingSnapshot {
    name: TemplateName,
    /// The VM whose disk was cloned.
    source: Option<VmId>,
    kernel: Option<KernelId>,
    config: Option<ImageConfig>,
    init: Option<Init>,
    partial: PathBuf,
    file: File,
    finished: bool,
    room: Vec<Reservation>,
}

impl Drop for PendingSnapshot {
    fn drop(&mut self) {
        if !self.finished {
            files::discard(&self.partial);
        }
    }
}

impl PendingSnapshot {
    /// Records the image settings of the template and the first process of its VMs, as its source
    /// has them. Without this call, it has none.
    pub fn set_image(&mut self, config: Option<ImageConfig>, init: Option<Init>) {
        (self.config, self.init) = (config, init);
    }

    /// Records the kernel that VMs of the template boot. It is the kernel of the VM whose disk is
    /// cloned.
    pub fn set_kernel(&mut self, kernel: Option<KernelId>) {
        self.kernel = kernel;
    }
}

impl Pool {
    /// Reserves the name of a new template, and the space for making it.
    ///
    /// # Errors
    /// [`StorageError::TemplateExists`], [`StorageError::TemplateBeingMade`],
    /// [`StorageError::Insufficient`].
    pub fn begin_snapshot(&self, name: &TemplateName) -> Result<PendingSnapshot, StorageError> {
        self.require_unused(name)?;
        let room = self.admit(MAX_SCRUB_WRITES)?;
        let partial = self.templates_dir().join(format!(".{name}{PARTIAL}"));
        let file = self.claim(&partial).map_err(|error| match error {
            StorageError::Busy(_) => StorageError::TemplateBeingMade(name.to_string()),
            other => other,
        })?;
        let snapshot = PendingSnapshot {
            name: name.clone(),
            source: None,
            kernel: None,
            config: None,
            init: None,
            partial,
            file,
            finished: false,
            room: vec![room],
        };
        fault_point("snapshot: file made").map_err(StorageError::step)?;
        if self.backs_every_byte() {
            // The new file made the last measurement stale; without a current one, all used space
            // would count twice.
            self.measure()?;
        }
        Ok(snapshot)
    }

    /// Flushes the host's dirty pages of the disk `id`, so that [`Pool::take_snapshot`] has little
    /// to wait for.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn flush_disk(&self, id: &VmId) -> Result<(), StorageError> {
        let path = self.disk_path(id);
        files::open_read(&path)
            .and_then(|disk| disk.sync_data())
            .map_err(|error| StorageError::io("flush", path.display(), error))
    }

    /// Clones the disk `id` as it is now, without copying data. A concurrent write is in the clone
    /// completely or not at all. Data that the guest has not written out is not in the clone:
    /// freeze the guest's file systems first to include it.
    ///
    /// From here on the template shares the blocks, and the guest's next write to each of them
    /// takes a new block. Where every committed byte must be backed, the new blocks need space,
    /// which is admitted before the guest resumes. Once the template is in place, its own usage
    /// covers it.
    ///
    /// # Errors
    /// [`StorageError::Io`], [`StorageError::Insufficient`].
    pub fn take_snapshot(&self, snapshot: &mut PendingSnapshot, id: &VmId) -> Result<(), StorageError> {
        let path = self.disk_path(id);
        files::open_read(&path)
            .and_then(|disk| self.file_system.clone_file(&disk, &snapshot.file))
            .map_err(|error| StorageError::io("clone", path.display(), error))?;
        snapshot.source = Some(id.clone());
        fault_point("snapshot: disk cloned").map_err(StorageError::step)?;
        if self.backs_every_byte() {
            let shared = allocated_of(&snapshot.file)
                .map_err(|errno| StorageError::io("read", snapshot.partial.display(), errno.into()))?;
            snapshot.room.push(self.admit(shared)?);
        }
        Ok(())
    }

    /// Turns the clone into a template. It replays the journal, removes the contents of `scrub`,
    /// zeroes unused blocks, and checks the file system. The template appears under its name when
    /// it is complete and durable.
    ///
    /// # Errors
    /// [`StorageError::UnfitDisk`] with the reason, [`StorageError::TemplateExists`],
    /// [`StorageError::Host`], [`StorageError::Program`].
    pub fn finish_snapshot(&self, mut snapshot: PendingSnapshot, scrub: &Scrub<'_>) -> Result<Template, StorageError> {
        let (partial, file) = (snapshot.partial.as_path(), &snapshot.file);
        // Replaying the journal after an edit would undo the edit.
        self.images.repair(partial).map_err(unfit)?;
        fault_point("snapshot: journal replayed").map_err(StorageError::step)?;
        self.images.scrub(partial, file, scrub).map_err(unfit)?;
        fault_point("snapshot: identity removed").map_err(StorageError::step)?;
        file.sync_all()
            .map_err(|error| StorageError::io("flush", partial.display(), error))?;
        fault_point("snapshot: flushed").map_err(StorageError::step)?;

        let Some(source) = snapshot.source.clone() else {
            return Err(StorageError::UnfitDisk("it was not cloned".to_owned()));
        };
        let template = self.publish_template(NewTemplate {
            name: &snapshot.name,
            file,
            path: partial,
            source: TemplateSource::Snapshot(source),
            config: snapshot.config.clone(),
            init: snapshot.init,
            kernel: snapshot.kernel.clone(),
            digest: None,
            replace: false,
        })?;
        snapshot.finished = true;
        crash_point("snapshot: template durable");
        Ok(template)
    }
}

fn unfit(error: StorageError) -> StorageError {
    match error {
        StorageError::FileSystem(_) => StorageError::UnfitDisk(error.to_string()),
        // A guest can make a folder too long to list.
        StorageError::Program(ProgramError::Killed { why, .. }) => {
            StorageError::UnfitDisk(format!("the identity of its VM cannot be removed: a program {why}"))
        }
        other => other,
    }
}

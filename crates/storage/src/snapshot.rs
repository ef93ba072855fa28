//! Snapshots: a disk becomes a template.
//!
//! [`Pool::begin_snapshot`] holds a name and room, [`Pool::take_snapshot`] clones the disk,
//! [`Pool::finish_snapshot`] makes the clone a template. Only the one in the middle needs the disk
//! to stand still, and it copies nothing; all else is done on the clone.

use crate::admission::Reservation;
use crate::command::CommandError;
use crate::error::StorageError;
use crate::ext4;
use crate::files::{self, Folder};
use crate::import;
use crate::name::Name;
use crate::pool::Pool;
use crate::scrub::{self, Identity};
use crate::size::Bytes;
use crate::space::allocated_of;
use crate::template::{PARTIAL, Template};
use scalebox_fault_points::{crash_point, fault_point};
use std::fs::File;
use std::path::PathBuf;

/// What cleaning a clone may write: the new journal, and the metadata blocks that it no longer
/// shares.
const WORK: Bytes = Bytes::from_mib(256);

/// A template that is being made of a disk. Dropped before it is finished, nothing is left of it.
#[derive(Debug)]
#[must_use = "dropping a snapshot takes it back"]
pub struct Snapshot {
    name: Name,
    partial: PathBuf,
    file: File,
    finished: bool,
    room: Vec<Reservation>,
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if !self.finished {
            files::discard(&self.partial);
        }
    }
}

impl Pool {
    /// Takes the name of a template to be made, and the room that its making needs.
    ///
    /// # Errors
    /// [`StorageError::TemplateExists`], [`StorageError::TemplateBeingMade`],
    /// [`StorageError::Insufficient`].
    pub fn begin_snapshot(&self, name: &Name) -> Result<Snapshot, StorageError> {
        match self.template(name) {
            Ok(_) => return Err(StorageError::TemplateExists(name.to_string())),
            Err(StorageError::NoTemplate(_)) => {}
            Err(error) => return Err(error),
        }
        let room = self.admit(WORK)?;
        let partial = self.templates_dir().join(format!(".{name}{PARTIAL}"));
        let file = self.claim(&partial).map_err(|error| match error {
            StorageError::Busy(_) => StorageError::TemplateBeingMade(name.to_string()),
            other => other,
        })?;
        let snapshot = Snapshot {
            name: name.clone(),
            partial,
            file,
            finished: false,
            room: vec![room],
        };
        fault_point("snapshot: file made").map_err(StorageError::step)?;
        if self.backs_every_byte() {
            // The new file made the last measurement stale, and without one all that is used would
            // count twice.
            self.measure()?;
        }
        Ok(snapshot)
    }

    /// Writes what the host still holds of the disk `id`, so that [`Pool::take_snapshot`] finds
    /// little to wait for.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub fn settle_disk(&self, id: &Name) -> Result<(), StorageError> {
        let path = self.disk_path(id);
        files::open_read(&path)
            .and_then(|disk| disk.sync_data())
            .map_err(|error| StorageError::io("flush", path.display(), error))
    }

    /// Clones the disk `id` as it is now: no byte is copied, and a write beside it is in the clone
    /// wholly or not at all. What the guest has not written out is not in it: to have that, freeze
    /// its file systems first.
    ///
    /// The blocks are the template's as well from here on, and the guest's next write to each goes
    /// to a new one. Where every promised byte is backed, there has to be room for that. It is
    /// asked for before the guest goes on; once the template is in place it counts for itself.
    ///
    /// # Errors
    /// [`StorageError::Io`], [`StorageError::Insufficient`].
    pub fn take_snapshot(&self, snapshot: &mut Snapshot, id: &Name) -> Result<(), StorageError> {
        let path = self.disk_path(id);
        files::open_read(&path)
            .and_then(|disk| files::reflink(&disk, &snapshot.file))
            .map_err(|error| StorageError::io("clone", path.display(), error))?;
        fault_point("snapshot: disk cloned").map_err(StorageError::step)?;
        if self.backs_every_byte() {
            let shared = allocated_of(&snapshot.file)
                .map_err(|errno| StorageError::io("read", snapshot.partial.display(), errno.into()))?;
            snapshot.room.push(self.admit(shared)?);
        }
        Ok(())
    }

    /// Makes the clone a template: its journal is replayed, what belongs to the disk's owner alone
    /// is taken out, what is not in use is emptied, and the file system is checked. It appears
    /// under its name when it is whole and durable.
    ///
    /// # Errors
    /// [`StorageError::Unfit`] with the reason, [`StorageError::TemplateExists`],
    /// [`StorageError::Host`], [`StorageError::Command`].
    pub fn finish_snapshot(&self, mut snapshot: Snapshot, source: &Identity) -> Result<Template, StorageError> {
        let (partial, file) = (snapshot.partial.as_path(), &snapshot.file);
        // An edit before the journal is replayed would be undone by the replay.
        ext4::repair(partial).map_err(unfit)?;
        fault_point("snapshot: journal replayed").map_err(StorageError::step)?;
        scrub::remove(partial, file, source).map_err(unfit)?;
        fault_point("snapshot: identity removed").map_err(StorageError::step)?;
        file.sync_all()
            .map_err(|error| StorageError::io("flush", partial.display(), error))?;
        fault_point("snapshot: flushed").map_err(StorageError::step)?;

        let template = Template::of_file(&snapshot.name, file)?;
        let (folder, target) = (Folder::open(&self.templates_dir())?, self.template_path(&snapshot.name));
        folder
            .publish(partial, &target, || fault_point("snapshot: template in place"))
            .map_err(|error| import::exists(error, &snapshot.name))?;
        snapshot.finished = true;
        crash_point("snapshot: template durable");
        Ok(template)
    }
}

fn unfit(error: StorageError) -> StorageError {
    match error {
        StorageError::FileSystem(_) => StorageError::Unfit(error.to_string()),
        // A guest can make a folder too long to list.
        StorageError::Command(CommandError::Endless { why, .. }) => StorageError::Unfit(format!(
            "what belongs to its VM alone cannot be taken out: a program {why}"
        )),
        other => other,
    }
}

//! Merges layers into a tree, and stages the contents of their files.
//!
//! The content of each regular file goes to a file with a number for its name, mode 0600, in a
//! folder of the task; everything else stays in memory. See [`super`] for the reasons.

use crate::oci::digest::Digest;
use crate::oci::error::{OciError, quoted};
use crate::oci::layer::{Entry, Kind, Layer, MAX_PATH};
use crate::oci::task::{GrowingRoom, Phase, Task};
use crate::oci::tree::{Body, MAX_DEPTH, Meta, NodeId, ROOT, Tree};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The prefix of entries that remove something (OCI image specification, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// The name of an entry that makes its folder hide all lower layers.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// The prefix of bookkeeping entries of AUFS, which are ignored here.
const AUFS: &[u8] = b".wh..wh.";
/// Maximum length of a name (NAME_MAX).
const MAX_NAME: usize = 255;
/// Maximum size of the extended attributes of one file, with their names, in bytes. They must fit
/// into a block of the file system.
const MAX_XATTRS: usize = 3500;
/// Maximum size of all names, link targets and attributes of an image, in bytes: they are in
/// memory.
const MAX_METADATA: u64 = 256 << 20;
/// Maximum average number of steps of look-ups and removals for each entry of the limit.
/// Well-formed images need less than ten.
const STEPS: u64 = 64;
/// Contents are staged in units of this size; those of zeros become holes.
const BLOCK: usize = 4096;

/// A stored layer.
pub(crate) struct StoredLayer<'a> {
    pub(crate) data: Box<dyn Read + 'a>,
    /// The digest of the uncompressed layer.
    pub(crate) diff_id: Digest,
}

/// The merged layers.
pub(crate) struct Unpacked<'t> {
    pub(crate) tree: Tree,
    /// The folder of the staged contents.
    pub(crate) staged: PathBuf,
    /// The space that is admitted for them.
    pub(crate) room: GrowingRoom<'t>,
}

/// Merges layers.
pub(crate) struct Unpacker<'t> {
    task: &'t Task,
    tree: Tree,
    staged: PathBuf,
    room: GrowingRoom<'t>,
    /// The number of the next staged content.
    next: u64,
    entries: u64,
    unpacked: u64,
    metadata: u64,
    /// Bytes of stored layers: those done, and all.
    stored: (u64, u64),
    /// Entries that were omitted: nodes below /dev, and unsupported attributes.
    left_out: u64,
}

impl<'t> Unpacker<'t> {
    /// Begins without layers; `stored` is the size of all layers that will follow. Creates a folder
    /// in `work`.
    pub(crate) fn new(task: &'t Task, work: &Path, stored: u64) -> Result<Unpacker<'t>, OciError> {
        let staged = work.join("staged");
        fs::create_dir(&staged).map_err(OciError::io("create", &staged))?;
        Ok(Unpacker {
            task,
            tree: Tree::new(),
            staged,
            room: GrowingRoom::new(task),
            next: 0,
            entries: 0,
            unpacked: 0,
            metadata: 0,
            stored: (0, stored),
            left_out: 0,
        })
    }

    /// Merges the next layer, whose number is `number`.
    pub(crate) fn layer(&mut self, number: usize, stored: StoredLayer<'_>) -> Result<(), OciError> {
        let rest = self.task.limits.max_unpacked.as_u64() - self.unpacked;
        let mut layer = Layer::new(number, stored.data, self.task, rest)?;
        while let Some(entry) = layer.next()? {
            self.entries += 1;
            self.check(&entry)?;
            self.entry(&mut layer, entry)?;
            for dropped in std::mem::take(&mut self.tree.dropped) {
                let path = staged_path(&self.staged, dropped);
                fs::remove_file(&path).map_err(OciError::io("remove", &path))?;
            }
            self.report(layer.stored());
        }
        self.unpacked += layer.unpacked();
        let done = layer.stored();
        let actual = layer.finish()?;
        self.stored.0 += done;
        if actual != stored.diff_id {
            return Err(OciError::WrongDigest {
                what: format!("the uncompressed layer {number}"),
                expected: stored.diff_id.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(())
    }

    /// Returns the merged layers, with the empty folders that every system needs.
    pub(crate) fn finish(mut self) -> Unpacked<'t> {
        if self.left_out > 0 {
            tracing::info!(
                count = self.left_out,
                "skipped device nodes below /dev and unsupported extended attributes"
            );
        }
        for (name, mode) in [
            ("dev", 0o755),
            ("proc", 0o555),
            ("sys", 0o555),
            ("run", 0o755),
            ("tmp", 0o1777),
        ] {
            let is_there = self
                .tree
                .folder(ROOT)
                .is_some_and(|names| names.contains_key(name.as_bytes()));
            if !is_there {
                self.tree
                    .make_folder(ROOT, name.as_bytes(), usize::MAX, Meta::folder(mode));
            }
        }
        Unpacked {
            tree: self.tree,
            staged: self.staged,
            room: self.room,
        }
    }

    fn report(&self, stored: u64) {
        let (done, total) = self.stored;
        self.task.progress(Phase::Unpack, (done + stored).min(total), total);
    }

    /// Checks the limits of the image with one more entry.
    fn check(&mut self, entry: &Entry) -> Result<(), OciError> {
        let max = self.task.limits.max_entries;
        let xattrs: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.metadata += (entry.path.len() + entry.target.len() + xattrs) as u64;
        let exceeded = [
            (self.entries > max, "too many entries", max),
            (
                self.metadata > MAX_METADATA,
                "too many bytes of names and attributes",
                MAX_METADATA,
            ),
            (
                self.tree.steps > max.saturating_mul(STEPS),
                "too many entries that undo each other",
                max,
            ),
        ];
        match exceeded.into_iter().find(|(exceeded, ..)| *exceeded) {
            Some((_, what, limit)) => Err(OciError::TooMany { what, limit }),
            None => Ok(()),
        }
    }

    fn entry(&mut self, layer: &mut Layer<'_>, entry: Entry) -> Result<(), OciError> {
        let number = layer.number;
        let invalid = |reason| OciError::Path {
            layer: number,
            path: quoted(&entry.path),
            reason,
        };
        let components = components(&entry.path).map_err(invalid)?;
        let Some((name, parents)) = components.split_last() else {
            if entry.kind == Kind::Folder {
                let meta = self.meta(&entry, number)?;
                self.tree.set_root(meta);
            }
            return Ok(());
        };
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(number, name, hidden, parents).map_err(invalid);
        }
        if let Kind::Node(kind) = entry.kind {
            // Every guest mounts its own file system over /dev.
            if components.first() == Some(&&b"dev"[..]) {
                self.left_out += 1;
                return Ok(());
            }
            return Err(OciError::Kind {
                layer: number,
                path: quoted(&entry.path),
                kind,
            });
        }
        let walked = self.tree.walk(parents, Some(number)).map_err(invalid)?;
        let parent = walked.unwrap_or(ROOT);
        self.place(layer, &entry, parent, name)
    }

    /// Adds an entry of an allowed kind to its folder.
    fn place(&mut self, layer: &mut Layer<'_>, entry: &Entry, parent: NodeId, name: &[u8]) -> Result<(), OciError> {
        let number = layer.number;
        match entry.kind {
            Kind::Folder => {
                let meta = self.meta(entry, number)?;
                self.tree.make_folder(parent, name, number, meta);
            }
            Kind::File => {
                let meta = self.meta(entry, number)?;
                let staged = self.stage(layer, entry.size)?;
                self.tree
                    .add(parent, name.to_vec(), number, meta, Body::File(staged, entry.size));
            }
            Kind::Symlink => {
                let target = link_target(&entry.target).map_err(|reason| OciError::Path {
                    layer: number,
                    path: quoted(&entry.path),
                    reason,
                })?;
                let meta = self.meta(entry, number)?;
                self.tree
                    .add(parent, name.to_vec(), number, meta, Body::Symlink(target));
            }
            Kind::HardLink => self.hard_link(number, entry, parent, name)?,
            Kind::Node(_) | Kind::Unknown => {
                return Err(OciError::Kind {
                    layer: number,
                    path: quoted(&entry.path),
                    kind: "an entry of an unknown kind",
                });
            }
        }
        Ok(())
    }

    fn whiteout(&mut self, layer: usize, name: &[u8], hidden: &[u8], parents: &[&[u8]]) -> Result<(), &'static str> {
        if name != OPAQUE && name.starts_with(AUFS) {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err("is not a valid whiteout");
        }
        // A whiteout of an entry that does not exist is valid.
        let Some(folder) = self.tree.walk(parents, None)? else {
            return Ok(());
        };
        match name == OPAQUE {
            true => self.tree.make_opaque(folder, layer),
            false => self.tree.whiteout(folder, hidden, layer),
        }
        Ok(())
    }

    fn hard_link(&mut self, layer: usize, entry: &Entry, parent: NodeId, name: &[u8]) -> Result<(), OciError> {
        let invalid = |reason| OciError::HardLink {
            layer,
            path: quoted(&entry.path),
            target: quoted(&entry.target),
            reason,
        };
        let components = components(&entry.target).map_err(invalid)?;
        let Some((target, parents)) = components.split_last() else {
            return Err(invalid("is the root"));
        };
        let folder = self.tree.walk(parents, None).map_err(invalid)?;
        let found = folder.and_then(|folder| self.tree.folder(folder)?.get(*target));
        let Some(node) = found.map(|name| name.node) else {
            return Err(invalid("does not exist in the image"));
        };
        match self.tree.node(node).body {
            Body::Folder(_) => return Err(invalid("is a folder")),
            // The limit of ext4.
            _ if self.tree.node(node).links >= 65_000 => return Err(invalid("has too many links")),
            _ => {}
        }
        let is_itself = self
            .tree
            .folder(parent)
            .and_then(|names| names.get(name))
            .is_some_and(|name| name.node == node);
        if !is_itself {
            self.tree.link(parent, name.to_vec(), layer, node);
        }
        Ok(())
    }

    /// Returns the metadata of an entry, without the attributes that are not kept.
    fn meta(&mut self, entry: &Entry, layer: usize) -> Result<Meta, OciError> {
        let invalid = |reason| OciError::Path {
            layer,
            path: quoted(&entry.path),
            reason,
        };
        let id = |id: u64| u32::try_from(id).map_err(|_| invalid("has an owner of more than 32 bits"));
        let (uid, gid) = (id(entry.uid)?, id(entry.gid)?);
        let mut xattrs = Vec::new();
        for (name, value) in &entry.xattrs {
            match is_kept(name) {
                true => xattrs.push((name.clone(), value.clone())),
                false => self.left_out += 1,
            }
        }
        let size: usize = xattrs.iter().map(|(name, value)| name.len() + value.len() + 32).sum();
        if size > MAX_XATTRS {
            return Err(OciError::Xattrs {
                layer,
                path: quoted(&entry.path),
                limit: MAX_XATTRS,
            });
        }
        Ok(Meta {
            mode: entry.mode & 0o7777,
            uid,
            gid,
            mtime: entry.mtime,
            xattrs,
        })
    }

    /// Stages the content of a file; returns its number, or `None` if it is empty.
    fn stage(&mut self, layer: &mut Layer<'_>, size: u64) -> Result<Option<u64>, OciError> {
        if size == 0 {
            return Ok(None);
        }
        let number = self.next;
        self.next += 1;
        let path = staged_path(&self.staged, number);
        let write = |error| OciError::io("write", &path)(error);
        let file = create(&path).map_err(OciError::io("create", &path))?;
        let mut at = 0;
        let mut block = Vec::with_capacity(BLOCK);
        loop {
            let chunk = layer.chunk()?;
            if chunk.is_empty() {
                break;
            }
            self.room.take(chunk.len() as u64)?;
            at = write_sparse(&file, at, &mut block, chunk).map_err(write)?;
        }
        file.write_all_at(&block, at).map_err(write)?;
        file.set_len(size).map_err(write)?;
        Ok(Some(number))
    }
}

/// Writes whole blocks of `pending` and `data` at `at`, except those of zeros. Leaves the rest in
/// `pending`, and returns its place.
fn write_sparse(file: &File, mut at: u64, pending: &mut Vec<u8>, data: &[u8]) -> io::Result<u64> {
    pending.extend_from_slice(data);
    let whole = pending.len() - pending.len() % BLOCK;
    let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let mut start = 0;
    while start < whole {
        let hole = is_zero(&pending[start..start + BLOCK]);
        let mut end = start + BLOCK;
        while end < whole && is_zero(&pending[end..end + BLOCK]) == hole {
            end += BLOCK;
        }
        if !hole {
            file.write_all_at(&pending[start..end], at)?;
        }
        at += (end - start) as u64;
        start = end;
    }
    pending.drain(..whole);
    Ok(at)
}

pub(crate) fn staged_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(number.to_string())
}

/// Creates a file that only this process' user can read.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Splits the path of an entry. A leading slash means the image's root, as in a container engine.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    if path.len() > MAX_PATH {
        return Err("is too long");
    }
    let components: Vec<&[u8]> = path
        .split(|byte| *byte == b'/')
        .filter(|part| !matches!(*part, b"" | b"."))
        .collect();
    check_text(path)?;
    for part in &components {
        match *part {
            b".." => return Err("contains .."),
            part if part.len() > MAX_NAME => return Err("has a name of more than 255 bytes"),
            _ => {}
        }
    }
    match components.len() > MAX_DEPTH {
        true => Err("is too deep"),
        false => Ok(components),
    }
}

fn link_target(target: &[u8]) -> Result<Vec<u8>, &'static str> {
    check_text(target)?;
    match target.len() {
        0 => Err("is a symbolic link to nothing"),
        1..MAX_PATH => Ok(target.to_vec()),
        _ => Err("is a symbolic link with a target that is too long"),
    }
}

/// Rejects a text that a script for debugfs cannot express.
fn check_text(text: &[u8]) -> Result<(), &'static str> {
    match text.iter().any(|byte| matches!(byte, 0 | b'\n' | b'\r')) {
        true => Err("contains a line break or a NUL"),
        false => Ok(()),
    }
}

/// Returns whether an extended attribute is kept: file capabilities, and attributes of users.
fn is_kept(name: &[u8]) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    let user = name.strip_prefix(b"user.").is_some_and(|rest| !rest.is_empty());
    name == b"security.capability" || user && name.len() <= MAX_NAME && name.iter().all(plain)
}

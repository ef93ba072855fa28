//! Writes a merged tree into an ext4 image: `mke2fs` makes an empty file system, and scripts for
//! `debugfs` fill it. Nothing is mounted.
//!
//! Paths of the image are arguments in these scripts. They begin with a slash, are quoted, and
//! contain no line breaks ([`super::unpack`] rejects them), so none is mistaken for an option, for
//! the number of an inode, or for another command. `debugfs` exits with 0 after errors: each line
//! on its standard error is a failure, and the number of used inodes is compared at the end.

use crate::mke2fs;
use crate::oci::error::{OciError, quoted};
use crate::oci::task::{Phase, Task};
use crate::oci::tree::{Body, Meta, Name, NodeId, ROOT, Tree};
use crate::oci::unpack::{Unpacked, create, staged_path};
use crate::programs::DEBUGFS;
use scalebox_programs::Run;
use scalebox_units::{Bytes, Gib};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const BLOCK: u64 = 4096;
/// Space for each inode, as in [`mke2fs`].
const BYTES_PER_INODE: u64 = 16384;
/// The journal, the reserved descriptors, and free space in a new disk.
const OVERHEAD: u64 = 256 << 20;
/// Maximum size of one script, in bytes. debugfs prints each line again.
const MAX_SCRIPT: usize = 4 << 20;
/// Maximum size of the contents that one script writes, in bytes. A single file can be larger.
const MAX_CONTENTS: u64 = 1 << 30;
/// Maximum length of a line of a script (`BUFSIZ` of debugfs), with its end.
const MAX_LINE: usize = 8190;
/// Maximum number of folders in one folder. Each is a link to it, and ext4 has 16 bits for their
/// number.
const MAX_FOLDERS: usize = 64_000;
/// Minimum speed of writing, in bytes per second.
const MIN_SPEED: u64 = 4 << 20;
/// Inodes of an empty file system: the reserved ones, and `lost+found`.
const FIRST_INODES: u32 = 11;
/// The newest time that an inode can have: 34 bits from 1901 on.
const MAX_TIME: u64 = (1 << 34) - (1 << 31) - 1;

/// Writes the tree to the new file `image`, and removes the staged contents.
pub(crate) fn write(unpacked: Unpacked<'_>, image: &Path, task: &Task) -> Result<(), OciError> {
    let Unpacked { tree, staged, room } = unpacked;
    let plan = Plan::of(&tree);
    let size = plan.size();
    if size > task.limits.max_disk {
        return Err(OciError::TooLarge {
            what: "the file system of the image".to_owned(),
            limit: task.limits.max_disk,
        });
    }
    let _room = task.reserve(plan.bytes + OVERHEAD / 4)?;
    mke2fs::create(image, size, None)?;
    let mut writer = Writer {
        tree: &tree,
        task,
        image,
        staged: &staged,
        script: Vec::new(),
        contents: Vec::new(),
        batch: 0,
        done: 0,
        total: plan.contents,
        names: vec![None; tree.nodes.len()],
        values: 0,
    };
    let empty = staged.join("empty");
    create(&empty).map_err(OciError::io("create", &empty))?;
    writer.tree()?;
    drop(room);
    fs::remove_dir_all(&staged).map_err(OciError::io("remove", &staged))?;
    task.check()?;
    require_inodes(image, plan.inodes)?;
    Ok(mke2fs::finish(image)?)
}

/// The needs of a tree in a file system.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    inodes: u64,
    /// The size of all files.
    contents: u64,
    /// The blocks of files, folders and attributes, in bytes.
    bytes: u64,
}

impl Plan {
    fn of(tree: &Tree) -> Plan {
        let mut plan = Plan::default();
        for node in tree.nodes.iter().filter(|node| node.links > 0) {
            plan.inodes += 1;
            plan.bytes += if node.meta.xattrs.is_empty() { 0 } else { BLOCK };
            plan.bytes += match &node.body {
                Body::Folder(names) => names.keys().map(|name| entry_size(name)).sum::<u64>() * 2 + BLOCK,
                Body::File(_, size) => {
                    plan.contents += size;
                    // Extents of a fragmented file need blocks of their own.
                    size.next_multiple_of(BLOCK) + size / 512
                }
                Body::Symlink(_) => BLOCK,
            };
        }
        plan
    }

    fn size(&self) -> Bytes {
        let inodes = (self.inodes + self.inodes / 8) * BYTES_PER_INODE;
        let tables = inodes / BYTES_PER_INODE * 256;
        let bytes = self.bytes + self.bytes / 50 + tables + OVERHEAD;
        let gib: Gib = Bytes::new(bytes.max(inodes)).ceil_gib();
        gib.max(Gib::new(1)).bytes()
    }
}

/// Returns the size of a name in a folder.
fn entry_size(name: &[u8]) -> u64 {
    (8 + name.len() as u64).next_multiple_of(4)
}

/// Fills the file system of an image.
struct Writer<'w> {
    tree: &'w Tree,
    task: &'w Task,
    image: &'w Path,
    staged: &'w Path,
    script: Vec<u8>,
    /// The staged contents that the present script writes.
    contents: Vec<u64>,
    /// Their size, in bytes.
    batch: u64,
    /// Bytes of all contents: written so far, and all.
    done: u64,
    total: u64,
    /// The first name of each node with several names, once it is written.
    names: Vec<Option<Vec<u8>>>,
    /// The number of values of attributes so far.
    values: u64,
}

impl Writer<'_> {
    fn tree(&mut self) -> Result<(), OciError> {
        self.meta(b"/", &self.tree.node(ROOT).meta, 0o040_000)?;
        let mut queue: Vec<(Vec<u8>, NodeId)> = vec![(Vec::new(), ROOT)];
        while let Some((path, folder)) = queue.pop() {
            let Some(names) = self.tree.folder(folder) else {
                continue;
            };
            self.make_room(&path, names)?;
            for (name, there) in names {
                let path = [path.as_slice(), b"/", name].concat();
                self.name(&path, there.node)?;
                if self.tree.folder(there.node).is_some() {
                    queue.push((path, there.node));
                }
            }
        }
        self.flush()
    }

    /// Grows a folder for additional names of files, because `ln` of debugfs does not grow it.
    fn make_room(&mut self, path: &[u8], names: &BTreeMap<Vec<u8>, Name>) -> Result<(), OciError> {
        let links = names.iter().filter(|(_, there)| self.tree.node(there.node).links > 1);
        let bytes: u64 = links.map(|(name, _)| entry_size(name)).sum();
        let folders = names.values().filter(|there| self.tree.folder(there.node).is_some());
        if folders.count() > MAX_FOLDERS {
            return Err(OciError::TooMany {
                what: "too many folders in one folder",
                limit: MAX_FOLDERS as u64,
            });
        }
        // A block has at least this many bytes for names, regardless of their lengths.
        let blocks = bytes.div_ceil(BLOCK - 24 - entry_size(&[0; 255]));
        let path = if path.is_empty() { b"/" } else { path };
        for _ in 0..blocks {
            self.line(&[b"expand_dir", path])?;
        }
        Ok(())
    }

    /// Writes one name, and the node with its first.
    fn name(&mut self, path: &[u8], id: NodeId) -> Result<(), OciError> {
        let node = self.tree.node(id);
        if node.links > 1 {
            if let Some(first) = self.names[id as usize].clone() {
                return self.line(&[b"ln", &first, path]);
            }
            self.names[id as usize] = Some(path.to_vec());
        }
        match &node.body {
            Body::Folder(_) => {
                // mke2fs has created it.
                if path != b"/lost+found" {
                    self.line(&[b"mkdir", path])?;
                }
                self.meta(path, &node.meta, 0o040_000)?;
            }
            Body::Symlink(target) => {
                self.line(&[b"symlink", path, target])?;
                self.meta(path, &node.meta, 0o120_000)?;
            }
            Body::File(staged, size) => {
                let source = staged.map_or("empty".to_owned(), |number| number.to_string());
                self.line(&[b"write", source.as_bytes(), path])?;
                self.contents.extend(staged);
                self.batch += size;
                self.meta(path, &node.meta, 0o100_000)?;
            }
        }
        if node.links > 1 {
            self.set(path, "links_count", node.links)?;
        }
        if self.script.len() > MAX_SCRIPT || self.batch > MAX_CONTENTS {
            self.flush()?;
        }
        Ok(())
    }

    fn meta(&mut self, path: &[u8], meta: &Meta, kind: u32) -> Result<(), OciError> {
        self.set(path, "mode", format_args!("0{:o}", kind | meta.mode))?;
        self.set(path, "mtime", format_args!("@{}", meta.mtime.min(MAX_TIME)))?;
        // Files belong to root by default; each other owner takes a command.
        if meta.uid != 0 {
            self.set(path, "uid", meta.uid)?;
        }
        if meta.gid != 0 {
            self.set(path, "gid", meta.gid)?;
        }
        for (name, value) in &meta.xattrs {
            let file = format!("value-{}", self.values);
            self.values += 1;
            let target = self.staged.join(&file);
            fs::write(&target, value).map_err(OciError::io("write", &target))?;
            self.line(&[b"ea_set", b"-f", file.as_bytes(), path, name])?;
        }
        Ok(())
    }

    fn set(&mut self, path: &[u8], field: &str, value: impl ToString) -> Result<(), OciError> {
        self.line(&[b"sif", path, field.as_bytes(), value.to_string().as_bytes()])
    }

    /// Appends a command. Its words are quoted.
    fn line(&mut self, words: &[&[u8]]) -> Result<(), OciError> {
        let start = self.script.len();
        for (index, word) in words.iter().enumerate() {
            if index > 0 {
                self.script.push(b' ');
            }
            quote(word, &mut self.script);
        }
        if self.script.len() - start > MAX_LINE {
            return Err(OciError::Path {
                layer: 0,
                path: quoted(words.get(1).copied().unwrap_or_default()),
                reason: "is too long together with its target",
            });
        }
        self.script.push(b'\n');
        Ok(())
    }

    /// Runs the script, and removes the contents that it wrote.
    fn flush(&mut self) -> Result<(), OciError> {
        self.task.check()?;
        let script = self.staged.join("script");
        fs::write(&script, &self.script).map_err(OciError::io("write", &script))?;
        let limit = Duration::from_secs(300 + self.batch / MIN_SPEED);
        let output = Run::of(DEBUGFS.within(limit))
            .folder(self.staged)
            .max_output(64 << 20)
            .args(["-w", "-f", "script"])
            .args([self.image])
            .output()?;
        let complaints = String::from_utf8_lossy(&output.stderr);
        // The first line is the version.
        let complaint = complaints
            .lines()
            .find(|line| !line.is_empty() && !line.starts_with("debugfs 1."));
        if let Some(complaint) = complaint.or((!output.status.success()).then_some("debugfs failed")) {
            return Err(OciError::FileSystem(quoted(complaint.as_bytes())));
        }
        for number in self.contents.drain(..) {
            let path = staged_path(self.staged, number);
            fs::remove_file(&path).map_err(OciError::io("remove", &path))?;
        }
        self.script.clear();
        self.done += std::mem::take(&mut self.batch);
        self.task.progress(Phase::Write, self.done, self.total);
        Ok(())
    }
}

/// Quotes a word for debugfs: a doubled quotation mark inside stands for one.
fn quote(word: &[u8], script: &mut Vec<u8>) {
    script.push(b'"');
    for byte in word {
        if *byte == b'"' {
            script.push(b'"');
        }
        script.push(*byte);
    }
    script.push(b'"');
}

/// Checks that the file system has as many files as the tree.
fn require_inodes(image: &Path, inodes: u64) -> Result<(), OciError> {
    let mut superblock = [0; 24];
    let file = File::open(image).map_err(OciError::io("open", image))?;
    file.read_exact_at(&mut superblock, 1024)
        .map_err(OciError::io("read", image))?;
    let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| superblock[at + byte]));
    let used = number(0).saturating_sub(number(16)).saturating_sub(FIRST_INODES);
    // The root is one of the reserved inodes.
    match u64::from(used) + 1 == inodes {
        true => Ok(()),
        false => Err(OciError::FileSystem(format!(
            "it has {used} files instead of {}",
            inodes - 1
        ))),
    }
}

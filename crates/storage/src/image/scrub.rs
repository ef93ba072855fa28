//! Removes files and lines from a disk's file system, in user space. The host never mounts a file
//! system that a guest has written.
//!
//! The caller's paths are fixed, and names read from the image are used only if they are plain, so
//! a guest cannot insert words into a debugfs script. A guest that hides its key on purpose keeps
//! it, like any other file.
//!
//! The blocks of a deleted file still contain its data, folders keep deleted names, and the journal
//! contains old copies of both. So unused space is zeroed afterwards ([`ext4::zero_unused`]).
//!
//! `debugfs` can fail to write and report success. So the image is inspected again: all items to
//! remove must be gone, removed inodes must be unused, and no other file may have changed.

use crate::error::StorageError;
use crate::image::e2fsprogs::{bare_name, run_on_image};
use crate::image::ext4::{self, Stat, Tree, Work};
use crate::local::files::{self, PARTIAL};
use crate::programs::DEBUGFS;
use scalebox_programs::ProgramError;
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The parts that are removed from a disk that becomes a template, such as keys and ids of one
/// machine.
///
/// Paths are absolute, in the disk's file system, and consist of letters, digits and `._@+:,=~%-`.
/// A path that does not exist is skipped. The lists are processed in the order of the fields.
#[derive(Clone, Copy, Default)]
pub struct Scrub<'s> {
    /// Files to remove; a folder with this path stays.
    pub removed_files: &'s [&'s str],
    /// Files to truncate.
    pub emptied_files: &'s [&'s str],
    /// Files to remove, by their folder and the beginnings of their names.
    pub removed_by_prefix: &'s [(&'s str, &'s [&'s str])],
    /// Files to remove, or folders to remove with all their contents.
    pub removed_trees: &'s [&'s str],
    /// Folders to remove with all their contents and to create again, because their blocks contain
    /// names.
    pub recreated_folders: &'s [&'s str],
    /// Text files of at most 1 MiB whose lines are changed.
    pub edited_files: &'s [EditedFile<'s>],
}

/// A text file whose lines are changed.
#[derive(Clone, Copy)]
pub struct EditedFile<'s> {
    /// The path of the file. A component `*` stands for every folder in that place.
    pub path: &'s str,
    /// Returns the new line, with its line break; `None` removes the line. A changed line stays as
    /// it is when it is passed again.
    pub edit: &'s dyn Fn(&[u8]) -> Option<Vec<u8>>,
}

/// Maximum size of a file whose lines are edited; it is read as a whole.
const MAX_EDITED_SIZE: u64 = 1 << 20;
/// Maximum number of folders, nested or in total; far more than the folders above have.
const MAX_FOLDERS: usize = 512;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const KIND: u32 = 0o170_000;

/// Removes the contents of `scrub` from the ext4 image `path`, open as `image`. Its journal was
/// replayed, and no other process uses it. Afterwards its file system is sound, and its unused
/// space is zeroed.
///
/// # Errors
/// [`StorageError::UnfitDisk`], [`StorageError::FileSystem`], [`StorageError::Host`]: the image
/// must then be discarded.
pub(crate) fn remove(path: &Path, image: &File, scrub: &Scrub<'_>) -> Result<(), StorageError> {
    let before = files::unnamed_clone(files::parent(path), image)?;
    let mut edit = Pass::new(path, image, Mode::Edit)?;
    edit.all(scrub)?;
    if ext4::keeps_quotas(image)? {
        // The quota files still count the removed files.
        ext4::repair(path)?;
    }
    ext4::zero_unused(image)?;
    ext4::check_work(path, "edit a file system")?;

    let mut verify = Pass::new(path, image, Mode::Verify)?;
    verify.all(scrub)?;
    require_gone(&before, image, &edit.removed, &verify.kept)?;
    ext4::require_unchanged(&before, image, &Work::Edit(&edit.touched))
}

/// Checks that the inodes of removed files are unused. They must not be in use as one of the files
/// in `kept`, nor under another name.
fn require_gone(before: &File, after: &File, removed: &HashSet<u64>, kept: &HashSet<u64>) -> Result<(), StorageError> {
    let (before, after) = (Tree::open(before)?, Tree::open(after)?);
    for inode in removed.difference(kept) {
        let was = before.stat(*inode)?.map_or(0, |stat| stat.links);
        if after.stat(*inode)?.is_some_and(|stat| stat.links >= was) {
            return Err(still_exists(&format!("inode {inode}")));
        }
    }
    Ok(())
}

fn still_exists(what: &str) -> StorageError {
    StorageError::Host {
        doing: "edit a file system",
        reason: format!("{what} still exists"),
    }
}

/// A file in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FileEntry {
    name: String,
    stat: Stat,
}

impl FileEntry {
    fn is(&self, kind: u32) -> bool {
        self.stat.mode & KIND == kind
    }

    /// Returns whether the name can be used in a script as it is.
    fn is_plain(&self) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._@+:,=~%-".contains(&byte);
        !self.name.is_empty() && self.name.bytes().all(plain)
    }
}

/// The action of a [`Pass`] on its findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Edit,
    /// Fails on any finding.
    Verify,
}

/// One pass over an image, which collects a debugfs script and runs it.
struct Pass<'i> {
    path: &'i Path,
    tree: Tree<'i>,
    mode: Mode,
    script: String,
    /// The new contents that the script refers to.
    contents: Vec<ScratchFile>,
    folders: usize,
    /// The inodes of removed files.
    removed: HashSet<u64>,
    /// The inodes that change: those of removed files, truncated files, and their folders.
    touched: HashSet<u64>,
    /// The inodes of recreated files and folders.
    kept: HashSet<u64>,
}

impl<'i> Pass<'i> {
    fn new(path: &'i Path, image: &'i File, mode: Mode) -> Result<Pass<'i>, StorageError> {
        Ok(Pass {
            path,
            tree: Tree::open(image)?,
            mode,
            script: String::new(),
            contents: Vec::new(),
            folders: 0,
            removed: HashSet::new(),
            touched: HashSet::new(),
            kept: HashSet::new(),
        })
    }

    /// Processes all lists of `scrub`.
    fn all(&mut self, scrub: &Scrub<'_>) -> Result<(), StorageError> {
        for path in scrub.removed_files {
            if let Some(entry) = self.find(path)?
                && !entry.is(DIRECTORY)
            {
                self.remove(path, &entry)?;
            }
        }
        for path in scrub.emptied_files {
            if let Some(entry) = self.find(path)?
                && entry.is(REGULAR)
            {
                self.kept.insert(entry.stat.inode);
                if entry.stat.size > 0 {
                    self.rewrite(path, &entry, b"")?;
                }
            }
        }
        for (folder, prefixes) in scrub.removed_by_prefix {
            for entry in self.list(folder)? {
                let named = prefixes.iter().any(|prefix| entry.name.starts_with(prefix));
                if named && entry.is_plain() && !entry.is(DIRECTORY) {
                    self.remove(&format!("{folder}/{}", entry.name), &entry)?;
                }
            }
        }
        self.folders(scrub)?;
        for file in scrub.edited_files {
            for path in self.paths_of(file.path)? {
                self.edit_lines(&path, file.edit)?;
            }
        }
        self.run()
    }

    fn folders(&mut self, scrub: &Scrub<'_>) -> Result<(), StorageError> {
        for path in scrub.removed_trees {
            if let Some(entry) = self.find(path)? {
                self.remove_tree(path, &entry)?;
            }
        }
        for path in scrub.recreated_folders {
            if let Some(entry) = self.find(path)?
                && entry.is(DIRECTORY)
            {
                self.kept.insert(entry.stat.inode);
                if self.list(path)?.is_empty() {
                    continue;
                }
                self.remove_tree(path, &entry)?;
                self.command(&["mkdir", path])?;
                self.set_owner(path, &entry.stat)?;
            }
        }
        Ok(())
    }

    /// Lists the files of a folder; empty if the folder does not exist.
    fn list(&self, folder: &str) -> Result<Vec<FileEntry>, StorageError> {
        let Some((_, names)) = self.tree.list(folder)? else {
            return Ok(Vec::new());
        };
        let mut entries = Vec::new();
        for found in names {
            if let Some(stat) = self.tree.stat(found.inode)? {
                let name = String::from_utf8_lossy(&found.name).into_owned();
                entries.push(FileEntry { name, stat });
            }
        }
        Ok(entries)
    }

    fn find(&self, path: &str) -> Result<Option<FileEntry>, StorageError> {
        let (folder, name) = path.rsplit_once('/').unwrap_or_default();
        let Some((_, names)) = self.tree.list(folder)? else {
            return Ok(None);
        };
        let Some(found) = names.into_iter().find(|entry| entry.name == name.as_bytes()) else {
            return Ok(None);
        };
        let name = name.to_owned();
        Ok(self.tree.stat(found.inode)?.map(|stat| FileEntry { name, stat }))
    }

    fn remove(&mut self, path: &str, entry: &FileEntry) -> Result<(), StorageError> {
        self.record_removal(path, entry)?;
        self.command(&["rm", path])
    }

    /// Records a removal, which changes the folder too.
    fn record_removal(&mut self, path: &str, entry: &FileEntry) -> Result<(), StorageError> {
        let (folder, _) = path.rsplit_once('/').unwrap_or_default();
        self.touched.extend(self.tree.list(folder)?.map(|(folder, _)| folder));
        self.removed.insert(entry.stat.inode);
        self.touched.insert(entry.stat.inode);
        Ok(())
    }

    /// Removes a file, or a folder with all its contents.
    fn remove_tree(&mut self, path: &str, entry: &FileEntry) -> Result<(), StorageError> {
        if !entry.is(DIRECTORY) {
            return self.remove(path, entry);
        }
        self.folders += 1;
        if self.folders > MAX_FOLDERS {
            return Err(StorageError::UnfitDisk(format!(
                "there are too many folders below {path}: remove some"
            )));
        }
        for entry in self.list(path)? {
            if !entry.is_plain() {
                let name = &entry.name;
                return Err(StorageError::UnfitDisk(format!(
                    "in {path}, the file {name:?} has an unusual name: remove it"
                )));
            }
            self.remove_tree(&format!("{path}/{}", entry.name), &entry)?;
        }
        self.record_removal(path, entry)?;
        self.command(&["rmdir", path])
    }

    fn set_owner(&mut self, path: &str, stat: &Stat) -> Result<(), StorageError> {
        let fields = [
            ("mode", format!("0{:o}", stat.mode)),
            ("uid", stat.uid.to_string()),
            ("gid", stat.gid.to_string()),
        ];
        for (field, value) in fields {
            self.command(&["set_inode_field", path, field, &value])?;
        }
        Ok(())
    }

    /// Returns the paths that a path with a component `*` stands for.
    fn paths_of(&self, path: &str) -> Result<Vec<String>, StorageError> {
        let Some((parent, rest)) = path.split_once("/*/") else {
            return Ok(vec![path.to_owned()]);
        };
        let mut paths = Vec::new();
        for folder in self.list(parent)? {
            if folder.is(DIRECTORY) && folder.is_plain() {
                paths.push(format!("{parent}/{}/{rest}", folder.name));
            }
        }
        // Each folder is read from the image separately.
        if paths.len() > MAX_FOLDERS {
            return Err(StorageError::UnfitDisk(format!(
                "there are {} folders in {parent}, more than {MAX_FOLDERS}: remove some",
                paths.len()
            )));
        }
        Ok(paths)
    }

    /// Replaces each line of a file by the result of `edited`; `None` removes the line.
    fn edit_lines(&mut self, path: &str, edited: impl Fn(&[u8]) -> Option<Vec<u8>>) -> Result<(), StorageError> {
        let Some(entry) = self.find(path)?.filter(|entry| entry.is(REGULAR)) else {
            return Ok(());
        };
        self.kept.insert(entry.stat.inode);
        if entry.stat.size > MAX_EDITED_SIZE {
            return Err(StorageError::UnfitDisk(format!(
                "{path} is larger than 1 MiB: make it smaller"
            )));
        }
        let content = self.tree.read(entry.stat.inode, MAX_EDITED_SIZE)?;
        let lines = content.split_inclusive(|byte| *byte == b'\n');
        let left = lines.filter_map(edited).collect::<Vec<_>>().concat();
        if left == content {
            return Ok(());
        }
        self.rewrite(path, &entry, &left)
    }

    /// Replaces a file by a new one with `content`, so that `debugfs` allocates its blocks.
    fn rewrite(&mut self, path: &str, entry: &FileEntry, content: &[u8]) -> Result<(), StorageError> {
        let (folder, name) = path.rsplit_once('/').unwrap_or_default();
        let scratch = ScratchFile::new(self.path, &format!(".{}", self.contents.len()), content)?;
        let content = bare_name(&scratch.path).to_string_lossy().into_owned();
        self.contents.push(scratch);
        self.remove(path, entry)?;
        self.command(&["cd", folder])?;
        self.command(&["write", &content, name])?;
        self.set_owner(path, &entry.stat)
    }

    /// Adds a line to the script; fails in a verifying pass.
    fn command(&mut self, words: &[&str]) -> Result<(), StorageError> {
        if self.mode == Mode::Verify {
            return Err(still_exists(words.get(1).unwrap_or(&"something")));
        }
        for (nth, word) in words.iter().enumerate() {
            if word.contains(['"', '\n', '\0']) {
                return Err(StorageError::UnfitDisk(format!(
                    "{word:?} cannot be used in a debugfs script"
                )));
            }
            if nth == 0 {
                self.script.push_str(word);
            } else {
                self.script.extend([" \"", word, "\""]);
            }
        }
        self.script.push('\n');
        Ok(())
    }

    fn run(&mut self) -> Result<(), StorageError> {
        if self.script.is_empty() {
            return Ok(());
        }
        let script = ScratchFile::new(self.path, ".script", std::mem::take(&mut self.script).as_bytes())?;
        let input = File::open(&script.path).map_err(|error| StorageError::io("read", script.path.display(), error))?;
        let unfit = |why: &str| StorageError::UnfitDisk(format!("its files cannot be changed: {why}"));
        let answer = match run_on_image(self.path, DEBUGFS, &["-w", "-f", "-"], Some(input)) {
            Err(ProgramError::Killed { why, .. }) => return Err(unfit(&format!("a program {why}"))),
            other => other?,
        };
        self.contents.clear();
        // debugfs always exits with 0; a message on standard error means failure.
        match answer.complaint(|_| false) {
            None if answer.code == Some(0) => Ok(()),
            _ if answer.is_fault_on_sound_image() || answer.code != Some(0) => Err(StorageError::Host {
                doing: "edit a file system",
                reason: format!("debugfs exited with {}: {}", answer.status, answer.output()),
            }),
            complaint => Err(unfit(complaint.unwrap_or_default())),
        }
    }
}

/// A file next to the image, removed on drop; after a crash the sweep of unfinished files removes
/// it.
struct ScratchFile {
    path: PathBuf,
}

impl ScratchFile {
    fn new(image: &Path, kind: &str, content: &[u8]) -> Result<ScratchFile, StorageError> {
        let mut path: OsString = image.as_os_str().to_owned();
        path.push(kind);
        path.push(PARTIAL);
        let scratch = ScratchFile {
            path: PathBuf::from(path),
        };
        let mut file = files::create_new(&scratch.path)?;
        file.write_all(content)
            .map_err(|error| StorageError::io("write", scratch.path.display(), error))?;
        Ok(scratch)
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        files::discard(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_used_in_a_script() {
        let entry = |name: &str| FileEntry {
            name: name.to_owned(),
            stat: Stat {
                inode: 12,
                mode: REGULAR,
                uid: 0,
                gid: 0,
                size: 0,
                links: 1,
            },
        };
        assert!(entry("ssh_host_ed25519_key.pub").is_plain());
        for name in ["a b", "a\"b", "a;b", "", "\u{fffd}"] {
            assert!(!entry(name).is_plain(), "{name:?}");
        }
    }
}

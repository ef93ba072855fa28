//! Removes a guest's identity from its file system, in user space. The host never mounts a file
//! system that a guest has written.
//!
//! Paths are fixed, and names read from the image are used only if they are plain, so a guest
//! cannot insert words into a debugfs script. A guest that hides its key on purpose keeps it, like
//! any other file.
//!
//! The blocks of a deleted file still contain its data, folders keep deleted names, and the journal
//! contains old copies of both. So unused space is zeroed afterwards ([`ext4::zero_unused`]).
//!
//! `debugfs` can fail to write and report success. So the image is inspected again: nothing to be
//! removed may be left, removed inodes must be unused, and no other file may have changed.

use crate::command::{self, CommandError, Program};
use crate::error::StorageError;
use crate::image::ext4::{self, Stat, Tree, Work};
use crate::local::files::{self, PARTIAL};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The identity of the guest whose disk an image was.
#[derive(Debug, Clone, Default)]
pub struct GuestIdentity {
    /// The guest's host name. Lines of `/etc/hosts` with it are removed.
    pub hostname: String,
    /// The guest's public SSH key. Lines with it are removed from every `authorized_keys`; cloud
    /// images write it there.
    pub ssh_public_key: String,
}

/// Files to remove: the guest creates them again at its first boot or when needed.
const REMOVED: [&str; 13] = [
    "/etc/hostname",
    "/etc/machine-info",
    "/etc/mailname",
    "/etc/hostid",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/var/lib/scalebox/instance-id",
    "/var/lib/NetworkManager/secret_key",
    // Files that cloud-init created from the old seed.
    "/etc/netplan/50-cloud-init.yaml",
    "/etc/network/interfaces.d/50-cloud-init",
    "/etc/systemd/network/10-cloud-init-eth0.network",
    "/var/lib/urandom/random-seed",
];

/// Files to truncate. An empty machine id makes systemd generate a new one.
const EMPTIED: [&str; 4] = ["/etc/machine-id", "/var/log/wtmp", "/var/log/btmp", "/var/log/lastlog"];

/// Files to remove by folder and name prefix.
const REMOVED_PREFIXES: [(&str, &[&str]); 2] = [
    ("/etc/ssh", &["ssh_host_"]),
    (
        "/var/log",
        &[
            "syslog",
            "messages",
            "secure",
            "auth.log",
            "daemon.log",
            "kern.log",
            "user.log",
            "cloud-init",
            "dmesg",
            "boot.log",
        ],
    ),
];

/// Folders to recreate empty, because their blocks contain names. The journal's are machine ids.
const RECREATED: [&str; 5] = [
    "/var/log/journal",
    "/var/lib/dhcp",
    "/var/lib/dhclient",
    "/var/lib/cloud/instances",
    "/var/lib/cloud/sem",
];

/// The rest of cloud-init's state, which would make it skip the setup of a new guest.
const REMOVED_CLOUD_STATE: [&str; 2] = ["/var/lib/cloud/instance", "/var/lib/cloud/data"];

/// Maximum size of a file whose lines are edited; it is read as a whole.
const MAX_EDITED_SIZE: u64 = 1 << 20;
/// Maximum number of folders, nested or in total; far more than the folders above have.
const MAX_FOLDERS: usize = 512;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const KIND: u32 = 0o170_000;

/// Names in `/etc/hosts` of every machine; a guest's own host name can be one of them.
const COMMON_NAMES: [&str; 9] = [
    "localhost",
    "localhost4",
    "localhost6",
    "ip6-localhost",
    "ip6-loopback",
    "ip6-localnet",
    "ip6-mcastprefix",
    "ip6-allnodes",
    "ip6-allrouters",
];

/// Removes the identity from the ext4 image `path`, open as `image`. Its journal was replayed, and
/// nobody else uses it. Afterwards its file system is sound, and its unused space is zeroed.
///
/// # Errors
/// [`StorageError::UnfitDisk`], [`StorageError::FileSystem`], [`StorageError::Host`]: the image
/// must then be discarded.
pub(crate) fn remove(path: &Path, image: &File, source: &GuestIdentity) -> Result<(), StorageError> {
    let before = files::unnamed_clone(files::parent(path), image)?;
    let mut edit = Scrub::new(path, image, Mode::Edit)?;
    edit.all(source)?;
    if ext4::keeps_quotas(image)? {
        // The quota files still count the removed files.
        ext4::repair(path)?;
    }
    ext4::zero_unused(image)?;
    ext4::check_work(path, "edit a file system")?;

    let mut verify = Scrub::new(path, image, Mode::Verify)?;
    verify.all(source)?;
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
        doing: "remove the identity of a VM from an image",
        reason: format!("{what} still exists"),
    }
}

fn short_name(name: &[u8]) -> &[u8] {
    name.split(|byte| *byte == b'.').next().unwrap_or_default()
}

/// Removes the host's names from a line of `/etc/hosts`; `None` if it has no other names.
fn without_host(line: &[u8], host: &[u8]) -> Option<Vec<u8>> {
    let is_common = COMMON_NAMES
        .iter()
        .any(|name| name.as_bytes().eq_ignore_ascii_case(host));
    let is_host = |name: &[u8]| !host.is_empty() && !is_common && short_name(name).eq_ignore_ascii_case(host);
    let (entry, comment) = match line.iter().position(|&byte| byte == b'#') {
        Some(at) => line.split_at(at),
        None => (line, &[][..]),
    };
    let words = |text: &'_ [u8]| -> Vec<Vec<u8>> {
        let words = text.split(|byte| byte.is_ascii_whitespace() || *byte == b'#');
        words.filter(|word| !word.is_empty()).map(<[u8]>::to_vec).collect()
    };
    let (names, remarks) = (words(entry), words(comment));
    if !names.iter().skip(1).chain(&remarks).any(|word| is_host(word)) {
        return Some(line.to_vec());
    }
    let left: Vec<Vec<u8>> = names
        .into_iter()
        .enumerate()
        .filter(|(nth, name)| *nth == 0 || !is_host(name))
        .map(|(_, name)| name)
        .collect();
    (left.len() > 1).then(|| [left.join(&b' '), b"\n".to_vec()].concat())
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

/// The action of a [`Scrub`] on its findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Edit,
    /// Fails on any finding.
    Verify,
}

/// One pass over an image, which collects a debugfs script and runs it.
struct Scrub<'i> {
    path: &'i Path,
    tree: Tree<'i>,
    mode: Mode,
    script: String,
    /// The new contents that the script refers to.
    contents: Vec<ScratchFile>,
    folders: usize,
    /// The inodes of removed files.
    removed: HashSet<u64>,
    /// The inodes of everything that changes: removed files, truncated files, and their folders.
    touched: HashSet<u64>,
    /// The inodes of recreated files and folders.
    kept: HashSet<u64>,
}

impl<'i> Scrub<'i> {
    fn new(path: &'i Path, image: &'i File, mode: Mode) -> Result<Scrub<'i>, StorageError> {
        Ok(Scrub {
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

    /// Processes everything that belongs to the guest's identity.
    fn all(&mut self, source: &GuestIdentity) -> Result<(), StorageError> {
        for path in REMOVED {
            if let Some(entry) = self.find(path)?
                && !entry.is(DIRECTORY)
            {
                self.remove(path, &entry)?;
            }
        }
        for path in EMPTIED {
            if let Some(entry) = self.find(path)?
                && entry.is(REGULAR)
            {
                self.kept.insert(entry.stat.inode);
                if entry.stat.size > 0 {
                    self.rewrite(path, &entry, b"")?;
                }
            }
        }
        for (folder, prefixes) in REMOVED_PREFIXES {
            for entry in self.list(folder)? {
                let named = prefixes.iter().any(|prefix| entry.name.starts_with(prefix));
                if named && entry.is_plain() && !entry.is(DIRECTORY) {
                    self.remove(&format!("{folder}/{}", entry.name), &entry)?;
                }
            }
        }
        self.folders()?;
        self.lines(source)?;
        self.run()
    }

    fn folders(&mut self) -> Result<(), StorageError> {
        for path in REMOVED_CLOUD_STATE {
            if let Some(entry) = self.find(path)? {
                self.remove_tree(path, &entry)?;
            }
        }
        for path in RECREATED {
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

    /// Removes lines from files.
    fn lines(&mut self, source: &GuestIdentity) -> Result<(), StorageError> {
        self.edit_lines("/etc", "hosts", |line| without_host(line, source.hostname.as_bytes()))?;
        // Type and comment can be spelled differently; the key itself is the second word.
        let key = source.ssh_public_key.split_whitespace().nth(1).unwrap_or_default();
        for folder in self.ssh_folders()? {
            self.edit_lines(&folder, "authorized_keys", |line| {
                let held = !key.is_empty() && line.windows(key.len()).any(|window| window == key.as_bytes());
                (!held).then(|| line.to_vec())
            })?;
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

    /// Lists the `.ssh` folders of root and of the users in `/home`.
    fn ssh_folders(&self) -> Result<Vec<String>, StorageError> {
        let mut folders = vec!["/root/.ssh".to_owned()];
        for home in self.list("/home")? {
            if home.is(DIRECTORY) && home.is_plain() {
                folders.push(format!("/home/{}/.ssh", home.name));
            }
        }
        // Each folder is read from the image separately.
        if folders.len() > MAX_FOLDERS {
            return Err(StorageError::UnfitDisk(format!(
                "there are {} folders in /home, more than {MAX_FOLDERS}: remove some",
                folders.len()
            )));
        }
        Ok(folders)
    }

    /// Replaces each line of a file by the result of `edited`; `None` removes the line.
    fn edit_lines(
        &mut self,
        folder: &str,
        name: &str,
        edited: impl Fn(&[u8]) -> Option<Vec<u8>>,
    ) -> Result<(), StorageError> {
        let path = format!("{folder}/{name}");
        let Some(entry) = self.find(&path)?.filter(|entry| entry.is(REGULAR)) else {
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
        self.rewrite(&path, &entry, &left)
    }

    /// Replaces a file by a new one with `content`, so that `debugfs` allocates its blocks.
    fn rewrite(&mut self, path: &str, entry: &FileEntry, content: &[u8]) -> Result<(), StorageError> {
        let (folder, name) = path.rsplit_once('/').unwrap_or_default();
        let scratch = ScratchFile::new(self.path, &format!(".{}", self.contents.len()), content)?;
        let content = command::bare_name(&scratch.path).to_string_lossy().into_owned();
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
        let unfit = |why: &str| StorageError::UnfitDisk(format!("the identity of its VM cannot be removed: {why}"));
        let answer = match command::run_on_image(self.path, Program::Debugfs, &["-w", "-f", "-"], Some(input)) {
            Err(CommandError::Killed { why, .. }) => return Err(unfit(&format!("a program {why}"))),
            other => other?,
        };
        self.contents.clear();
        // It always exits with 0; a message on standard error means failure.
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
    fn the_guest_s_names_are_removed_from_hosts_and_common_names_stay() {
        let left = |line: &str, host: &str| {
            let left = without_host(line.as_bytes(), host.as_bytes());
            left.map(|line| String::from_utf8(line).unwrap())
        };
        let same = |line: &str, host: &str| assert_eq!(left(line, host).as_deref(), Some(line), "{host}");
        assert_eq!(left("127.0.1.1 box.lan box\n", "box"), None);
        assert_eq!(left("127.0.1.1\tBox", "box"), None);
        assert_eq!(left("# this is box\n", "box"), None);
        assert_eq!(
            left("127.0.0.1 localhost box box.lan # box\n", "box").unwrap(),
            "127.0.0.1 localhost\n"
        );
        for host in ["localhost", "ip6-localhost", "LOCALHOST", ""] {
            same("127.0.0.1 localhost\n", host);
            same("::1\tlocalhost ip6-localhost  ip6-loopback # all\n", host);
        }
        same("192.0.2.9 boxes other\n", "box");
        same("\n", "box");
    }

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

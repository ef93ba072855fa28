//! Taking out of a guest's file system what belongs to one machine only, in user space: the host mounts nothing that a guest has written.
//!
//! Paths are fixed, and names that were read from the image are used only if they are plain: no guest puts a word into a script of ours. A
//! guest that hides its key on purpose keeps it, as it may keep any file.
//!
//! A deleted file's blocks still hold its bytes, and the journal holds old copies of directories. So the journal is taken away, all free
//! blocks are punched out of the image, and a new journal is made.

use crate::command::{self, Program};
use crate::error::StorageError;
use crate::ext4;
use crate::files;
use crate::template::PARTIAL;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Whose disk an image was.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// The guest's host name. Lines of `/etc/hosts` that name it go.
    pub hostname: String,
    /// The public key that the guest was given: lines of anyone's `authorized_keys` that hold it go. Cloud images write it there.
    pub ssh_public_key: String,
}

/// Files that are made anew at a guest's first boot, or by whoever needs them.
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
    // What cloud-init made of the old seed.
    "/etc/netplan/50-cloud-init.yaml",
    "/etc/network/interfaces.d/50-cloud-init",
    "/etc/systemd/network/10-cloud-init-eth0.network",
    "/var/lib/urandom/random-seed",
];

/// Files that stay, empty. An empty machine id is what makes systemd draw one.
const EMPTIED: [&str; 4] = ["/etc/machine-id", "/var/log/wtmp", "/var/log/btmp", "/var/log/lastlog"];

/// Folders of which files go whose names begin so.
const REMOVED_BEGINNING: [(&str, &[&str]); 2] = [
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

/// Folders that stay, made anew and empty: their blocks held names. The journal's are machine ids.
const RENEWED: [&str; 5] = [
    "/var/log/journal",
    "/var/lib/dhcp",
    "/var/lib/dhclient",
    "/var/lib/cloud/instances",
    "/var/lib/cloud/sem",
];

/// What else of cloud-init's state makes it take the guest for one that it has set up.
const REMOVED_FROM_CLOUD: [&str; 2] = ["/var/lib/cloud/instance", "/var/lib/cloud/data"];

/// A file that lines are taken out of is read whole; none that a person keeps is as large.
const LARGEST_EDITED: u64 = 1 << 20;
/// More folders below one another, or in all, than any of the folders above has.
const MOST_FOLDERS: usize = 512;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const KIND: u32 = 0o170_000;

/// Takes the identity out of the ext4 image, whose journal was replayed. The image is nobody else's. Afterwards its file system is sound and has
/// nothing in its free blocks.
///
/// # Errors
/// [`StorageError::Unfit`], [`StorageError::Command`]: the image is then of no use.
pub(crate) fn remove(image: &Path, source: &Identity) -> Result<(), StorageError> {
    let mut scrub = Scrub {
        image,
        script: String::new(),
        listed: HashMap::new(),
        folders: 0,
    };
    for path in REMOVED {
        if let Some(entry) = scrub.find(path)?
            && !entry.is(DIRECTORY)
        {
            scrub.remove(path)?;
        }
    }
    for path in EMPTIED {
        if scrub.find(path)?.is_some_and(|entry| entry.is(REGULAR)) {
            scrub.command(&["punch", path, "0"])?;
            scrub.command(&["set_inode_field", path, "size", "0"])?;
        }
    }
    for (folder, beginnings) in REMOVED_BEGINNING {
        for entry in scrub.list(folder)? {
            let named = beginnings.iter().any(|beginning| entry.name.starts_with(beginning));
            if named && entry.is_plain() && !entry.is(DIRECTORY) {
                scrub.remove(&format!("{folder}/{}", entry.name))?;
            }
        }
    }
    for path in REMOVED_FROM_CLOUD {
        if let Some(entry) = scrub.find(path)? {
            scrub.remove_tree(path, &entry)?;
        }
    }
    for path in RENEWED {
        if let Some(entry) = scrub.find(path)?
            && entry.is(DIRECTORY)
        {
            scrub.remove_tree(path, &entry)?;
            scrub.command(&["mkdir", path])?;
            scrub.set_owner(path, &entry)?;
        }
    }
    scrub.run()?;
    scrub.remove_lines("/etc", "hosts", |line| {
        let names = line.split(|byte| byte.is_ascii_whitespace()).skip(1);
        let host = source.hostname.as_bytes();
        !host.is_empty() && names.map(short_name).any(|name| name.eq_ignore_ascii_case(host))
    })?;
    // Its type and comment may be written otherwise; what it is stands in the middle.
    let key = source
        .ssh_public_key
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .to_owned();
    for folder in scrub.ssh_folders()? {
        scrub.remove_lines(&folder, "authorized_keys", |line| {
            !key.is_empty() && line.windows(key.len()).any(|window| window == key.as_bytes())
        })?;
    }
    empty_free_blocks(image)
}

fn short_name(name: &[u8]) -> &[u8] {
    name.split(|byte| *byte == b'.').next().unwrap_or_default()
}

/// Takes the old journal away, punches every free block out of the image, and makes a journal of the same size.
fn empty_free_blocks(image: &Path) -> Result<(), StorageError> {
    let journal = debugfs(image, "stat <8>", |_| false)?;
    let journal = journal_size(&String::from_utf8_lossy(&journal));
    if journal.is_some() {
        command::run(
            Program::Tune2fs,
            [OsStr::new("-O"), OsStr::new("^has_journal"), image.as_os_str()],
        )?;
    }
    ext4::repair_and_discard(image)?;
    if let Some(size) = journal {
        let mib = (size >> 20).clamp(4, 1024);
        let size = format!("size={mib}");
        let options = ["-O", "has_journal", "-J", &size].map(OsStr::new);
        command::run(Program::Tune2fs, options.into_iter().chain([image.as_os_str()]))?;
    }
    Ok(())
}

/// The size in bytes of the journal, as `debugfs` tells of its inode; `None` where there is none.
fn journal_size(told: &str) -> Option<u64> {
    let (_, rest) = told.split_once("Size: ")?;
    rest.split_whitespace().next()?.parse().ok().filter(|size| *size > 0)
}

/// A file of a folder in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    mode: u32,
    uid: u32,
    gid: u32,
    name: String,
    size: u64,
}

impl Entry {
    /// Of a line `/INODE/MODE/UID/GID/NAME/SIZE/`. No name has a slash, so that none can pass for another line.
    fn parse(line: &str) -> Option<Entry> {
        let fields: Vec<&str> = line.strip_prefix('/')?.strip_suffix('/')?.split('/').collect();
        let [_, mode, uid, gid, name, size] = fields[..] else {
            return None;
        };
        Some(Entry {
            mode: u32::from_str_radix(mode, 8).ok()?,
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            name: name.to_owned(),
            // Folders have none.
            size: size.parse().unwrap_or_default(),
        })
    }

    fn is(&self, kind: u32) -> bool {
        self.mode & KIND == kind
    }

    /// Whether the name can stand in a script as it is.
    fn is_plain(&self) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._@+:,=~%-".contains(&byte);
        !self.name.is_empty() && self.name.bytes().all(plain)
    }
}

/// The work on one image: a script that grows and is run.
struct Scrub<'i> {
    image: &'i Path,
    script: String,
    /// What was listed since the script was run last: until then the image stays as it is.
    listed: HashMap<String, Vec<Entry>>,
    folders: usize,
}

impl Scrub<'_> {
    fn list(&mut self, folder: &str) -> Result<Vec<Entry>, StorageError> {
        if let Some(known) = self.listed.get(folder) {
            return Ok(known.clone());
        }
        let answer = debugfs(self.image, &format!("ls -p \"{folder}\""), |complaint| {
            complaint.contains("File not found") || complaint.contains("not a directory")
        })?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let mut entries: Vec<Entry> = answer.lines().filter_map(Entry::parse).collect();
        entries.retain(|entry| entry.name != "." && entry.name != "..");
        self.listed.insert(folder.to_owned(), entries.clone());
        Ok(entries)
    }

    fn find(&mut self, path: &str) -> Result<Option<Entry>, StorageError> {
        let (folder, name) = path.rsplit_once('/').unwrap_or_default();
        Ok(self.list(folder)?.into_iter().find(|entry| entry.name == name))
    }

    fn remove(&mut self, path: &str) -> Result<(), StorageError> {
        self.command(&["rm", path])
    }

    /// A folder with all that is in it, or a file.
    fn remove_tree(&mut self, path: &str, entry: &Entry) -> Result<(), StorageError> {
        if !entry.is(DIRECTORY) {
            return self.remove(path);
        }
        self.folders += 1;
        if self.folders > MOST_FOLDERS {
            return Err(StorageError::Unfit(format!(
                "there are too many folders below {path}: remove them"
            )));
        }
        for entry in self.list(path)? {
            if !entry.is_plain() {
                let name = &entry.name;
                return Err(StorageError::Unfit(format!(
                    "in {path}, the file {name:?} has an unusual name: remove it"
                )));
            }
            self.remove_tree(&format!("{path}/{}", entry.name), &entry)?;
        }
        self.command(&["rmdir", path])
    }

    fn set_owner(&mut self, path: &str, entry: &Entry) -> Result<(), StorageError> {
        let fields = [
            ("mode", format!("0{:o}", entry.mode)),
            ("uid", entry.uid.to_string()),
            ("gid", entry.gid.to_string()),
        ];
        for (field, value) in fields {
            self.command(&["set_inode_field", path, field, &value])?;
        }
        Ok(())
    }

    /// The `.ssh` folders of root and of who has a home.
    fn ssh_folders(&mut self) -> Result<Vec<String>, StorageError> {
        let mut folders = vec!["/root/.ssh".to_owned()];
        for home in self.list("/home")? {
            if home.is(DIRECTORY) && home.is_plain() {
                folders.push(format!("/home/{}/.ssh", home.name));
            }
        }
        // Each is looked into by a program of its own.
        if folders.len() > MOST_FOLDERS {
            return Err(StorageError::Unfit(format!(
                "there are {} folders in /home, and {MOST_FOLDERS} are the most: remove some",
                folders.len()
            )));
        }
        Ok(folders)
    }

    /// Takes the lines for which `gone` holds out of a file.
    fn remove_lines(&mut self, folder: &str, name: &str, gone: impl Fn(&[u8]) -> bool) -> Result<(), StorageError> {
        let path = format!("{folder}/{name}");
        let Some(entry) = self.find(&path)?.filter(|entry| entry.is(REGULAR)) else {
            return Ok(());
        };
        if entry.size > LARGEST_EDITED {
            return Err(StorageError::Unfit(format!(
                "{path} is larger than 1 MiB: make it smaller"
            )));
        }
        let content = debugfs(self.image, &format!("cat \"{path}\""), |_| false)?;
        let kept: Vec<&[u8]> = content
            .split_inclusive(|byte| *byte == b'\n')
            .filter(|line| !gone(line))
            .collect();
        let kept = kept.concat();
        if kept == content {
            return Ok(());
        }
        let beside = Beside::new(self.image, ".edited", &kept)?;
        self.remove(&path)?;
        self.command(&["cd", folder])?;
        let edited = beside.path.to_string_lossy().into_owned();
        self.command(&["write", &edited, name])?;
        self.set_owner(&path, &entry)?;
        self.run()
    }

    /// Adds a line to the script.
    fn command(&mut self, words: &[&str]) -> Result<(), StorageError> {
        for (nth, word) in words.iter().enumerate() {
            if word.contains(['"', '\n', '\0']) {
                return Err(StorageError::Unfit(format!("{word:?} cannot be a word of a script")));
            }
            if nth == 0 {
                self.script.push_str(word);
            } else {
                // Quoted: a space in the pool's path parts nothing.
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
        let script = Beside::new(self.image, ".script", std::mem::take(&mut self.script).as_bytes())?;
        let args = ["-w", "-f", "-"]
            .map(OsStr::new)
            .into_iter()
            .chain([self.image.as_os_str()]);
        let input = File::open(&script.path).map_err(|error| StorageError::io("read", script.path.display(), error))?;
        command::run_without_complaint(Program::Debugfs, args, Some(input), is_banner)?;
        self.listed.clear();
        Ok(())
    }
}

/// Asks `debugfs` one thing. Complaints for which `harmless` holds are none.
fn debugfs(image: &Path, request: &str, harmless: impl Fn(&str) -> bool) -> Result<Vec<u8>, StorageError> {
    let args = [OsStr::new("-R"), OsStr::new(request), image.as_os_str()];
    let answer =
        command::run_without_complaint(Program::Debugfs, args, None, |line| is_banner(line) || harmless(line))?;
    Ok(answer)
}

/// `debugfs 1.47.0 (5-Feb-2023)`, which it always says first.
fn is_banner(line: &str) -> bool {
    line.starts_with("debugfs 1.")
}

/// A file beside the image, gone when dropped; a crash leaves it to the sweep of half-made files.
struct Beside {
    path: PathBuf,
}

impl Beside {
    fn new(image: &Path, kind: &str, content: &[u8]) -> Result<Beside, StorageError> {
        let mut path: OsString = image.as_os_str().to_owned();
        path.push(kind);
        path.push(PARTIAL);
        let beside = Beside {
            path: PathBuf::from(path),
        };
        let mut file = files::create_new(&beside.path)?;
        file.write_all(content)
            .map_err(|error| StorageError::io("write", beside.path.display(), error))?;
        Ok(beside)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        files::discard(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_s_line_is_read_and_a_name_cannot_pass_for_one() {
        let entry = Entry::parse("/16/100600/0/5/ssh_host_key/399/").unwrap();
        assert!(entry.is(REGULAR) && entry.is_plain());
        assert_eq!((entry.gid, entry.size, entry.name.as_str()), (5, 399, "ssh_host_key"));
        assert!(Entry::parse("/15/040755/0/0/sub//").unwrap().is(DIRECTORY));
        for line in [
            "",
            "/",
            "debugfs: rm x",
            "/1/2/3/",
            "/16/100600/0/0/a",
            "/16/100699/0/0/a/1/",
        ] {
            assert_eq!(Entry::parse(line), None, "{line:?}");
        }
        for name in ["a b", "a\"b", "a;b", ""] {
            let entry = Entry {
                mode: REGULAR,
                uid: 0,
                gid: 0,
                name: name.to_owned(),
                size: 0,
            };
            assert!(!entry.is_plain(), "{name:?}");
        }
    }
}

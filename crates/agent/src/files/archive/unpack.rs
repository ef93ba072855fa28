//! Unpacks an archive below a folder, and never outside it.
//!
//! Each entry is made in its parent folder, which is opened below the folder without following any
//! symbolic link (openat2(2)). Files appear when they are complete, and replace files of the same
//! name, as symbolic links do. A directory is never replaced. An error ends the unpacking; the
//! entries before it stay.
//!
//! Modes, including setuid and setgid, owners by number, and times are kept. If the request names a
//! user, all entries belong to it, and setuid and setgid are cleared: they were meant for another
//! owner. The mode and owner of the folder itself are not changed.

use crate::accounts::Owner;
use crate::blocking;
use crate::files::archive::path::inside;
use crate::files::archive::turn;
use crate::files::folder;
use crate::files::names::encode;
use crate::files::pieces::{Reader, from_host};
use crate::files::read::PIECE;
use crate::files::temporary::Temporary;
use crate::server::Failure;
use hyper::body::Incoming;
use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chownat, linkat, mkdirat, openat2,
    statat, symlinkat, syncfs, unlinkat, utimensat,
};
use rustix::io::Errno;
use scalebox_agent_api::FailureCode;
use scalebox_agent_api::files::MAX_UNPACKED;
use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use tar::{Archive, Entry, EntryType};

/// Maximum size of the headers of one entry, including long names, in bytes.
const MAX_HEADERS: u64 = 1 << 20;

/// Unpacks the body of a request.
///
/// # Errors
/// [`FailureCode::Invalid`] for a malformed archive, and for an entry that would leave the folder
/// or is a device or FIFO; the text names it. Those of the file system.
pub(crate) async fn unpack(path: PathBuf, owner: Option<Owner>, parents: bool, body: Incoming) -> Result<(), Failure> {
    let turn = turn().await?;
    let (feeder, reader) = from_host();
    let unpacking = blocking::run_apart(move || {
        let _turn = turn;
        if parents {
            folder::make_all(&path, folder::DEFAULT_MODE, owner)?;
        }
        let failed = || Failure::io(format!("unpack below {}", encode(&path)));
        let root = Arc::new(folder::open(&path).map_err(failed())?);
        Unpacker::new(Arc::clone(&root), owner).unpack(reader)?;
        syncfs(&root).map_err(failed())
    });
    let (unpacked, ()) = tokio::join!(unpacking, feeder.feed(body));
    unpacked
}

/// Limits how much is read for the headers of an entry: the crate holds them in memory.
struct Limited {
    reader: Reader,
    left: Rc<Cell<u64>>,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        let left = self.left.get().checked_sub(read as u64);
        self.left
            .set(left.ok_or_else(|| io::Error::other("the headers of an entry are too long"))?);
        Ok(read)
    }
}

struct Unpacker {
    root: Arc<OwnedFd>,
    owner: Option<Owner>,
    /// The folder of the last entry.
    last: Option<(PathBuf, Arc<OwnedFd>)>,
    /// The folders around the last entry, with the times that they get after their last entry.
    around: Vec<(PathBuf, Timestamps)>,
}

/// An entry, with the needed fields of its header.
struct Item<'a> {
    path: &'a Path,
    /// The path, for error messages.
    shown: String,
    mode: u32,
    owner: Owner,
    times: Timestamps,
}

impl Item<'_> {
    fn refuse(&self, why: &str) -> Failure {
        refuse(&self.shown, why)
    }

    fn failed<E: Into<io::Error>>(&self) -> impl FnOnce(E) -> Failure {
        Failure::io(format!("unpack {}", self.shown))
    }

    fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }
}

fn refuse(shown: &str, why: &str) -> Failure {
    Failure::new(FailureCode::Invalid, format!("the archive's entry {shown} {why}"))
}

fn malformed(error: io::Error) -> Failure {
    Failure::new(FailureCode::Invalid, format!("the archive is malformed: {error}"))
}

impl Unpacker {
    fn new(root: Arc<OwnedFd>, owner: Option<Owner>) -> Unpacker {
        Unpacker {
            root,
            owner,
            last: None,
            around: Vec::new(),
        }
    }

    fn unpack(mut self, reader: Reader) -> Result<(), Failure> {
        let left = Rc::new(Cell::new(MAX_HEADERS));
        let mut archive = Archive::new(Limited {
            reader,
            left: Rc::clone(&left),
        });
        let mut count = 0;
        for entry in archive.entries().map_err(malformed)? {
            let mut entry = entry.map_err(malformed)?;
            left.set(u64::MAX);
            count += 1;
            if count > MAX_UNPACKED {
                return Err(Failure::new(
                    FailureCode::Invalid,
                    format!("the archive has more than {MAX_UNPACKED} entries"),
                ));
            }
            self.entry(&mut entry)?;
            io::copy(&mut entry, &mut io::sink()).map_err(malformed)?;
            left.set(MAX_HEADERS);
        }
        self.leave(Path::new(""), true)?;
        // The padding after the last entry. An upload that breaks off there has failed, too.
        let mut reader = archive.into_inner().reader;
        io::copy(&mut reader, &mut io::sink()).map_err(malformed)?;
        Ok(())
    }

    fn entry(&mut self, entry: &mut Entry<'_, Limited>) -> Result<(), Failure> {
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let bytes = entry.path_bytes().into_owned();
        let shown = encode(OsStr::from_bytes(&bytes));
        let path = inside(&bytes).map_err(|why| refuse(&shown, &format!("has a path that {why}")))?;
        refuse_pax_sparse(entry, &shown)?;
        let item = self.item(entry, &path, shown)?;
        self.leave(&path, false)?;
        if path.as_os_str().is_empty() {
            return match kind {
                EntryType::Directory => Ok(()),
                _ => Err(item.refuse("is not a directory, but has the folder's path")),
            };
        }
        let parent = self.parent(&item)?;
        match kind {
            EntryType::Directory => self.directory(&parent, &item),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => file(parent, &item, entry),
            EntryType::Symlink => symbolic_link(&parent, &item, &link_target(entry, &item)?),
            EntryType::Link => self.hard_link(&parent, &item, &link_target(entry, &item)?),
            EntryType::Char | EntryType::Block => Err(item.refuse("is a device")),
            EntryType::Fifo => Err(item.refuse("is a FIFO")),
            other => Err(item.refuse(&format!("has the unknown type {}", other.as_byte().escape_ascii()))),
        }
    }

    fn item<'a>(&self, entry: &Entry<'_, Limited>, path: &'a Path, shown: String) -> Result<Item<'a>, Failure> {
        let header = entry.header();
        let mode = header.mode().map_err(malformed)?;
        let number = |number: io::Result<u64>| {
            let number = u32::try_from(number.map_err(malformed)?).ok();
            number
                .filter(|number| *number != u32::MAX)
                .ok_or_else(|| refuse(&shown, "has an owner that is out of bounds"))
        };
        let in_header = Owner {
            uid: number(header.uid())?,
            gid: number(header.gid())?,
        };
        let modified = Timespec {
            tv_sec: i64::try_from(header.mtime().map_err(malformed)?).unwrap_or(0),
            tv_nsec: 0,
        };
        Ok(Item {
            path,
            mode: match self.owner {
                Some(_) => mode & 0o1777,
                None => mode & 0o7777,
            },
            owner: self.owner.unwrap_or(in_header),
            times: Timestamps {
                last_access: modified,
                last_modification: modified,
            },
            shown,
        })
    }

    /// Opens the folder of an entry, and makes it if it does not exist.
    fn parent(&mut self, item: &Item<'_>) -> Result<Arc<OwnedFd>, Failure> {
        let path = item.path.parent().unwrap_or(Path::new(""));
        if let Some((_, folder)) = self.last.as_ref().filter(|(last, _)| last == path) {
            return Ok(Arc::clone(folder));
        }
        let folder = self.folder(path, item)?;
        self.last = Some((path.to_owned(), Arc::clone(&folder)));
        Ok(folder)
    }

    fn folder(&self, path: &Path, item: &Item<'_>) -> Result<Arc<OwnedFd>, Failure> {
        if path.as_os_str().is_empty() {
            return Ok(Arc::clone(&self.root));
        }
        match open_beneath(&self.root, path) {
            Err(Errno::NOENT) => {}
            opened => return opened.map(Arc::new).map_err(|error| unreachable(item, error)),
        }
        let mut folder = Arc::clone(&self.root);
        for part in path {
            match folder::make_at(&folder, part, folder::DEFAULT_MODE, self.owner) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(item.failed()(error)),
            }
            let opened = open_beneath(&folder, Path::new(part));
            folder = Arc::new(opened.map_err(|error| unreachable(item, error))?);
        }
        Ok(folder)
    }

    fn directory(&mut self, parent: &OwnedFd, item: &Item<'_>) -> Result<(), Failure> {
        match mkdirat(parent, item.name(), Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(item.failed()(error)),
        }
        let folder = match folder::open_at(parent, item.name(), OFlags::NOFOLLOW) {
            Err(Errno::NOTDIR | Errno::LOOP) => {
                return Err(Failure::new(
                    FailureCode::WrongKind,
                    format!("cannot unpack {}: it exists and is not a directory", item.shown),
                ));
            }
            opened => opened.map_err(item.failed())?,
        };
        folder::set_owner_and_mode(&folder, Some(item.owner), item.mode).map_err(item.failed())?;
        self.around.push((item.path.to_owned(), item.times.clone()));
        Ok(())
    }

    /// Sets the times of the folders that do not contain `path`: their last entry is unpacked.
    fn leave(&mut self, path: &Path, all: bool) -> Result<(), Failure> {
        while let Some((folder, times)) = self.around.pop_if(|(folder, _)| all || !path.starts_with(folder)) {
            let set = open_beneath(&self.root, &folder)
                .and_then(|opened| utimensat(&opened, c"", &times, AtFlags::EMPTY_PATH));
            match set {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(Failure::io(format!("unpack {}", encode(&folder)))(error)),
            }
        }
        Ok(())
    }

    fn hard_link(&self, parent: &OwnedFd, item: &Item<'_>, target: &[u8]) -> Result<(), Failure> {
        let target = inside(target).map_err(|why| item.refuse(&format!("links to a path that {why}")))?;
        let Some(name) = target.file_name() else {
            return Err(item.refuse("links to the folder itself"));
        };
        if target == item.path {
            return Ok(());
        }
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => open_beneath(&self.root, folder).map(Arc::new),
            _ => Ok(Arc::clone(&self.root)),
        };
        let folder = folder.map_err(|error| unreachable(item, error))?;
        statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|error| match error {
            Errno::NOENT => item.refuse("is a hard link to a file that does not exist"),
            error => item.failed()(error),
        })?;
        remove_file(parent, item)?;
        linkat(&folder, name, parent, item.name(), AtFlags::empty()).map_err(item.failed())
    }
}

/// Rejects the sparse files of `tar --sparse --format=posix`, whose content would be unpacked
/// together with its map.
fn refuse_pax_sparse(entry: &mut Entry<'_, Limited>, shown: &str) -> Result<(), Failure> {
    let Some(extensions) = entry.pax_extensions().map_err(malformed)? else {
        return Ok(());
    };
    for extension in extensions {
        if extension.map_err(malformed)?.key_bytes().starts_with(b"GNU.sparse.") {
            return Err(refuse(shown, "is sparse in the format of pax, which is not supported"));
        }
    }
    Ok(())
}

fn open_beneath(folder: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(folder, path, flags, Mode::empty(), resolve)
}

fn unreachable(item: &Item<'_>, error: Errno) -> Failure {
    match error {
        Errno::LOOP => item.refuse("goes through a symbolic link"),
        Errno::NOTDIR => item.refuse("goes through a file that is not a directory"),
        Errno::XDEV => item.refuse("leaves the folder"),
        Errno::NOENT => item.refuse("is a hard link to a file that does not exist"),
        error => item.failed()(error),
    }
}

fn link_target(entry: &Entry<'_, Limited>, item: &Item<'_>) -> Result<Vec<u8>, Failure> {
    match entry.link_name_bytes() {
        Some(target) if !target.is_empty() && !target.contains(&0) => Ok(target.into_owned()),
        _ => Err(item.refuse("is a link without a target")),
    }
}

fn file(parent: Arc<OwnedFd>, item: &Item<'_>, entry: &mut Entry<'_, Limited>) -> Result<(), Failure> {
    let new = Temporary::create(parent).map_err(item.failed())?;
    let size = entry.size();
    let mut buffer = vec![0; PIECE];
    let mut written = 0;
    loop {
        let read = entry.read(&mut buffer).map_err(malformed)?;
        if read == 0 {
            break;
        }
        new.write(&buffer[..read]).map_err(item.failed())?;
        written += read as u64;
    }
    if written != size {
        return Err(item.refuse("is not complete"));
    }
    folder::set_owner_and_mode(&new, Some(item.owner), item.mode).map_err(item.failed())?;
    rustix::fs::futimens(&new, &item.times).map_err(item.failed())?;
    new.publish(item.name()).map_err(item.failed())
}

fn symbolic_link(parent: &OwnedFd, item: &Item<'_>, target: &[u8]) -> Result<(), Failure> {
    remove_file(parent, item)?;
    let (target, name) = (OsString::from_vec(target.to_vec()), item.name());
    let (uid, gid) = (Uid::from_raw(item.owner.uid), Gid::from_raw(item.owner.gid));
    symlinkat(target, parent, name)
        .and_then(|()| chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))
        .and_then(|()| utimensat(parent, name, &item.times, AtFlags::SYMLINK_NOFOLLOW))
        .map_err(item.failed())
}

/// Removes a file that a link replaces.
fn remove_file(parent: &OwnedFd, item: &Item<'_>) -> Result<(), Failure> {
    match statat(parent, item.name(), AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(()),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => Err(Failure::new(
            FailureCode::WrongKind,
            format!("cannot unpack {}: a directory has this path", item.shown),
        )),
        Ok(_) => unlinkat(parent, item.name(), AtFlags::empty()).map_err(item.failed()),
        Err(error) => Err(item.failed()(error)),
    }
}

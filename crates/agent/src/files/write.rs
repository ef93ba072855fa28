//! Replaces the content of a file, as a whole.
//!
//! The content arrives in a temporary file of the same folder, which is flushed and then renamed. A
//! program in the guest sees the old content or all of the new one, also after a crash. Extended
//! attributes of the old file are not kept.

use crate::accounts::Owner;
use crate::blocking;
use crate::files::folder;
use crate::files::info::info;
use crate::files::kind::require_regular;
use crate::files::names::encode;
use crate::files::read::PIECE;
use crate::files::temporary::Temporary;
use crate::server::Failure;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use rustix::fs::{AtFlags, CWD, FileType, fsync, readlinkat, statat};
use rustix::io::Errno;
use scalebox_agent_api::{FailureCode, FileInfo};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The permissions of a new file.
const DEFAULT_MODE: u32 = 0o644;
/// Maximum number of symbolic links that are followed, as in the kernel.
const MAX_LINKS: usize = 40;

/// The file to write. Mode and owner are those of the file that exists unless they are given.
pub(crate) struct Target {
    /// The path. A symbolic link is followed, also if its target does not exist.
    pub(crate) path: PathBuf,
    /// The permissions.
    pub(crate) mode: Option<u32>,
    /// The owner.
    pub(crate) owner: Option<Owner>,
    /// `true` if folders that do not exist are made; they belong to the owner, too.
    pub(crate) parents: bool,
}

/// Writes the body of a request to a file.
///
/// # Errors
/// Those of the file system; [`FailureCode::WrongKind`] if the path names a directory or a special
/// file; [`FailureCode::Other`] if the body ends early. An error leaves nothing, except for folders
/// that were made.
pub(crate) async fn write(target: Target, mut body: Incoming) -> Result<FileInfo, Failure> {
    let path = encode(&target.path);
    let mut upload = Upload(Some(blocking::run(move || Draft::begin(target)).await?));
    let mut buffer = Vec::with_capacity(PIECE);
    while let Some(frame) = body.frame().await {
        let ended_early = |error| {
            Failure::new(
                FailureCode::Other,
                format!("the content of {path} ended early: {error}"),
            )
        };
        let Ok(mut data) = frame.map_err(ended_early)?.into_data() else {
            continue;
        };
        while !data.is_empty() {
            let part = data.split_to(data.len().min(PIECE - buffer.len()));
            buffer.extend_from_slice(&part);
            if buffer.len() == PIECE {
                buffer = upload.append(buffer).await?;
            }
        }
    }
    upload.append(buffer).await?;
    upload.finish().await
}

/// A draft that is discarded on a thread for blocking operations, unless it is finished.
struct Upload(Option<Draft>);

impl Upload {
    /// Appends bytes, and returns the emptied buffer.
    async fn append(&mut self, mut buffer: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let draft = self.take()?;
        let (draft, buffer) = blocking::run(move || {
            let failed = Failure::io(format!("write {}", encode(&draft.path)));
            draft.file.write(&buffer).map_err(failed)?;
            buffer.clear();
            Ok((draft, buffer))
        })
        .await?;
        self.0 = Some(draft);
        Ok(buffer)
    }

    async fn finish(mut self) -> Result<FileInfo, Failure> {
        let draft = self.take()?;
        blocking::run(move || draft.finish()).await
    }

    fn take(&mut self) -> Result<Draft, Failure> {
        let lost = || Failure::new(FailureCode::Other, "the temporary file is gone");
        self.0.take().ok_or_else(lost)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(draft) = self.0.take() {
            // Removing the file may wait for a disk. Without a runtime the agent itself ends.
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn_blocking(move || drop(draft));
            }
        }
    }
}

/// A file that is being written.
struct Draft {
    path: PathBuf,
    file: Temporary,
    mode: u32,
    owner: Option<Owner>,
}

impl Draft {
    fn begin(target: Target) -> Result<Draft, Failure> {
        let bytes = target.path.as_os_str().as_bytes();
        if bytes.ends_with(b"/") || bytes.ends_with(b"/.") {
            return Err(Failure::new(
                FailureCode::WrongKind,
                format!("{} names a directory", encode(&target.path)),
            ));
        }
        let path = follow(target.path)?;
        let (parent, name) = folder::split(&path)?;
        if target.parents {
            folder::make_all(parent, folder::DEFAULT_MODE, target.owner)?;
        }
        let failed = || Failure::io(format!("write {}", encode(&path)));
        let folder = Arc::new(folder::open(parent).map_err(failed())?);
        let present = match statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                require_regular(&path, &stat)?;
                Some(stat)
            }
            Err(Errno::NOENT) => None,
            Err(error) => return Err(failed()(error)),
        };
        let present_mode = present.map(|stat| stat.st_mode & 0o7777);
        let present_owner = present.map(|stat| Owner {
            uid: stat.st_uid,
            gid: stat.st_gid,
        });
        Ok(Draft {
            file: Temporary::create(folder).map_err(failed())?,
            mode: target.mode.or(present_mode).unwrap_or(DEFAULT_MODE),
            owner: target.owner.or(present_owner),
            path,
        })
    }

    fn finish(self) -> Result<FileInfo, Failure> {
        let failed = || Failure::io(format!("write {}", encode(&self.path)));
        let name = self.path.file_name().unwrap_or(OsStr::new(""));
        let folder = Arc::clone(self.file.folder());
        folder::set_owner_and_mode(&self.file, self.owner, self.mode).map_err(failed())?;
        self.file.flush().map_err(failed())?;
        self.file.publish(name).map_err(failed())?;
        fsync(&folder).map_err(failed())?;
        info(&self.path)
    }
}

/// Follows the symbolic link at the end of a path, and the next ones.
fn follow(mut path: PathBuf) -> Result<PathBuf, Failure> {
    for _ in 0..MAX_LINKS {
        let is_link = match statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => FileType::from_raw_mode(stat.st_mode) == FileType::Symlink,
            Err(Errno::NOENT) => false,
            Err(error) => return Err(Failure::io(format!("open {}", encode(&path)))(error)),
        };
        if !is_link {
            return Ok(path);
        }
        let target = readlinkat(CWD, &path, Vec::new());
        let target = target.map_err(Failure::io(format!("read {}", encode(&path))))?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        path = folder.join(OsStr::from_bytes(target.as_bytes()));
    }
    Err(Failure::io(format!("open {}", encode(&path)))(Errno::LOOP))
}

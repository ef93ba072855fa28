//! Lists a directory.
//!
//! Only the names are held, and the properties are read and sent in groups, so that the largest
//! listing fits into the agent's memory.

use crate::blocking;
use crate::files::info::info_at;
use crate::files::names::encode;
use crate::server::{Failure, Response, stream};
use bytes::Bytes;
use futures::stream::try_unfold;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Dir, Mode, OFlags, openat};
use rustix::io::Errno;
use scalebox_agent_api::files::MAX_ENTRIES;
use std::collections::BinaryHeap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Number of entries that are read and sent at once.
const GROUP: usize = 128;

/// Responds with a [`Listing`](scalebox_agent_api::Listing) of the directory. If it has more than
/// [`MAX_ENTRIES`] entries, these are the first ones by name.
///
/// # Errors
/// Those of the file system.
pub(crate) async fn list(path: PathBuf) -> Result<Response, Failure> {
    let rest = blocking::run(move || read_names(&path).map_err(Failure::io(format!("list {}", encode(&path))))).await?;
    let mut response = stream(try_unfold(Some(rest), |rest| async {
        let Some(rest) = rest else { return Ok(None) };
        let piece = blocking::run(move || Ok(rest.next_piece())).await;
        piece.map_err(|failure| io::Error::other(failure.0.error))?.map(Some)
    }));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    Ok(response)
}

/// The part of a listing that is not sent yet.
struct Rest {
    folder: Arc<OwnedFd>,
    /// The names, in reverse order.
    names: Vec<Box<[u8]>>,
    has_begun: bool,
    has_entries: bool,
    is_truncated: bool,
}

fn read_names(path: &Path) -> rustix::io::Result<Rest> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let folder = openat(CWD, path, flags, Mode::empty())?;
    let mut names: BinaryHeap<Box<[u8]>> = BinaryHeap::new();
    let mut is_truncated = false;
    for entry in Dir::read_from(&folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        names.push(name.into());
        if names.len() > MAX_ENTRIES {
            names.pop();
            is_truncated = true;
        }
    }
    let mut names = names.into_sorted_vec();
    names.reverse();
    Ok(Rest {
        folder: Arc::new(folder),
        names,
        has_begun: false,
        has_entries: false,
        is_truncated,
    })
}

impl Rest {
    /// Returns the next piece of the JSON document, and the rest of the listing.
    fn next_piece(mut self) -> io::Result<(Bytes, Option<Rest>)> {
        let mut piece = Vec::new();
        if !std::mem::replace(&mut self.has_begun, true) {
            piece.extend_from_slice(b"{\"entries\":[");
        }
        for _ in 0..GROUP {
            let Some(name) = self.names.pop() else { break };
            let info = match info_at(&self.folder, OsStr::from_bytes(&name)) {
                // The file vanished after the names were read.
                Err(Errno::NOENT) => continue,
                info => info?,
            };
            if std::mem::replace(&mut self.has_entries, true) {
                piece.push(b',');
            }
            serde_json::to_writer(&mut piece, &info)?;
        }
        let rest = if self.names.is_empty() {
            piece.extend_from_slice(format!("],\"truncated\":{}}}", self.is_truncated).as_bytes());
            None
        } else {
            Some(self)
        };
        Ok((Bytes::from(piece), rest))
    }
}

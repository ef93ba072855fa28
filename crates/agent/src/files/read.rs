//! Sends the content of a file.

use crate::blocking;
use crate::files::info::modified_ms;
use crate::files::kind::{is_generated, require_regular};
use crate::files::names::encode;
use crate::server::{Failure, Response, stream};
use bytes::Bytes;
use futures::stream::try_unfold;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use rustix::buffer::spare_capacity;
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, Stat, fcntl_setfl, fstat, openat, stat};
use scalebox_agent_api::files::MAX_GENERATED;
use scalebox_agent_api::{FailureCode, headers};
use std::io;
use std::path::{Path, PathBuf};

/// Size of the pieces in which content is read and sent, in bytes.
pub(crate) const PIECE: usize = 64 << 10;

/// Responds with the content of a regular file.
///
/// # Errors
/// [`FailureCode::WrongKind`] for anything but a regular file, and for files that the kernel
/// generates and that are longer than [`MAX_GENERATED`], such as `/proc/kcore`. Those of the file
/// system.
pub(crate) async fn read(path: PathBuf) -> Result<Response, Failure> {
    let (content, stat) = blocking::run(move || open(&path)).await?;
    let size = match content.end {
        End::At(_) => Some(stat.st_size.to_string()),
        End::OfFile { .. } => None,
    };
    let mut response = stream(try_unfold(content, |content| async {
        let piece = blocking::run(move || Ok(content.next_piece())).await;
        piece.map_err(|failure| io::Error::other(failure.0.error))?
    }));
    let fields = [
        (headers::MODE, Some(format!("{:04o}", stat.st_mode & 0o7777))),
        (headers::UID, Some(stat.st_uid.to_string())),
        (headers::GID, Some(stat.st_gid.to_string())),
        (headers::MODIFIED_MS, Some(modified_ms(&stat).to_string())),
        (headers::SIZE, size),
    ];
    for (name, value) in fields {
        // Digits are valid in a header.
        if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
            response.headers_mut().insert(name, value);
        }
    }
    let binary = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(CONTENT_TYPE, binary);
    Ok(response)
}

/// The part of a file that is not sent yet.
struct Content {
    file: OwnedFd,
    end: End,
    /// The first piece of a generated file, which was read when it was opened.
    first: Option<Vec<u8>>,
}

/// Where the content ends.
enum End {
    /// After this number of bytes.
    At(u64),
    /// At the end of a generated file.
    OfFile { read: u64 },
}

fn open(path: &Path) -> Result<(Content, Stat), Failure> {
    let failed = || Failure::io(format!("open {}", encode(path)));
    // Opening a device can have effects of its own, such as the start of a watchdog. So the kind is
    // checked before, and again after, in case another file has this name by then.
    require_regular(path, &stat(path).map_err(failed())?)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = openat(CWD, path, flags, Mode::empty()).map_err(failed())?;
    let stat = fstat(&file).map_err(failed())?;
    require_regular(path, &stat)?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if !is_generated(&file).map_err(failed())? {
        fcntl_setfl(&file, OFlags::RDONLY).map_err(failed())?;
        let content = Content {
            file,
            end: End::At(size),
            first: None,
        };
        return Ok((content, stat));
    }
    if size > MAX_GENERATED {
        return Err(Failure::new(
            FailureCode::WrongKind,
            format!("{} has {size} bytes, which the kernel generates", encode(path)),
        ));
    }
    // Many such files fail at the first read, or have nothing to read until an event.
    let first = read_piece(&file, PIECE as u64).map_err(Failure::io(format!("read {}", encode(path))))?;
    let content = Content {
        file,
        end: End::OfFile { read: 0 },
        first: Some(first),
    };
    Ok((content, stat))
}

impl Content {
    /// Returns the next piece, and what is left after it.
    fn next_piece(mut self) -> io::Result<Option<(Bytes, Content)>> {
        let piece = match &mut self.end {
            End::At(0) => return Ok(None),
            End::At(left) => {
                let piece = read_piece(&self.file, *left)?;
                if piece.is_empty() {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the file became shorter while it was read",
                    ));
                }
                *left -= piece.len() as u64;
                piece
            }
            End::OfFile { read } => {
                let piece = match self.first.take() {
                    Some(piece) => piece,
                    None => read_piece(&self.file, PIECE as u64)?,
                };
                *read += piece.len() as u64;
                if *read > MAX_GENERATED {
                    return Err(io::Error::other("the file is too long"));
                }
                if piece.is_empty() {
                    return Ok(None);
                }
                piece
            }
        };
        Ok(Some((Bytes::from(piece), self)))
    }
}

/// Reads up to `max` bytes, but at most [`PIECE`]; no bytes at the end.
fn read_piece(file: &OwnedFd, max: u64) -> rustix::io::Result<Vec<u8>> {
    let size = usize::try_from(max).map_or(PIECE, |max| max.min(PIECE));
    let mut piece = Vec::with_capacity(size);
    rustix::io::retry_on_intr(|| rustix::io::read(file, spare_capacity(&mut piece)))?;
    piece.truncate(size);
    Ok(piece)
}

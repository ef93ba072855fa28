//! Files of VMs: `/vms/{vm}/files` and the routes below it.

use crate::host::Host;
use crate::host::error::ServiceError;
use crate::http::extract::{RawBody, Segment, require_supported_encoding};
use crate::http::query::Params;
use crate::http::upload::upload;
use crate::vm::files::{self, Reading};
use crate::vm::guest;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream};
use scalebox_api::files::headers;
use scalebox_api::{FileEntry, FileList, FileMode, FileOwner, MakeDirectory, RenameFile};
use scalebox_guest::{FileHead, PutFile};
use std::io;
use std::str::FromStr;
use std::time::Duration;
use tokio::time::timeout;

/// Time limit for the guest to send the next piece of a file.
const PIECE_TIMEOUT: Duration = Duration::from_secs(60);
const OCTET_STREAM: HeaderValue = HeaderValue::from_static("application/octet-stream");
const TAR: HeaderValue = HeaderValue::from_static("application/x-tar");

/// The parameter `format`.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Tar;

impl FromStr for Tar {
    type Err = ();

    fn from_str(text: &str) -> Result<Tar, ()> {
        if text == "tar" { Ok(Tar) } else { Err(()) }
    }
}

impl Params {
    /// Returns whether the content is a tar archive.
    fn is_tar(&self) -> Result<bool, ServiceError> {
        Ok(self.parsed::<Tar>("format", "tar")?.is_some())
    }
}

/// Reads a file of a VM, or the properties or entries of one.
///
/// Symbolic links are followed for the content, and not for the properties.
#[utoipa::path(
    get, path = "/vms/{vm}/files", tag = "Files",
    params(
        ("vm" = String, Path, description = "Id or name of the VM."),
        ("path" = String, Query, description = "An absolute path in the VM."),
        ("list" = Option<bool>, Query, description = "`true` returns the entries of a directory."),
        ("info" = Option<bool>, Query, description = "`true` returns the file's properties."),
        ("format" = Option<String>, Query, description = "`tar` returns a file, or a directory with everything in it, as a tar archive."),
    ),
    responses(
        (status = 200, description = "The content; or an archive, entries or properties, as requested.", headers(
            ("X-Scalebox-Mode" = String, description = "The file's permissions, in octal."),
            ("X-Scalebox-Uid" = u32, description = "The owner's number."),
            ("X-Scalebox-Gid" = u32, description = "The group's number."),
            ("X-Scalebox-Modified-Ms" = i64, description = "Time of the last change of the content, in milliseconds since 1970."),
            ("X-Scalebox-Size" = u64, description = "Size in bytes, when the file was opened.")
        ), content((Vec<u8> = "application/octet-stream"), (Vec<u8> = "application/x-tar"), (FileList = "application/json"))),
        (status = 400, description = "A query parameter is invalid; the error names it."),
        (status = 403, description = "The guest's kernel does not allow it."),
        (status = 404, description = "No such VM, or no such file in it."),
        (status = 409, description = "The VM is not running, or the file is of another kind."),
        (status = 503, description = "The VM's agent does not respond."),
    )
)]
pub(crate) async fn read(State(host): State<Host>, Segment(vm): Segment, uri: Uri) -> Result<Response, ServiceError> {
    let params = Params::parse(&uri, &["path", "list", "info", "format"])?;
    let path = params.path()?;
    match (params.flag("list")?, params.flag("info")?, params.is_tar()?) {
        (true, false, false) => Ok(Json(files::list(&host, &vm, &path).await?).into_response()),
        (false, true, false) => Ok(Json(files::info(&host, &vm, &path).await?).into_response()),
        (false, false, true) => {
            let reading = files::read_tar(&host, &vm, &path).await?;
            Ok(([(CONTENT_TYPE, TAR)], body(reading)).into_response())
        }
        (false, false, false) => {
            let (head, reading) = files::read(&host, &vm, &path).await?;
            Ok((head_of(&head), body(reading)).into_response())
        }
        _ => Err(ServiceError::invalid(
            "list, info and format exclude each other: send one of them",
        )),
    }
}

fn head_of(head: &FileHead) -> [(HeaderName, HeaderValue); 7] {
    let octal = format!("{:04o}", head.mode);
    // Octal digits are a valid value.
    let mode = HeaderValue::from_str(&octal).unwrap_or(HeaderValue::from_static(""));
    [
        (CONTENT_TYPE, OCTET_STREAM),
        // A file that changes while it is read has another length, which ends the connection.
        (CONTENT_LENGTH, head.size.into()),
        (HeaderName::from_static(headers::MODE), mode),
        (HeaderName::from_static(headers::UID), head.uid.into()),
        (HeaderName::from_static(headers::GID), head.gid.into()),
        (HeaderName::from_static(headers::MODIFIED_MS), head.modified_ms.into()),
        (HeaderName::from_static(headers::SIZE), head.size.into()),
    ]
}

fn body(reading: Reading) -> Body {
    Body::from_stream(pieces(reading))
}

/// Returns the content piece by piece. An error closes the client's connection, so that it does not
/// treat the content as complete.
fn pieces(reading: Reading) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some(reading), |reading| async {
        let mut reading = reading?;
        let next = tokio::select! {
            next = timeout(PIECE_TIMEOUT, reading.content.next()) => next,
            () = reading.guest.host.closing.cancelled() => {
                return Some((Err(io::Error::other("scaleboxd is stopping")), None));
            }
        };
        let error = match next {
            Ok(None) => return None,
            Ok(Some(Ok(piece))) => return Some((Ok(piece), Some(reading))),
            Ok(Some(Err(error))) => reading.guest.failed(&error).to_string(),
            Err(_) => format!("no data for {} s", PIECE_TIMEOUT.as_secs()),
        };
        tracing::info!(vm = %reading.guest.record.id, error, "reading a file of a guest ended early");
        Some((Err(io::Error::other(error)), None))
    })
}

/// Writes a file of a VM: the file is replaced when all of the body has arrived. With `format=tar`,
/// unpacks an archive into a directory.
#[utoipa::path(
    put, path = "/vms/{vm}/files", tag = "Files",
    params(
        ("vm" = String, Path, description = "Id or name of the VM."),
        ("path" = String, Query, description = "An absolute path in the VM."),
        ("mode" = Option<String>, Query, description = "Permissions in octal; by default 0644 for a new file, and those of a file that is replaced."),
        ("user" = Option<String>, Query, description = "Owner: `NAME`, `UID`, `NAME:GROUP` or `UID:GID`; by default root."),
        ("parents" = Option<bool>, Query, description = "`true` creates missing directories."),
        ("format" = Option<String>, Query, description = "`tar` unpacks the body below `path`, with the modes and owners of the archive."),
    ),
    request_body(content = [u8], content_type = "application/octet-stream"),
    responses(
        (status = 200, body = FileEntry),
        (status = 400, description = "A query parameter is invalid, and the error names it; or the archive is invalid."),
        (status = 403, description = "The guest's kernel does not allow it."),
        (status = 404, description = "No such VM, user or directory."),
        (status = 409, description = "The VM is not running, or the file is of another kind."),
        (status = 503, description = "The VM's agent does not respond."),
        (status = 504, description = "The guest did not store the content in time."),
        (status = 507, description = "The guest's disk is full."),
    )
)]
pub(crate) async fn write(
    State(host): State<Host>,
    Segment(vm): Segment,
    uri: Uri,
    headers: HeaderMap,
    content: Body,
) -> Result<Json<FileEntry>, ServiceError> {
    let params = Params::parse(&uri, &["path", "mode", "user", "parents", "format"])?;
    let path = params.path()?;
    let mode = params.parsed::<FileMode>("mode", "permissions in octal, such as 0644")?;
    let user = params.parsed::<FileOwner>("user", "a user's name or number, optionally with a group")?;
    let put = PutFile {
        mode: mode.map(FileMode::bits),
        user: user.map(|user| user.to_string()),
        parents: params.flag("parents")?,
    };
    let is_tar = params.is_tar()?;
    if is_tar && put != PutFile::default() {
        return Err(ServiceError::invalid_field(
            "format",
            "format=tar takes modes and owners from the archive: omit mode, user and parents",
        ));
    }
    require_supported_encoding(&headers, &[])?;
    let guest = guest::reach(&host, &vm).await?;
    let (content, failure) = upload(content);
    let written = match is_tar {
        true => files::write_tar(&guest, &path, content).await,
        false => files::write(&guest, &path, &put, content).await,
    };
    failure.explain(written).map(Json)
}

/// Removes a file or directory of a VM.
#[utoipa::path(
    delete, path = "/vms/{vm}/files", tag = "Files",
    params(
        ("vm" = String, Path, description = "Id or name of the VM."),
        ("path" = String, Query, description = "An absolute path in the VM."),
        ("recursive" = Option<bool>, Query, description = "`true` removes a directory with everything in it."),
    ),
    responses(
        (status = 204), (status = 400, description = "A query parameter is invalid; the error names it."),
        (status = 403, description = "The guest's kernel does not allow it."),
        (status = 404, description = "No such VM, or no such file in it."),
        (status = 409, description = "The VM is not running, or the directory is not empty."),
        (status = 503, description = "The VM's agent does not respond."),
    )
)]
pub(crate) async fn remove(
    State(host): State<Host>,
    Segment(vm): Segment,
    uri: Uri,
) -> Result<StatusCode, ServiceError> {
    let params = Params::parse(&uri, &["path", "recursive"])?;
    files::remove(&host, &vm, &params.path()?, params.flag("recursive")?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Creates a directory in a VM.
#[utoipa::path(
    post, path = "/vms/{vm}/files/mkdir", tag = "Files", request_body = MakeDirectory,
    params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses(
        (status = 200, body = FileEntry), (status = 400, description = "A field is invalid; the error names it."),
        (status = 403, description = "The guest's kernel does not allow it."),
        (status = 404, description = "No such VM, user or parent directory."),
        (status = 409, description = "The VM is not running, or the directory exists."),
        (status = 503, description = "The VM's agent does not respond."), (status = 507, description = "The guest's disk is full."),
    )
)]
pub(crate) async fn make_directory(
    State(host): State<Host>,
    Segment(vm): Segment,
    RawBody(body): RawBody,
) -> Result<Json<FileEntry>, ServiceError> {
    let request = MakeDirectory::parse(&body)?;
    let put = PutFile {
        mode: request.mode.map(FileMode::bits),
        user: request.user.map(|user| user.to_string()),
        parents: request.parents,
    };
    let made = files::make_directory(&host, &vm, request.path.as_str().as_bytes(), &put).await;
    made.map(Json)
}

/// Renames a file or directory of a VM.
#[utoipa::path(
    post, path = "/vms/{vm}/files/rename", tag = "Files", request_body = RenameFile,
    params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses(
        (status = 200, body = FileEntry), (status = 400, description = "A field is invalid; the error names it."),
        (status = 403, description = "The guest's kernel does not allow it."),
        (status = 404, description = "No such VM, or no such file in it."),
        (status = 409, description = "The VM is not running, or the new name is that of a file of another kind."),
        (status = 503, description = "The VM's agent does not respond."), (status = 507, description = "The guest's disk is full."),
    )
)]
pub(crate) async fn rename(
    State(host): State<Host>,
    Segment(vm): Segment,
    RawBody(body): RawBody,
) -> Result<Json<FileEntry>, ServiceError> {
    let RenameFile { path, to } = RenameFile::parse(&body)?;
    let renamed = files::rename(&host, &vm, path.as_str().as_bytes(), to.as_str().as_bytes()).await;
    renamed.map(Json)
}

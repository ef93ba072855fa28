//! Files in VMs.

use crate::error::ClientError;
use crate::http::{ApiRequest, Client, OPERATION_TIMEOUT, QUERY_TIMEOUT, percent_encoded, vm_path};
use scalebox_api::files::headers;
use scalebox_api::{FileEntry, FileList, FileMode, FileOwner, GuestPath, MakeDirectory, RenameFile};
use std::io::Read;
use std::time::Duration;
use ureq::http::{Method, Response};

/// Maximum silence while a file or an archive is downloaded.
const DOWNLOAD_IDLE_TIMEOUT: Duration = Duration::from_secs(120);

/// The content of a file in a VM.
pub struct Download {
    /// Size when the file was opened; none for an archive. If the content has another size, the
    /// reader returns an error at its end.
    pub size: Option<u64>,
    /// Permissions; none for an archive.
    pub mode: Option<FileMode>,
    /// The content.
    pub content: Box<dyn Read + Send>,
}

/// The properties of a file that is written.
#[derive(Debug, Clone, Default)]
pub struct Upload {
    /// Permissions; the daemon's default is 0644, or those of the file that is replaced.
    pub mode: Option<FileMode>,
    /// Owner; root by default.
    pub user: Option<FileOwner>,
    /// `true` to create missing parents.
    pub parents: bool,
}

impl Client {
    /// Sends `GET /vms/{vm}/files?path=…`: the content of a file.
    ///
    /// # Errors
    /// See [`ClientError`]. The reader reports later failures.
    pub fn read_file(&self, vm: &str, path: &GuestPath) -> Result<Download, ClientError> {
        let path = files_path(vm, path, "");
        let call = ApiRequest::new(self, Method::GET, &path, QUERY_TIMEOUT);
        let (response, _) = call.begin("application/octet-stream", None, Some(DOWNLOAD_IDLE_TIMEOUT))?;
        let header = |name| {
            let value: &ureq::http::HeaderValue = response.headers().get(name)?;
            value.to_str().ok()
        };
        Ok(Download {
            size: header(headers::SIZE).and_then(|size| size.parse().ok()),
            mode: header(headers::MODE).and_then(|mode| mode.parse().ok()),
            content: content(response),
        })
    }

    /// Sends `GET /vms/{vm}/files?path=…&format=tar`: a file or a directory as a tar archive, with
    /// names relative to it.
    ///
    /// # Errors
    /// See [`ClientError`]. The reader reports later failures.
    pub fn read_archive(&self, vm: &str, path: &GuestPath) -> Result<Download, ClientError> {
        let path = files_path(vm, path, "&format=tar");
        let call = ApiRequest::new(self, Method::GET, &path, QUERY_TIMEOUT);
        let (response, _) = call.begin("application/x-tar", None, Some(DOWNLOAD_IDLE_TIMEOUT))?;
        Ok(Download {
            size: None,
            mode: None,
            content: content(response),
        })
    }

    /// Sends `GET /vms/{vm}/files?path=…&info=true`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn file_info(&self, vm: &str, path: &GuestPath) -> Result<FileEntry, ClientError> {
        self.get(&files_path(vm, path, "&info=true"))
    }

    /// Sends `GET /vms/{vm}/files?path=…&list=true`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn list_files(&self, vm: &str, path: &GuestPath) -> Result<FileList, ClientError> {
        self.get(&files_path(vm, path, "&list=true"))
    }

    /// Sends `PUT /vms/{vm}/files?path=…`: creates or replaces a file. Without a `length`, the
    /// content may have any length. A reader that fails leaves the file as it was.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn write_file(
        &self,
        vm: &str,
        path: &GuestPath,
        upload: &Upload,
        content: impl Read + 'static,
        length: Option<u64>,
    ) -> Result<FileEntry, ClientError> {
        let path = files_path(vm, path, &upload.query());
        ApiRequest::new(self, Method::PUT, &path, OPERATION_TIMEOUT)
            .upload(content, length)?
            .json()
    }

    /// Sends `PUT /vms/{vm}/files?path=…&format=tar`: unpacks a tar archive below a directory. With
    /// a user in `upload`, everything belongs to that user. The mode in `upload` is not used.
    ///
    /// # Errors
    /// See [`ClientError`]. Files that were unpacked before an error stay.
    pub fn write_archive(
        &self,
        vm: &str,
        path: &GuestPath,
        upload: &Upload,
        archive: impl Read + 'static,
    ) -> Result<FileEntry, ClientError> {
        let upload = Upload {
            mode: None,
            ..upload.clone()
        };
        let path = files_path(vm, path, &(upload.query() + "&format=tar"));
        ApiRequest::new(self, Method::PUT, &path, OPERATION_TIMEOUT)
            .upload(archive, None)?
            .json()
    }

    /// Sends `DELETE /vms/{vm}/files?path=…`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn delete_file(&self, vm: &str, path: &GuestPath, recursive: bool) -> Result<(), ClientError> {
        self.delete(&files_path(vm, path, &format!("&recursive={recursive}")))
    }

    /// Sends `POST /vms/{vm}/files/mkdir`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn make_directory(&self, vm: &str, request: &MakeDirectory) -> Result<(), ClientError> {
        self.change_files(vm, "mkdir", request)
    }

    /// Sends `POST /vms/{vm}/files/rename`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn rename_file(&self, vm: &str, request: &RenameFile) -> Result<(), ClientError> {
        self.change_files(vm, "rename", request)
    }

    fn change_files(&self, vm: &str, change: &str, body: &impl serde::Serialize) -> Result<(), ClientError> {
        let path = format!("{}/files/{change}", vm_path(vm));
        let call = ApiRequest::new(self, Method::POST, &path, OPERATION_TIMEOUT);
        let body = serde_json::to_vec(body).map_err(|error| call.protocol(error.to_string()))?;
        call.run(Some(body)).map(drop)
    }
}

impl Upload {
    fn query(&self) -> String {
        let mut query = String::new();
        if let Some(mode) = self.mode {
            query += &format!("&mode={mode}");
        }
        if let Some(user) = &self.user {
            query += &format!("&user={}", percent_encoded(user.as_str()));
        }
        if self.parents {
            query += "&parents=true";
        }
        query
    }
}

fn content(response: Response<ureq::Body>) -> Box<dyn Read + Send> {
    Box::new(response.into_body().into_with_config().limit(u64::MAX).reader())
}

fn files_path(vm: &str, path: &GuestPath, rest: &str) -> String {
    format!("{}/files?path={}{rest}", vm_path(vm), percent_encoded(path.as_str()))
}

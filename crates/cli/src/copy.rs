//! The command `scalebox cp`.

use crate::archive::{self, Packed};
use crate::error::Error;
use crate::guest_args::CopyArgs;
use crate::human::bytes;
use crate::output::Output;
use crate::place::{Place, file_name, inside};
use indicatif::ProgressBar;
use scalebox_api::{FileKind, FileMode, FileOwner, GuestPath, MakeDirectory};
use scalebox_client::{Client, Download, Upload};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

pub(crate) fn copy(client: &Client, args: &CopyArgs, output: &Output) -> Result<(), Error> {
    match (Place::parse(&args.source)?, Place::parse(&args.target)?) {
        (Place::Remote { .. }, Place::Remote { .. }) => Err(Error::Copy("between two VMs: copy to this machine first")),
        (Place::Remote { vm, path }, Place::Stdio) => {
            let download = client.read_file(&vm, &path)?;
            let bar = output.bar(&format!("copying {path}"), download.size);
            transfer(download, &mut io::stdout().lock(), &bar).map(drop)
        }
        (Place::Remote { vm, path }, Place::Local(target)) => {
            let copied = download(client, &vm, &path, &target, args.recursive, output)?;
            report(&args.source, &copied.0.display().to_string(), copied.1, output)
        }
        (Place::Stdio, Place::Remote { vm, path }) => {
            let upload = Upload {
                user: args.user.clone(),
                ..Upload::default()
            };
            let bar = output.bar(&format!("copying to {path}"), None);
            let entry = client.write_file(&vm, &path, &upload, bar.wrap_read(io::stdin()), None)?;
            report("-", &args.target, entry.size, output)
        }
        (Place::Local(source), Place::Remote { vm, path }) => {
            let target = Target {
                client,
                vm: &vm,
                path: &path,
                user: args.user.as_ref(),
            };
            let (path, size) = target.upload(&source, args.recursive, output)?;
            report(&args.source, &format!("{vm}:{path}"), size, output)
        }
        (_, Place::Local(_) | Place::Stdio) => Err(Error::Copy("without a VM: one of the two paths must be VM:/PATH")),
    }
}

fn report(source: &str, target: &str, size: u64, output: &Output) -> Result<(), Error> {
    match output.json {
        true => output.json(&serde_json::json!({ "source": source, "target": target, "bytes": size })),
        false => output.line(&format!("copied {source} to {target} ({})", bytes(size))),
    }
}

/// The destination of copied files.
pub(crate) struct Target<'c> {
    pub client: &'c Client,
    pub vm: &'c str,
    pub path: &'c GuestPath,
    pub user: Option<&'c FileOwner>,
}

impl Target<'_> {
    /// Copies a file or, if `recursive`, a directory. Returns its path in the VM and its size.
    pub(crate) fn upload(&self, source: &Path, recursive: bool, output: &Output) -> Result<(GuestPath, u64), Error> {
        let failed = |error| Error::file(source, error);
        let metadata = fs::metadata(source).map_err(failed)?;
        if metadata.is_dir() && !recursive {
            return Err(Error::NotRecursive(source.display().to_string()));
        }
        if !metadata.is_dir() && !metadata.is_file() {
            return Err(failed(io::Error::other("neither a regular file nor a directory")));
        }
        let path = self.path_for(source)?;
        let exact = Target { path: &path, ..*self };
        let size = match metadata.is_dir() {
            true => exact.upload_directory(source, output)?,
            false => exact.upload_file(source, false, output)?,
        };
        Ok((path, size))
    }

    /// Copies a file or a directory to exactly the path, and creates missing parents.
    pub(crate) fn upload_as(&self, source: &Path, output: &Output) -> Result<(), Error> {
        let metadata = fs::metadata(source).map_err(|error| Error::file(source, error))?;
        match metadata.is_dir() {
            true => self.upload_directory(source, output).map(drop),
            false => self.upload_file(source, true, output).map(drop),
        }
    }

    fn upload_file(&self, source: &Path, parents: bool, output: &Output) -> Result<u64, Error> {
        let failed = |error| Error::file(source, error);
        let file = File::open(source).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let upload = Upload {
            mode: Some(FileMode::of_bits(metadata.permissions().mode())),
            user: self.user.cloned(),
            parents,
        };
        let size = Some(metadata.len());
        let bar = output.bar(&format!("copying {}", source.display()), size);
        let content = bar.wrap_read(file);
        let entry = self.client.write_file(self.vm, self.path, &upload, content, size)?;
        bar.finish_and_clear();
        Ok(entry.size)
    }

    /// Returns the path of the copy. It is inside the target if the target is a directory.
    fn path_for(&self, source: &Path) -> Result<GuestPath, Error> {
        let is_directory = match self.client.file_info(self.vm, self.path) {
            Ok(entry) => entry.kind == FileKind::Directory,
            Err(error) if error.status() == Some(404) => self.path.as_str().ends_with('/') && source.is_file(),
            Err(error) => return Err(error.into()),
        };
        if !is_directory {
            return Ok(self.path.clone());
        }
        // The name of `.` and `..` is that of the directory.
        let absolute = fs::canonicalize(source).map_err(|error| Error::file(source, error))?;
        let named = if source.file_name().is_some() {
            source
        } else {
            &absolute
        };
        match named.file_name().and_then(|name| name.to_str()) {
            Some(name) => inside(self.path, name),
            None => Err(Error::file(source, io::Error::other("the name is not UTF-8"))),
        }
    }

    fn upload_directory(&self, source: &Path, output: &Output) -> Result<u64, Error> {
        let upload = Upload {
            user: self.user.cloned(),
            ..Upload::default()
        };
        self.client.make_directory(
            self.vm,
            &MakeDirectory {
                path: self.path.clone(),
                mode: None,
                user: self.user.cloned(),
                parents: true,
            },
        )?;
        let (report_skipped, skipped) = mpsc::channel();
        let packed = Packed::start(source, report_skipped).map_err(|error| Error::file(source, error))?;
        let bar = output.bar(&format!("copying {}", source.display()), None);
        let archive = bar.wrap_read(packed);
        self.client.write_archive(self.vm, self.path, &upload, archive)?;
        for path in skipped.try_iter().flatten() {
            output.warning(&format!(
                "{} is neither a file nor a directory: skipped",
                path.display()
            ));
        }
        let size = bar.position();
        bar.finish_and_clear();
        Ok(size)
    }
}

/// Copies a file or, if `recursive`, a directory from a VM. Returns its path here and its size.
fn download(
    client: &Client,
    vm: &str,
    path: &GuestPath,
    target: &Path,
    recursive: bool,
    output: &Output,
) -> Result<(PathBuf, u64), Error> {
    let entry = client.file_info(vm, path)?;
    if entry.kind == FileKind::Directory && !recursive {
        return Err(Error::NotRecursive(format!("{vm}:{path}")));
    }
    let target = match file_name(path) {
        Some(name) if target.is_dir() => target.join(name),
        _ => target.to_owned(),
    };
    if entry.kind == FileKind::Directory {
        let download = client.read_archive(vm, path)?;
        let bar = output.bar(&format!("copying {path}"), None);
        for name in archive::unpack(bar.wrap_read(download.content), &target)? {
            output.warning(&format!("{name} was skipped: not a file, or outside of the directory"));
        }
        let size = bar.position();
        bar.finish_and_clear();
        return Ok((target, size));
    }
    let download = client.read_file(vm, path)?;
    let bar = output.bar(&format!("copying {path}"), download.size);
    let size = save(download, &target, &bar)?;
    bar.finish_and_clear();
    Ok((target, size))
}

/// Writes a file under a temporary name, and renames it when it is complete. A device, such as
/// `/dev/null`, is written to directly.
fn save(download: Download, target: &Path, bar: &ProgressBar) -> Result<u64, Error> {
    let is_special = fs::metadata(target).is_ok_and(|metadata| !metadata.is_file());
    if is_special {
        let mut out = File::options()
            .write(true)
            .open(target)
            .map_err(|error| Error::file(target, error))?;
        return transfer(download, &mut out, bar);
    }
    let mut partial = target.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    // Setuid bits of a guest are not kept on this machine.
    let mode = download.mode.map_or(0o644, FileMode::bits) & 0o777;
    let written = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode | 0o200)
        .open(&partial)
        .map_err(|error| Error::file(&partial, error))
        .and_then(|mut out| {
            let size = transfer(download, &mut out, bar)?;
            out.set_permissions(fs::Permissions::from_mode(mode))
                .and_then(|()| fs::rename(&partial, target))
                .map_err(|error| Error::file(target, error))?;
            Ok(size)
        });
    written.inspect_err(|_| {
        // Only the first error is reported.
        let _left = fs::remove_file(&partial);
    })
}

/// Copies the content, and checks that it is complete. Returns its size.
fn transfer(mut download: Download, out: &mut impl Write, bar: &ProgressBar) -> Result<u64, Error> {
    let (mut piece, mut size) = (vec![0; 64 << 10], 0);
    loop {
        let read = match download.content.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Download(error.to_string())),
        };
        out.write_all(&piece[..read]).map_err(Error::Output)?;
        size += read as u64;
        bar.inc(read as u64);
    }
    out.flush().map_err(Error::Output)?;
    match download.size {
        Some(expected) if expected != size => Err(Error::Download(format!(
            "{size} of {expected} bytes arrived: the file changed meanwhile, or the VM stopped"
        ))),
        _ => Ok(size),
    }
}

//! Packs and unpacks directories as tar streams.

use crate::error::Error;
use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use tar::{Archive, Builder, EntryType, Header};

/// A directory as a tar stream, packed in a thread. Reading fails if packing does, so that an
/// incomplete archive is not mistaken for a complete one.
pub(crate) struct Packed {
    archive: PipeReader,
    packing: Option<JoinHandle<io::Result<Vec<PathBuf>>>>,
    skipped: std::sync::mpsc::Sender<Vec<PathBuf>>,
}

impl Packed {
    /// Starts to pack the content of a directory, with root as the owner of everything. The paths
    /// of devices, FIFOs and sockets, which are skipped, are sent to `skipped` at the end.
    pub(crate) fn start(directory: &Path, skipped: std::sync::mpsc::Sender<Vec<PathBuf>>) -> io::Result<Packed> {
        let (archive, writer) = io::pipe()?;
        let directory = directory.to_owned();
        let thread = thread::Builder::new().name("pack".to_owned());
        let packing = thread.spawn(move || pack(&directory, writer))?;
        Ok(Packed {
            archive,
            packing: Some(packing),
            skipped,
        })
    }
}

impl Read for Packed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.archive.read(buffer)?;
        if read == 0
            && !buffer.is_empty()
            && let Some(packing) = self.packing.take()
        {
            let packed = packing
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("packing failed")));
            // The receiver may be gone.
            let _unheard = self.skipped.send(packed?);
        }
        Ok(read)
    }
}

fn pack(directory: &Path, writer: PipeWriter) -> io::Result<Vec<PathBuf>> {
    let mut builder = Builder::new(io::BufWriter::with_capacity(64 << 10, writer));
    let mut skipped = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<_> = fs::read_dir(directory.join(&folder))
            .and_then(Iterator::collect)
            .map_err(|error| at(&directory.join(&folder), error))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, name) = (entry.path(), folder.join(entry.file_name()));
            match pack_entry(&mut builder, &path, &name).map_err(|error| at(&path, error))? {
                Packing::Done => {}
                Packing::Folder => folders.push(name),
                Packing::Skipped => skipped.push(path),
            }
        }
    }
    builder.into_inner()?.into_inner()?;
    Ok(skipped)
}

enum Packing {
    Done,
    Folder,
    Skipped,
}

fn pack_entry(builder: &mut Builder<io::BufWriter<PipeWriter>>, path: &Path, name: &Path) -> io::Result<Packing> {
    let metadata = fs::symlink_metadata(path)?;
    let mut header = Header::new_gnu();
    header.set_metadata(&metadata);
    header.set_uid(0);
    header.set_gid(0);
    if metadata.is_symlink() {
        header.set_size(0);
        builder.append_link(&mut header, name, fs::read_link(path)?)?;
        return Ok(Packing::Done);
    }
    if metadata.is_dir() {
        header.set_size(0);
        builder.append_data(&mut header, name, io::empty())?;
        return Ok(Packing::Folder);
    }
    if !metadata.is_file() {
        return Ok(Packing::Skipped);
    }
    let file = fs::File::open(path)?;
    // The size at this moment: bytes that are appended later are omitted.
    let size = file.metadata()?.size();
    header.set_size(size);
    let mut content = file.take(size);
    builder.append_data(&mut header, name, &mut content)?;
    match content.limit() {
        0 => Ok(Packing::Done),
        _ => Err(io::Error::other("the file became shorter while it was read")),
    }
}

fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Unpacks an archive from a VM below a directory, and returns the names of entries that it
/// skipped. The archive is not trusted: no entry is written outside the directory, and devices and
/// setuid bits are ignored.
pub(crate) fn unpack(archive: impl Read, directory: &Path) -> Result<Vec<String>, Error> {
    fs::create_dir_all(directory).map_err(|error| Error::file(directory, error))?;
    let mut archive = Archive::new(archive);
    let failed = |error: io::Error| Error::Archive(error.to_string());
    let mut skipped = Vec::new();
    // Their permissions may forbid writing into them, so they are set at the end.
    let mut directories = Vec::new();
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let is_known = matches!(
            entry.header().entry_type(),
            EntryType::Regular | EntryType::Continuous | EntryType::Symlink | EntryType::Link
        );
        if entry.header().entry_type() == EntryType::Directory {
            directories.push(entry);
        } else if !is_known || !entry.unpack_in(directory).map_err(failed)? {
            skipped.push(String::from_utf8_lossy(&entry.path_bytes()).into_owned());
        }
    }
    for mut entry in directories.into_iter().rev() {
        entry.unpack_in(directory).map_err(failed)?;
    }
    Ok(skipped)
}

//! Template export and import: `scalebox template export|import`.

use crate::error::Error;
use crate::human::bytes;
use crate::output::Output;
use indicatif::ProgressBar;
use scalebox_client::{Client, Export};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use zstd::stream::read::Encoder;
use zstd::stream::write::Decoder;

/// First bytes of a zstd frame (RFC 8878, section 3.1.1).
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The magic of ext4, and its place: in the superblock, which begins after 1024 bytes
/// (Documentation/filesystems/ext4/super.rst of Linux).
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];
const EXT4_MAGIC_AT: usize = 1080;
/// Bytes that decide whether a file is an ext4 file system.
const HEAD_BYTES: usize = EXT4_MAGIC_AT + EXT4_MAGIC.len();
/// Compression level, the same as the server's.
const ZSTD_LEVEL: i32 = 3;
/// File name that means standard input or output.
const STDIO: &str = "-";

/// Writes a template to a file, compressed with zstd. The file is renamed into place when it is
/// complete.
pub(crate) fn export(
    client: &Client,
    name: &str,
    file: Option<&Path>,
    force: bool,
    output: &Output,
) -> Result<(), Error> {
    let file = file.map_or_else(|| PathBuf::from(format!("{name}.ext4.zst")), Path::to_owned);
    if file == Path::new(STDIO) {
        let export = client.export_template(name)?;
        let bar = output.bar(&format!("exporting {name}"), Some(export.image_bytes));
        return copy(export, io::stdout().lock(), &bar).map(drop);
    }
    if !force && file.exists() {
        return Err(Error::FileExists(file));
    }
    let mut partial = file.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let export = client.export_template(name)?;
    let (image_bytes, bar) = (
        export.image_bytes,
        output.bar(&format!("exporting {name}"), Some(export.image_bytes)),
    );
    let written = File::create(&partial)
        .map_err(|error| Error::file(&partial, error))
        .and_then(|out| copy(export, &out, &bar).and_then(|size| Ok((size, out.sync_all()?))))
        .and_then(|(size, ())| {
            fs::rename(&partial, &file)
                .map(|()| size)
                .map_err(|error| Error::file(&file, error))
        });
    bar.finish_and_clear();
    let compressed_bytes = written.inspect_err(|_| {
        // Only the first error is reported.
        let _left = fs::remove_file(&partial);
    })?;
    if output.json {
        let file = file.display().to_string();
        return output.json(&serde_json::json!({
            "template": name, "file": file, "image_bytes": image_bytes, "packed_bytes": compressed_bytes,
        }));
    }
    output.line(&format!(
        "exported the template {name} to {}: {}, compressed to {}",
        file.display(),
        bytes(image_bytes),
        bytes(compressed_bytes)
    ))
}

/// Copies the compressed image, and decompresses it meanwhile to show progress and to verify it.
/// Returns the compressed size in bytes.
fn copy(mut export: Export, mut out: impl Write, bar: &ProgressBar) -> Result<u64, Error> {
    let mut decoder = Decoder::new(Count(bar)).map_err(Error::Output)?;
    let (mut buffer, mut compressed_bytes) = (vec![0; 64 << 10], 0);
    loop {
        let read = match export.compressed.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Export(error.to_string())),
        };
        decoder
            .write_all(&buffer[..read])
            .map_err(|error| Error::Export(error.to_string()))?;
        out.write_all(&buffer[..read]).map_err(Error::Output)?;
        compressed_bytes += read as u64;
    }
    decoder.flush().map_err(|error| Error::Export(error.to_string()))?;
    if bar.position() != export.image_bytes {
        return Err(Error::Export(format!(
            "the image is incomplete: received {} of {} bytes",
            bar.position(),
            export.image_bytes
        )));
    }
    out.flush().map_err(Error::Output)?;
    Ok(compressed_bytes)
}

/// A writer that advances a progress bar by the bytes written to it.
struct Count<'b>(&'b ProgressBar);

impl Write for Count<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.inc(bytes.len() as u64);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Creates a template from an image. An ext4 file system is compressed for the upload; the server
/// recognises other images by their content, so they are sent as they are.
pub(crate) fn import(client: &Client, name: &str, file: &Path, replace: bool, output: &Output) -> Result<(), Error> {
    let (input, size): (Box<dyn Read>, _) = if file == Path::new(STDIO) {
        (Box::new(io::stdin()), None)
    } else {
        let open = || {
            let meta = fs::metadata(file)?;
            if !meta.is_file() {
                return Err(io::Error::other("not a regular file"));
            }
            Ok((File::open(file)?, meta.len()))
        };
        let (opened, size) = open().map_err(|error| Error::file(file, error))?;
        (Box::new(opened), Some(size))
    };
    let bar = output.bar(&format!("importing {name}"), size);
    let mut input = bar.wrap_read(input);
    let mut head = Vec::new();
    input
        .by_ref()
        .take(HEAD_BYTES as u64)
        .read_to_end(&mut head)
        .map_err(|error| Error::file(file, error))?;
    let is_file_system = !head.starts_with(&ZSTD_MAGIC) && head.get(EXT4_MAGIC_AT..) == Some(&EXT4_MAGIC);
    let image = io::Cursor::new(head).chain(input);
    let created = if is_file_system {
        let encoder = Encoder::new(image, ZSTD_LEVEL).map_err(|error| Error::file(file, error))?;
        client.import_template(name, encoder, replace)
    } else {
        client.import_template(name, image, replace)
    };
    bar.finish_and_clear();
    let template = created?;
    if output.json {
        return output.json(&template);
    }
    output.line(&format!(
        "created the template {}: {}, of which {} are used",
        template.name,
        bytes(template.size_bytes),
        bytes(template.used_bytes)
    ))
}

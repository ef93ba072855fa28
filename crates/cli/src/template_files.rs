//! `scalebox template export|import`: a template to a file, and a file to a template.

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

/// The first bytes of what is packed.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// As the server packs.
const LEVEL: i32 = 3;
/// What stands for the standard input or output.
const STANDARD: &str = "-";

/// Writes a template to a file, packed with zstd; the file gets its name when it is whole.
pub fn export(client: &Client, name: &str, file: Option<&Path>, force: bool, output: &Output) -> Result<(), Error> {
    let file = file.map_or_else(|| PathBuf::from(format!("{name}.ext4.zst")), Path::to_owned);
    if file == Path::new(STANDARD) {
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
    let packed_bytes = written.inspect_err(|_| {
        // The first error is the one to tell.
        let _left = fs::remove_file(&partial);
    })?;
    if output.json {
        let file = file.display().to_string();
        return output.answer(&serde_json::json!({
            "template": name, "file": file, "image_bytes": image_bytes, "packed_bytes": packed_bytes,
        }));
    }
    output.line(&format!(
        "{} holds the template {name}: {} in {}",
        file.display(),
        bytes(image_bytes),
        bytes(packed_bytes)
    ))
}

/// Copies what is packed, and unpacks it on the side: that tells how far it is, and whether it is
/// whole. Returns how much it was.
fn copy(mut export: Export, mut out: impl Write, bar: &ProgressBar) -> Result<u64, Error> {
    let mut unpacked = Decoder::new(Count(bar)).map_err(Error::Output)?;
    let (mut piece, mut packed_bytes) = (vec![0; 64 << 10], 0);
    loop {
        let read = match export.packed.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Export(error.to_string())),
        };
        unpacked
            .write_all(&piece[..read])
            .map_err(|error| Error::Export(error.to_string()))?;
        out.write_all(&piece[..read]).map_err(Error::Output)?;
        packed_bytes += read as u64;
    }
    unpacked.flush().map_err(|error| Error::Export(error.to_string()))?;
    if bar.position() != export.image_bytes {
        return Err(Error::Export("it ended early".to_owned()));
    }
    out.flush().map_err(Error::Output)?;
    Ok(packed_bytes)
}

/// Counts bytes on a bar.
struct Count<'b>(&'b ProgressBar);

impl Write for Count<'_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.0.inc(piece.len() as u64);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes a template of a file: an ext4 image, bare (it is packed on the way) or packed with zstd.
pub fn import(client: &Client, name: &str, file: &Path, replace: bool, output: &Output) -> Result<(), Error> {
    let (input, size): (Box<dyn Read>, _) = if file == Path::new(STANDARD) {
        (Box::new(io::stdin()), None)
    } else {
        let open = || {
            let meta = fs::metadata(file)?;
            if !meta.is_file() {
                return Err(io::Error::other("it is not a plain file"));
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
        .take(MAGIC.len() as u64)
        .read_to_end(&mut head)
        .map_err(|error| Error::file(file, error))?;
    let packed = head == MAGIC;
    let whole = io::Cursor::new(head).chain(input);
    let made = if packed {
        client.import_template(name, whole, replace)
    } else {
        let packing = Encoder::new(whole, LEVEL).map_err(|error| Error::file(file, error))?;
        client.import_template(name, packing, replace)
    };
    bar.finish_and_clear();
    let made = made?;
    if output.json {
        return output.answer(&made);
    }
    output.line(&format!(
        "the template {} is made: {} large, {} on disk",
        made.name,
        bytes(made.size_bytes),
        bytes(made.used_bytes)
    ))
}

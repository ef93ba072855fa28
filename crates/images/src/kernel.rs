//! The kernel package: its version, the image in the form that boots fastest, and the modules.

use crate::error::Error;
use crate::lz4;
use std::fs;
use std::path::{Path, PathBuf};

/// An unpacked kernel package.
pub(crate) struct KernelPackage {
    dir: PathBuf,
    /// The version, such as `6.1.0-18-cloud-amd64`.
    pub(crate) version: String,
}

impl KernelPackage {
    /// Opens the package that was unpacked to `dir`, and determines the version.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let modules = dir.join("lib/modules");
        let mut versions = Vec::new();
        for entry in fs::read_dir(&modules).map_err(Error::io("read", &modules))? {
            versions.push(entry.map_err(Error::io("read", &modules))?.file_name());
        }
        match versions.as_slice() {
            [version] => Ok(KernelPackage {
                dir: dir.to_owned(),
                version: version.to_string_lossy().into_owned(),
            }),
            _ => Err(Error::Kernel(format!(
                "it contains the modules of {} kernels instead of one",
                versions.len()
            ))),
        }
    }

    /// Returns the kernel to boot: the ELF image if it can be extracted, otherwise the bzImage.
    ///
    /// An ELF image is decompressed once instead of at each boot, which saves 0.4 s of an emulated
    /// CPU. It is also the only form that every hypervisor boots (QEMU by its PVH note).
    pub(crate) fn image(&self) -> Result<Vec<u8>, Error> {
        let path = self.dir.join("boot").join(format!("vmlinuz-{}", self.version));
        let bzimage = fs::read(&path).map_err(Error::io("read", &path))?;
        let elf = payload(&bzimage)
            .and_then(lz4::decompress)
            .filter(|image| image.starts_with(b"\x7fELF"));
        if elf.is_none() {
            tracing::warn!(
                version = self.version,
                "the kernel is not compressed with LZ4; guests decompress it at each boot"
            );
        }
        Ok(elf.unwrap_or(bzimage))
    }

    /// Returns the file of a module; `None` if it is built into the kernel.
    pub(crate) fn module(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let dir = self.dir.join("lib/modules").join(&self.version);
        let file = format!("{name}.ko");
        let builtin = dir.join("modules.builtin");
        let builtin = fs::read_to_string(&builtin).map_err(Error::io("read", &builtin))?;
        if builtin.lines().any(|path| is_file(path, &file)) {
            return Ok(None);
        }
        match find(&dir, &file)? {
            Some(path) => fs::read(&path).map(Some).map_err(Error::io("read", &path)),
            None => Err(Error::Kernel(format!("{} has no module {file}", self.version))),
        }
    }
}

fn is_file(path: &str, file: &str) -> bool {
    path.rsplit('/').next() == Some(file)
}

fn find(dir: &Path, file: &str) -> Result<Option<PathBuf>, Error> {
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let entry = entry.map_err(Error::io("read", dir))?;
        let kind = entry.file_type().map_err(Error::io("read the type of", entry.path()))?;
        if kind.is_dir() {
            if let Some(path) = find(&entry.path(), file)? {
                return Ok(Some(path));
            }
        } else if entry.file_name() == file {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Returns the compressed kernel inside a bzImage. Offsets are those of the boot protocol
/// (`Documentation/arch/x86/boot.rst`, version 2.08 and later).
fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*bytes) as usize)
    };
    let protocol = u16::from_le_bytes(*image.get(0x206..0x208)?.first_chunk::<2>()?);
    if protocol < 0x0208 {
        return None;
    }
    // Number of real-mode sectors after the first; zero means four.
    let setup = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup + 1) * 512 + word(0x248)?;
    image.get(start..start.checked_add(word(0x24c)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_is_found_by_the_boot_protocol() {
        let mut image = vec![0; 4096];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&3u32.to_le_bytes());
        image[1040..1043].copy_from_slice(b"abc");
        assert_eq!(payload(&image), Some(&b"abc"[..]));
        image[0x24c..0x250].copy_from_slice(&9999u32.to_le_bytes());
        assert_eq!(payload(&image), None, "longer than the file");
        assert_eq!(payload(b"\x7fELF"), None);
    }
}

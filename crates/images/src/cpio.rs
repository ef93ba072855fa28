//! Writes a cpio archive in the kernel's format *newc*
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).

/// An archive under construction. Every entry belongs to root and has time zero, so equal contents
/// give equal archives.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    /// The number of the last entry: entries with equal numbers would be hard links.
    inode: u32,
}

const DIR: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHAR_DEVICE: u32 = 0o020_000;

impl Archive {
    pub(crate) fn new() -> Self {
        Archive {
            bytes: Vec::new(),
            inode: 0,
        }
    }

    pub(crate) fn dir(&mut self, path: &str) {
        self.entry(path, DIR | 0o755, (0, 0), &[]);
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, FILE | mode, (0, 0), content);
    }

    pub(crate) fn char_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHAR_DEVICE | 0o600, (major, minor), &[]);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.inode += 1;
        let name_size = path.len() as u32 + 1;
        let fields = [
            self.inode,
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // time
            content.len() as u32,
            0, // device of the file
            0,
            major,
            minor,
            name_size,
            0, // checksum: none in this format
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Pads the header with its name, and the content, to a multiple of four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_unpacks_the_archive() {
        let mut archive = Archive::new();
        archive.dir("bin");
        archive.file("bin/one", 0o755, b"content");
        archive.char_device("console", 5, 1);
        let dir = tempfile::tempdir().unwrap();
        let packed = dir.path().join("packed");
        fs::write(&packed, archive.finish()).unwrap();

        let status = Command::new("cpio")
            .args(["--extract", "--quiet"])
            .current_dir(dir.path())
            .stdin(Stdio::from(fs::File::open(&packed).unwrap()))
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!(fs::read(dir.path().join("bin/one")).unwrap(), b"content");
        assert_eq!(fs::metadata(dir.path().join("bin/one")).unwrap().mode() & 0o7777, 0o755);
        assert!(
            fs::metadata(dir.path().join("console"))
                .unwrap()
                .file_type()
                .is_char_device()
        );
    }
}

//! Hand-made layers for tests: tar archives, byte by byte, so that they can be wrong.

use std::io::Write;

/// A tar archive that is being written.
#[derive(Default)]
pub(crate) struct Tar {
    bytes: Vec<u8>,
    pax: Vec<u8>,
}

impl Tar {
    pub(crate) fn new() -> Tar {
        Tar::default()
    }

    /// Adds a PAX record to the next entry.
    pub(crate) fn pax(mut self, key: &str, value: &[u8]) -> Tar {
        // The length counts itself.
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length.to_string().len() + rest != length {
            length += 1;
        }
        self.pax.extend(format!("{length} {key}=").into_bytes());
        self.pax.extend(value);
        self.pax.push(b'\n');
        self
    }

    /// Adds an entry of type `kind` with mode and owner.
    pub(crate) fn entry(
        mut self,
        kind: u8,
        path: &[u8],
        target: &[u8],
        content: &[u8],
        (mode, owner): (u32, u32),
    ) -> Tar {
        let pax = std::mem::take(&mut self.pax);
        if !pax.is_empty() {
            self.raw(b'x', b"pax", b"", &pax, (0o644, 0));
        }
        for (long, kind) in [(path, b'L'), (target, b'K')] {
            if long.len() > 100 {
                self.raw(kind, b"././@LongLink", b"", &[long, b"\0"].concat(), (0, 0));
            }
        }
        let short = |text: &[u8]| text[..text.len().min(100)].to_vec();
        self.raw(kind, &short(path), &short(target), content, (mode, owner));
        self
    }

    fn raw(&mut self, kind: u8, path: &[u8], target: &[u8], content: &[u8], (mode, owner): (u32, u32)) {
        let mut header = [0; 512];
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        put(0, path);
        put(100, format!("{mode:07o}").as_bytes());
        put(108, format!("{owner:07o}").as_bytes());
        put(116, format!("{owner:07o}").as_bytes());
        put(124, format!("{:011o}", content.len()).as_bytes());
        put(136, format!("{:011o}", 1_700_000_000).as_bytes());
        put(148, b"        ");
        put(156, &[kind]);
        put(157, target);
        put(257, b"ustar  \0");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend(header);
        self.bytes.extend(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    pub(crate) fn file(self, path: &str, content: &[u8]) -> Tar {
        self.entry(b'0', path.as_bytes(), b"", content, (0o644, 0))
    }

    pub(crate) fn folder(self, path: &str) -> Tar {
        self.entry(b'5', path.as_bytes(), b"", b"", (0o755, 0))
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Tar {
        self.entry(b'2', path.as_bytes(), target.as_bytes(), b"", (0o777, 0))
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Tar {
        self.entry(b'1', path.as_bytes(), target.as_bytes(), b"", (0o644, 0))
    }

    /// Returns the archive, with its end.
    pub(crate) fn done(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

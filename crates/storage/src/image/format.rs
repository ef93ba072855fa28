//! Recognizes common formats other than ext4, so that the error of a rejected import names the
//! remedy.

use crate::image::pack;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes read from the start of a file: the signature of ISO 9660 is at 32 KiB.
const HEAD: usize = 64 << 10;

/// A signature: its offset, its bytes, and the message about it.
type Mark = (usize, &'static [u8], &'static str);

const MARKS: [Mark; 21] = [
    (0, b"QFI\xfb", "a qcow2 image: convert it with qemu-img convert -O raw"),
    (0, b"KDMV", "a VMDK image: convert it with qemu-img convert -O raw"),
    (
        0,
        b"# Disk DescriptorFile",
        "the description of a VMDK image: convert it with qemu-img convert -O raw",
    ),
    (
        64,
        &[0x7f, 0x10, 0xda, 0xbe],
        "a VDI image: convert it with qemu-img convert -O raw",
    ),
    (0, b"vhdxfile", "a VHDX image: convert it with qemu-img convert -O raw"),
    (0, b"conectix", "a VHD image: convert it with qemu-img convert -O raw"),
    (
        0,
        &[0x3a, 0xff, 0x26, 0xed],
        "an Android sparse image: convert it with simg2img",
    ),
    (
        0,
        &[0x1f, 0x8b],
        "compressed with gzip: decompress it first, or compress it with zstd",
    ),
    (
        0,
        &[0xfd, b'7', b'z', b'X'],
        "compressed with xz: decompress it first, or compress it with zstd",
    ),
    (
        0,
        b"BZh",
        "compressed with bzip2: decompress it first, or compress it with zstd",
    ),
    (
        0,
        &[0x04, 0x22, 0x4d, 0x18],
        "compressed with lz4: decompress it first, or compress it with zstd",
    ),
    (
        0,
        &[0x02, 0x21, 0x4c, 0x18],
        "compressed with lz4: decompress it first, or compress it with zstd",
    ),
    (
        0,
        b"LZIP",
        "compressed with lzip: decompress it first, or compress it with zstd",
    ),
    (0, b"PK\x03\x04", "a zip archive: unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (
        0,
        b"070701",
        "a cpio archive: extract it, and make an ext4 image of the files with mke2fs -d",
    ),
    (
        257,
        b"ustar",
        "a tar archive: extract it, and make an ext4 image of the files with mke2fs -d",
    ),
    (
        512,
        b"LABELONE",
        "an LVM physical volume: copy the logical volume with the root file system to a file",
    ),
    (
        0,
        b"LUKS\xba\xbe",
        "encrypted with LUKS: open it, and copy the file system to a file",
    ),
    (
        0,
        b"hsqs",
        "a SquashFS: extract it, and make an ext4 image of the files with mke2fs -d",
    ),
    (
        32769,
        b"CD001",
        "an ISO 9660 image: a template is a bare ext4 file system",
    ),
];

/// Returns the beginning of a file; shorter if the file is.
pub(crate) fn head_of(file: &File) -> io::Result<Vec<u8>> {
    let mut head = vec![0; HEAD];
    let mut filled = 0;
    while filled < head.len() {
        match file.read_at(&mut head[filled..], filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    head.truncate(filled);
    Ok(head)
}

/// Rejects a file that begins with `head` if that is a known format other than ext4.
pub(crate) fn refuse_others(head: &[u8]) -> io::Result<()> {
    match recognise(head) {
        Some(other) => Err(io::Error::other(format!("it is {other}"))),
        None => Ok(()),
    }
}

/// Returns the format of a file that begins with `head`, if it is a known one other than ext4.
fn recognise(head: &[u8]) -> Option<&'static str> {
    if pack::is_packed(head) {
        return Some("compressed twice: decompress it once");
    }
    if is_form(head) {
        return Some(
            "a form (multipart/form-data): send the image itself as the request body, for example with curl --data-binary or -T",
        );
    }
    let found = MARKS.iter().find(|(at, mark, _)| {
        let there = head.get(*at..).unwrap_or_default();
        there.starts_with(mark)
    });
    found.map(|(_, _, what)| *what)
}

/// Returns whether the data is a multipart body (RFC 2046, 5.1): a boundary, then the headers of
/// the first part.
fn is_form(head: &[u8]) -> bool {
    let Some(rest) = head.strip_prefix(b"--") else {
        return false;
    };
    // A boundary has at most 70 characters.
    let Some(end) = rest.iter().take(72).position(|&byte| byte == b'\r') else {
        return false;
    };
    let headers = rest.get(end..).unwrap_or_default();
    headers
        .get(..10)
        .is_some_and(|begin| begin.eq_ignore_ascii_case(b"\r\nContent-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_formats_are_recognized_and_other_data_is_not() {
        for (at, mark, what) in MARKS {
            let mut head = vec![0; 40 << 10];
            head[at..at + mark.len()].copy_from_slice(mark);
            assert_eq!(recognise(&head), Some(what));
            assert_eq!(recognise(&head[..at + mark.len() - 1]), None, "{what}, cut off");
        }
        let form =
            b"--------------------------d74496d66958873e\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n";
        assert!(recognise(form).unwrap().starts_with("a form"));
        for plain in [&b""[..], b"--", b"--x", b"--x\r\nhello world", &[0; 4096]] {
            assert_eq!(recognise(plain), None);
        }
    }
}

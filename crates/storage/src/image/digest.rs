//! The digest of an image.

use crate::local::files;
use rustix::fs::SeekFrom;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Size of the blocks, in bytes; a block of zeros is omitted.
const BLOCK: u64 = 4096;
/// Bytes read at a time; a multiple of [`BLOCK`].
const PIECE: u64 = 1 << 20;
const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// Returns the digest of an image: `blocks-sha256:` and 64 hex digits.
///
/// It is the SHA-256 of the image's size, followed by each block of 4 KiB that is not all zeros,
/// after its offset. Numbers are 8 bytes, little-endian. So images with equal bytes have equal
/// digests, wherever their files have holes. A large image with little data takes little time,
/// because only data is read.
///
/// # Errors
/// Any error of reading.
pub(crate) fn digest(image: &File) -> io::Result<String> {
    let size = image.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(size.to_le_bytes());
    let mut piece = vec![0; PIECE as usize];
    let mut done = 0;
    while done < size
        && let Some(start) = files::seek_or_end(image, SeekFrom::Data(done))?
    {
        let end = files::seek_or_end(image, SeekFrom::Hole(start))?.unwrap_or(size);
        // Holes need not begin and end at blocks: round outwards, and read no block twice.
        let mut offset = (start - start % BLOCK).max(done);
        let end = end.next_multiple_of(BLOCK).min(size);
        while offset < end {
            let length = (end - offset).min(PIECE) as usize;
            image.read_exact_at(&mut piece[..length], offset)?;
            for block in piece[..length].chunks(BLOCK as usize) {
                if *block != ZEROS[..block.len()] {
                    hash.update(offset.to_le_bytes());
                    hash.update(block);
                }
                offset += block.len() as u64;
            }
        }
        done = end;
    }
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("blocks-sha256:{hex}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(parts: &[(u64, &[u8])], size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, part) in parts {
            file.write_all_at(part, *offset).unwrap();
        }
        file
    }

    #[test]
    fn equal_bytes_have_equal_digests_whatever_is_a_hole() {
        let size = (3 << 20) + 1000;
        let sparse = image(&[(5000, b"data"), (size - 4, b"tail")], size);
        let mut bytes = vec![0; size as usize];
        bytes[5000..5004].copy_from_slice(b"data");
        bytes[size as usize - 4..].copy_from_slice(b"tail");
        let full = image(&[(0, &bytes)], size);
        assert_eq!(digest(&sparse).unwrap(), digest(&full).unwrap());
    }

    #[test]
    fn place_size_and_content_change_the_digest() {
        let mut digests = [
            digest(&image(&[(0, b"data")], 1 << 20)),
            digest(&image(&[(4096, b"data")], 1 << 20)),
            digest(&image(&[(0, b"date")], 1 << 20)),
            digest(&image(&[(0, b"data")], 2 << 20)),
            digest(&image(&[], 1 << 20)),
        ]
        .map(Result::unwrap);
        digests.sort();
        assert!(digests.windows(2).all(|pair| pair[0] != pair[1]), "{digests:?}");
    }

    #[test]
    fn the_digest_follows_its_description() {
        let mut expected = Sha256::new();
        expected.update((8192_u64 + 3).to_le_bytes());
        expected.update(4096_u64.to_le_bytes());
        expected.update([[1; 1].as_slice(), &[0; 4095]].concat());
        expected.update(8192_u64.to_le_bytes());
        expected.update([7, 7, 7]);
        let hex: String = expected.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let image = image(&[(4096, &[1]), (8192, &[7, 7, 7])], 8192 + 3);
        assert_eq!(digest(&image).unwrap(), format!("blocks-sha256:{hex}"));
    }
}

//! Disk images as zstd streams, compressed and decompressed without an intermediate copy.
//!
//! A compressed image is one frame that contains the image's size and ends with a checksum (RFC
//! 8878). `zstd -d` decompresses it.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use scalebox_units::Bytes;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use zstd::stream::read::Decoder;
use zstd::stream::write::Encoder;

/// The first bytes of a frame.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The first bytes of a skippable frame. The lower half of the first byte is arbitrary and zero
/// here (RFC 8878, 3.1.2). `pzstd` output begins with such a frame.
const SKIPPABLE: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
/// The compression level, which is as fast as most disks and networks. A Debian image is compressed
/// to a third of its size.
const LEVEL: i32 = 3;
/// Bytes read and written at once.
const PIECE: usize = 1 << 20;
/// Unit in which zeros become holes: the block size at which file systems share and free space.
const BLOCK: usize = 4096;
const ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Compresses an image. Calls `progress` after each piece with the bytes of the image done so far,
/// including holes.
pub(crate) fn pack(image: &File, out: impl Write, mut progress: impl FnMut(Bytes)) -> io::Result<()> {
    let size = image.metadata()?.len();
    let mut encoder = Encoder::new(out, LEVEL)?;
    encoder.include_checksum(true)?;
    encoder.include_contentsize(true)?;
    encoder.set_pledged_src_size(Some(size))?;
    let mut piece = vec![0; PIECE];
    let zeros = vec![0; PIECE];
    let (mut at, mut data) = (0, next_data(image, 0, size)?);
    while at < size {
        let length = PIECE.min(usize::try_from(size - at).unwrap_or(PIECE));
        // Holes need not be read.
        if at + length as u64 <= data {
            encoder.write_all(&zeros[..length])?;
        } else {
            image.read_exact_at(&mut piece[..length], at)?;
            encoder.write_all(&piece[..length])?;
            data = next_data(image, at + length as u64, size)?;
        }
        at += length as u64;
        progress(Bytes::new(at));
    }
    encoder.finish()?.flush()
}

/// Returns the start of the next data at or after `from`; `size` if there is none.
fn next_data(image: &File, from: u64, size: u64) -> io::Result<u64> {
    match seek(image, SeekFrom::Data(from)) {
        Ok(at) => Ok(at),
        Err(Errno::NXIO) => Ok(size),
        Err(errno) => Err(errno.into()),
    }
}

/// The error of decompressing an image.
#[derive(Debug)]
pub(crate) enum UnpackError<E> {
    /// The input is damaged, ends early, or is too large.
    Input(io::Error),
    /// Writing the file failed.
    Output(io::Error),
    /// There is no space for the image.
    Room(E),
}

/// Returns whether data beginning with `head` is compressed with zstd.
pub(crate) fn is_packed(head: &[u8]) -> bool {
    let Some([first, rest @ ..]) = head.first_chunk::<4>() else {
        return false;
    };
    head.starts_with(&MAGIC) || [first & 0xf0, rest[0], rest[1], rest[2]] == SKIPPABLE
}

/// Decompresses an image into the new file `image`, or copies an uncompressed one; blocks of zeros
/// become holes. Calls `room` for more space before data is written. Rejects input of more than
/// `largest` bytes. `look` gets the first MiB before anything is written, and can reject it.
pub(crate) fn unpack<E>(
    mut input: impl Read,
    image: &File,
    largest: Bytes,
    look: impl FnOnce(&[u8]) -> io::Result<()>,
    mut room: impl FnMut(Bytes) -> Result<(), E>,
) -> Result<(), UnpackError<E>> {
    let mut head = Vec::new();
    input
        .by_ref()
        .take(4)
        .read_to_end(&mut head)
        .map_err(UnpackError::Input)?;
    let packed = is_packed(&head);
    let whole = io::Cursor::new(head).chain(input);
    let mut plain: Box<dyn Read> = if packed {
        Box::new(Decoder::new(whole).map_err(UnpackError::Input)?)
    } else {
        Box::new(whole)
    };
    let (mut piece, mut at, mut look) = (vec![0; PIECE], 0u64, Some(look));
    loop {
        let length = read_full(&mut plain, &mut piece).map_err(UnpackError::Input)?;
        if let Some(look) = look.take() {
            look(&piece[..length]).map_err(UnpackError::Input)?;
        }
        if length == 0 {
            break;
        }
        if at + length as u64 > largest.as_u64() {
            let more = format!("it is larger than the maximum disk size of {largest}");
            return Err(UnpackError::Input(io::Error::other(more)));
        }
        for run in data_runs(&piece[..length]) {
            let data = &piece[run.clone()];
            room(Bytes::new(data.len() as u64)).map_err(UnpackError::Room)?;
            image
                .write_all_at(data, at + run.start as u64)
                .map_err(UnpackError::Output)?;
        }
        at += length as u64;
    }
    image.set_len(at).map_err(UnpackError::Output)
}

/// Returns the ranges of blocks that are not all zeros.
fn data_runs(piece: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, block) in piece.chunks(BLOCK).enumerate() {
        // The block is compared as a whole, which compiles to a memcmp.
        if *block == ZEROS[..block.len()] {
            continue;
        }
        let (start, end) = (index * BLOCK, index * BLOCK + block.len());
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Fills `buffer` or reads to the end; returns the number of bytes.
fn read_full(input: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// Creates an image of a bit more than 10 MiB, with two blocks of data.
    fn image() -> File {
        let image = tempfile::tempfile().unwrap();
        image.set_len((10 << 20) + 77).unwrap();
        image.write_all_at(&[7; 4096], 3 << 20).unwrap();
        image.write_all_at(b"end", (10 << 20) + 74).unwrap();
        image
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn unpacked(input: &[u8], largest: u64) -> Result<(File, u64), UnpackError<()>> {
        let (file, mut requested) = (tempfile::tempfile().unwrap(), 0);
        let room = |more: Bytes| {
            requested += more.as_u64();
            Ok(())
        };
        unpack(input, &file, Bytes::new(largest), |_| Ok(()), room).map(|()| (file, requested))
    }

    #[test]
    fn images_keep_contents_and_holes() {
        let (image, mut packed, mut progress) = (image(), Vec::new(), Vec::new());
        pack(&image, &mut packed, |done| progress.push(done.as_u64())).unwrap();
        assert!(packed.len() < 4096, "{} bytes", packed.len());
        assert!(
            progress.is_sorted() && progress.last() == Some(&((10 << 20) + 77)),
            "{progress:?}"
        );
        for input in [packed.as_slice(), &bytes(&image)] {
            let (file, requested) = unpacked(input, 1 << 30).unwrap();
            assert!(bytes(&file) == bytes(&image));
            assert_eq!(requested, 4096 + 77, "space is requested for data only");
            assert!(file.metadata().unwrap().blocks() * 512 <= 16384);
        }
    }

    #[test]
    fn several_frames_and_skippable_frames_are_one_image() {
        let (image, mut packed) = (image(), Vec::new());
        let whole = bytes(&image);
        // The stream is as pzstd writes it: before each frame a skippable one with its length.
        for part in whole.chunks(4 << 20) {
            let frame = zstd::encode_all(part, LEVEL).unwrap();
            packed.extend([0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0]);
            packed.extend((frame.len() as u32).to_le_bytes());
            packed.extend(frame);
        }
        packed.extend([0x5f, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 7]);
        let (file, _) = unpacked(&packed, 1 << 30).unwrap();
        assert!(bytes(&file) == bytes(&image));
        // A truncated frame after a complete one is an error.
        let cut = packed.len() - 20;
        assert!(matches!(unpacked(&packed[..cut], 1 << 30), Err(UnpackError::Input(_))));
    }

    #[test]
    fn damaged_truncated_and_too_large_images_are_rejected() {
        let mut packed = Vec::new();
        pack(&image(), &mut packed, |_| {}).unwrap();
        let refused = |input: &[u8], largest| match unpacked(input, largest) {
            Err(UnpackError::Input(error)) => error.to_string(),
            other => panic!("{other:?}"),
        };
        refused(&packed[..packed.len() - 1], 1 << 30);
        let mut damaged = packed.clone();
        let last = damaged.len() - 1;
        damaged[last] ^= 1;
        refused(&damaged, 1 << 30);
        assert!(refused(&packed, 5 << 20).contains("larger than the maximum disk size of 5 MiB"));
    }
}

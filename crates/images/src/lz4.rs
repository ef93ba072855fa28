//! Decompresses the LZ4 *legacy* format (`lz4 -l`), in which Debian's kernels are compressed.
//!
//! Source: `lz4_Frame_format.md` (section *Legacy frame*) of the LZ4 project. The format is a magic
//! number, then independent blocks of at most 8 MiB of content, each after its compressed length
//! (32 bits, little endian). `lz4_flex` decompresses the blocks.

use lz4_flex::block::decompress_into;

/// The first four bytes.
pub(crate) const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();

const MAX_BLOCK_BYTES: usize = 8 << 20;

/// Decompresses `packed`, which starts with [`MAGIC`]. Data after the last block must be shorter
/// than five bytes (the kernel's build appends the uncompressed length). Returns `None` if the data
/// is incomplete or not in this format.
pub(crate) fn decompress(packed: &[u8]) -> Option<Vec<u8>> {
    let mut rest = packed.strip_prefix(&MAGIC)?;
    let (mut out, mut content) = (Vec::new(), vec![0; MAX_BLOCK_BYTES]);
    while rest.len() > 4 {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        let (block, tail) = tail.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        let size = decompress_into(block, &mut content).ok()?;
        out.extend_from_slice(content.get(..size)?);
        rest = tail;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(block: &[u8]) -> Vec<u8> {
        let mut frame = MAGIC.to_vec();
        frame.extend((block.len() as u32).to_le_bytes());
        frame.extend(block);
        frame
    }

    #[test]
    fn literals_and_overlapping_matches_are_decompressed() {
        // "ab", then a match of eight bytes at offset two, then "!" as the last literals.
        let mut packed = frame(&[0x24, b'a', b'b', 2, 0, 0x10, b'!']);
        assert_eq!(decompress(&packed).unwrap(), b"ababababab!");
        packed.extend(11u32.to_le_bytes());
        assert_eq!(decompress(&packed).unwrap(), b"ababababab!", "with the length appended");
    }

    #[test]
    fn long_lengths_are_decoded() {
        let mut block = vec![0xf0, 255, 30];
        block.extend([7; 300]);
        assert_eq!(decompress(&frame(&block)).unwrap(), [7; 300]);
    }

    #[test]
    fn blocks_follow_each_other_and_none_is_larger_than_8_mib() {
        let content: Vec<u8> = (0..MAX_BLOCK_BYTES as u32).map(|n| (n / 1000) as u8).collect();
        let mut packed = frame(&lz4_flex::block::compress(&content));
        packed.extend(&frame(&lz4_flex::block::compress(b"the end"))[MAGIC.len()..]);
        let unpacked = decompress(&packed).unwrap();
        assert!(unpacked == [&content[..], b"the end"].concat(), "{}", unpacked.len());
        let larger = lz4_flex::block::compress(&vec![0; MAX_BLOCK_BYTES + 1]);
        assert_eq!(decompress(&frame(&larger)), None);
    }

    #[test]
    fn damaged_data_is_rejected() {
        for block in [
            &[0x20, b'a'][..],
            &[0x10, b'a', 9, 0],
            &[0x14, b'a', 0, 0],
            &[0xf0, 255],
        ] {
            assert_eq!(decompress(&frame(block)), None, "{block:?}");
        }
        assert_eq!(decompress(b"\x7fELF"), None);
        assert_eq!(decompress(&[&MAGIC[..], &[200, 0, 0, 0, 1]].concat()), None);
    }
}

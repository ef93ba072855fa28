//! Decompresses the LZ4 *legacy* format (`lz4 -l`), in which Debian's kernels are compressed.
//!
//! Sources: `lz4_Frame_format.md` (section *Legacy frame*) and `lz4_Block_format.md` of the LZ4
//! project. The format is a magic number, then independent blocks of at most 8 MiB of content, each
//! after its compressed length (32 bits, little endian).

/// The first four bytes.
pub(crate) const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();

const MAX_BLOCK_BYTES: usize = 8 << 20;
/// Minimum length of a match; the stored length is smaller by this value.
const MIN_MATCH: usize = 4;
/// A length of this value continues in the following bytes.
const LENGTH_CONTINUES: usize = 15;

/// Decompresses `packed`, which starts with [`MAGIC`]. Data after the last block must be shorter
/// than five bytes (the kernel's build appends the uncompressed length). Returns `None` if the data
/// is incomplete or not in this format.
pub(crate) fn decompress(packed: &[u8]) -> Option<Vec<u8>> {
    let mut rest = packed.strip_prefix(&MAGIC)?;
    let mut out = Vec::new();
    while rest.len() > 4 {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        decompress_block(tail.get(..length)?, &mut out)?;
        rest = &tail[length..];
    }
    Some(out)
}

/// Decompresses a block, which is a list of sequences. A sequence is a token (two lengths of four
/// bits), literals, and a match (offset and length). The last one ends after its literals.
fn decompress_block(block: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let start = out.len();
    let mut input = block.iter();
    loop {
        let token = usize::from(*input.next()?);
        let literals = length(token >> 4, &mut input)?;
        out.extend_from_slice(input.as_slice().get(..literals)?);
        input = input.as_slice()[literals..].iter();
        if input.as_slice().is_empty() {
            return Some(());
        }
        let back = usize::from(u16::from_le_bytes([*input.next()?, *input.next()?]));
        let length = MIN_MATCH + length(token & 15, &mut input)?;
        let from = out.len().checked_sub(back).filter(|from| back > 0 && *from >= start)?;
        if out.len() - start + length > MAX_BLOCK_BYTES {
            return None;
        }
        // A match may overlap its own output, which repeats it: each step copies at most the bytes
        // that exist.
        let end = out.len() + length;
        while out.len() < end {
            let piece = (end - out.len()).min(out.len() - from);
            out.extend_from_within(from..from + piece);
        }
    }
}

fn length(nibble: usize, input: &mut std::slice::Iter<'_, u8>) -> Option<usize> {
    let mut length = nibble;
    if nibble == LENGTH_CONTINUES {
        loop {
            let byte = *input.next()?;
            length += usize::from(byte);
            if byte != 255 {
                break;
            }
        }
    }
    Some(length)
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

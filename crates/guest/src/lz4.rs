//! Reading the LZ4 *legacy* format, in which Debian's kernels are packed (`lz4 -l`).
//!
//! Sources: `lz4_Frame_format.md` (section *Legacy frame*) and `lz4_Block_format.md` of the LZ4
//! project. A magic number, then blocks of at most 8 MiB of content, each behind its packed length
//! (32 bits, little endian) and independent of the others.

/// The first four bytes.
pub(crate) const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();

const BLOCK: usize = 8 << 20;
/// A match is at least so long; its length is stored less by this much.
const MIN_MATCH: usize = 4;
/// A length that does not fit into its half of the token goes on in the bytes behind it.
const MORE: usize = 15;

/// Unpacks `packed`, which begins with [`MAGIC`]. What stands behind the last block (the kernel's
/// build appends the unpacked length) must be shorter than five bytes. `None` when it is not whole
/// and in this format.
pub(crate) fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let mut rest = packed.strip_prefix(&MAGIC)?;
    let mut out = Vec::new();
    while rest.len() > 4 {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        unpack_block(behind.get(..length)?, &mut out)?;
        rest = &behind[length..];
    }
    Some(out)
}

/// A block is a row of sequences: a token (two lengths of four bits), literals, then a match: how
/// far back, how long. The last sequence ends behind its literals.
fn unpack_block(block: &[u8], out: &mut Vec<u8>) -> Option<()> {
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
        if out.len() - start + length > BLOCK {
            return None;
        }
        // The match may reach into what it writes, which repeats it: at most as much as is there is
        // copied at once.
        let end = out.len() + length;
        while out.len() < end {
            let piece = (end - out.len()).min(out.len() - from);
            out.extend_from_within(from..from + piece);
        }
    }
}

fn length(nibble: usize, input: &mut std::slice::Iter<'_, u8>) -> Option<usize> {
    let mut length = nibble;
    if nibble == MORE {
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
    fn literals_and_matches_that_reach_into_themselves_are_unpacked() {
        // "ab", then eight bytes from two back, then "!" as the last literals.
        let mut packed = frame(&[0x24, b'a', b'b', 2, 0, 0x10, b'!']);
        assert_eq!(unpack(&packed).unwrap(), b"ababababab!");
        packed.extend(11u32.to_le_bytes());
        assert_eq!(unpack(&packed).unwrap(), b"ababababab!", "with the length behind it");
    }

    #[test]
    fn long_lengths_are_read_to_their_end() {
        let mut block = vec![0xf0, 255, 30];
        block.extend([7; 300]);
        assert_eq!(unpack(&frame(&block)).unwrap(), [7; 300]);
    }

    #[test]
    fn what_is_broken_is_refused_and_never_read_past_its_end() {
        for block in [
            &[0x20, b'a'][..],
            &[0x10, b'a', 9, 0],
            &[0x14, b'a', 0, 0],
            &[0xf0, 255],
        ] {
            assert_eq!(unpack(&frame(block)), None, "{block:?}");
        }
        assert_eq!(unpack(b"\x7fELF"), None);
        assert_eq!(unpack(&[&MAGIC[..], &[200, 0, 0, 0, 1]].concat()), None);
    }
}

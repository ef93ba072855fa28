//! Reduces the number of extents in a base image from which many clones are made.
//!
//! Growing a file system writes single blocks all over its image. Each extent costs every clone
//! some microseconds; filling a few holes removes a third of the extents.

use crate::local::files;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Maximum hole between two joined ranges of data; the hole becomes zeros on disk.
const MAX_HOLE: u64 = 512 << 10;
/// Maximum length of a rewritten range. Longer ranges have few extents for their size, and stay
/// shared with the original.
const MAX_RANGE: u64 = 4 << 20;
/// Maximum data rewritten, and thus no longer shared, per image.
const MAX_REWRITTEN: u64 = 16 << 20;

/// Joins neighbouring ranges of data into one extent each, where that costs little. The contents
/// stay the same. A crash may lose data, so the caller must discard the image after a crash.
pub(crate) fn defragment(image: &File) -> io::Result<()> {
    let mut near = neighbouring_ranges(image)?;
    near.sort_by_key(|range| range.end - range.start);
    let mut left_to_rewrite = MAX_REWRITTEN;
    for range in near {
        let Some(left) = left_to_rewrite.checked_sub(range.end - range.start) else {
            break;
        };
        left_to_rewrite = left;
        rewrite(image, &range)?;
    }
    Ok(())
}

/// Returns the ranges of data that have close neighbours, each joined with its neighbours and the
/// holes between them.
fn neighbouring_ranges(image: &File) -> io::Result<Vec<Range<u64>>> {
    let size = image.metadata()?.len();
    let mut near = Vec::new();
    // The current range, and whether it was joined from several.
    let mut current: Option<(Range<u64>, bool)> = None;
    let mut offset = 0;
    while let Some(start) = files::seek_or_end(image, SeekFrom::Data(offset))? {
        let end = files::seek_or_end(image, SeekFrom::Hole(start))?.unwrap_or(size);
        offset = end;
        match &mut current {
            Some((range, joined)) if start - range.end <= MAX_HOLE && end - range.start <= MAX_RANGE => {
                range.end = end;
                *joined = true;
            }
            _ => near.extend(current.replace((start..end, false)).filter(|(_, joined)| *joined)),
        }
    }
    near.extend(current.filter(|(_, joined)| *joined));
    Ok(near.into_iter().map(|(range, _)| range).collect())
}

/// Rewrites a range. Its blocks are freed first, so that the new ones are allocated in one piece.
fn rewrite(image: &File, range: &Range<u64>) -> io::Result<()> {
    let length = range.end - range.start;
    // The length is at most `MAX_RANGE`.
    let mut data = vec![0; length as usize];
    image.read_exact_at(&mut data, range.start)?;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(image, punch, range.start, length)?;
    image.write_all_at(&data, range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn image(data: &[Range<u64>]) -> File {
        let image = tempfile::tempfile().unwrap();
        image.set_len(1 << 30).unwrap();
        for Range { start, end } in data {
            let bytes: Vec<u8> = (*start..*end).map(|at| (at / 4096 + 1) as u8).collect();
            image.write_all_at(&bytes, *start).unwrap();
        }
        image
    }

    #[test]
    fn only_short_neighbouring_ranges_are_joined() {
        let image = image(&[
            0..4096,
            8192..12288,
            // This range is isolated.
            100 * MIB..101 * MIB,
            // These ranges are too long if joined.
            200 * MIB..203 * MIB,
            203 * MIB + 65536..206 * MIB,
            // These ranges are too far apart.
            300 * MIB..300 * MIB + 4096,
            301 * MIB..301 * MIB + 4096,
            // This range is at the end of the image.
            400 * MIB..401 * MIB,
            401 * MIB + 65536..402 * MIB,
        ]);
        assert_eq!(neighbouring_ranges(&image).unwrap(), [0..12288, 400 * MIB..402 * MIB]);
    }

    #[test]
    fn the_contents_do_not_change() {
        let image = image(&[0..4096, 8192..12288, 65536..131072, 500 * MIB..501 * MIB]);
        let mut before = vec![0; MIB as usize];
        image.read_exact_at(&mut before, 0).unwrap();
        defragment(&image).unwrap();
        let mut after = vec![0; MIB as usize];
        image.read_exact_at(&mut after, 0).unwrap();
        assert!(before == after && before.iter().any(|&byte| byte != 0));
        assert!(
            neighbouring_ranges(&image).unwrap().is_empty(),
            "ranges are left to join"
        );
    }

    #[test]
    fn the_amount_of_rewritten_data_is_limited() {
        let pieces: Vec<_> = (0..40).map(|n| 6 * MIB * n..6 * MIB * n + MIB).collect();
        let holes = pieces
            .iter()
            .map(|piece| piece.end + 4096..piece.end + MIB)
            .collect::<Vec<_>>();
        let image = image(&[pieces, holes].concat());
        assert_eq!(neighbouring_ranges(&image).unwrap().len(), 40);
        defragment(&image).unwrap();
        assert_eq!(
            neighbouring_ranges(&image).unwrap().len(),
            32,
            "the limit allows eight ranges of 2 MiB"
        );
    }
}

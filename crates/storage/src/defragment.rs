//! Fewer extents in an image of which many clones are made.
//!
//! Growing a file system writes single blocks all over its image. Each extent takes every clone of
//! it some microseconds, and closing a few holes is all it takes to have a third less of them.

use crate::files;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Stretches of data that lie no further apart are joined: what is between them becomes zeros on
/// disk.
const HOLE: u64 = 512 << 10;
/// The longest stretch that is written anew. Longer ones have few extents for their size, and stay
/// shared with what the image is a clone of.
const STRETCH: u64 = 4 << 20;
/// What is written anew, and shared no longer, in one image at most.
const BUDGET: u64 = 16 << 20;

/// Joins stretches of data that lie close together into one extent each, where that costs little.
/// The bytes stay what they are; a crash meanwhile may lose some, so the image has to be one that
/// is thrown away then.
pub(crate) fn compact(image: &File) -> io::Result<()> {
    let mut near = near_stretches(image)?;
    near.sort_by_key(|stretch| stretch.end - stretch.start);
    let mut budget = BUDGET;
    for stretch in near {
        let Some(left) = budget.checked_sub(stretch.end - stretch.start) else {
            break;
        };
        budget = left;
        rewrite(image, &stretch)?;
    }
    Ok(())
}

/// The stretches of data that have neighbours close by, each with its neighbours and the holes
/// between them.
fn near_stretches(image: &File) -> io::Result<Vec<Range<u64>>> {
    let size = image.metadata()?.len();
    let mut near = Vec::new();
    // The stretch at hand, and whether it is more than one.
    let mut current: Option<(Range<u64>, bool)> = None;
    let mut offset = 0;
    while let Some(start) = files::seek_or_end(image, SeekFrom::Data(offset))? {
        let end = files::seek_or_end(image, SeekFrom::Hole(start))?.unwrap_or(size);
        offset = end;
        match &mut current {
            Some((stretch, joined)) if start - stretch.end <= HOLE && end - stretch.start <= STRETCH => {
                stretch.end = end;
                *joined = true;
            }
            _ => near.extend(current.replace((start..end, false)).filter(|(_, joined)| *joined)),
        }
    }
    near.extend(current.filter(|(_, joined)| *joined));
    Ok(near.into_iter().map(|(stretch, _)| stretch).collect())
}

/// Its blocks are given up first: what is written then is new, and allocated in one piece.
fn rewrite(image: &File, stretch: &Range<u64>) -> io::Result<()> {
    let length = stretch.end - stretch.start;
    // At most `STRETCH`.
    let mut data = vec![0; length as usize];
    image.read_exact_at(&mut data, stretch.start)?;
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(image, punch, stretch.start, length)?;
    image.write_all_at(&data, stretch.start)
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
    fn only_what_lies_close_together_and_is_short_is_joined() {
        let image = image(&[
            0..4096,
            8192..12288,
            // Alone.
            100 * MIB..101 * MIB,
            // Too long together.
            200 * MIB..203 * MIB,
            203 * MIB + 65536..206 * MIB,
            // Too far apart.
            300 * MIB..300 * MIB + 4096,
            301 * MIB..301 * MIB + 4096,
            // The last.
            400 * MIB..401 * MIB,
            401 * MIB + 65536..402 * MIB,
        ]);
        assert_eq!(near_stretches(&image).unwrap(), [0..12288, 400 * MIB..402 * MIB]);
    }

    #[test]
    fn the_bytes_stay_what_they_are() {
        let image = image(&[0..4096, 8192..12288, 65536..131072, 500 * MIB..501 * MIB]);
        let mut before = vec![0; MIB as usize];
        image.read_exact_at(&mut before, 0).unwrap();
        compact(&image).unwrap();
        let mut after = vec![0; MIB as usize];
        image.read_exact_at(&mut after, 0).unwrap();
        assert!(before == after && before.iter().any(|&byte| byte != 0));
        assert!(near_stretches(&image).unwrap().is_empty(), "joined");
    }

    #[test]
    fn an_image_of_small_pieces_stays_shared_but_for_a_part() {
        let pieces: Vec<_> = (0..40).map(|n| 6 * MIB * n..6 * MIB * n + MIB).collect();
        let holes = pieces
            .iter()
            .map(|piece| piece.end + 4096..piece.end + MIB)
            .collect::<Vec<_>>();
        let image = image(&[pieces, holes].concat());
        assert_eq!(near_stretches(&image).unwrap().len(), 40);
        compact(&image).unwrap();
        assert_eq!(
            near_stretches(&image).unwrap().len(),
            32,
            "eight of 2 MiB are what the budget allows"
        );
    }
}

//! Stores an image that arrives as a stream in a file, which conversions need.

use crate::convert::recognise::{HEAD_BYTES, Head, of_head};
use crate::oci::{GrowingRoom, OciError, Task};
use crate::scratch::Scratch;
use scalebox_units::Bytes;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes that are read and written at a time.
const CHUNK: usize = 1 << 20;
/// Unit in which zeros become holes.
const BLOCK: usize = 4096;
const ZEROS: [u8; BLOCK] = [0; BLOCK];
/// Space of a disk outside its root partition, and of an archive besides its layers.
const REST: u64 = 1 << 30;

/// An image that was stored in a file, in a folder that is removed with this value.
#[derive(Debug)]
pub struct Received {
    path: PathBuf,
    _scratch: Scratch,
}

impl Received {
    /// Returns the file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Stores an image in a file below `work`. Its space is admitted while it arrives; zeros need none.
///
/// A disk may be 1 GiB larger than the largest disk that the task allows, and an archive 1 GiB
/// larger than its layers.
///
/// # Errors
/// [`OciError::Incomplete`] with an error of `input`, [`OciError::TooLarge`],
/// [`OciError::Refused`], [`OciError::Cancelled`], [`OciError::Io`].
pub fn receive(mut input: impl Read, work: &Path, task: &Task) -> Result<Received, OciError> {
    let scratch = Scratch::new(work)?;
    let path = scratch.path().join("received");
    let file = File::create_new(&path).map_err(OciError::io("create", &path))?;
    let (mut room, mut at, mut limit) = (GrowingRoom::new(task), 0_u64, None);
    let mut chunk = vec![0; CHUNK];
    loop {
        task.check()?;
        let length = fill(&mut input, &mut chunk).map_err(OciError::Incomplete)?;
        let chunk = &chunk[..length];
        let limit = *limit.get_or_insert_with(|| limit_of(chunk, task));
        if length == 0 {
            break;
        }
        if at + length as u64 > limit.as_u64() {
            let what = "the uploaded image".to_owned();
            return Err(OciError::TooLarge { what, limit });
        }
        for (index, block) in chunk.chunks(BLOCK).enumerate() {
            // As a whole, which compiles to a memcmp.
            if *block != ZEROS[..block.len()] {
                room.take(block.len() as u64)?;
                let written = file.write_all_at(block, at + (index * BLOCK) as u64);
                written.map_err(OciError::io("write", &path))?;
            }
        }
        at += length as u64;
    }
    file.set_len(at).map_err(OciError::io("write", &path))?;
    Ok(Received {
        path,
        _scratch: scratch,
    })
}

/// Returns the maximum size of an image that begins with `head`.
fn limit_of(head: &[u8], task: &Task) -> Bytes {
    let content = match of_head(&head[..head.len().min(HEAD_BYTES)]) {
        Head::Tar => task.limits.max_stored,
        Head::Kind(_) => task.limits.max_disk,
    };
    Bytes::new(content.as_u64().saturating_add(REST))
}

/// Fills `buffer`, or reads to the end. Returns the number of bytes.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{Limits, Room, Supervisor};
    use std::error::Error;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Admits this number of bytes.
    struct Space(AtomicU64);

    impl Supervisor for Space {
        fn reserve(&self, bytes: Bytes) -> Result<Room, Box<dyn Error + Send + Sync>> {
            let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(bytes.as_u64())
            });
            taken.map(|_| Box::new(()) as Room).map_err(|_| "full".into())
        }

        fn progress(&self, _: crate::oci::Phase, _: Bytes, _: Bytes) {}
    }

    fn task(space: u64, max_disk: Bytes, max_stored: Bytes) -> Task {
        let limits = Limits {
            max_disk,
            max_stored,
            ..Limits::default()
        };
        Task::new(Arc::new(Space(AtomicU64::new(space))), limits)
    }

    /// A disk of this size with a partition table.
    fn disk(size: usize) -> Vec<u8> {
        let mut disk = vec![0; size];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[size - 1] = 1;
        disk
    }

    #[test]
    fn images_are_stored_with_their_holes_and_removed_with_the_value() {
        let work = tempfile::tempdir().unwrap();
        let disk = disk((3 << 20) + 77);
        let task = task(64 << 20, Bytes::ZERO, Bytes::ZERO);
        let received = receive(disk.as_slice(), work.path(), &task).unwrap();
        assert!(fs::read(received.path()).unwrap() == disk);
        assert!(received.path().metadata().unwrap().blocks() * 512 <= 64 << 10);
        drop(received);
        assert_eq!(fs::read_dir(work.path()).unwrap().count(), 0);
    }

    #[test]
    fn refused_too_large_and_incomplete_images_leave_nothing() {
        let work = tempfile::tempdir().unwrap();
        let tar = {
            let mut head = vec![0; 512];
            head[257..262].copy_from_slice(b"ustar");
            head
        };
        let endless = |head: Vec<u8>| io::Cursor::new(head).chain(io::repeat(0));
        let mut cut = io::Cursor::new(disk(CHUNK)).chain(Broken);
        let fails = |input: &mut dyn Read, task: &Task| {
            let error = receive(input, work.path(), task).unwrap_err();
            assert_eq!(fs::read_dir(work.path()).unwrap().count(), 0);
            error
        };
        let wide = task(u64::MAX, Bytes::from_mib(1), Bytes::from_mib(9));
        assert!(matches!(fails(&mut cut, &wide), OciError::Incomplete(_)));
        for (head, mib) in [(disk(512), 1025), (tar, 1033)] {
            match fails(&mut endless(head), &wide) {
                OciError::TooLarge { limit, .. } => assert_eq!(limit, Bytes::from_mib(mib)),
                other => panic!("{other}"),
            }
        }
        let full = task(1 << 20, Bytes::from_mib(9), Bytes::ZERO);
        assert!(matches!(
            fails(&mut disk(2 << 20).as_slice(), &full),
            OciError::Refused(_)
        ));
        wide.cancel();
        assert!(matches!(fails(&mut disk(512).as_slice(), &wide), OciError::Cancelled));
    }

    struct Broken;

    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::ConnectionReset.into())
        }
    }
}

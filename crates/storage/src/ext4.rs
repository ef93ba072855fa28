//! An ext4 file system in an image, looked at, checked and grown by e2fsprogs, in user space.
//!
//! Guests write these images, all of them: the superblock too. What it says is read before any program is, because some of it makes
//! programs wait for another host, or look for another device.

use crate::command::{self, CommandError, Program};
use crate::error::StorageError;
use crate::files;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where the superblock lies, in bytes; its length; and in it the fields that are read (`struct ext4_super_block`, little-endian;
/// Documentation/filesystems/ext4/super.rst of the kernel).
const SUPERBLOCK: u64 = 1024;
const LENGTH: usize = 1024;
const MAGIC: (usize, u16) = (0x38, 0xef53);
const FEATURE_COMPAT: usize = 0x5c;
const FEATURE_INCOMPAT: usize = 0x60;
const JOURNAL_INODE: usize = 0xe0;
const JOURNAL_DEVICE: usize = 0xe4;

const HAS_JOURNAL: u32 = 0x4;
const RECOVER: u32 = 0x4;
const JOURNAL_DEV: u32 = 0x8;
const MMP: u32 = 0x100;

/// Replays the journal and repairs what is safe to repair.
///
/// # Errors
/// [`StorageError::FileSystem`] when more is wrong with it, or it is of a kind that is not taken.
pub(crate) fn repair(image: &Path) -> Result<(), StorageError> {
    replay(image)?;
    e2fsck(check_args("-p", image))
}

/// As [`repair`], and punches the free blocks out of the image.
///
/// # Errors
/// As there.
pub(crate) fn repair_and_discard(image: &Path) -> Result<(), StorageError> {
    replay(image)?;
    let discard = ["-E", "discard"].map(OsStr::new);
    e2fsck(discard.into_iter().chain(check_args("-p", image)))
}

/// Checks it and changes nothing: there must be no finding.
///
/// # Errors
/// [`StorageError::FileSystem`].
pub(crate) fn check(image: &Path) -> Result<(), StorageError> {
    require_plain(image)?;
    e2fsck(check_args("-n", image))
}

/// Makes it as large as its image.
///
/// # Errors
/// [`StorageError::FileSystem`], [`StorageError::Command`].
pub(crate) fn grow(image: &Path) -> Result<(), StorageError> {
    // A journal that was not replayed would undo the edit at the guest's next boot.
    repair(image)?;
    command::run(Program::Resize2fs, [image])?;
    Ok(())
}

/// A forced check; `mode` is `-p` (repair what is safe) or `-n` (change nothing).
fn check_args<'a>(mode: &'a str, image: &'a Path) -> [&'a OsStr; 3] {
    [OsStr::new("-f"), OsStr::new(mode), image.as_os_str()]
}

/// Replays the journal if there is something in it. It may hold another superblock, which then is looked at in its turn.
fn replay(image: &Path) -> Result<(), StorageError> {
    if require_plain(image)?.needs_replay {
        let only = ["-E", "journal_only", "-p"].map(OsStr::new);
        e2fsck(only.into_iter().chain([image.as_os_str()]))?;
        require_plain(image)?;
    }
    Ok(())
}

/// Of the exit code (e2fsck(8)) 1 is that errors were corrected, 4 that some were not; the others are no fault of the file system.
fn e2fsck<'a>(args: impl IntoIterator<Item = &'a OsStr>) -> Result<(), StorageError> {
    const UNCORRECTED: i32 = 4;
    let run = command::run_accepting(Program::E2fsck, args, |code| matches!(code & !UNCORRECTED, 0 | 1));
    match run {
        Ok((code, _)) if code & UNCORRECTED == 0 => Ok(()),
        Ok((_, said)) => Err(StorageError::FileSystem(format!(
            "is damaged; repair it first.\n{}",
            said.trim()
        ))),
        Err(CommandError::Endless { why, .. }) => {
            Err(StorageError::FileSystem(format!("cannot be checked: the check {why}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// What a superblock tells that is good to know.
struct Plain {
    needs_replay: bool,
}

/// Says no to what a program of e2fsprogs would wait for or look for outside the image.
fn require_plain(image: &Path) -> Result<Plain, StorageError> {
    let file = files::open_read(image).map_err(|error| StorageError::io("read", image.display(), error))?;
    match look(&file) {
        Ok(Ok(plain)) => Ok(plain),
        Ok(Err(oddity)) => Err(StorageError::FileSystem(oddity.to_owned())),
        Err(error) => Err(StorageError::io("read", image.display(), error)),
    }
}

fn look(image: &File) -> std::io::Result<Result<Plain, &'static str>> {
    let mut block = [0; LENGTH];
    match image.read_exact_at(&mut block, SUPERBLOCK) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(Err("is cut off")),
        other => other?,
    }
    let word = |at: usize| {
        block
            .iter()
            .skip(at)
            .take(4)
            .rev()
            .fold(0, |sum, byte| sum << 8 | u32::from(*byte))
    };
    let (compat, incompat) = (word(FEATURE_COMPAT), word(FEATURE_INCOMPAT));
    let (at, magic) = MAGIC;
    Ok(if word(at) & 0xffff != u32::from(magic) {
        // A copy would be used in its place, which nobody has looked at.
        Err("has a damaged superblock; repair it first")
    } else if incompat & MMP != 0 {
        // `e2fsck` waits, as long as the image says, for another host to show that it has it in use.
        Err("is protected against multiple mounts; take that off (tune2fs -O ^mmp)")
    } else if incompat & JOURNAL_DEV != 0 {
        Err("is a journal")
    } else if compat & HAS_JOURNAL != 0 && (word(JOURNAL_INODE) == 0 || word(JOURNAL_DEVICE) != 0) {
        // Programs look for it among the host's devices.
        Err("has its journal elsewhere; give it one of its own (tune2fs -O ^has_journal, then tune2fs -j)")
    } else {
        Ok(Plain {
            needs_replay: incompat & RECOVER != 0,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn image(options: &[&str]) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(32 << 20).unwrap();
        let made = Command::new("mke2fs")
            .args(["-q", "-t", "ext4"])
            .args(options)
            .arg(image.path())
            .output();
        assert!(made.unwrap().status.success());
        image
    }

    fn refusal(image: &tempfile::NamedTempFile) -> String {
        repair(image.path()).unwrap_err().to_string()
    }

    #[test]
    fn what_would_keep_programs_waiting_is_refused_before_they_see_it() {
        let image = image(&["-O", "mmp", "-E", "mmp_update_interval=300"]);
        assert!(
            refusal(&image).contains("take that off (tune2fs -O ^mmp)"),
            "{}",
            refusal(&image)
        );
        assert!(
            check(image.path()).is_err() && grow(image.path()).is_err() && repair_and_discard(image.path()).is_err()
        );
    }

    #[test]
    fn a_journal_elsewhere_is_refused() {
        let journal = image(&["-O", "journal_dev"]);
        assert!(refusal(&journal).ends_with("is a journal"), "{}", refusal(&journal));
        let user = image(&[]);
        let inode = SUPERBLOCK + JOURNAL_INODE as u64;
        user.as_file().write_all_at(&[0; 4], inode).unwrap();
        assert!(
            refusal(&user).contains("has its journal elsewhere"),
            "{}",
            refusal(&user)
        );
    }

    #[test]
    fn a_superblock_that_is_none_is_not_replaced_by_a_copy_that_nobody_looked_at() {
        let image = image(&[]);
        image.as_file().write_all_at(&[0; 2], SUPERBLOCK + 0x38).unwrap();
        assert!(refusal(&image).contains("damaged superblock"), "{}", refusal(&image));
        image.as_file().set_len(1024).unwrap();
        assert!(refusal(&image).ends_with("is cut off"), "{}", refusal(&image));
    }

    #[test]
    fn a_plain_file_system_with_or_without_a_journal_is_taken() {
        for options in [&[][..], &["-O", "^has_journal"]] {
            let image = image(options);
            repair(image.path()).unwrap();
            check(image.path()).unwrap();
        }
    }
}

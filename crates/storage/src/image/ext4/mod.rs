//! The ext4 file system in an image. e2fsprogs check, grow and edit it in user space; our own code
//! inspects it and zeroes its unused space.
//!
//! Guests can write everything in these images, including the superblock. The superblock is
//! inspected before any program runs, because some of its fields make programs wait for another
//! host or look for another device.
//!
//! A program succeeds when its exit code indicates success and its standard error contains nothing
//! but its banner. For operations that move blocks or edit files this is not sufficient:
//! `resize2fs` exits with 0 after failed writes. There the files are compared with a clone made
//! before.
//!
//! | file | contents |
//! |---|---|
//! | `features` | the ext4 features a disk may have |
//! | `superblock`, `layout`, `inode`, `directory`, `tree` | parsing the structures in the image |
//! | `unused` | zeroing unused space |
//! | `unchanged` | comparing all files with an earlier clone |
//! | `ranges`, `crc32c` | sets of blocks, checksums of metadata |

mod crc32c;
mod directory;
mod features;
mod inode;
mod layout;
mod ranges;
mod superblock;
mod tree;
mod unchanged;
mod unused;

pub(crate) use tree::{Stat, Tree};
pub(crate) use unchanged::Work;
pub(crate) use unused::zero as zero_unused;

use crate::command::{self, CommandError, Program};
use crate::error::StorageError;
use crate::local::files;
use features::{Incompat, RoCompat};
use layout::Layout;
use scalebox_units::Bytes;
use std::fs::File;
use std::path::Path;
use superblock::Superblock;

/// Growth factor per step, for a file system that cannot grow to its size at once. Each step needs
/// about as much new space for group descriptors as exists already, and `resize2fs` takes it only
/// from the existing blocks.
const STEP_FACTOR: u64 = 8;

/// Beginnings of messages about file systems crafted to keep the host busy.
const CHECK_TOO_SLOW: &str = "cannot be checked";
const FRAGMENTED: &str = "is so fragmented that";

/// Replays the journal and repairs what is safe to repair.
///
/// # Errors
/// [`StorageError::FileSystem`] when it has other damage, or a feature that is not supported;
/// [`StorageError::Host`].
pub(crate) fn repair(image: &Path) -> Result<(), StorageError> {
    replay(image)?;
    e2fsck(image, &["-f", "-p"])
}

/// Checks the file system without changing it: there must be no finding.
///
/// # Errors
/// The same as [`repair`].
pub(crate) fn check(image: &Path) -> Result<(), StorageError> {
    require_plain(image)?;
    e2fsck(image, &["-f", "-n"])?;
    let file = open(image)?;
    Layout::read(&file)?.check_bitmaps(&file)
}

/// Checks a file system that was sound before an operation of the host: any damage is the host's
/// fault.
///
/// # Errors
/// [`StorageError::Host`]; otherwise the same as [`check`].
pub(crate) fn check_work(image: &Path, doing: &'static str) -> Result<(), StorageError> {
    check(image).map_err(|error| as_host_fault(error, doing))
}

/// Turns damage into a fault of the host: a program caused it. Does not apply to file systems that
/// keep programs busy for too long.
fn as_host_fault(error: StorageError, doing: &'static str) -> StorageError {
    match error {
        StorageError::FileSystem(reason) if !reason.starts_with(CHECK_TOO_SLOW) && !reason.starts_with(FRAGMENTED) => {
            StorageError::Host {
                doing,
                reason: format!("afterwards, the file system {reason}"),
            }
        }
        other => other,
    }
}

/// Returns whether the file system fills its image.
///
/// # Errors
/// [`StorageError::FileSystem`], [`StorageError::Io`].
pub(crate) fn fills(image: &File) -> Result<bool, StorageError> {
    let superblock = Superblock::read_unchecked(image)?;
    let size = image.metadata().map_err(layout::unreadable)?.len();
    Ok(superblock.blocks() >= size / superblock.block_size())
}

/// Returns whether the file system keeps quotas itself.
pub(crate) fn keeps_quotas(image: &File) -> Result<bool, StorageError> {
    let superblock = Superblock::read_unchecked(image)?;
    Ok([RoCompat::QUOTA, RoCompat::PROJECT]
        .map(|feature| superblock.has_ro_compat(feature))
        .contains(&true))
}

/// Returns why the file system in `image` cannot grow at all. The reason continues the sentence
/// "its file system …".
///
/// # Errors
/// [`StorageError::FileSystem`], [`StorageError::Io`].
pub(crate) fn cannot_grow(image: &File) -> Result<Option<&'static str>, StorageError> {
    // resize2fs up to 1.47 grows it only when forced, and then leaves wrong counts of free blocks.
    let bigalloc = Superblock::read_unchecked(image)?.has_ro_compat(RoCompat::BIGALLOC);
    Ok(bigalloc.then_some("has the feature bigalloc, and resize2fs cannot grow such file systems reliably"))
}

/// Grows the image `path`, open as `image`, and its file system to `size`. No file in it changes.
/// Returns a clone of the image before, for [`finish_growth`].
///
/// # Errors
/// [`StorageError::FileSystem`] when it is damaged, [`StorageError::CannotGrow`] when it cannot
/// become that large, [`StorageError::Host`]. The image must then be discarded.
pub(crate) fn grow(path: &Path, image: &File, size: Bytes) -> Result<File, StorageError> {
    // Replaying the journal at the guest's next boot would undo the growth.
    repair(path)?;
    let before = files::unnamed_clone(parent(path), image)?;
    let superblock = Superblock::read(image)?;
    if let Err(whole) = grow_to(path, image, size.as_u64()) {
        if matches!(
            whole,
            StorageError::Host { .. } | StorageError::Io { .. } | StorageError::Command(_)
        ) {
            return Err(whole);
        }
        grow_in_steps(path, image, &before, &superblock, size)?;
    }
    require_unchanged(&before, image, &Work::Growth)?;
    Ok(before)
}

/// Checks a grown file system. `resize2fs` does not update the checksums of an orphan file, nor the
/// counts of some layouts. Those are repaired, and all files must then be as in `before`.
///
/// # Errors
/// [`StorageError::Host`], [`StorageError::Io`].
pub(crate) fn finish_growth(path: &Path, image: &File, before: &File) -> Result<(), StorageError> {
    const DOING: &str = "grow a file system";
    match check(path) {
        Err(StorageError::FileSystem(reason)) if !reason.starts_with(CHECK_TOO_SLOW) => {
            repair(path).map_err(|error| as_host_fault(error, DOING))?;
            require_unchanged(before, image, &Work::Growth)?;
            check_work(path, DOING)
        }
        other => other,
    }
}

/// Compares the files of an image with those of an earlier clone: see [`unchanged::require`].
///
/// # Errors
/// [`StorageError::Host`], [`StorageError::Io`]; [`StorageError::FileSystem`] when it takes too
/// long.
pub(crate) fn require_unchanged(before: &File, after: &File, work: &Work<'_>) -> Result<(), StorageError> {
    unchanged::require(before, after, work).map_err(|error| as_host_fault(error, unchanged::DOING))
}

/// Grows the file system of `before` in steps that are each small enough to succeed.
fn grow_in_steps(
    path: &Path,
    image: &File,
    before: &File,
    superblock: &Superblock,
    size: Bytes,
) -> Result<(), StorageError> {
    let failed = |error| StorageError::io("clone", path.display(), error);
    image.set_len(0).map_err(failed)?;
    files::reflink(before, image).map_err(failed)?;
    let mut next = superblock.blocks() * superblock.block_size();
    while next < size.as_u64() {
        next = next.saturating_mul(STEP_FACTOR).min(size.as_u64());
        grow_to(path, image, next).map_err(|error| match error {
            StorageError::CannotGrow { what, reason, .. } => StorageError::CannotGrow {
                what,
                size: size.ceil_gib(),
                reason,
            },
            other => other,
        })?;
    }
    Ok(())
}

fn grow_to(path: &Path, image: &File, size: u64) -> Result<(), StorageError> {
    let resized = image.set_len(size);
    resized.map_err(|error| StorageError::io("resize", path.display(), error))?;
    let answer = command::run_on_image(path, Program::Resize2fs, &[], None)?;
    let harmless = |line: &str| line.starts_with("The filesystem is already ");
    let complaint = answer.complaint(harmless);
    if answer.code == Some(0) && complaint.is_none() {
        return Ok(());
    }
    let reason = answer.output();
    if answer.is_fault_on_sound_image() || answer.code != Some(1) {
        return Err(StorageError::Host {
            doing: "grow a file system",
            reason,
        });
    }
    Err(StorageError::CannotGrow {
        what: "the disk".to_owned(),
        size: Bytes::new(size).ceil_gib(),
        reason,
    })
}

/// Replays the journal if it is not empty. It may contain another superblock, which is then
/// inspected too.
fn replay(image: &Path) -> Result<(), StorageError> {
    if require_plain(image)?.has_incompat(Incompat::RECOVER) {
        e2fsck(image, &["-E", "journal_only", "-p"])?;
        require_plain(image)?;
    }
    Ok(())
}

/// Runs e2fsck. Exit code 1 means that errors were corrected, 4 that some were not (e2fsck(8)).
/// Others are faults of the host, except for a feature that this e2fsck does not know.
fn e2fsck(image: &Path, options: &[&str]) -> Result<(), StorageError> {
    const CORRECTED: i32 = 1;
    const UNCORRECTED: i32 = 4;
    const ERROR: i32 = 8;
    let answer = match command::run_on_image(image, Program::E2fsck, options, None) {
        Err(CommandError::Killed { why, .. }) => {
            return Err(StorageError::FileSystem(format!("{CHECK_TOO_SLOW}: the check {why}")));
        }
        other => other?,
    };
    let output = answer.output();
    if let Some((_, features)) = output.split_once("has unsupported feature(s): ") {
        let features = features.lines().next().unwrap_or_default();
        return Err(StorageError::FileSystem(format!(
            "has features that e2fsck does not know: {features}"
        )));
    }
    match answer.code {
        _ if answer.is_fault_of_host() => {}
        // Reported when it updates quotas.
        Some(0 | CORRECTED) if answer.complaint(|line| line.starts_with("[QUOTA WARNING]")).is_none() => return Ok(()),
        // Also combined with 8, when it aborts because of a finding. With 8 alone, it cannot
        // interpret the superblock.
        Some(code) if code & UNCORRECTED != 0 || code == ERROR && output.contains("super") => {
            return Err(StorageError::FileSystem(format!(
                "is damaged; repair it first.\n{output}"
            )));
        }
        _ => {}
    }
    Err(StorageError::Host {
        doing: "check a file system",
        reason: format!("e2fsck exited with {}: {output}", answer.status),
    })
}

/// Returns the folder of a file.
pub(crate) fn parent(image: &Path) -> &Path {
    image.parent().unwrap_or(Path::new("/"))
}

fn open(image: &Path) -> Result<File, StorageError> {
    files::open_read(image).map_err(|error| StorageError::io("read", image.display(), error))
}

/// Rejects file systems that make e2fsprogs wait, or look for something outside the image, and
/// those that guests cannot use.
fn require_plain(image: &Path) -> Result<Superblock, StorageError> {
    let file = open(image)?;
    let superblock = Superblock::read_unchecked(&file)?;
    match features::refuse(&superblock) {
        Some(reason) => Err(StorageError::FileSystem(reason)),
        None => Ok(superblock),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    fn image(options: &[&str]) -> tempfile::NamedTempFile {
        image_of(32, options)
    }

    fn image_of(mib: u64, options: &[&str]) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(mib << 20).unwrap();
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
    fn multi_mount_protection_is_rejected_before_programs_wait_for_it() {
        let image = image(&["-O", "mmp", "-E", "mmp_update_interval=300"]);
        assert!(
            refusal(&image).contains("remove it (tune2fs -O ^mmp)"),
            "{}",
            refusal(&image)
        );
        assert!(check(image.path()).is_err());
    }

    #[test]
    fn external_journals_are_rejected() {
        let journal = image(&["-O", "journal_dev"]);
        assert!(refusal(&journal).ends_with("is a journal"), "{}", refusal(&journal));
        let user = image(&[]);
        let inode = superblock::START + 0xe0;
        user.as_file().write_all_at(&[0; 4], inode).unwrap();
        assert!(refusal(&user).contains("has an external journal"), "{}", refusal(&user));
    }

    #[test]
    fn damaged_superblocks_are_rejected_although_a_copy_exists() {
        let image = image(&[]);
        image.as_file().write_all_at(&[0; 2], superblock::START + 0x38).unwrap();
        assert!(refusal(&image).contains("damaged superblock"), "{}", refusal(&image));
        image.as_file().set_len(1024).unwrap();
        assert!(refusal(&image).ends_with("is truncated"), "{}", refusal(&image));
    }

    #[test]
    fn plain_file_systems_with_and_without_a_journal_are_accepted() {
        for options in [&[][..], &["-O", "^has_journal"]] {
            let image = image(options);
            repair(image.path()).unwrap();
            check(image.path()).unwrap();
        }
    }

    /// Parses the free blocks listed by `dumpe2fs`, each group on lines of its own: `  Free blocks:
    /// 9-20, 30`. If a bit represents a cluster, the last number is the first block of that
    /// cluster.
    fn listed_free(image: &tempfile::NamedTempFile, cluster: u64) -> Vec<Range<u64>> {
        let listed = Command::new("dumpe2fs").arg(image.path()).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let runs = listed.lines().filter_map(|line| line.strip_prefix("  Free blocks: "));
        let ranges = runs
            .flat_map(|runs| runs.split(", "))
            .filter(|run| !run.is_empty())
            .map(|run| {
                let (first, last) = run.split_once('-').unwrap_or((run, run));
                first.parse().unwrap()..last.parse::<u64>().unwrap() + cluster
            });
        ranges::normalize(ranges.collect())
    }

    #[test]
    fn free_blocks_match_dumpe2fs() {
        const SETS: [&[&str]; 14] = [
            &["-b", "1024"],
            &["-b", "2048"],
            &["-b", "4096"],
            &["-b", "1024", "-O", "^64bit"],
            &["-b", "1024", "-O", "^flex_bg"],
            &["-b", "1024", "-O", "^resize_inode"],
            &["-b", "1024", "-O", "meta_bg,^resize_inode"],
            &["-b", "1024", "-O", "meta_bg,^resize_inode,^flex_bg,^64bit"],
            &["-b", "1024", "-O", "bigalloc"],
            &["-b", "4096", "-O", "bigalloc", "-C", "65536"],
            &["-b", "1024", "-O", "sparse_super2"],
            &["-b", "1024", "-O", "^sparse_super,^resize_inode"],
            &["-b", "1024", "-O", "^metadata_csum,uninit_bg"],
            &["-b", "1024", "-O", "^metadata_csum"],
        ];
        for options in SETS {
            let image = image_of(300, options);
            let layout = Layout::read(image.as_file()).unwrap();
            let metadata = layout.metadata();
            let free = (0..layout.groups())
                .flat_map(|group| layout.free_blocks(image.as_file(), group, &metadata).unwrap())
                .collect();
            assert_eq!(
                ranges::normalize(free),
                listed_free(&image, layout.superblock.cluster_ratio()),
                "{options:?}"
            );
        }
    }

    /// Deleted names stay in their folder, also after the folder's index; short files stay in their
    /// inode.
    #[test]
    fn deleted_names_and_files_are_zeroed() {
        for options in [
            &["-b", "1024"][..],
            &["-b", "4096", "-I", "512", "-O", "inline_data"],
            &["-O", "^extent,^64bit,^metadata_csum"],
        ] {
            let scratch = tempfile::tempdir().unwrap();
            let (root, deleted) = (scratch.path().join("root"), "SECRET");
            std::fs::create_dir_all(root.join("folder")).unwrap();
            for nth in 0..400 {
                let name = format!("{}-{nth:04}", if nth % 3 == 0 { deleted } else { "kept" });
                std::fs::write(root.join("folder").join(&name), format!("{name}\n").repeat(nth % 5)).unwrap();
            }
            let mut all = options.to_vec();
            all.extend(["-d", root.to_str().unwrap()]);
            let image = image_of(32, &all);
            let run = |program: &str, args: &[&str]| {
                let output = Command::new(program).args(args).arg(image.path()).output().unwrap();
                assert!(output.status.code().is_some_and(|code| code < 2), "{output:?}");
                String::from_utf8(output.stdout).unwrap()
            };
            // Creates an index; the names are then after it.
            run("e2fsck", &["-fpD"]);
            let names = |wanted: &str| {
                let listed = run("debugfs", &["-R", "ls -p /folder"]);
                let there = listed.lines().filter(|line| !line.starts_with("/0/"));
                let names = there.filter_map(|line| line.split('/').nth(5)).map(str::to_owned);
                names.filter(|name| name.starts_with(wanted)).collect::<Vec<_>>()
            };
            let script = names(deleted)
                .iter()
                .map(|name| format!("rm /folder/{name}\n"))
                .collect::<String>();
            let commands = scratch.path().join("commands");
            std::fs::write(&commands, script).unwrap();
            run("debugfs", &["-w", "-f", commands.to_str().unwrap()]);
            let holds = || {
                std::fs::read(image.path())
                    .unwrap()
                    .windows(6)
                    .any(|bytes| bytes == b"SECRET")
            };
            assert!(names(deleted).is_empty() && holds());

            let before = tempfile::tempfile().unwrap();
            files::copy_sparse(image.as_file(), &before).unwrap();
            zero_unused(image.as_file()).unwrap();
            assert!(!holds(), "{options:?}");
            check(image.path()).unwrap();
            assert_eq!(names("kept").len(), 266);
            let content = run("debugfs", &["-R", "cat /folder/kept-0004"]);
            assert_eq!(content.trim_end_matches('\0'), "kept-0004\n".repeat(4));
        }
    }

    /// Creates an image with three files, and a copy of it.
    fn image_and_copy(options: &[&str]) -> (tempfile::TempDir, tempfile::NamedTempFile, File) {
        let scratch = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("long", "content ".repeat(9000)),
            ("short", "x".repeat(90)),
            ("third", "3".repeat(5000)),
        ] {
            std::fs::write(scratch.path().join(name), content).unwrap();
        }
        let image = image(&[options, &["-d", scratch.path().to_str().unwrap()]].concat());
        let copy = tempfile::tempfile().unwrap();
        files::copy_sparse(image.as_file(), &copy).unwrap();
        (scratch, image, copy)
    }

    fn debugfs(image: &tempfile::NamedTempFile, request: &str) {
        let done = Command::new("debugfs")
            .args(["-w", "-R", request])
            .arg(image.path())
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&done.stderr).lines().count(),
            1,
            "{request}: {done:?}"
        );
    }

    #[test]
    fn changed_bytes_names_and_owners_are_detected() {
        for options in [&["-b", "1024"][..], &["-b", "4096", "-O", "^extent,^64bit"]] {
            let (_scratch, image, before) = image_and_copy(options);
            let unchanged = |work: Work<'_>| require_unchanged(&before, image.as_file(), &work);
            unchanged(Work::Growth).unwrap();
            let mut data = Vec::new();
            std::io::Read::read_to_end(&mut File::open(image.path()).unwrap(), &mut data).unwrap();
            let at = data.windows(16).position(|bytes| bytes == b"content content ").unwrap() as u64;
            image.as_file().write_all_at(b"C", at + 700).unwrap();
            let changed = unchanged(Work::Growth).unwrap_err();
            assert!(matches!(changed, StorageError::Host { .. }), "{changed}");
            image
                .as_file()
                .write_all_at(&data[at as usize + 700..][..1], at + 700)
                .unwrap();
            unchanged(Work::Growth).unwrap();
            for request in ["set_inode_field /short uid 7", "ln /short /fourth", "rm /third"] {
                debugfs(&image, request);
                assert!(unchanged(Work::Growth).is_err(), "{request}");
                image.as_file().write_all_at(&data, 0).unwrap();
            }
        }
    }

    #[test]
    fn only_the_edited_inodes_may_change() {
        let (_scratch, image, before) = image_and_copy(&["-b", "1024"]);
        let inode = |name: &str| {
            let (_, names) = Tree::open(&before).unwrap().list("/").unwrap().unwrap();
            names
                .into_iter()
                .find(|entry| entry.name == name.as_bytes())
                .unwrap()
                .inode
        };
        debugfs(&image, "rm /third");
        let unchanged = |inodes: &[u64]| {
            let inodes = inodes.iter().copied().collect();
            require_unchanged(&before, image.as_file(), &Work::Edit(&inodes))
        };
        assert!(unchanged(&[inode("third")]).is_err(), "its folder changed too");
        unchanged(&[inode("third"), 2]).unwrap();
        zero_unused(image.as_file()).unwrap();
        unchanged(&[inode("third"), 2]).unwrap();
        debugfs(&image, "set_inode_field /short mode 0100600");
        assert!(unchanged(&[inode("third"), 2]).is_err());
    }

    #[test]
    fn files_moved_by_growth_count_as_unchanged() {
        // Without space reserved for descriptors, growth moves the data after them.
        let noise: Vec<u8> = (0..6_000_000u32)
            .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        let scratch = tempfile::tempdir().unwrap();
        std::fs::write(scratch.path().join("noise"), noise).unwrap();
        let root = scratch.path().to_str().unwrap();
        let image = image_of(32, &["-b", "1024", "-O", "^resize_inode,^64bit", "-d", root]);
        let before = tempfile::tempfile().unwrap();
        files::copy_sparse(image.as_file(), &before).unwrap();
        grow_to(image.path(), image.as_file(), 1 << 30).unwrap();
        check(image.path()).unwrap();
        let blocks = |image: &File| {
            let tree = Layout::read(image).unwrap();
            let bytes = tree.inode(image, 12).unwrap().unwrap();
            bytes[0x28..0x64].to_vec()
        };
        assert!(blocks(&before) != blocks(image.as_file()), "the file was not moved");
        require_unchanged(&before, image.as_file(), &Work::Growth).unwrap();
    }

    #[test]
    fn a_bitmap_with_a_wrong_checksum_is_damage() {
        let image = image(&["-b", "1024"]);
        check(image.path()).unwrap();
        let layout = Layout::read(image.as_file()).unwrap();
        let listed = Command::new("dumpe2fs").arg(image.path()).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let bitmap = listed
            .split_once("Block bitmap at ")
            .unwrap()
            .1
            .split(' ')
            .next()
            .unwrap();
        let at = bitmap.parse::<u64>().unwrap() * layout.superblock.block_size();
        let mut first = [0];
        image.as_file().read_exact_at(&mut first, at).unwrap();
        image.as_file().write_all_at(&[first[0] ^ 1], at).unwrap();
        let damage = layout.check_bitmaps(image.as_file()).unwrap_err().to_string();
        assert!(damage.contains("checksum of the block bitmap of group 0"), "{damage}");
    }
}

//! Tests of several files of this folder together, on images that mke2fs made.

use super::grow::grow_to;
use super::layout::Layout;
use super::*;
use crate::error::StorageError;
use crate::local::files;
use std::fs::File;
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

/// Checks that deleted names in a folder, also after the folder's index, and short files in their
/// inode are zeroed.
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

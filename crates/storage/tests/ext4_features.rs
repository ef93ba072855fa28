//! Import, growth to 100 GiB, snapshot and clone of an ext4 file system with each feature of
//! mke2fs. Every file must stay the same; unsupported features must be rejected at import with a
//! reason.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step ends the test"
)]

mod support;

use scalebox_storage::{Backing, Bounds, Pool, StorageError};
use scalebox_units::{Gib, TemplateName, VmId};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use support::{HostDisk, MAX, Place, disk_path, finish_snapshot, found_in, name, run, text, vm_id};
use tempfile::TempDir;

const MAX_SIZE: Gib = Gib::new(100);
const HOST_NAME: &str = "so-secret-otter";
const HOST_KEY: &str = "the-private-host-key";
const SEEDED: &str = "AAAAC3NzaC1lZDI1NTE5AAAAIJustAPublicKeyThatWasSeeded";
const DELETED: &str = "a-file-that-the-guest-deleted";
/// Texts that must not occur in any byte of the template's image.
const SECRETS: [&str; 4] = [HOST_NAME, HOST_KEY, SEEDED, DELETED];

/// Options of mke2fs, and the expected reason of a rejected import; empty if it is accepted.
type Set = (&'static str, &'static str);

/// The feature that prevents growth; no other feature does.
const NOT_GROWN: &str = "bigalloc";

/// The sets of features to test: each feature of ext4(5), switched from its default, and the
/// defaults of distributions.
const SETS: &[Set] = &[
    ("", ""),
    ("-O 64bit,extent", ""),
    ("-O ^64bit", ""),
    ("-O bigalloc", ""),
    ("-O bigalloc -C 65536", ""),
    ("-O casefold", ""),
    ("-O ^dir_index", ""),
    ("-O ^dir_nlink", ""),
    ("-O ea_inode", ""),
    ("-O encrypt", ""),
    ("-O ^ext_attr", ""),
    ("-O ^extent,^64bit", ""),
    ("-O ^extra_isize", ""),
    ("-O fast_commit", ""),
    ("-O ^filetype", ""),
    ("-O ^flex_bg", ""),
    ("-O ^has_journal", ""),
    ("-O ^huge_file", ""),
    ("-O inline_data", ""),
    ("-O journal_dev", "it contains jbd"),
    ("-O large_dir", ""),
    ("-O ^large_file", ""),
    ("-O ^metadata_csum", ""),
    ("-O metadata_csum_seed", ""),
    ("-O meta_bg,^resize_inode", ""),
    ("-O mmp", "multiple mount protection"),
    ("-O orphan_file", ""),
    ("-O project", ""),
    ("-O quota", ""),
    ("-O quota,project", ""),
    ("-O ^resize_inode", ""),
    ("-O ^sparse_super,^resize_inode", ""),
    ("-O sparse_super2", ""),
    ("-O stable_inodes", ""),
    ("-O ^metadata_csum,uninit_bg", ""),
    ("-O verity", ""),
    // Features that no guest can mount and write, and unknown ones.
    ("+shared_blocks", "cannot use or the host cannot check: shared_blocks"),
    ("+read-only", "cannot use or the host cannot check: read-only"),
    (
        "+dirdata +FEATURE_I31 +FEATURE_R29",
        "cannot use or the host cannot check: dirdata, FEATURE_I31, FEATURE_R29",
    ),
    ("+FEATURE_C30", "cannot use or the host cannot check: FEATURE_C30"),
    ("-O ^has_journal -b 65536", "has blocks of 64 KiB"),
    // Defaults of e2fsprogs from 1.47.1; Debian 11 and Ubuntu 20.04; RHEL 7; RHEL 6; ext3 and ext2;
    // revision 0.
    ("-O orphan_file,metadata_csum_seed", ""),
    ("-O metadata_csum,64bit,^orphan_file", ""),
    ("-O ^metadata_csum,uninit_bg,64bit", ""),
    ("-O ^metadata_csum,uninit_bg,^64bit", ""),
    (
        "-O none,has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file",
        "",
    ),
    (
        "-O none,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file",
        "",
    ),
    ("-r 0 -O none", ""),
    // Combinations.
    (
        "-O inline_data,ea_inode,casefold,large_dir,fast_commit,orphan_file,quota,project,verity,encrypt",
        "",
    ),
    ("-O bigalloc,inline_data,quota,orphan_file,metadata_csum_seed", ""),
    ("-O meta_bg,^resize_inode,^flex_bg,sparse_super2", ""),
    ("-G 64", ""),
    ("-g 8192 -O ^flex_bg", ""),
    ("-E resize=2000000", ""),
];

/// Returns the block and inode sizes to try with a set. All sets are tried with blocks of 4 KiB.
/// Sets that change the position of metadata are also tried with 1 KiB, which makes sixteen times
/// as many groups in 100 GiB.
fn sizes(set: &str) -> Vec<String> {
    let is_about = |words: &[&str]| set.is_empty() || words.iter().any(|word| set.contains(word));
    let mut sizes = vec!["-b 4096 -I 256"];
    if is_about(&["inline", "ea_inode", "extra_isize", "O quota", "none"]) {
        sizes.extend(["-b 4096 -I 128", "-b 4096 -I 1024"]);
    }
    if is_about(&["bigalloc", "meta_bg", "O ^resize", "O sparse_super2", "O ^flex_bg"]) {
        sizes.push("-b 1024 -I 256");
    }
    if is_about(&["orphan_file", "inline"]) {
        sizes.push("-b 2048 -I 256");
    }
    if set.is_empty() {
        sizes.push("-b 2048 -I 128");
    }
    sizes
        .into_iter()
        .map(|size| format!("{set} {size}").trim().to_owned())
        .collect()
}

/// Creates a tree with all kinds of files, and with a machine's identity.
fn tree(folder: &Path) -> PathBuf {
    let root = folder.join("root");
    let put = |path: &str, content: &[u8]| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    let large: Vec<u8> = (0..3_000_000u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .take(5_000_001)
        .collect();
    put("data/large", &large);
    put("data/empty", b"");
    put("data/short", b"short\n");
    put("data/mail", "a line of two hundred bytes or so, ".repeat(6).as_bytes());
    for nth in 0..300 {
        put(
            &format!("data/many/file-with-a-long-name-{nth:04}"),
            format!("{nth}\n").as_bytes(),
        );
    }
    symlink("short", root.join("data/link")).unwrap();
    symlink("x/".repeat(80), root.join("data/long-link")).unwrap();
    fs::hard_link(root.join("data/large"), root.join("data/again")).unwrap();
    rustix::fs::setxattr(
        root.join("data/mail"),
        "user.note",
        b"kept",
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();

    put("etc/ssh/ssh_host_ed25519_key", HOST_KEY.repeat(20).as_bytes());
    put("etc/ssh/ssh_host_short_key", HOST_KEY.as_bytes());
    put("etc/machine-id", b"0123456789abcdef0123456789abcdef\n");
    put("etc/hostname", format!("{HOST_NAME}\n").as_bytes());
    put(
        "etc/hosts",
        format!("127.0.0.1 localhost\n127.0.1.1 {HOST_NAME}\n").as_bytes(),
    );
    put(
        "var/log/journal/0123456789abcdef0123456789abcdef/system.journal",
        HOST_NAME.repeat(999).as_bytes(),
    );
    put(
        "root/.ssh/authorized_keys",
        format!("ssh-ed25519 {SEEDED} me\n").as_bytes(),
    );
    put("deleted", DELETED.repeat(300).as_bytes());
    put(&format!("{DELETED}-2"), DELETED.as_bytes());
    root
}

/// Creates the image of a case; `None` if mke2fs rejects the options. `+feature` is set afterwards,
/// because mke2fs would reject it.
fn image(folder: &Path, root: &Path, options: &str) -> Option<PathBuf> {
    let image = folder.join("image");
    fs::remove_file(&image).unwrap_or_default();
    let (later, options): (Vec<&str>, Vec<&str>) = options.split_whitespace().partition(|word| word.starts_with('+'));
    let mut args = vec!["-q", "-F", "-t", "ext4"];
    args.extend(&options);
    if !options.contains(&"journal_dev") && !options.windows(2).any(|pair| pair == ["-b", "65536"]) {
        args.extend(["-d", text(root)]);
    }
    let size = if options.iter().any(|word| word.contains(NOT_GROWN)) {
        "1G"
    } else {
        "64M"
    };
    args.extend([text(&image), size]);
    if !Command::new("mke2fs").args(args).output().unwrap().status.success() {
        return None;
    }
    for file in ["/deleted", &format!("/{DELETED}-2")] {
        run("debugfs", &["-w", "-R", &format!("rm {file}"), text(&image)]);
    }
    if !later.is_empty() {
        let features = later.join(" ").replace('+', "");
        run("debugfs", &["-w", "-R", &format!("feature {features}"), text(&image)]);
    }
    Some(image)
}

/// The outcome of each step of a case.
#[derive(Default)]
struct Row {
    options: String,
    steps: Vec<String>,
    wrong: Vec<String>,
}

impl Row {
    /// Records the outcome of a step, and returns its result.
    fn step<T>(&mut self, result: Result<T, StorageError>, refusal: &str) -> Option<T> {
        let (outcome, made) = match result {
            Ok(made) => ("yes".to_owned(), Some(made)),
            Err(error) => {
                let refused = matches!(
                    error,
                    StorageError::NotATemplate { .. } | StorageError::CannotGrow { .. }
                );
                let reason = error.to_string();
                if !refused || refusal.is_empty() || !reason.contains(refusal) {
                    self.wrong.push(reason.clone());
                }
                let reason = reason
                    .rsplit_once("file system ")
                    .map_or(reason.as_str(), |(_, reason)| reason);
                (format!("400 {reason}"), None)
            }
        };
        if made.is_some() && !refusal.is_empty() {
            self.wrong.push(format!("should have been rejected: {refusal}"));
        }
        self.steps.push(outcome);
        made
    }

    fn require(&mut self, holds: bool, problem: &str) {
        if !holds {
            self.wrong.push(problem.to_owned());
        }
    }
}

/// One file system, and the disks and templates made from it.
struct Case<'c> {
    pool: &'c Pool,
    place: &'c Place,
    nth: usize,
    root: PathBuf,
    scratch: TempDir,
}

impl Case<'_> {
    fn name(&self, kind: &str) -> TemplateName {
        name(&format!("{kind}-{}", self.nth))
    }

    fn disk(&self, kind: &str) -> VmId {
        vm_id(&format!("{kind}-{}", self.nth))
    }

    fn create(&self, disk: &str, template: &str, size: Gib) -> Result<(), StorageError> {
        let admitted = self.pool.admit(size.bytes())?;
        self.pool.create_disk(&self.disk(disk), &self.name(template), &admitted)
    }

    /// Runs all steps.
    fn follow(&self, row: &mut Row, refusal: &str) {
        let Some(source) = image(self.scratch.path(), &self.root, &row.options) else {
            row.steps.push("mke2fs rejects it".to_owned());
            return;
        };
        let first = self.name("first");
        let imported = self.pool.import_template(&first, &source, MAX, false);
        if row.step(imported, refusal).is_none() {
            return;
        }
        let fixed = row.options.contains(NOT_GROWN);
        let (refusal, size) = if fixed {
            ("has the feature bigalloc", Gib::new(1))
        } else {
            ("", MAX_SIZE)
        };
        let disk = self.disk("disk");
        let grown = self
            .create("disk", "first", Gib::new(1))
            .and_then(|()| self.pool.grow_disk(&disk, MAX_SIZE.bytes()));
        if row.step(grown, refusal).is_some() || fixed {
            self.same_tree(row, &disk_path(self.pool, &disk), "grown");
            self.snapshot_and_clone(row, size);
        }
        self.pool.delete_template(&first).unwrap();
        for disk in ["disk", "clone"] {
            self.pool.delete_disk(&self.disk(disk)).unwrap();
        }
    }

    fn snapshot_and_clone(&self, row: &mut Row, size: Gib) {
        let derived = self.name("derived");
        let snapshot = self.pool.begin_snapshot(&derived).and_then(|mut snapshot| {
            self.pool.take_snapshot(&mut snapshot, &self.disk("disk"))?;
            finish_snapshot(self.pool, snapshot, HOST_NAME, &format!("ssh-ed25519 {SEEDED} me"))
        });
        if row.step(snapshot, "").is_none() {
            return;
        }
        let template = self.place.plan.data_dir.join(format!("templates/{derived}.ext4"));
        for secret in found_in(&template, &SECRETS) {
            row.wrong.push(format!("the template contains {secret}"));
        }
        if row.step(self.create("clone", "derived", size), "").is_some() {
            let clone = disk_path(self.pool, &self.disk("clone"));
            let checked = Command::new("e2fsck").args(["-fn", text(&clone)]).output().unwrap();
            row.require(checked.status.success(), "e2fsck has findings");
            row.steps.push("clean".to_owned());
            for gone in [
                "etc/ssh",
                "etc/machine-id",
                "etc/hostname",
                "etc/hosts",
                "root/.ssh",
                "var/log/journal",
            ] {
                let path = self.root.join(gone);
                fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path)).unwrap();
            }
            self.same_tree(row, &clone, "cloned");
        }
        self.pool.delete_template(&derived).unwrap();
    }

    fn same_tree(&self, row: &mut Row, image: &Path, when: &str) {
        same_tree(row, &self.root, image, self.scratch.path(), when);
    }
}

/// Compares the files of `root` with those in an image, which may have others.
fn same_tree(row: &mut Row, root: &Path, image: &Path, scratch: &Path, when: &str) {
    let dump = scratch.join(when);
    fs::create_dir(&dump).unwrap();
    Command::new("debugfs")
        .args(["-R", &format!("rdump / {}", text(&dump)), text(image)])
        .output()
        .unwrap();
    let (mut folders, mut differs) = (vec![PathBuf::new()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder)).unwrap() {
            let path = folder.join(entry.unwrap().file_name());
            if text(&path).contains("deleted") {
                continue;
            }
            let (was, is) = (root.join(&path), dump.join(&path));
            let kind = fs::symlink_metadata(&was).unwrap().file_type();
            let same = if kind.is_dir() {
                folders.push(path.clone());
                is.is_dir()
            } else if kind.is_symlink() {
                fs::read_link(&was).ok() == fs::read_link(&is).ok()
            } else {
                let (was, is) = (fs::read(&was).unwrap(), fs::read(&is).unwrap_or_default());
                // For inline files, debugfs pads the contents with zeros.
                is.starts_with(&was) && is[was.len()..].iter().all(|byte| *byte == 0)
            };
            if !same {
                differs.push(path);
            }
        }
    }
    if let Some(path) = differs.first() {
        row.wrong.push(format!(
            "{}, {when}, changed, and {} more",
            path.display(),
            differs.len() - 1
        ));
    }
    if !row.options.contains("^ext_attr") && !row.options.contains("-O none ") && !row.options.contains("-r 0") {
        let note = run("debugfs", &["-R", "ea_get /data/mail user.note", text(image)]);
        row.require(note.contains("kept"), &format!("the attribute, {when}, changed"));
    }
}

/// Creates a sparse disk with nominal space for several disks of the maximum size, and a pool on
/// it.
fn large_pool() -> (HostDisk, Place, Pool) {
    let host = HostDisk::made("1T", "mkfs.btrfs", &["-q"]);
    let mut place = Place::at(&host.folder, None);
    place.plan.backing = Backing::Existing;
    place.init().unwrap();
    let bounds = Bounds {
        buffer: Gib::new(2),
        overcommit_ratio: 100.0,
    };
    let pool = place.open(bounds);
    // The caller drops these in reverse order.
    (host, place, pool)
}

#[test]
fn growth_too_large_for_one_step_is_done_in_several() {
    let (_host, _place, pool) = large_pool();
    let scratch = tempfile::tempdir().unwrap();
    let root = tree(scratch.path());
    // In one step, resize2fs fails with "Illegal doubly indirect block found".
    let source = image(scratch.path(), &root, "-b 4096").unwrap();
    pool.import_template(&name("small"), &source, MAX, false).unwrap();
    let admitted = pool.admit(MAX_SIZE.bytes()).unwrap();
    pool.create_disk(&vm_id("vm"), &name("small"), &admitted).unwrap();
    let disk = disk_path(&pool, &vm_id("vm"));
    assert!(run("dumpe2fs", &["-h", text(&disk)]).contains("Block count:              26214400\n"));
    run("e2fsck", &["-fn", text(&disk)]);
    let mut row = Row::default();
    same_tree(&mut row, &root, &disk, scratch.path(), "grown");
    assert_eq!(row.wrong, Vec::<String>::new());
}

#[test]
fn every_ext4_feature_works_or_is_rejected_at_import() {
    let mut cases: Vec<(String, &str)> = Vec::new();
    for (set, refusal) in SETS {
        if !refusal.is_empty() {
            cases.push((set.trim().to_owned(), refusal));
            continue;
        }
        // Revision 0 has only one inode size.
        let sized = sizes(set)
            .into_iter()
            .filter(|options| !set.contains("-r 0") || options.contains("-I 128"));
        cases.extend(sized.map(|options| (options, "")));
    }
    let (_host, place, pool) = large_pool();
    let (next, rows) = (Mutex::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let nth = {
                        let mut next = next.lock().unwrap();
                        *next += 1;
                        *next - 1
                    };
                    let Some((options, refusal)) = cases.get(nth) else {
                        return;
                    };
                    let scratch = tempfile::tempdir().unwrap();
                    let mut row = Row {
                        options: options.clone(),
                        ..Row::default()
                    };
                    let case = Case {
                        pool: &pool,
                        place: &place,
                        nth,
                        root: tree(scratch.path()),
                        scratch,
                    };
                    case.follow(&mut row, refusal);
                    rows.lock().unwrap().push((nth, row));
                }
            });
        }
    });
    let mut rows = rows.into_inner().unwrap();
    rows.sort_by_key(|(nth, _)| *nth);
    let mut table = String::from(
        "| mke2fs -t ext4 | import | grow to 100 GiB | snapshot | clone | check |\n|---|---|---|---|---|---|\n",
    );
    for (_, row) in &rows {
        let steps = (0..5)
            .map(|nth| row.steps.get(nth).map_or("", String::as_str))
            .collect::<Vec<_>>();
        writeln!(table, "| {} | {} |", row.options, steps.join(" | ")).unwrap();
    }
    println!("{table}");
    let wrong: Vec<String> = rows
        .iter()
        .flat_map(|(_, row)| row.wrong.iter().map(|wrong| format!("{}: {wrong}", row.options)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(rows.iter().filter(|(_, row)| row.steps.len() == 5).count() > 60);
}

//! Users of the guest, from its `/etc/passwd` and `/etc/group`.
//!
//! The agent is a static program and cannot load the guest's NSS modules: it finds users of LDAP
//! and similar services by number only.

use crate::server::Failure;
use rustix::fs::{Mode, OFlags};
use scalebox_agent_api::FailureCode;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;

/// Maximum length of a line. A group's line has its members; longer lines are skipped.
const MAX_LINE: u64 = 64 << 10;
/// Maximum number of bytes that are read of a file.
const MAX_FILE: u64 = 16 << 20;
/// Maximum number of supplementary groups; the kernel's limit is 65,536.
const MAX_GROUPS: usize = 1024;

/// A user that runs commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// The name; none for a number without an entry.
    pub(crate) name: Option<String>,
    pub(crate) home: String,
    pub(crate) shell: Option<String>,
}

/// The owner of a file, by numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// An entry of `/etc/passwd`.
struct Entry {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
    shell: String,
}

impl Account {
    /// Finds the user `spec`, `NAME|UID[:GROUP|GID]`, in the guest's `/etc/passwd` and
    /// `/etc/group`. Blocks.
    ///
    /// A number need not have an entry: then its group is 0 and its home `/`. With a group in
    /// `spec`, the user has no supplementary groups.
    ///
    /// # Errors
    /// [`FailureCode::NotFound`] for a name without an entry; [`FailureCode::Invalid`] for another
    /// form or a number out of range; the errors of reading the files.
    pub(crate) fn find(spec: &str) -> Result<Account, Failure> {
        find(spec, Path::new("/etc"))
    }

    /// Returns the owner of files that belong to the user.
    pub(crate) fn owner(&self) -> Owner {
        Owner {
            uid: self.uid,
            gid: self.gid,
        }
    }
}

/// Finds a user in the files of the folder `etc`.
fn find(spec: &str, etc: &Path) -> Result<Account, Failure> {
    if spec.contains(['\0', '\n']) || spec.matches(':').count() > 1 || spec.ends_with(':') {
        let error = format!("the user {spec:?} is not of the form NAME|UID[:GROUP|GID]");
        return Err(Failure::new(FailureCode::Invalid, error));
    }
    let (user, group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let entry = find_user(user, &etc.join("passwd"))?;
    let mut account = match entry {
        Some(entry) => Account {
            uid: entry.uid,
            gid: entry.gid,
            groups: Vec::new(),
            name: Some(entry.name),
            home: if entry.home.starts_with('/') {
                entry.home
            } else {
                "/".to_owned()
            },
            shell: Some(entry.shell).filter(|shell| shell.starts_with('/')),
        },
        None => Account {
            uid: number("user", user)?,
            gid: 0,
            groups: Vec::new(),
            name: None,
            home: "/".to_owned(),
            shell: None,
        },
    };
    let file = etc.join("group");
    match (group, &account.name) {
        (Some(group), _) => account.gid = find_group(group, &file)?,
        (None, Some(name)) => account.groups = groups_of(name, &file)?,
        (None, None) => {}
    }
    Ok(account)
}

fn number(what: &str, text: &str) -> Result<u32, Failure> {
    if text.is_empty() {
        return Err(Failure::new(FailureCode::Invalid, format!("the {what} is empty")));
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        let error = format!("the guest has no {what} {text}");
        return Err(Failure::new(FailureCode::NotFound, error));
    }
    // The largest number means "unchanged" in system calls.
    let parsed = text.parse().ok().filter(|number| *number < u32::MAX);
    parsed.ok_or_else(|| Failure::new(FailureCode::Invalid, format!("the {what} {text} is out of range")))
}

/// Finds a user by name, or else by number.
fn find_user(user: &str, file: &Path) -> Result<Option<Entry>, Failure> {
    let uid: Option<u32> = user.parse().ok();
    let (mut by_name, mut by_uid) = (None, None);
    read_lines(file, |line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid_field, gid, _, home, shell] = fields[..] else {
            return ControlFlow::Continue(());
        };
        let (Ok(number), Ok(gid)) = (uid_field.parse(), gid.parse()) else {
            return ControlFlow::Continue(());
        };
        let entry = || Entry {
            name: name.to_owned(),
            uid: number,
            gid,
            home: home.to_owned(),
            shell: shell.to_owned(),
        };
        if name == user {
            by_name = Some(entry());
            return ControlFlow::Break(());
        }
        if by_uid.is_none() && uid == Some(number) {
            by_uid = Some(entry());
        }
        ControlFlow::Continue(())
    })?;
    Ok(by_name.or(by_uid))
}

fn find_group(group: &str, file: &Path) -> Result<u32, Failure> {
    let mut found = None;
    read_groups(file, |name, gid, _| match name == group {
        true => {
            found = Some(gid);
            ControlFlow::Break(())
        }
        false => ControlFlow::Continue(()),
    })?;
    found.map_or_else(|| number("group", group), Ok)
}

fn groups_of(user: &str, file: &Path) -> Result<Vec<u32>, Failure> {
    let mut groups = Vec::new();
    read_groups(file, |_, gid, members| {
        if members.split(',').any(|member| member == user) {
            groups.push(gid);
        }
        match groups.len() < MAX_GROUPS {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    })?;
    Ok(groups)
}

fn read_groups(file: &Path, mut each: impl FnMut(&str, u32, &str) -> ControlFlow<()>) -> Result<(), Failure> {
    read_lines(file, |line| {
        let fields: Vec<&str> = line.split(':').collect();
        match fields[..] {
            [name, _, gid, members] => match gid.parse() {
                Ok(gid) => each(name, gid, members),
                Err(_) => ControlFlow::Continue(()),
            },
            _ => ControlFlow::Continue(()),
        }
    })
}

/// Calls `each` with the lines of a file, except those that are too long or not UTF-8. An absent
/// file has none.
fn read_lines(path: &Path, each: impl FnMut(&str) -> ControlFlow<()>) -> Result<(), Failure> {
    match open(path) {
        Ok(file) => for_each_line(file, each).map_err(Failure::io(format!("read {}", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::io(format!("open {}", path.display()))(error)),
    }
}

/// Opens a regular file; does not wait for the writer of a FIFO.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

fn for_each_line(file: File, mut each: impl FnMut(&str) -> ControlFlow<()>) -> io::Result<()> {
    let mut reader = BufReader::new(file.take(MAX_FILE));
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() as u64 == MAX_LINE {
            reader.skip_until(b'\n')?;
            continue;
        }
        if let Ok(line) = std::str::from_utf8(&line)
            && each(line).is_break()
        {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::write;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        # comment\n\
        broken:x:zero:0::/:/bin/sh\n\
        www:x:33:33:www:/var/www:/usr/sbin/nologin\n\
        1001:x:7:8::relative:\n\
        ann:x:1001:100::/home/ann:/bin/sh";
    const GROUP: &str = "root:x:0:\nwww:x:33:\nadm:x:4:ann,www\nusers:x:100:ann\nbroken:x:many:ann\n";

    fn etc() -> tempfile::TempDir {
        let etc = tempfile::tempdir().unwrap();
        write(etc.path().join("passwd"), PASSWD).unwrap();
        write(etc.path().join("group"), GROUP).unwrap();
        etc
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let etc = etc();
        let find = |spec: &str| find(spec, etc.path()).unwrap();
        let ann = find("ann");
        assert_eq!((ann.uid, ann.gid, ann.home.as_str()), (1001, 100, "/home/ann"));
        assert_eq!((ann.groups, ann.shell.as_deref()), (vec![4, 100], Some("/bin/sh")));
        let www = find("33");
        assert_eq!((www.name.as_deref(), www.gid, www.groups), (Some("www"), 33, vec![4]));
        let named_by_number = find("1001");
        assert_eq!((named_by_number.uid, named_by_number.home.as_str()), (7, "/"));
        let with_group = find("ann:adm");
        assert_eq!((with_group.gid, with_group.groups), (4, vec![]));
        let numbers = find("5000:6000");
        assert_eq!((numbers.uid, numbers.gid, numbers.name), (5000, 6000, None));
        assert_eq!((numbers.home.as_str(), find("5000").gid), ("/", 0));
    }

    #[test]
    fn unknown_users_and_bad_numbers_are_rejected() {
        let etc = etc();
        let code = |spec: &str| find(spec, etc.path()).unwrap_err().0.code;
        for unknown in ["bob", "ann:nobody", "broken", "-1", "+5", "root "] {
            assert_eq!(code(unknown), FailureCode::NotFound, "{unknown}");
        }
        for invalid in [
            "",
            ":",
            "a:b:c",
            "a\0",
            "ann:",
            "4294967295",
            "0:4294967295",
            "99999999999",
        ] {
            assert_eq!(code(invalid), FailureCode::Invalid, "{invalid}");
        }
    }

    #[test]
    fn guests_without_the_files_or_with_odd_ones_are_served() {
        let etc = tempfile::tempdir().unwrap();
        let root = find("0", etc.path()).unwrap();
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/"));
        let long = format!("{}\nann:x:5:5:::\n", "x".repeat(3 * MAX_LINE as usize));
        write(etc.path().join("passwd"), long).unwrap();
        assert_eq!(find("ann", etc.path()).unwrap().uid, 5);
        write(etc.path().join("passwd"), b"\xff\xfe:x:1:1:::\nann:x:6:6:::").unwrap();
        assert_eq!(find("ann", etc.path()).unwrap().uid, 6);
        std::fs::remove_file(etc.path().join("passwd")).unwrap();
        let fifo = etc.path().join("passwd");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(find("ann", etc.path()).is_err(), "does not wait for a writer");
    }
}

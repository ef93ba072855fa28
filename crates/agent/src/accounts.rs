//! The users and groups of the guest.

use crate::server::Failure;
use scalebox_agent_api::FailureCode;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

/// Maximum number of bytes that are read of `/etc/passwd` or `/etc/group`.
const MAX_DATABASE: u64 = 8 << 20;

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Account {
    /// The user's number.
    pub(crate) uid: u32,
    /// The group's number.
    pub(crate) gid: u32,
}

impl Account {
    /// Finds `NAME`, `UID`, `NAME:GROUP` or `UID:GID` in the guest's `/etc/passwd` and
    /// `/etc/group`.
    /// Without a group it is the user's own, or 0 for a number that has no entry.
    ///
    /// # Errors
    /// [`FailureCode::NotFound`] for an unknown name, [`FailureCode::Invalid`] for another form.
    pub(crate) fn find(text: &str) -> Result<Account, Failure> {
        Account::find_in(Path::new("/etc"), text)
    }

    fn find_in(etc: &Path, text: &str) -> Result<Account, Failure> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let is_malformed = |part: &str| part.is_empty() || part.contains([':', '\0', '\n']);
        if is_malformed(user) || group.is_some_and(is_malformed) {
            return Err(Failure::new(
                FailureCode::Invalid,
                format!("the user {text:?} is not of the form NAME, UID, NAME:GROUP or UID:GID"),
            ));
        }
        let found = find_line(&etc.join("passwd"), user, [2, 3])?;
        let (uid, own_group) = match (found, number(user)) {
            (Some([uid, gid]), _) => (uid, gid),
            (None, Some(uid)) => (uid, 0),
            (None, None) => return Err(unknown("user", user)),
        };
        let gid = match group {
            None => own_group,
            Some(group) => match (find_line(&etc.join("group"), group, [2, 2])?, number(group)) {
                (Some([gid, _]), _) | (None, Some(gid)) => gid,
                (None, None) => return Err(unknown("group", group)),
            },
        };
        Ok(Account { uid, gid })
    }
}

fn unknown(kind: &str, name: &str) -> Failure {
    Failure::new(
        FailureCode::NotFound,
        format!("the {kind} {name:?} does not exist in the guest"),
    )
}

/// Parses the number of a user or group; the largest number stands for "none" in system calls.
fn number(text: &str) -> Option<u32> {
    let is_decimal = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|number| is_decimal && *number != u32::MAX)
}

/// Searches a file with lines like `NAME:x:NUMBER:…` for a name, or else for the number in the
/// third field, and returns two numbers of the line.
fn find_line(path: &Path, key: &str, fields: [usize; 2]) -> Result<Option<[u32; 2]>, Failure> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::io(format!("read {}", path.display()))(error)),
    };
    let mut by_number = None;
    for line in BufReader::with_capacity(4 << 10, file.take(MAX_DATABASE)).split(b'\n') {
        let line = line.map_err(Failure::io(format!("read {}", path.display())))?;
        let parts: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
        let field = |index: usize| std::str::from_utf8(parts.get(index)?).ok().and_then(number);
        let [Some(first), Some(second)] = fields.map(field) else {
            continue;
        };
        if parts[0] == key.as_bytes() {
            return Ok(Some([first, second]));
        }
        if by_number.is_none() && number(key).is_some_and(|wanted| field(2) == Some(wanted)) {
            by_number = Some([first, second]);
        }
    }
    Ok(by_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let etc = tempfile::tempdir().unwrap();
        std::fs::write(
            etc.path().join("passwd"),
            b"root:x:0:0::/root:/bin/sh\nbroken\n\xff:x:9:9:::\nweb:x:33:44:::\n",
        )
        .unwrap();
        std::fs::write(etc.path().join("group"), "root:x:0:\nstaff:x:50:web\n").unwrap();
        let find = |text: &str| Account::find_in(etc.path(), text).map_err(|failure| failure.0.code);
        let account = |uid, gid| Ok(Account { uid, gid });
        assert_eq!(find("web"), account(33, 44));
        assert_eq!(find("33"), account(33, 44));
        assert_eq!(find("1000"), account(1000, 0));
        assert_eq!(find("web:staff"), account(33, 50));
        assert_eq!(find("1000:2000"), account(1000, 2000));
        for unknown in ["nobody-here", "web:nothing", "-1", "4294967295", "+5"] {
            assert_eq!(find(unknown), Err(FailureCode::NotFound), "{unknown}");
        }
        for malformed in ["", ":", "web:", ":staff", "a:b:c", "a\0"] {
            assert_eq!(find(malformed), Err(FailureCode::Invalid), "{malformed:?}");
        }
    }

    #[test]
    fn numbers_need_no_database() {
        let etc = tempfile::tempdir().unwrap();
        assert_eq!(Account::find_in(etc.path(), "7:8"), Ok(Account { uid: 7, gid: 8 }));
    }
}

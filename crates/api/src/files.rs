//! Files in a VM.

use crate::body::{Fields, Invalid};
use scalebox_units::InvalidFormat;
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

pub use scalebox_agent_api::headers;

/// A path in a VM: absolute, at most 4095 bytes, without `..` and zero bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPath(String);

/// Maximum length of a path: `PATH_MAX` minus the zero.
const MAX_PATH: usize = 4095;

impl GuestPath {
    /// Returns the path.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GuestPath {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        let form = if !text.starts_with('/') {
            "must be an absolute path, which begins with /"
        } else if text.len() > MAX_PATH {
            "must be at most 4095 bytes long"
        } else if text.contains('\0') {
            "must not contain a zero byte"
        } else if text.split('/').any(|part| part == "..") {
            "must not contain the part .."
        } else {
            return Ok(GuestPath(text.to_owned()));
        };
        Err(InvalidFormat::new(form))
    }
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// An account of a VM: `NAME`, `UID`, `NAME:GROUP` or `UID:GID`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileOwner(String);

impl FileOwner {
    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for FileOwner {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        let is_name = |name: &str| {
            let is_word = |c: char| !c.is_control() && !c.is_whitespace() && c != '/';
            (1..=255).contains(&name.len()) && name.chars().all(is_word)
        };
        let mut parts = text.split(':');
        if parts.clone().count() <= 2 && parts.all(is_name) {
            return Ok(FileOwner(text.to_owned()));
        }
        let form = "must be a user's name or number, optionally with a group, such as user, 1000 or user:users";
        Err(InvalidFormat::new(form))
    }
}

impl fmt::Display for FileOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The permissions of a file, in octal with four digits: `0644`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileMode(u16);

impl FileMode {
    /// Returns the lowest 12 bits of a mode.
    pub fn of_bits(mode: u32) -> Self {
        FileMode((mode & 0o7777) as u16)
    }

    /// Returns the permissions as a number, 0 to 0o7777.
    pub fn bits(self) -> u32 {
        self.0.into()
    }
}

impl FromStr for FileMode {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        let is_octal = (1..=4).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
        let mode = u16::from_str_radix(text, 8).ok().filter(|_| is_octal);
        mode.map(FileMode)
            .ok_or_else(|| InvalidFormat::new("must be permissions in octal, such as 0644"))
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:04o}", self.0))
    }
}

/// Implements JSON as the text that the type displays and parses.
macro_rules! as_text {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?
                    .parse()
                    .map_err(de::Error::custom)
            }
        }
    };
}

as_text!(GuestPath);
as_text!(FileOwner);
as_text!(FileMode);

/// A file and its properties.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FileEntry {
    /// The name in its directory, or the path in the request. Bytes that are not UTF-8 are
    /// percent-encoded, and so is `%`.
    pub name: String,
    /// The kind; of a symbolic link, not of its target.
    pub kind: FileKind,
    /// Size in bytes.
    pub size: u64,
    /// The permissions in octal, such as `0644`.
    pub mode: FileMode,
    /// The owner's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// Time of the last change of the content: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub modified_at: String,
    /// The target of a symbolic link, encoded like `name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// The kind of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, FIFO or socket.
    #[serde(other)]
    Other,
}

/// The response to `GET /vms/{vm}/files?path=…&list=true`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FileList {
    /// The entries of the directory by name, at most 10,000.
    pub entries: Vec<FileEntry>,
    /// `true` if the directory has more entries.
    pub truncated: bool,
}

/// The body of `POST /vms/{vm}/files/mkdir`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MakeDirectory {
    /// The new directory.
    pub path: GuestPath,
    /// Its permissions; `0755` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub mode: Option<FileMode>,
    /// Its owner; root by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub user: Option<FileOwner>,
    /// `true` to create missing parents, and to accept an existing directory.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[cfg_attr(feature = "openapi", schema(required = false, default = false))]
    pub parents: bool,
}

impl MakeDirectory {
    /// Parses a client's body.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &["path", "mode", "user", "parents"])?;
        Ok(MakeDirectory {
            path: fields.text("path", "send the absolute path of the new directory")?,
            mode: fields.optional_text("mode")?,
            user: fields.optional_text("user")?,
            parents: fields.optional_bool("parents")?.unwrap_or(false),
        })
    }
}

/// The body of `POST /vms/{vm}/files/rename`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RenameFile {
    /// The file.
    pub path: GuestPath,
    /// Its new path, on the same file system. An existing file is replaced.
    pub to: GuestPath,
}

impl RenameFile {
    /// Parses a client's body.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &["path", "to"])?;
        Ok(RenameFile {
            path: fields.text("path", "send the absolute path of the file")?,
            to: fields.text("to", "send the new absolute path of the file")?,
        })
    }
}

#[cfg(feature = "openapi")]
mod schema {
    use super::{FileMode, FileOwner, GuestPath};
    use std::borrow::Cow;
    use utoipa::openapi::RefOr;
    use utoipa::openapi::schema::{ObjectBuilder, Schema, SchemaType, Type};
    use utoipa::{PartialSchema, ToSchema};

    macro_rules! text_schema {
        ($name:ident, $description:literal, $pattern:literal, $max:literal, $example:literal) => {
            impl ToSchema for $name {
                fn name() -> Cow<'static, str> {
                    stringify!($name).into()
                }
            }

            impl PartialSchema for $name {
                fn schema() -> RefOr<Schema> {
                    ObjectBuilder::new()
                        .schema_type(SchemaType::Type(Type::String))
                        .description(Some($description))
                        .pattern(Some($pattern))
                        .max_length(Some($max))
                        .examples([$example])
                        .into()
                }
            }
        };
    }

    text_schema!(
        GuestPath,
        "A path in a VM: absolute, at most 4095 bytes, without `..` and zero bytes.",
        "^(/(?!\\.\\.(/|$))[^/\\u0000]*)+$",
        4095,
        "/etc/hostname"
    );
    text_schema!(
        FileOwner,
        "An account of a VM: `NAME`, `UID`, `NAME:GROUP` or `UID:GID`.",
        "^[A-Za-z0-9_.-]{1,255}(:[A-Za-z0-9_.-]{1,255})?$",
        511,
        "user:users"
    );
    text_schema!(FileMode, "Permissions in octal.", "^[0-7]{1,4}$", 4, "0644");
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_are_absolute_and_without_parents() {
        for path in [
            "/",
            "/etc/hostname",
            "//x/",
            "/a..b/...",
            "/ö \n",
            &format!("/{}", "x".repeat(4094)),
        ] {
            assert_eq!(path.parse::<GuestPath>().unwrap().as_str(), path);
        }
        for path in [
            "",
            "etc",
            "./x",
            "/..",
            "/a/../b",
            "/a/..",
            "/a\0b",
            &format!("/{}", "x".repeat(4095)),
        ] {
            assert!(path.parse::<GuestPath>().is_err(), "{path:?}");
        }
    }

    #[test]
    fn modes_are_octal_and_shown_with_four_digits() {
        for (text, mode) in [("0644", 0o644), ("755", 0o755), ("7777", 0o7777), ("0", 0)] {
            assert_eq!(text.parse::<FileMode>().unwrap().bits(), mode);
        }
        assert_eq!(FileMode::of_bits(0o100_644).to_string(), "0644");
        for text in ["", "8", "0o644", "00644", "-1", "+644", "rwx"] {
            assert!(text.parse::<FileMode>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn owners_have_at_most_one_group() {
        for text in ["root", "1000", "user:users", "1000:1000", "systemd-network"] {
            assert_eq!(text.parse::<FileOwner>().unwrap().as_str(), text);
        }
        for text in ["", ":", "user:", ":users", "a:b:c", "a b", "a/b", "a\n"] {
            assert!(text.parse::<FileOwner>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn entries_have_the_documented_form() {
        let json = json!({"name": "hostname", "kind": "file", "size": 4, "mode": "0644", "uid": 0, "gid": 0,
                          "modified_at": "2026-01-02T03:04:05.678Z"});
        let entry: FileEntry = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(entry).unwrap(), json);
        let mut newer = json;
        newer["kind"] = json!("door");
        assert_eq!(
            serde_json::from_value::<FileEntry>(newer).unwrap().kind,
            FileKind::Other
        );
    }

    #[test]
    fn requests_are_parsed_strictly() {
        let made = MakeDirectory::parse(br#"{"path": "/srv/a", "mode": "0700", "user": "user", "parents": true}"#);
        let made = made.unwrap();
        assert_eq!(made.mode.unwrap().bits(), 0o700);
        assert_eq!(MakeDirectory::parse(&serde_json::to_vec(&made).unwrap()), Ok(made));
        let renamed = RenameFile::parse(br#"{"path": "/a", "to": "/b"}"#).unwrap();
        assert_eq!(RenameFile::parse(&serde_json::to_vec(&renamed).unwrap()), Ok(renamed));
        for (body, field) in [
            (&br#"{}"#[..], Some("path")),
            (br#"{"path": "srv"}"#, Some("path")),
            (br#"{"path": "/srv", "mode": 755}"#, Some("mode")),
            (br#"{"path": "/srv", "mode": "u+x"}"#, Some("mode")),
            (br#"{"path": "/srv", "parent": true}"#, None),
        ] {
            assert_eq!(MakeDirectory::parse(body).unwrap_err().field(), field);
        }
        assert_eq!(RenameFile::parse(br#"{"path": "/a"}"#).unwrap_err().field(), Some("to"));
    }
}

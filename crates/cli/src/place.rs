//! The two sides of `scalebox cp`: a path here, or a path in a VM.

use crate::error::Error;
use scalebox_api::GuestPath;
use std::path::PathBuf;

/// A side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Standard input or output.
    Stdio,
    /// A path here.
    Local(PathBuf),
    /// A path in a VM.
    Remote { vm: String, path: GuestPath },
}

impl Place {
    /// Parses `VM:/PATH`, `-`, or a local path: one without a colon, or with a slash before it.
    pub(crate) fn parse(text: &str) -> Result<Place, Error> {
        if text == "-" {
            return Ok(Place::Stdio);
        }
        match text.split_once(':') {
            Some((vm, path)) if !vm.is_empty() && !vm.contains('/') => {
                let path = path.parse().map_err(|form| Error::RemotePath {
                    given: text.to_owned(),
                    form,
                })?;
                Ok(Place::Remote {
                    vm: vm.to_owned(),
                    path,
                })
            }
            _ => Ok(Place::Local(text.into())),
        }
    }
}

/// Returns the last part of a path in a VM; `None` for the root.
pub(crate) fn file_name(path: &GuestPath) -> Option<&str> {
    path.as_str().split('/').rfind(|part| !part.is_empty() && *part != ".")
}

/// Returns the path of an entry of a directory in a VM.
pub(crate) fn inside(directory: &GuestPath, name: &str) -> Result<GuestPath, Error> {
    let path = format!("{}/{name}", directory.as_str().trim_end_matches('/'));
    path.parse().map_err(|form| Error::RemotePath { given: path, form })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_with_a_name_before_the_colon_are_in_a_vm() {
        let remote = |vm: &str, path: &str| Place::Remote {
            vm: vm.to_owned(),
            path: path.parse().unwrap(),
        };
        for (text, place) in [
            ("-", Place::Stdio),
            ("box:/etc", remote("box", "/etc")),
            ("box:/a:b", remote("box", "/a:b")),
            ("./box:/etc", Place::Local("./box:/etc".into())),
            (":/etc", Place::Local(":/etc".into())),
            ("notes", Place::Local("notes".into())),
        ] {
            assert_eq!(Place::parse(text).unwrap(), place);
        }
        for text in ["box:", "box:etc", "box:/../etc"] {
            assert!(Place::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_the_last_part_of_a_path() {
        for (path, name) in [
            ("/a/b", Some("b")),
            ("/a//", Some("a")),
            ("/a/.", Some("a")),
            ("/", None),
        ] {
            assert_eq!(file_name(&path.parse().unwrap()), name);
        }
        assert_eq!(inside(&"/".parse().unwrap(), "a").unwrap().as_str(), "/a");
    }
}

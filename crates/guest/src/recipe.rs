//! What a template is made of, and the name under which the finished one is kept.

use crate::error::Error;
use crate::files;
use scalebox_units::{Bytes, Gib};
use sha2::{Digest, Sha256};

/// Raised when the code that builds changes what comes out of it: a template kept by older code is
/// then built anew.
const GENERATION: u32 = 3;

/// What the template `debian-base` is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// The Debian suite: `bookworm` is the one this crate's files are written for and tested with.
    pub suite: String,
    /// The archive, as a URL. `None` takes the one this host's apt is configured with, if it is
    /// Debian's and has the suite, with its updates and security updates; else mmdebstrap's own
    /// default.
    pub mirror: Option<String>,
    /// The kernel package without a version; the one it depends on is unpacked.
    pub kernel_package: String,
    /// Packages beyond those that a guest always has.
    pub extra_packages: Vec<String>,
    /// The size of the image (sparse). A disk of this size needs no growing.
    pub size: Bytes,
}

impl Default for Recipe {
    /// Debian 12, 2 GiB: what a VM gets that asks for no size.
    fn default() -> Self {
        Recipe {
            suite: "bookworm".to_owned(),
            mirror: None,
            kernel_package: "linux-image-cloud-amd64".to_owned(),
            extra_packages: Vec::new(),
            size: Gib::new(2).bytes(),
        }
    }
}

impl Recipe {
    /// The name of what this recipe makes: the same as long as the recipe, the files that go into
    /// the guest and this crate's way of building are. It says nothing of the age of the packages:
    /// who wants newer ones removes what is kept.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        };
        part(&GENERATION.to_be_bytes());
        part(self.suite.as_bytes());
        part(self.mirror.as_deref().unwrap_or_default().as_bytes());
        part(self.kernel_package.as_bytes());
        part(self.extra_packages.join(" ").as_bytes());
        part(&self.size.as_u64().to_be_bytes());
        for file in files::IN_GUEST {
            part(file.path.as_bytes());
            part(&file.mode.to_be_bytes());
            part(file.content.as_bytes());
        }
        for content in files::BUILD_INPUTS {
            part(content.as_bytes());
        }
        let digest = hash.finalize();
        digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Every field is an argument of a program, or a line of a file it reads: none may be taken for
    /// something else.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check("suite", &self.suite, NAME, is_name)?;
        check("kernel package", &self.kernel_package, NAME, is_name)?;
        for package in &self.extra_packages {
            check("package", package, NAME, is_name)?;
        }
        if let Some(mirror) = &self.mirror {
            check(
                "mirror",
                mirror,
                "write a URL such as http://mirror.example/debian",
                is_url,
            )?;
        }
        check(
            "size",
            &self.size.to_string(),
            "at least 1 GiB and at most 2 TiB, in whole MiB",
            |_| {
                let range = Gib::new(1).bytes()..=Gib::new(2048).bytes();
                range.contains(&self.size) && self.size.as_u64().is_multiple_of(1 << 20)
            },
        )
    }
}

const NAME: &str = "lower-case letters, digits and + - . only, beginning with a letter or digit";

fn check(field: &'static str, value: &str, reason: &'static str, good: impl Fn(&str) -> bool) -> Result<(), Error> {
    if good(value) {
        return Ok(());
    }
    Err(Error::Recipe {
        field,
        value: value.to_owned(),
        reason,
    })
}

fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.bytes().next().is_some_and(plain) && text.bytes().all(|byte| plain(byte) || b"+-.".contains(&byte))
}

fn is_url(text: &str) -> bool {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    rest.is_some_and(|rest| !rest.is_empty()) && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_recipe_has_another_fingerprint() {
        let recipe = Recipe::default();
        let changed = [
            Recipe {
                suite: "trixie".into(),
                ..recipe.clone()
            },
            Recipe {
                mirror: Some("http://mirror.example/debian".into()),
                ..recipe.clone()
            },
            Recipe {
                extra_packages: vec!["git".into()],
                ..recipe.clone()
            },
            Recipe {
                size: Gib::new(3).bytes(),
                ..recipe.clone()
            },
        ];
        assert_eq!(recipe.fingerprint(), recipe.clone().fingerprint());
        for other in changed {
            assert_ne!(recipe.fingerprint(), other.fingerprint(), "{other:?}");
        }
    }

    #[test]
    fn what_could_be_taken_for_an_option_or_a_second_line_is_refused() {
        let recipe = Recipe::default();
        recipe.check().unwrap();
        for bad in [
            Recipe {
                suite: "--simulate".into(),
                ..recipe.clone()
            },
            Recipe {
                suite: String::new(),
                ..recipe.clone()
            },
            Recipe {
                suite: "book worm".into(),
                ..recipe.clone()
            },
            Recipe {
                mirror: Some("http://a b".into()),
                ..recipe.clone()
            },
            Recipe {
                mirror: Some("http://a\ndeb".into()),
                ..recipe.clone()
            },
            Recipe {
                mirror: Some("/etc/passwd".into()),
                ..recipe.clone()
            },
            Recipe {
                kernel_package: "../x".into(),
                ..recipe.clone()
            },
            Recipe {
                extra_packages: vec!["git,curl".into()],
                ..recipe.clone()
            },
            Recipe {
                size: Bytes::from_mib(100),
                ..recipe.clone()
            },
        ] {
            let error = bad.check().unwrap_err();
            assert!(matches!(error, Error::Recipe { .. }), "{bad:?}: {error}");
        }
    }
}

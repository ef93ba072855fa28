//! The inputs of a template, and the fingerprint under which a finished one is cached.

use crate::embedded;
use crate::error::Error;
use scalebox_units::{Bytes, Gib};
use sha2::{Digest, Sha256};

/// The number of this code's generation, incremented when a change affects the result of a build.
/// Cached templates of older code are then built again.
const GENERATION: u32 = 5;

/// The inputs of a Debian template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// The Debian suite. This crate's files are written for `bookworm` and tested with it.
    pub suite: String,
    /// URL of the archive. `None` uses the archive that this host's apt is configured with,
    /// including updates and security updates, if it is Debian's and has the suite; otherwise
    /// mmdebstrap's default.
    pub mirror: Option<String>,
    /// The kernel metapackage; the versioned package that it depends on is unpacked.
    pub kernel_package: String,
    /// Packages in addition to those that every guest has.
    pub extra_packages: Vec<String>,
    /// Minimum size of the sparse image; it is larger if the packages need it. A disk of the
    /// image's size need not be grown.
    pub size: Bytes,
}

/// The template with tools for development and Docker.
pub const DEV_TEMPLATE: &str = "debian-dev";

impl Default for Recipe {
    /// Returns the recipe of Debian 12 with 2 GiB, the default disk size of a VM.
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
    /// Returns the recipe of the template `name`, with more packages: for `debian-dev` its tools,
    /// for others the default.
    pub fn of_template(name: &str, packages: &[String]) -> Recipe {
        let mut extra_packages = Vec::new();
        if name == DEV_TEMPLATE {
            extra_packages.extend(embedded::entries(embedded::DEV_PACKAGES).map(str::to_owned));
        }
        extra_packages.extend_from_slice(packages);
        Recipe {
            extra_packages,
            ..Recipe::default()
        }
    }

    /// Returns a name for the result of this recipe. It changes with the recipe, the files that go
    /// into the guest, and this crate's build code. It does not depend on the age of the packages:
    /// to get newer ones, remove the cached result.
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
        for file in embedded::GUEST_FILES {
            part(file.path.as_bytes());
            part(&file.mode.to_be_bytes());
            part(file.content.as_bytes());
        }
        for content in embedded::BUILD_INPUTS {
            part(content.as_bytes());
        }
        let digest = hash.finalize();
        digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Checks that no field can be mistaken for an option or another line. Fields become program
    /// arguments, or lines of files that programs read.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check("suite", &self.suite, NAME_RULE, is_name)?;
        check("kernel package", &self.kernel_package, NAME_RULE, is_name)?;
        for package in &self.extra_packages {
            check("package", package, NAME_RULE, is_name)?;
        }
        if let Some(mirror) = &self.mirror {
            check(
                "mirror",
                mirror,
                "use a URL such as http://mirror.example/debian",
                is_url,
            )?;
        }
        check(
            "size",
            &self.size.to_string(),
            "must be from 1 GiB to 2 TiB, in whole MiB",
            |_| {
                let range = Gib::new(1).bytes()..=Gib::new(2048).bytes();
                range.contains(&self.size) && self.size.as_u64().is_multiple_of(1 << 20)
            },
        )
    }
}

const NAME_RULE: &str = "only lower-case letters, digits and + - . are allowed, starting with a letter or digit";

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
    fn changed_recipes_have_other_fingerprints() {
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
    fn templates_with_tools_have_more_packages() {
        let packages = ["jq".to_owned()];
        assert_eq!(Recipe::of_template("debian-base", &[]), Recipe::default());
        assert_eq!(Recipe::of_template("mine", &packages).extra_packages, packages);
        let dev = Recipe::of_template(DEV_TEMPLATE, &packages).extra_packages;
        assert!(dev.iter().any(|package| package == "docker.io"), "{dev:?}");
        assert_eq!(dev.last(), packages.first());
        Recipe::of_template(DEV_TEMPLATE, &packages).check().unwrap();
    }

    #[test]
    fn fields_that_look_like_options_or_lines_are_rejected() {
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

//! Chooses the package archive of a guest: the host's own, if it is Debian's.

use crate::programs::{APT_GET, run};
use crate::recipe::Recipe;

/// The format in which `apt-get indextargets` prints each package index; fields are documented in
/// apt's `acquire-additional-files.md`. A field that a source lacks is printed literally.
const FORMAT: &str = "$(RELEASE)|$(COMPONENT)|$(REPO_URI)|$(ORIGIN)";

/// Returns mmdebstrap's arguments for its package sources. Without any, mmdebstrap uses its
/// default.
pub(crate) fn mirrors(recipe: &Recipe) -> Vec<String> {
    if let Some(mirror) = &recipe.mirror {
        return vec![mirror.clone()];
    }
    let indexes = run(APT_GET).args(["indextargets", "--format", FORMAT, "Created-By: Packages"]);
    match indexes.stdout() {
        Ok(indexes) => sources(&indexes, &recipe.suite),
        Err(error) => {
            tracing::warn!(%error, "cannot list the sources of this host's apt; using mmdebstrap's default mirror");
            Vec::new()
        }
    }
}

/// Returns sources.list lines for `suite`, its updates and its security updates, as far as
/// `indexes` contains them. Without the suite itself there are none: updates alone cannot be
/// installed.
fn sources(indexes: &str, suite: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut has_suite = false;
    for index in indexes.lines() {
        let mut fields = index.split('|');
        let (Some(release), Some(component), Some(uri), Some(origin)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let wanted = release
            .strip_prefix(suite)
            .is_some_and(|rest| ["", "-updates", "-security"].contains(&rest));
        // No origin: apt has not read the release yet. Debian's signature is checked in any case.
        let debian = origin == "Debian" || origin == "$(ORIGIN)" || origin.is_empty();
        // The guest must be able to reach it too.
        let reachable = uri.starts_with("http://") || uri.starts_with("https://");
        // Credentials in the URL would become part of the template.
        if !wanted || !debian || !reachable || component != "main" || uri.contains('@') {
            continue;
        }
        has_suite |= release == suite;
        let line = format!("deb {uri} {release} {component}");
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    if has_suite { lines } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "\
bookworm|main|http://mirror.example/debian/|Debian
bookworm|main|http://mirror.example/debian/|Debian
bookworm|contrib|http://mirror.example/debian/|Debian
bookworm-updates|main|http://mirror.example/debian/|Debian
bookworm-security|main|http://mirror.example/debian-security/|$(ORIGIN)
bookworm|stable|https://docker.example/linux/debian/|Docker
bookworm-pgdg|main|https://pgdg.example/|apt.postgresql.org
trixie|main|http://mirror.example/debian/|Debian
";

    #[test]
    fn a_debian_host_s_archive_is_used_with_its_updates() {
        assert_eq!(
            sources(HOST, "bookworm"),
            [
                "deb http://mirror.example/debian/ bookworm main",
                "deb http://mirror.example/debian/ bookworm-updates main",
                "deb http://mirror.example/debian-security/ bookworm-security main",
            ]
        );
        assert_eq!(
            sources(HOST, "trixie"),
            ["deb http://mirror.example/debian/ trixie main"]
        );
    }

    #[test]
    fn other_hosts_use_the_default_mirror() {
        assert!(sources(HOST, "noble").is_empty());
        assert!(sources("noble|main|http://mirror.example/ubuntu/|Ubuntu\n", "noble").is_empty());
        assert!(
            sources(
                "bookworm-updates|main|http://mirror.example/debian/|Debian\n",
                "bookworm"
            )
            .is_empty()
        );
        assert!(sources("bookworm|main|file:/srv/mirror/|Debian\n", "bookworm").is_empty());
        assert!(sources("bookworm|main|http://name:word@mirror.example/|Debian\n", "bookworm").is_empty());
        assert!(sources("", "bookworm").is_empty());
    }
}

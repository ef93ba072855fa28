//! Which archive a guest is made from: the one this host uses itself, where that is Debian's.

use crate::command::{Program, run};
use crate::recipe::Recipe;

/// What `apt-get indextargets` is asked to print for each index of packages it knows; fields of
/// apt's documentation in `acquire-additional-files.md`. A field that a source does not have is
/// printed as it stands here.
const FORMAT: &str = "$(RELEASE)|$(COMPONENT)|$(REPO_URI)|$(ORIGIN)";

/// The arguments that tell mmdebstrap where to get packages from; none makes it use its default.
pub(crate) fn mirrors(recipe: &Recipe) -> Vec<String> {
    if let Some(mirror) = &recipe.mirror {
        return vec![mirror.clone()];
    }
    match run(
        Program::AptGet,
        ["indextargets", "--format", FORMAT, "Created-By: Packages"],
    ) {
        Ok(indexes) => sources(&indexes, &recipe.suite),
        Err(error) => {
            tracing::warn!(%error, "this host's apt does not tell its sources: the bootstrap's default mirror is used");
            Vec::new()
        }
    }
}

/// The lines of a sources.list for `suite` with its updates and security updates, as far as they
/// are among `indexes`. Without the suite itself there are none: updates alone install nothing.
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
        // No origin: apt has not read the release yet. What comes from there must bear Debian's
        // signature either way.
        let debian = origin == "Debian" || origin == "$(ORIGIN)" || origin.is_empty();
        // The guest has to reach it as well.
        let reachable = uri.starts_with("http://") || uri.starts_with("https://");
        // Without a user name and password that would go into the template with it.
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
    fn a_debian_host_s_own_archive_is_used_with_its_updates() {
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
    fn other_hosts_leave_the_choice_to_the_bootstrap() {
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

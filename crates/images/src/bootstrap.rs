//! Installs Debian into a directory with `mmdebstrap`, in a mount namespace of its own.

use crate::embedded;
use crate::error::Error;
use crate::mirrors;
use crate::programs::{self, MMDEBSTRAP, UNSHARE};
use crate::progress::{self, Progress, Step};
use crate::recipe::Recipe;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Maximum output of an installation, in bytes: a hundred times that of the default packages.
const MAX_OUTPUT: usize = 64 << 20;

/// The result of the bootstrap, in a scratch directory.
pub(crate) struct Bootstrapped {
    /// The guest's root.
    pub(crate) root: PathBuf,
    /// The kernel package, unpacked but not installed.
    pub(crate) kernel: PathBuf,
}

/// Installs the recipe's packages below `scratch`. Takes about a minute.
pub(crate) fn bootstrap(recipe: &Recipe, scratch: &Path, progress: &mut dyn Progress) -> Result<Bootstrapped, Error> {
    let (root, kernel) = (scratch.join("root"), scratch.join("kernel"));
    fs::create_dir(&kernel).map_err(Error::io("create", &kernel))?;
    let hook = scratch.join("fetch-kernel");
    fs::write(&hook, embedded::FETCH_KERNEL).map_err(Error::io("write", &hook))?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).map_err(Error::io("make executable", &hook))?;

    let mut phases = Phases::new(progress);
    programs::run(UNSHARE)
        .args(arguments(recipe, &root, &hook))
        .max_output(MAX_OUTPUT)
        .env("SCALEBOX_KERNEL", &kernel)
        .env("SCALEBOX_KERNEL_PACKAGE", recipe.kernel_package.as_str())
        .lines(|line| phases.line(line))?;
    Ok(Bootstrapped { root, kernel })
}

fn arguments(recipe: &Recipe, root: &Path, hook: &Path) -> Vec<String> {
    let mut arguments: Vec<String> = [
        // mmdebstrap mounts /proc, /sys and /dev in the new root. In a mount namespace of its own
        // the mounts disappear with the process, even if it is killed.
        "--mount",
        "--",
        MMDEBSTRAP.name(),
        "--verbose",
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        // Without this hook, setting up the merged /usr installs all of Perl.
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        "--aptopt=Apt::Install-Recommends \"false\"",
        // An interrupted build is discarded as a whole.
        "--dpkgopt=force-unsafe-io",
    ]
    .map(str::to_owned)
    .into();
    arguments.extend(embedded::entries(embedded::DPKG_OPTIONS).map(|option| format!("--dpkgopt={option}")));
    let packages: Vec<&str> = embedded::entries(embedded::PACKAGES)
        .chain(recipe.extra_packages.iter().map(String::as_str))
        .collect();
    arguments.push(format!("--include={}", packages.join(",")));
    arguments.push(format!("--customize-hook={}", hook.display()));
    arguments.push(recipe.suite.clone());
    arguments.push(root.display().to_string());
    arguments.extend(mirrors::mirrors(recipe));
    arguments
}

/// Lines of mmdebstrap's output that start a step, and the number of lines until the next step. The
/// step's fraction is computed from that number.
const PHASES: [(&str, Step, usize); 5] = [
    ("I: running apt-get update", progress::INDEX, 8),
    ("I: downloading packages with apt", progress::UNPACK, 213),
    ("I: installing essential packages", progress::BASE, 607),
    ("I: installing remaining packages", progress::PACKAGES, 728),
    ("I: running --customize-hook", progress::KERNEL, 9),
];

struct Phases<'a> {
    progress: &'a mut dyn Progress,
    current: Option<usize>,
    lines: usize,
}

impl<'a> Phases<'a> {
    fn new(progress: &'a mut dyn Progress) -> Self {
        Phases {
            progress,
            current: None,
            lines: 0,
        }
    }

    fn line(&mut self, line: &str) {
        self.progress.line(line);
        let next = self.current.map_or(0, |current| current + 1);
        if let Some(offset) = PHASES[next..].iter().position(|(mark, _, _)| line.starts_with(mark)) {
            self.current = Some(next + offset);
            self.lines = 0;
            self.progress.step(PHASES[next + offset].1);
        } else if let Some(current) = self.current {
            self.lines += 1;
            let expected = PHASES[current].2;
            self.progress.fraction((self.lines as f64 / expected as f64).min(1.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Seen {
        steps: Vec<&'static str>,
        fractions: Vec<f64>,
    }

    impl Progress for Seen {
        fn step(&mut self, step: Step) {
            self.steps.push(step.name);
            self.fractions.clear();
        }
        fn fraction(&mut self, fraction: f64) {
            self.fractions.push(fraction);
        }
    }

    #[test]
    fn mmdebstrap_s_output_advances_steps_and_fractions() {
        let mut seen = Seen::default();
        let mut phases = Phases::new(&mut seen);
        phases.line("I: chroot architecture amd64 is equal to the host's architecture");
        phases.line("I: running apt-get update...");
        phases.line("I: downloading packages with apt...");
        for _ in 0..400 {
            phases.line("Get:1 something");
        }
        assert_eq!(seen.steps, [progress::INDEX.name, progress::UNPACK.name]);
        assert!(seen.fractions.is_sorted());
        assert_eq!(seen.fractions.last(), Some(&1.0));
    }
}

//! How far a build is, told to whoever draws it.

/// One step of a build.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// What is being done, for people: `Installing packages`.
    pub name: &'static str,
    /// Its part of the whole build, in (0, 1]; those of all steps of a build add up to 1. Measured
    /// on a build of `debian-base`; elsewhere the network and the disk shift it, so a time left
    /// that is computed from it is an estimate.
    pub share: f64,
}

/// Is told how far a build is. Called in this order: for each step `step` once, then `fraction` and
/// `line` any number of times. All methods default to doing nothing; `()` is a `Progress` that
/// nobody looks at.
pub trait Progress {
    /// A step begins, and with it the one before is done.
    fn step(&mut self, step: Step) {
        let _ = step;
    }

    /// So much of the step is done, in [0, 1], never going back.
    fn fraction(&mut self, fraction: f64) {
        let _ = fraction;
    }

    /// A line that an outside program wrote, as it was written. When the program fails, its error
    /// holds all of them.
    fn line(&mut self, line: &str) {
        let _ = line;
    }
}

impl Progress for () {}

/// The steps of a build with their shares: seconds of a measured build (2 cores, archive at 9
/// MB/s), of [`TOTAL`].
pub(crate) const INDEX: Step = step("Reading the archive's index", 2.5);
pub(crate) const UNPACK: Step = step("Fetching and unpacking the base system", 8.0);
pub(crate) const BASE: Step = step("Installing the base system", 13.0);
pub(crate) const PACKAGES: Step = step("Installing the guest's packages", 25.0);
pub(crate) const KERNEL: Step = step("Fetching the kernel", 3.0);
pub(crate) const CONTENTS: Step = step("Putting in the guest's own files", 0.5);
pub(crate) const BOOT: Step = step("Making kernel and initramfs", 0.5);
pub(crate) const IMAGE: Step = step("Writing the image", 12.0);

const TOTAL: f64 = 64.5;

const fn step(name: &'static str, seconds: f64) -> Step {
    Step {
        name,
        share: seconds / TOTAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_all_steps_add_up_to_one() {
        let sum: f64 = [INDEX, UNPACK, BASE, PACKAGES, KERNEL, CONTENTS, BOOT, IMAGE]
            .iter()
            .map(|step| step.share)
            .sum();
        assert!((sum - 1.0).abs() < 1e-9, "{sum}");
    }
}

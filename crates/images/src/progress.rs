//! Progress reports of a build.

/// One step of a build.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// The activity, for people: `Installing packages`.
    pub name: &'static str,
    /// The step's share of the whole build, in (0, 1]; the shares of all steps add up to 1. They
    /// were measured on a build of `debian-base`. Network and disk vary elsewhere, so a remaining
    /// time that is computed from them is an estimate.
    pub share: f64,
}

/// Receives the progress of a build.
///
/// Call order: for each step `step` once, then `fraction` and `line` any number of times. All
/// methods do nothing by default; `()` ignores all progress.
pub trait Progress {
    /// Receives the next step: it starts, and the previous one is done.
    fn step(&mut self, step: Step) {
        let _ = step;
    }

    /// Receives the fraction of the step that is done, in [0, 1], never decreasing.
    fn fraction(&mut self, fraction: f64) {
        let _ = fraction;
    }

    /// Receives a line of an external program's output. If the program fails, its error contains
    /// all lines.
    fn line(&mut self, line: &str) {
        let _ = line;
    }
}

impl Progress for () {}

/// The steps of a build. Shares are seconds of a measured build (2 cores, archive at 9 MB/s) out of
/// [`TOTAL_SECONDS`].
pub(crate) const INDEX: Step = step("Reading the archive's index", 2.5);
pub(crate) const UNPACK: Step = step("Downloading and unpacking the base system", 8.0);
pub(crate) const BASE: Step = step("Installing the base system", 13.0);
pub(crate) const PACKAGES: Step = step("Installing the guest's packages", 25.0);
pub(crate) const KERNEL: Step = step("Downloading the kernel", 3.0);
pub(crate) const CUSTOMIZE: Step = step("Adding the guest's own files", 0.5);
pub(crate) const BOOT: Step = step("Creating kernel and initramfs", 0.5);
pub(crate) const IMAGE: Step = step("Writing the image", 12.0);

const TOTAL_SECONDS: f64 = 64.5;

const fn step(name: &'static str, seconds: f64) -> Step {
    Step {
        name,
        share: seconds / TOTAL_SECONDS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_all_steps_add_up_to_one() {
        let sum: f64 = [INDEX, UNPACK, BASE, PACKAGES, KERNEL, CUSTOMIZE, BOOT, IMAGE]
            .iter()
            .map(|step| step.share)
            .sum();
        assert!((sum - 1.0).abs() < 1e-9, "{sum}");
    }
}

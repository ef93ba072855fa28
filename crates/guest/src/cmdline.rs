//! What the kernel is told when a guest starts.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The parameters of every guest, each with its reason.
const PARAMETERS: [&str; 11] = [
    // The console goes to the first serial port, and only warnings do: each character is an exit to
    // the emulator.
    "console=ttyS0",
    "quiet",
    // A kernel that gives up resets after a second, as hardware with a watchdog does: nobody can
    // type at its console.
    "panic=1",
    // The root is the first disk, and mounted for writing at once: see the initramfs and the
    // template's fstab.
    "root=/dev/vda",
    "rw",
    "rootflags=noatime",
    // The network card is eth0; the template's configuration goes by its MAC address.
    "net.ifnames=0",
    // The algorithms' tests of themselves are half of an emulated CPU's kernel boot (0.7 of 1.4
    // billion instructions).
    "cryptomgr.notests",
    // Without an audit daemon its records go to the log, a dozen for each unit.
    "audit=0",
    // What follows is about time. QEMU's microvm has no clock but the TSC that does not depend on
    // interrupts, and no reference to measure it by: an emulated machine on a busy host fails the
    // measurement and hangs (half of all boots on two busy cores), or finds the TSC too fast by the
    // watchdog and falls back to counting ticks. The host knows better: see `tsc_khz`.
    "tsc=reliable",
    // The check that the timer interrupt arrives measures by loops, and is wrong on a busy host as
    // well.
    "no_timer_check",
];

/// The kernel command line for a guest that boots a template's kernel and initramfs, with its own
/// disk as the first virtio disk.
///
/// It contains the frequency of this host's time stamp counter (`tsc_early_khz`), which guests see
/// unchanged, both emulated and under KVM: without it, emulated `microvm` machines fail to start
/// now and then. Measuring it takes 0.1 s, once per process. So this is a line for machines that
/// start *on this host, now*: do not keep it.
pub fn kernel_cmdline() -> String {
    let mut line = PARAMETERS.join(" ");
    if let Some(khz) = tsc_khz() {
        line.push_str(&format!(" tsc_early_khz={khz}"));
    }
    line
}

/// The frequency of this host's time stamp counter, measured against its clock. `None` on a CPU
/// without one.
fn tsc_khz() -> Option<u64> {
    static MEASURED: OnceLock<Option<u64>> = OnceLock::new();
    *MEASURED.get_or_init(|| measure(Duration::from_millis(100)))
}

#[cfg(target_arch = "x86_64")]
fn measure(over: Duration) -> Option<u64> {
    let (start, start_ticks) = sample();
    std::thread::sleep(over);
    let (end, end_ticks) = sample();
    let nanos = end.duration_since(start).as_nanos();
    let ticks = u128::from(end_ticks.checked_sub(start_ticks)?);
    // Ticks a nanosecond × 10⁶ are ticks a millisecond: kHz.
    u64::try_from(ticks * 1_000_000 / nanos.max(1))
        .ok()
        .filter(|khz| *khz > 0)
}

/// One moment on both clocks: the closest of several readings, so that an interruption between the
/// two does not count.
#[cfg(target_arch = "x86_64")]
fn sample() -> (Instant, u64) {
    let one = || {
        let before = Instant::now();
        // SAFETY: RDTSC reads a counter and touches no memory; every x86-64 CPU has it, and Linux
        // lets programs use it.
        let ticks = unsafe { core::arch::x86_64::_rdtsc() };
        let took = before.elapsed();
        (took, (before + took / 2, ticks))
    };
    let first = one();
    let closest = (0..16)
        .map(|_| one())
        .fold(first, |best, next| if next.0 < best.0 { next } else { best });
    closest.1
}

#[cfg(not(target_arch = "x86_64"))]
fn measure(_over: Duration) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_names_the_disk_the_console_and_the_clock_and_fits() {
        let line = kernel_cmdline();
        for word in ["console=ttyS0", "root=/dev/vda", "rw", "tsc=reliable"] {
            assert!(line.split(' ').any(|it| it == word), "{line}");
        }
        // COMMAND_LINE_SIZE of x86.
        assert!(line.len() < 2048 && line.is_ascii() && !line.contains("  "), "{line}");
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn two_measurements_of_the_clock_agree_to_a_thousandth() {
        let once = measure(Duration::from_millis(50)).unwrap() as f64;
        let again = measure(Duration::from_millis(50)).unwrap() as f64;
        assert!((once / again - 1.0).abs() < 1e-3, "{once} {again}");
    }
}

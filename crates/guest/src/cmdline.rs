//! The kernel parameters of a guest.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The parameters of every guest, each with its reason.
const PARAMETERS: [&str; 11] = [
    // The console is the first serial port, and shows only warnings: each character costs an exit
    // to the hypervisor.
    "console=ttyS0",
    "quiet",
    // Reset one second after a panic, as a hardware watchdog does, because the console has no
    // input.
    "panic=1",
    // The root is the first disk, and is mounted writable at once: see the initramfs and the
    // template's fstab.
    "root=/dev/vda",
    "rw",
    "rootflags=noatime",
    // The network interface is eth0; the template's configuration matches its MAC address.
    "net.ifnames=0",
    // The crypto self-tests take half of an emulated CPU's kernel boot (0.7 of 1.4 billion
    // instructions).
    "cryptomgr.notests",
    // Without an audit daemon, audit records go to the log, a dozen per unit.
    "audit=0",
    // The remaining parameters are about time. The TSC is the only clock of QEMU's microvm that
    // does not depend on interrupts, and there is no reference to calibrate it against. On a busy
    // host an emulated machine fails to calibrate it and hangs (half of all boots on two busy
    // cores), or the watchdog considers the TSC too fast and falls back to counting ticks. The host
    // knows the frequency: see `tsc_khz`.
    "tsc=reliable",
    // The kernel's check of the timer interrupt counts loops, which also fails on a busy host.
    "no_timer_check",
];

/// Returns the kernel command line of a guest. The guest boots a template's kernel and initramfs,
/// with its own disk as the first virtio disk.
///
/// It contains the frequency of this host's time stamp counter (`tsc_early_khz`), which guests see
/// unchanged, both emulated and under KVM. Without it, emulated `microvm` machines sometimes fail
/// to start. The frequency is measured once per process, which takes 0.1 s. So the line is only
/// valid for machines that start *on this host, now*: do not store it.
pub fn kernel_cmdline() -> String {
    let mut line = PARAMETERS.join(" ");
    if let Some(khz) = tsc_khz() {
        line.push_str(&format!(" tsc_early_khz={khz}"));
    }
    line
}

/// Returns the command line `line` for a machine with a modules drive as its third virtio disk.
pub fn with_modules_drive(line: &str) -> String {
    format!("{line} scalebox.modules=/dev/vdc")
}

/// Returns the frequency of this host's time stamp counter, measured against its clock; `None` on a
/// CPU without one.
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
    // Ticks per nanosecond × 10⁶ are ticks per millisecond: kHz.
    u64::try_from(ticks * 1_000_000 / nanos.max(1))
        .ok()
        .filter(|khz| *khz > 0)
}

/// Reads both clocks at one moment. Of several readings it returns the quickest, so that an
/// interruption between the two reads does not distort the result.
#[cfg(target_arch = "x86_64")]
fn sample() -> (Instant, u64) {
    let one = || {
        let before = Instant::now();
        // SAFETY: RDTSC reads a counter and accesses no memory; every x86-64 CPU has it, and Linux
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
    fn the_line_has_disk_console_and_clock_and_fits() {
        let line = kernel_cmdline();
        for word in ["console=ttyS0", "root=/dev/vda", "rw", "tsc=reliable"] {
            assert!(line.split(' ').any(|it| it == word), "{line}");
        }
        // COMMAND_LINE_SIZE of x86.
        assert!(line.len() < 2048 && line.is_ascii() && !line.contains("  "), "{line}");
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn two_clock_measurements_differ_by_less_than_a_thousandth() {
        let once = measure(Duration::from_millis(50)).unwrap() as f64;
        let again = measure(Duration::from_millis(50)).unwrap() as f64;
        assert!((once / again - 1.0).abs() < 1e-3, "{once} {again}");
    }
}

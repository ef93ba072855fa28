//! Shows the progress of long work: a bar on a terminal, otherwise one line per step.

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use scalebox_images::{Progress, Step};
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

/// The length of the bar: progress is shown in thousandths.
const BAR_LENGTH: u64 = 1000;

/// Shows the progress of a build: its step, its share and the time left.
pub(crate) struct ProgressDisplay {
    bar: ProgressBar,
    terminal: bool,
    begun: Instant,
    /// The current step, and the share of the steps before it, in [0, 1].
    step: Option<Step>,
    done: f64,
}

impl ProgressDisplay {
    /// Creates a display that shows nothing before the first step.
    pub(crate) fn new() -> ProgressDisplay {
        let terminal = stderr().is_terminal();
        let target = if terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(BAR_LENGTH), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}") {
            bar.set_style(style.progress_chars("━╸ "));
        }
        ProgressDisplay {
            bar,
            terminal,
            begun: Instant::now(),
            step: None,
            done: 0.0,
        }
    }

    /// Removes the bar; printed lines stay.
    pub(crate) fn finish(&mut self) {
        self.bar.finish_and_clear();
    }

    fn draw(&self, share: f64) {
        let Some(step) = self.step else { return };
        let left = self
            .time_left(share)
            .map(|left| format!(", about {} left", HumanDuration(left)))
            .unwrap_or_default();
        self.bar.set_position((share * BAR_LENGTH as f64) as u64);
        self.bar.set_message(format!("{}{left}", step.name));
    }

    /// Estimates the time left from the time spent; `None` while that is too short.
    fn time_left(&self, share: f64) -> Option<Duration> {
        let spent = self.begun.elapsed();
        if !(0.03..1.0).contains(&share) || spent < Duration::from_secs(2) {
            return None;
        }
        Some(spent.mul_f64((1.0 - share) / share))
    }
}

impl Progress for ProgressDisplay {
    fn step(&mut self, step: Step) {
        self.done += self.step.map_or(0.0, |before| before.share);
        self.step = Some(step);
        if self.terminal {
            self.bar.enable_steady_tick(Duration::from_millis(250));
        } else {
            eprintln!(
                "[{:>3.0} %] {} ({} s)",
                self.done * 100.0,
                step.name,
                self.begun.elapsed().as_secs()
            );
        }
        self.draw(self.done);
    }

    fn fraction(&mut self, fraction: f64) {
        let share = self.step.map_or(0.0, |step| step.share);
        self.draw(self.done + share * fraction.clamp(0.0, 1.0));
    }
}

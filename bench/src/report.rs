//! Writes the table, the JSON and the chart.

use crate::disks::Method;
use crate::execs::CONCURRENT as CONCURRENT_EXECS;
use crate::guest::GuestResults;
use crate::outcome::Outcome;
use crate::pull::Pulls;
use crate::random_writes::Passes;
use crate::stages::{CONCURRENT_CLIENTS, DiskResults, Results, Series};
use crate::transfers::SIZE_MIB;
use comfy_table::{CellAlignment, Table, presets};
use plotters::prelude::*;
use rustix::system::uname;
use serde::Serialize;
use std::fs;
use std::path::Path;

/// A figure and its goal.
#[derive(Debug, Serialize)]
struct Goal {
    figure: String,
    value: f64,
    unit: &'static str,
    goal: f64,
    /// `true` if the goal is a maximum, `false` if it is a minimum.
    at_most: bool,
    reached: bool,
    /// The same figure of the fastest method that is possible here, measured in the same run: a
    /// bare clone with two flushes, or a process that the guest starts itself.
    limit: Option<f64>,
    /// The measured figure divided by the limit.
    of_limit: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Machine {
    cores: usize,
    kernel: String,
    pool: &'static str,
}

#[derive(Serialize)]
struct Report<'a> {
    machine: Machine,
    goals: Vec<Goal>,
    #[serde(flatten)]
    results: &'a Results,
}

/// Prints the tables of the measured groups. After a complete run, also writes
/// `bench/results/bench.json` and `bench.svg`.
pub(crate) fn write(results: &Results) -> Outcome<()> {
    let report = Report {
        machine: Machine {
            cores: std::thread::available_parallelism()?.get(),
            kernel: uname().release().to_string_lossy().into_owned(),
            pool: "btrfs, NOCOW, on a loop device with direct I/O",
        },
        goals: goals(results)?,
        results,
    };
    println!(
        "{} cores, Linux {}; pool: {}\n",
        report.machine.cores, report.machine.kernel, report.machine.pool
    );
    if let Some(disks) = &results.disks {
        println!("{}\n", disks_table(disks));
    }
    if let Some(writes) = &results.random_writes {
        println!("{}\n", writes_table(writes));
    }
    println!("{}", goals_table(&report.goals));
    let (Some(disks), Some(_), Some(_), Some(_)) =
        (&results.disks, &results.random_writes, &results.guest, &results.pulls)
    else {
        return Ok(());
    };
    let folder = Path::new("bench/results");
    fs::create_dir_all(folder)?;
    fs::write(folder.join("bench.json"), serde_json::to_string_pretty(&report)? + "\n")?;
    draw(disks, &folder.join("bench.svg"))
}

impl DiskResults {
    fn find(&self, method: Method, size_gib: u64, disks: usize, clients: usize) -> Outcome<&Series> {
        let found = self.series.iter().find(|series| {
            (series.method, series.size_gib, series.disks, series.samples.clients) == (method, size_gib, disks, clients)
        });
        found.ok_or_else(|| format!("{method:?} of {size_gib} GiB among {disks} was not measured").into())
    }

    fn max_disks(&self) -> usize {
        self.series.iter().map(|series| series.disks).max().unwrap_or_default()
    }
}

/// Returns all figures of the measured groups with their goals, and at the end the figures without
/// a goal.
fn goals(results: &Results) -> Outcome<Vec<Goal>> {
    let mut goals = Vec::new();
    if let Some(disks) = &results.disks {
        goals.extend(creation_goals(disks)?);
        goals.extend(daemon_goals(disks));
    }
    if let Some(writes) = &results.random_writes {
        goals.push(random_write_goal(writes)?);
    }
    if let Some(guest) = &results.guest {
        goals.extend(guest_goals(guest));
    }
    if let Some(pulls) = &results.pulls {
        goals.push(pull_goal(pulls));
    }
    goals.extend(results.guest.iter().flat_map(guest_figures));
    goals.extend(results.pulls.iter().flat_map(pull_figures));
    Ok(goals)
}

/// Returns the goals of `POST /vms`, each with a new connection. Their limit is a bare clone.
fn creation_goals(results: &DiskResults) -> Outcome<Vec<Goal>> {
    let p50 = |method, size, disks| results.find(method, size, disks, 1).map(|series| series.samples.p50_ms);
    let rate = |method| {
        let concurrent = results.find(method, 2, 10, CONCURRENT_CLIENTS);
        concurrent.map(|series| series.samples.per_second)
    };
    let max_disks = results.max_disks();
    let (api, bare) = (p50(Method::Api, 10, 10)?, p50(Method::Bare, 10, 10)?);
    let with_many = |method| -> Outcome<f64> { Ok(p50(method, 2, max_disks)? / p50(method, 2, 10)?) };
    let with_100_gib = |method| -> Outcome<f64> { Ok(p50(method, 100, 10)? / p50(method, 2, 10)?) };
    Ok(vec![
        Goal::at_most("POST /vms, warm, durable, 10 GiB, p50", api, "ms", 3.0).with_limit(bare),
        Goal::at_most("POST /vms ÷ a clone and two flushes, 10 GiB, p50", api / bare, "×", 1.5),
        Goal::at_least(
            "the seed's sequence ÷ POST /vms, 10 GiB, p50",
            p50(Method::Seed, 10, 10)? / api,
            "×",
            35.0,
        ),
        Goal::at_least("POST /vms, 32 clients", rate(Method::Api)?, "disks/s", 300.0).with_limit(rate(Method::Bare)?),
        Goal::at_most(
            &format!("POST /vms, p50 with {max_disks} disks ÷ with 10"),
            with_many(Method::Api)?,
            "×",
            1.5,
        )
        .with_limit(with_many(Method::Bare)?),
        Goal::at_most(
            "POST /vms, p50 of 100 GiB ÷ of 2 GiB",
            with_100_gib(Method::Api)?,
            "×",
            1.1,
        )
        .with_limit(with_100_gib(Method::Bare)?),
        Goal::at_most("admission decision, p50", results.admission_us, "µs", 50.0),
    ])
}

/// Returns the goals of a daemon with many VMs.
fn daemon_goals(results: &DiskResults) -> Vec<Goal> {
    let vms = format!(
        "{} stopped and {} running VMs",
        results.list_stopped, results.list_running
    );
    let list = results.list.as_ref().map_or(f64::NAN, |list| list.p99_ms);
    vec![
        Goal::at_most(
            &format!("the daemon's memory with {} stopped VMs", results.resident_vms),
            mib(results.resident_bytes),
            "MiB",
            40.0,
        ),
        Goal::at_most(&format!("GET /vms with {vms}, p99"), list, "ms", 10.0),
        Goal::at_most(
            &format!("daemon's restart to ready with {vms}"),
            results.restart_ms,
            "ms",
            1000.0,
        ),
    ]
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn random_write_goal(results: &[Passes]) -> Outcome<Goal> {
    let last = |on: &str| {
        let passes = results.iter().find(|passes| passes.on == on);
        passes
            .and_then(|passes| passes.iops.last().copied())
            .ok_or_else(|| format!("no writes to {on} were measured"))
    };
    let ext4 = last("ext4 on a loop device")?;
    let ratio = last("a clone in the pool")? / ext4;
    let figure = "4 KiB random writes, third pass: clone ÷ ext4 on a loop device";
    Ok(Goal::at_least(figure, ratio, "×", 0.6))
}

/// Returns the goals of booting and running guests. The limit of a command is a process in the
/// guest.
fn guest_goals(results: &GuestResults) -> Vec<Goal> {
    let (to_ssh, transfers) = (results.boot.to_ssh_s, &results.transfers);
    let concurrent = &results.concurrent_execs;
    vec![
        Goal::at_most("live grow 10 → 20 GiB, idle guest", results.live_grow_s, "s", 2.0),
        Goal::at_most(
            "POST /vms to the first exec ÷ to SSH, medians",
            results.first_exec_s / to_ssh,
            "×",
            0.5,
        ),
        Goal::at_most(
            "POST /vms to the first exec, one-program image ÷ Debian to SSH",
            results.first_exec_agent_s / to_ssh,
            "×",
            0.35,
        ),
        Goal::at_most("exec of `true`, kept connection, p50", results.execs.p50_ms, "ms", 15.0)
            .with_limit(results.process_ms),
        Goal::at_least(
            &format!("upload of {SIZE_MIB} MiB: rate ÷ that of scp"),
            transfers.upload / transfers.scp_upload,
            "×",
            0.5,
        ),
        Goal::at_least(
            &format!("download of {SIZE_MIB} MiB: rate ÷ that of scp"),
            transfers.download / transfers.scp_download,
            "×",
            0.5,
        ),
        Goal::at_least(
            &format!("complete execs of {CONCURRENT_EXECS} at once with 1 MiB each"),
            concurrent.complete as f64,
            "execs",
            CONCURRENT_EXECS as f64,
        ),
        Goal::at_most(
            &format!("growth of the daemon's memory in {CONCURRENT_EXECS} execs with 1 MiB each"),
            mib(concurrent.peak_bytes.saturating_sub(concurrent.before_bytes)),
            "MiB",
            32.0,
        ),
    ]
}

/// Returns the figures of guests that have no goal.
fn guest_figures(results: &GuestResults) -> Vec<Goal> {
    let (boot, transfers) = (&results.boot, &results.transfers);
    let seconds = [
        ("POST /vms to SSH, median", boot.to_ssh_s),
        ("… until the machine runs", boot.vmm_s),
        ("… until the guest's kernel has started its init", boot.kernel_s),
        ("… until user space responds to SSH", boot.user_space_s),
        ("POST /vms to the first exec, median", results.first_exec_s),
        ("… one-program image", results.first_exec_agent_s),
    ];
    let rates = [
        ("upload", transfers.upload),
        ("… scp", transfers.scp_upload),
        ("download", transfers.download),
        ("… scp", transfers.scp_download),
    ];
    let execs = &results.concurrent_execs.samples;
    let mut figures: Vec<Goal> = seconds.map(|(figure, value)| Goal::none(figure, value, "s")).into();
    figures.extend(rates.map(|(figure, value)| Goal::none(figure, value, "MiB/s")));
    figures.push(Goal::none(
        &format!("{} execs at once with 1 MiB each", execs.count),
        execs.count as f64 / execs.per_second,
        "s",
    ));
    figures
}

fn pull_goal(results: &Pulls) -> Goal {
    let figure = format!(
        "pull of {:.0} MiB in {} layers ÷ skopeo copy and umoci unpack",
        mib(results.image_bytes),
        results.image_layers
    );
    let others = results.skopeo_s + results.umoci_s;
    Goal::at_most(&figure, results.pull_s / others, "×", 3.0)
}

/// Returns the figures of a pull that have no goal.
fn pull_figures(results: &Pulls) -> Vec<Goal> {
    vec![
        Goal::none("pull of that image", results.pull_s, "s"),
        Goal::none("… skopeo copy", results.skopeo_s, "s"),
        Goal::none("… umoci unpack", results.umoci_s, "s"),
    ]
}

impl Goal {
    fn at_most(figure: &str, value: f64, unit: &'static str, goal: f64) -> Goal {
        Goal {
            figure: figure.to_owned(),
            value,
            unit,
            goal,
            at_most: true,
            reached: value <= goal,
            limit: None,
            of_limit: None,
        }
    }

    /// Adds the limit: the same figure of the fastest method that is possible here.
    fn with_limit(self, limit: f64) -> Goal {
        Goal {
            limit: Some(limit),
            of_limit: Some(self.value / limit),
            ..self
        }
    }

    /// Creates a figure that is reported without a goal.
    fn none(figure: &str, value: f64, unit: &'static str) -> Goal {
        Goal {
            reached: true,
            ..Goal::at_most(figure, value, unit, f64::NAN)
        }
    }

    fn at_least(figure: &str, value: f64, unit: &'static str, goal: f64) -> Goal {
        Goal {
            at_most: false,
            reached: value >= goal,
            ..Goal::at_most(figure, value, unit, goal)
        }
    }
}

/// Creates a table; all columns but the first are numbers.
fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn disks_table(results: &DiskResults) -> Table {
    let seed = |series: &Series| {
        let same = results.find(Method::Seed, series.size_gib, series.disks, series.samples.clients);
        same.map_or_else(
            |_| "–".to_owned(),
            |seed| format!("{:.1}×", seed.samples.p50_ms / series.samples.p50_ms),
        )
    };
    let rows = results.series.iter().map(|series| {
        let samples = &series.samples;
        vec![
            series.method.name().to_owned(),
            series.size_gib.to_string(),
            series.disks.to_string(),
            samples.clients.to_string(),
            samples.count.to_string(),
            format!("{:.2}", samples.p50_ms),
            format!("{:.2}", samples.p99_ms),
            format!("{:.0}", samples.per_second),
            seed(series),
        ]
    });
    let header = [
        "method",
        "GiB",
        "disks",
        "clients",
        "created",
        "p50 ms",
        "p99 ms",
        "per second",
        "seed ÷ it",
    ];
    table(&header, rows)
}

fn writes_table(results: &[Passes]) -> Table {
    let rows = results.iter().map(|passes| {
        let mut row = vec![passes.on.to_owned()];
        row.extend(passes.iops.iter().map(|iops| format!("{iops:.0}")));
        row
    });
    table(
        &["4 KiB random writes per second to", "pass 1", "pass 2", "pass 3"],
        rows,
    )
}

fn goals_table(goals: &[Goal]) -> Table {
    let rows = goals.iter().map(|goal| {
        let sign = if goal.at_most { "≤" } else { "≥" };
        let verdict = if goal.reached { "reached" } else { "NOT reached" };
        let (goal_text, verdict) = match goal.goal.is_nan() {
            true => (String::new(), ""),
            false => (format!("{sign} {} {}", goal.goal, goal.unit), verdict),
        };
        vec![
            goal.figure.clone(),
            number(goal.value, goal.unit),
            goal_text,
            verdict.to_owned(),
            goal.limit.map_or_else(String::new, |limit| number(limit, goal.unit)),
            goal.of_limit.map_or_else(String::new, |ratio| format!("{ratio:.2} ×")),
        ]
    });
    table(&["figure", "measured", "goal", "", "limit", "of the limit"], rows)
}

fn number(value: f64, unit: &str) -> String {
    if value < 100.0 {
        format!("{value:.2} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

/// Draws one bar per method and size with one client: the median on a logarithmic scale.
fn draw(results: &DiskResults, path: &Path) -> Outcome<()> {
    let bars: Vec<(String, f64, RGBColor)> = results
        .series
        .iter()
        .filter(|series| series.samples.clients == 1 && series.disks == 10)
        .map(|series| {
            let colour = match series.method {
                Method::Seed => RGBColor(0xb0, 0x4a, 0x3a),
                Method::Bare => RGBColor(0x8a, 0x8a, 0x8a),
                Method::Library => RGBColor(0x5b, 0x9b, 0xc4),
                Method::Api => RGBColor(0x1f, 0x5f, 0x8b),
            };
            let label = format!("{}, {} GiB", series.method.name(), series.size_gib);
            (label, series.samples.p50_ms.max(0.02), colour)
        })
        .collect();
    let (width, bar) = (760, 26);
    let height = 70 + bar * bars.len() as i32;
    let area = SVGBackend::new(path, (width, height.unsigned_abs())).into_drawing_area();
    area.fill(&WHITE)?;
    let font = |size: i32| ("sans-serif", size).into_font();
    area.draw(&Text::new(
        "Creating one disk: median in milliseconds (logarithmic)",
        (12, 14),
        font(16),
    ))?;
    // The scale spans four decades, 0.1 ms to 1 s.
    let (left, right) = (190.0, 640.0);
    let x = |ms: f64| (left + (right - left) * ((ms.log10() + 1.0) / 4.0).clamp(0.0, 1.0)) as i32;
    for decade in [0.1, 1.0, 10.0, 100.0, 1000.0] {
        let grid = PathElement::new(
            vec![(x(decade), 40), (x(decade), height - 24)],
            RGBColor(0xdd, 0xdd, 0xdd),
        );
        area.draw(&grid)?;
        area.draw(&Text::new(format!("{decade}"), (x(decade) - 6, height - 20), font(12)))?;
    }
    for (row, (label, ms, colour)) in bars.iter().enumerate() {
        let top = 44 + bar * row as i32;
        area.draw(&Text::new(label.clone(), (12, top + 4), font(13)))?;
        area.draw(&Rectangle::new(
            [(x(0.1), top), (x(*ms), top + bar - 6)],
            colour.filled(),
        ))?;
        area.draw(&Text::new(format!("{ms:.2}"), (x(*ms) + 6, top + 4), font(13)))?;
    }
    Ok(area.present()?)
}

//! `scaleboxd`: the Scalebox daemon, and the commands to set up and maintain a host.
//!
//! # Layout
//!
//! | file | job |
//! |---|---|
//! | `commands` | the subcommands |
//! | `doctor` | problems on this host, with fixes |
//! | `settings` | environment, file, defaults |
//! | `contradictions` | settings that contradict each other |
//! | `log` | the log, as text, as JSON or for the journal |
//! | `api` | routes, authentication, limits on a request, request ids |
//! | `logins` | failed logins, in the log |
//! | `server` | connections and shutdown |
//! | `error_bodies` | JSON bodies for the errors that hyper sends by itself |
//! | `events` | events, kept for clients that reconnect |
//! | `event_stream` | `GET /events` |
//! | `service` | the service behind the API: shared state and operations |
//! | `create` | creating a VM, step by step |
//! | `lifecycle` | starting and stopping machines, and watching for their end |
//! | `drivers` | the hypervisor drivers, and which VM uses which |
//! | `cleanup` | retrying failed removals from the host |
//! | `down` | shutting all machines down, as before a reboot of the host |
//! | `update` | growing a VM's disk, changing its settings |
//! | `pool` | the pool's figures, and changes of its size |
//! | `metrics` | `GET /metrics` |
//! | `openapi` | `GET /openapi.json` |
//! | `idempotency` | repeated creation requests return the same VM |
//! | `restart` | stopping and starting a VM as one operation |
//! | `vms` | the VMs in memory: names, addresses, running operations |
//! | `state` | the state file |
//! | `recovery` | recovery at start |
//! | `pool_growth` | automatic growth of the pool |
//! | `agent` | connecting to a guest's agent |
//! | `reboot_loop` | detecting guests that cannot boot |
//! | `auto_extend` | growing disks before guests fill them |
//! | `guest_trim` | trimming guests |
//! | `pool_watch` | pausing guests before the pool runs full, and resuming them |
//! | `reclaim` | returning blocks of deleted disks to the pool and to the host disk |
//! | `network_watch` | restoring the network after another program removed it |
//! | `accounts` | measuring disk usage, estimating how long the pool lasts |
//! | `resize` | reading the size of a guest's root file system |
//! | `snapshots` | creating templates from VMs' disks |
//! | `template_files` | template export and import |
//! | `undo` | undo steps |
//! | `random` | random ids |
//! | `host` | information about the host |
//! | `progress` | progress display |
//! | `error` | errors, with HTTP status and error code |

mod accounts;
mod agent;
mod api;
mod auto_extend;
mod cleanup;
mod commands;
mod contradictions;
mod create;
mod doctor;
mod down;
mod drivers;
mod error;
mod error_bodies;
mod event_stream;
mod events;
mod guest_trim;
mod host;
mod idempotency;
mod lifecycle;
mod log;
mod logins;
mod metrics;
mod network_watch;
mod openapi;
mod pool;
mod pool_growth;
mod pool_watch;
mod progress;
mod random;
mod reboot_loop;
mod reclaim;
mod recovery;
mod resize;
mod restart;
mod server;
mod service;
mod settings;
mod snapshots;
mod state;
mod template_files;
mod undo;
mod update;
mod vms;

use clap::{Parser, Subcommand};
use rustix::fs::Mode;
use rustix::process::{Signal, umask};
use settings::Settings;
use std::path::PathBuf;
use std::process::ExitCode;

/// Turns a Linux server into a host for disposable virtual machines
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "Settings are read from the environment, then from the --config file, then from defaults.\n\n\
        Example, on a new host:\n  \
        scaleboxd pool init\n  \
        scaleboxd template build debian-base\n  \
        API_TOKEN=$(openssl rand -hex 32) scaleboxd serve"
)]
struct Arguments {
    /// The settings file, with KEY=VALUE lines [default: /etc/scaleboxd/config, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API until SIGTERM; machines keep running without the daemon
    #[command(after_help = "Example:\n  API_TOKEN=$(openssl rand -hex 32) API_PORT=8080 scaleboxd serve")]
    Serve,
    /// Manage the pool that holds all disks
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Manage the templates that VMs are cloned from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Stop all machines, remove the network and unmount the pool; VMs and their disks are kept
    ///
    /// For maintenance, and before removing Scalebox from a host. The daemon must not be running. A
    /// reboot, or `pool init` and `serve`, restore everything: VMs that were running are started
    /// again, except those with autostart off.
    #[command(after_help = "Example:\n  systemctl stop scaleboxd && scaleboxd down")]
    Down,
    /// Print the settings that let `scalebox` reach this daemon, for ~/.config/scalebox/config
    ///
    /// The output contains the token.
    #[command(after_help = "Example, as that user:\n  \
        (umask 077; mkdir -p ~/.config/scalebox; sudo scaleboxd client-config >~/.config/scalebox/config)")]
    ClientConfig,
    /// Report problems on this host with a fix for each; changes nothing
    ///
    /// Exits with 1 if there is a problem. Works before anything is set up, and while the daemon
    /// runs.
    #[command(
        after_help = "Examples:\n  scaleboxd doctor\n  scaleboxd doctor --json | jq '.[] | select(.level == \"problem\")'"
    )]
    Doctor {
        /// Print an array of {check, level, finding, fix}, for programs
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Size, create, mount and register the pool; changes nothing if the pool exists
    #[command(
        after_help = "Examples:\n  scaleboxd pool init                      # 80 % of what the host disk has free\n  \
        STORAGE_SIZE=100G scaleboxd pool init    # exactly 100 GiB"
    )]
    Init,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Build the Debian template and the kernel of all guests
    #[command(after_help = "Example:\n  scaleboxd template build debian-base")]
    Build {
        /// The template to build
        #[arg(value_parser = [service::BASE_TEMPLATE])]
        name: String,
        /// Build the template again if it exists
        #[arg(long)]
        replace: bool,
        /// Keep finished parts in this folder, and reuse those that are there
        #[arg(long, value_name = "DIR")]
        cache: Option<PathBuf>,
    },
    /// Create a template from an ext4 image, which is checked and copied
    #[command(after_help = "Example:\n  scaleboxd template import node-20 node-20.ext4")]
    Import {
        /// The name of the new template
        name: String,
        /// The image
        file: PathBuf,
        /// Replace an existing template of this name; disks cloned from it are kept
        #[arg(long)]
        replace: bool,
    },
}

/// `EX_CONFIG` of sysexits.h(3head): `serve` cannot start until a setting is changed. The systemd
/// unit does not restart the daemon then.
const WRONG_CONFIGURATION: u8 = 78;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // New files are accessible only to root, unless their mode is set explicitly.
    umask(Mode::RWXG | Mode::RWXO);
    if let Err(error) = survive_file_size_limit() {
        eprintln!("error: cannot handle signals: {error}");
        return ExitCode::FAILURE;
    }
    let serves = matches!(arguments.command, Command::Serve);
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            log::report(&error);
            match serves && error.is_configuration() {
                true => ExitCode::from(WRONG_CONFIGURATION),
                false => ExitCode::FAILURE,
            }
        }
    }
}

/// Makes a write beyond `RLIMIT_FSIZE` fail with `EFBIG` instead of killing the process.
///
/// The signal is handled rather than ignored, because child processes inherit an ignored signal but
/// not a handler.
fn survive_file_size_limit() -> std::io::Result<()> {
    let received = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    signal_hook::flag::register(Signal::XFSZ.as_raw(), received).map(drop)
}

fn run(arguments: Arguments) -> Result<ExitCode, commands::CommandFailed> {
    // `doctor` reports unusable settings as a finding.
    if let Command::Doctor { json } = arguments.command {
        return doctor::run(arguments.config.as_deref(), json);
    }
    let settings = Settings::load(arguments.config.as_deref())?;
    log::start(&settings)?;
    match arguments.command {
        Command::Serve => commands::serve(settings),
        Command::Pool(PoolCommand::Init) => commands::pool_init(&settings),
        Command::Template(TemplateCommand::Build { name, replace, cache }) => {
            commands::template_build(&settings, &name, replace, cache.as_deref())
        }
        Command::Template(TemplateCommand::Import { name, file, replace }) => {
            commands::template_import(&settings, &name, &file, replace)
        }
        Command::Down => commands::down(settings),
        Command::ClientConfig => commands::client_config(&settings),
        Command::Doctor { json } => return doctor::run(arguments.config.as_deref(), json),
    }
    .map(|()| ExitCode::SUCCESS)
}

//! `scaleboxd`: the Scalebox daemon, and the commands an operator prepares a host with.
//!
//! # Layout
//!
//! | file | job |
//! |---|---|
//! | `commands` | what each subcommand does |
//! | `doctor` | what is missing or wrong on this host |
//! | `settings` | environment, file, defaults |
//! | `contradictions` | settings that do not go together |
//! | `log` | the log, for people, programs and the journal |
//! | `api` | routes, token, limits on a request, request ids |
//! | `logins` | requests without the token, in the log |
//! | `server` | connections, and the daemon's end |
//! | `error_bodies` | the JSON body of errors that hyper answers by itself |
//! | `events` | what happens on the host, told as it happens |
//! | `event_stream` | `GET /events` |
//! | `service` | the service behind the API: its parts, and what can be asked of it |
//! | `create` | a VM is made, step by step |
//! | `lifecycle` | machines brought up, shut down, followed to their end, taken away |
//! | `drivers` | the hypervisors of this host, and which VM has which |
//! | `down` | all machines shut down, as before a reboot of the host |
//! | `update` | a VM's disk grows, what is kept of it changes |
//! | `pool` | the pool's numbers, and its size |
//! | `metrics` | `GET /metrics` |
//! | `openapi` | `GET /openapi.json` |
//! | `idempotency` | a creation that is asked for again gives the same VM |
//! | `restart` | down and up again |
//! | `vms` | the VMs in memory: names, addresses, what is under way |
//! | `state` | the state file |
//! | `recovery` | putting things right at start |
//! | `pool_growth` | a pool that grows by itself |
//! | `agent` | reaching a guest's agent |
//! | `reboot_loop` | guests that cannot boot |
//! | `auto_extend` | disks that extend themselves |
//! | `guest_trim` | guests that give back what they deleted |
//! | `pool_watch` | pausing guests before the pool runs full, and letting them go on |
//! | `reclaim` | blocks of deleted disks, back to the pool and to the host disk |
//! | `network_watch` | putting the network back when somebody sweeps it away |
//! | `accounts` | measuring whose the pool's blocks are, and how long it lasts |
//! | `resize` | asking a guest how large its root file system is |
//! | `snapshots` | a VM's disk becomes a template; the guest stands still for it |
//! | `template_files` | templates to elsewhere and from elsewhere |
//! | `undo` | steps that can be taken back |
//! | `random` | random ids |
//! | `host` | what the host is |
//! | `progress` | long work, shown to people |
//! | `error` | what clients are answered when it does not work |

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

/// Turns this host into one for disposable virtual machines.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "Settings come from the environment, over the file named by --config, over defaults.\n\n\
        Example, on a new host:\n  \
        scaleboxd pool init\n  \
        scaleboxd template build debian-base\n  \
        API_TOKEN=$(openssl rand -hex 32) scaleboxd serve"
)]
struct Arguments {
    /// The file of settings, KEY=VALUE lines [default: /etc/scaleboxd/config, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API until SIGTERM; machines run on without the daemon
    #[command(after_help = "Example:\n  API_TOKEN=$(openssl rand -hex 32) API_PORT=8080 scaleboxd serve")]
    Serve,
    /// The pool that holds all disks
    #[command(subcommand)]
    Pool(PoolCommand),
    /// The golden disks that VMs are cloned from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// End all machines, remove the network, unmount the pool; VMs and their disks stay
    ///
    /// For maintenance, and before Scalebox is removed from a host. The daemon must not be running.
    /// A reboot, or `pool init` and `serve`, bring everything back: the VMs that ran are started
    /// again, except those with autostart off.
    #[command(after_help = "Example:\n  systemctl stop scaleboxd && scaleboxd down")]
    Down,
    /// Print the settings with which `scalebox` reaches this daemon, for a user's
    /// ~/.config/scalebox/config
    ///
    /// The token is among them.
    #[command(after_help = "Example, as that user:\n  \
        (umask 077; mkdir -p ~/.config/scalebox; sudo scaleboxd client-config >~/.config/scalebox/config)")]
    ClientConfig,
    /// Say what is missing or wrong on this host, and how to put it right; changes nothing
    ///
    /// Exits with 1 if there is a problem. Works before anything is set up, and beside a running
    /// daemon.
    #[command(
        after_help = "Examples:\n  scaleboxd doctor\n  scaleboxd doctor --json | jq '.[] | select(.level == \"problem\")'"
    )]
    Doctor {
        /// An array of {check, level, finding, fix}, for programs
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Size, create, mount and register the pool; run again, it changes nothing
    #[command(
        after_help = "Examples:\n  scaleboxd pool init                      # 80 % of what the host disk has free\n  \
        STORAGE_SIZE=100G scaleboxd pool init    # exactly 100 GiB"
    )]
    Init,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Build the Debian template, with the kernel of all guests
    #[command(after_help = "Example:\n  scaleboxd template build debian-base")]
    Build {
        /// The template to build
        #[arg(value_parser = [service::BASE_TEMPLATE])]
        name: String,
        /// Build it anew although it is there
        #[arg(long)]
        replace: bool,
        /// Keep the finished parts in this folder, and take them from there if they are
        #[arg(long, value_name = "DIR")]
        cache: Option<PathBuf>,
    },
    /// Make a template from a bare ext4 image, which is checked and copied
    #[command(after_help = "Example:\n  scaleboxd template import node-20 node-20.ext4")]
    Import {
        /// The new template's name
        name: String,
        /// The image
        file: PathBuf,
        /// Replace a template of that name; disks made from it stay as they are
        #[arg(long)]
        replace: bool,
    },
}

/// `EX_CONFIG` of sysexits.h(3head): `serve` cannot start before somebody changes a setting. The
/// unit does not try again then.
const WRONG_CONFIGURATION: u8 = 78;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Whatever is made is for root alone, unless said otherwise.
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

/// Makes a write beyond `RLIMIT_FSIZE` fail with `EFBIG` instead of ending the process.
///
/// A handler, because programs that are started get the default action back, which an ignored
/// signal would keep from them.
fn survive_file_size_limit() -> std::io::Result<()> {
    let seen = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    signal_hook::flag::register(Signal::XFSZ.as_raw(), seen).map(drop)
}

fn run(arguments: Arguments) -> Result<ExitCode, commands::CommandFailed> {
    // Settings that cannot be used are a finding to it, not its end.
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

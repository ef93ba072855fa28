//! `scalebox`, the command line. It sends requests to the daemon over HTTP and prints the
//! responses; all decisions are the daemon's.
//!
//! # Layout
//!
//! - `args`: every command, its arguments and its help text
//! - `settings`: finds the server's address and token in flags, environment and files
//! - `source`: the source of a setting, for messages
//! - `vm`: `scalebox vm create|list|get|start|stop|restart|resize|set|trim|snapshot|delete|wait`
//! - `running`: refuses commands that need a running VM
//! - `wait`: waits until a guest responds to SSH
//! - `ssh`: `scalebox vm ssh`, and finding a public key
//! - `status`: `scalebox status`
//! - `template`: `scalebox template list|delete`
//! - `template_pull`: `scalebox template pull`
//! - `template_files`: `scalebox template export|import`
//! - `pool`: `scalebox pool …`
//! - `events`: `scalebox events`
//! - `output`: prints tables, JSON, messages and progress
//! - `human`: formats sizes and ages
//! - `error`: errors, their messages and exit codes

mod args;
mod error;
mod events;
mod human;
mod output;
mod pool;
mod running;
mod settings;
mod source;
mod ssh;
mod status;
mod template;
mod template_files;
mod template_pull;
mod vm;
mod wait;

use args::{Args, Command, PoolCommand, TemplateCommand, VmCommand};
use clap::{CommandFactory, Parser};
use error::Error;
use output::Output;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = Args::parse();
    let output = Output::new(args.connection.json);
    match run(args, &output) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader closed the pipe, as in `scalebox vm list | head -1`.
        Err(Error::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            error.exit_code()
        }
    }
}

fn run(args: Args, output: &Output) -> Result<(), Error> {
    if let Command::Completions { shell } = args.command {
        return output.completions(shell, Args::command());
    }
    let server = settings::connect(&args.connection, output)?;
    let result = match args.command {
        Command::Status => status::status(&server.client, output),
        Command::Vm(VmCommand::Create(create)) => vm::create(&server.client, &create, output),
        Command::Vm(VmCommand::List) => vm::list(&server.client, output),
        Command::Vm(VmCommand::Get { vm }) => vm::get(&server.client, &vm, output),
        Command::Vm(VmCommand::Start { vm }) => vm::start(&server.client, &vm, output),
        Command::Vm(VmCommand::Stop { vm }) => vm::stop(&server.client, &vm, output),
        Command::Vm(VmCommand::Restart { vm }) => vm::restart(&server.client, &vm, output),
        Command::Vm(VmCommand::Resize { vm, disk }) => vm::resize(&server.client, &vm, disk, output),
        Command::Vm(VmCommand::Set { vm, changes }) => vm::set(&server.client, &vm, &changes, output),
        Command::Vm(VmCommand::Trim { vm }) => vm::trim(&server.client, &vm, output),
        Command::Vm(VmCommand::Snapshot { vm, template }) => vm::snapshot(&server.client, &vm, template, output),
        Command::Vm(VmCommand::Delete { vms, yes }) => vm::delete(&server.client, &vms, yes, output),
        Command::Vm(VmCommand::Wait { vm, timeout }) => vm::wait(&server.client, &vm, timeout, output),
        Command::Vm(VmCommand::Ssh { vm, identity, command }) => {
            ssh::connect(&server.client, &vm, identity.as_deref(), &command)
        }
        Command::Template(TemplateCommand::List) => template::list(&server.client, output),
        Command::Template(TemplateCommand::Export { template, file, force }) => {
            template_files::export(&server.client, &template, file.as_deref(), force, output)
        }
        Command::Template(TemplateCommand::Import {
            template,
            file,
            replace,
        }) => template_files::import(&server.client, template.as_str(), &file, replace, output),
        Command::Template(TemplateCommand::Pull(args)) => template_pull::pull(&server.client, &args, output),
        Command::Template(TemplateCommand::Delete { templates, yes }) => {
            template::delete(&server.client, &templates, yes, output)
        }
        Command::Pool(PoolCommand::Show) => pool::show(&server.client, output),
        Command::Pool(PoolCommand::Grow { size }) => pool::grow(&server.client, size, output),
        Command::Pool(PoolCommand::Shrink { size }) => pool::shrink(&server.client, size, output),
        Command::Pool(PoolCommand::Trim) => pool::trim(&server.client, output),
        Command::Events { since, no_follow } => events::events(&server.client, since, !no_follow, output),
        Command::Completions { .. } => Ok(()),
    };
    result.map_err(|error| error.with_token_source(server.client.url(), &server.token_source))
}

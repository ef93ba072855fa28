//! The commands `scalebox exec` and `scalebox shell`.

use crate::error::Error;
use crate::guest_args::{ExecArgs, ShellArgs, Streams, Surroundings};
use crate::human;
use crate::output::{Output, Table, number, text};
use crate::session::{Session, exit_code};
use crate::terminal;
use jiff::Timestamp;
use scalebox_api::{CreateExec, Exec, ExecEnd, ExecId, ExecList, ExecStatus, StartedExec};
use scalebox_client::Client;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

/// Starts bash, or sh where there is no bash, as a login shell. Debian's locale is set by PAM at
/// other logins; without it, editors show no UTF-8.
const LOGIN_SHELL: &str = "\
    if [ -z \"$LANG$LC_ALL\" ] && [ -r /etc/default/locale ]; then set -a; . /etc/default/locale; set +a; fi; \
    if [ -x /bin/bash ]; then exec /bin/bash -l; else exec /bin/sh -l; fi";

pub(crate) fn exec(client: &Client, args: &ExecArgs, output: &Output) -> Result<ExitCode, Error> {
    if args.list {
        list(client, &args.vm, output)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(exec) = &args.attach {
        return attach(client, &args.vm, exec, args.streams, output);
    }
    let mut request = request(args.command.clone(), &args.surroundings);
    request.timeout_seconds = args.timeout;
    if args.detach {
        request.open_stdin = args.streams.interactive;
        let exec = client.start_exec(&args.vm, &request)?;
        match output.json {
            true => output.json(&StartedExec { exec })?,
            false => output.line(exec.as_str())?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    if output.json {
        return run_for_json(client, &args.vm, &request, output);
    }
    let session = start(client, &args.vm, request, args.streams)?;
    session.forward_signals()?;
    Ok(exit_code(&session.run(output)?))
}

pub(crate) fn shell(client: &Client, args: &ShellArgs, output: &Output) -> Result<ExitCode, Error> {
    let streams = Streams {
        tty: true,
        interactive: true,
    };
    let session = start(client, &args.vm, login_shell(&args.surroundings), streams)?;
    session.forward_signals()?;
    Ok(exit_code(&session.run(output)?))
}

/// Returns a request for a login shell.
pub(crate) fn login_shell(surroundings: &Surroundings) -> CreateExec {
    request(["/bin/sh", "-c", LOGIN_SHELL].map(str::to_owned).to_vec(), surroundings)
}

/// Returns a request for a command.
pub(crate) fn request(command: Vec<String>, surroundings: &Surroundings) -> CreateExec {
    CreateExec {
        env: surroundings.env.iter().cloned().collect(),
        cwd: surroundings.cwd.clone(),
        user: surroundings.user.clone(),
        ..CreateExec::of_argv(command)
    }
}

/// Starts a command and connects this process to it.
pub(crate) fn start<'c>(
    client: &'c Client,
    vm: &'c str,
    mut request: CreateExec,
    streams: Streams,
) -> Result<Session<'c>, Error> {
    let is_terminal = io::stdin().is_terminal();
    if streams.tty {
        if !is_terminal {
            return Err(Error::NoTerminal);
        }
        terminal::add_to(&mut request);
    }
    request.open_stdin = streams.tty || streams.interactive || !is_terminal;
    request.background = true;
    let exec = client.start_exec(vm, &request)?;
    let mut session = Session::attach(client, vm, exec, 0)?;
    if streams.tty {
        session.take_terminal()?;
    } else if request.open_stdin {
        session.send_stdin()?;
    }
    Ok(session)
}

fn attach(client: &Client, vm: &str, exec: &ExecId, streams: Streams, output: &Output) -> Result<ExitCode, Error> {
    let status = client.exec(vm, exec)?;
    if status.output_start > 0 {
        output.hint(&format!(
            "the first {} of the output are no longer available",
            human::bytes(status.output_start)
        ));
    }
    let mut session = Session::attach(client, vm, exec.clone(), status.output_start)?;
    let runs = status.status != ExecStatus::Ended;
    let is_terminal = io::stdin().is_terminal();
    if runs && status.tty && is_terminal {
        session.take_terminal()?;
    } else if runs && streams.tty {
        return Err(Error::NoTerminal);
    } else if runs && streams.interactive {
        session.send_stdin()?;
    }
    session.forward_signals()?;
    Ok(exit_code(&session.run(output)?))
}

/// Runs a command without standard input, and prints the server's response.
fn run_for_json(client: &Client, vm: &str, request: &CreateExec, output: &Output) -> Result<ExitCode, Error> {
    let result = client.run_exec(vm, request)?;
    output.json(&result)?;
    Ok(exit_code(&ExecEnd {
        exit_code: result.exit_code,
        signal: result.signal,
        timed_out: result.timed_out,
        duration_ms: result.duration_ms,
    }))
}

fn list(client: &Client, vm: &str, output: &Output) -> Result<(), Error> {
    let execs = client.execs(vm)?;
    if output.json {
        return output.json(&ExecList { execs });
    }
    if execs.is_empty() {
        output.hint(&format!(
            "no command has run in {vm}; run one with: scalebox exec {vm} -- COMMAND"
        ));
        return Ok(());
    }
    let columns = vec![
        text("ID", 0),
        text("STATUS", 0),
        number("AGE", 2),
        number("TIME", 3),
        number("OUTPUT", 4),
        text("COMMAND", 1),
    ];
    let now = Timestamp::now();
    output.table(Table::new(columns, execs.iter().map(|exec| row(exec, now)).collect()))
}

fn row(exec: &Exec, now: Timestamp) -> Vec<String> {
    /// Maximum number of characters of a command in the table.
    const MAX_COMMAND: usize = 60;
    let status = match (exec.status, exec.exit_code, exec.signal) {
        (ExecStatus::Running, _, _) => "running".to_owned(),
        (ExecStatus::Restarting, _, _) => "restarting".to_owned(),
        (ExecStatus::Ended, _, _) if exec.timed_out == Some(true) => "timed out".to_owned(),
        (ExecStatus::Ended, Some(code), _) => format!("exit {code}"),
        (ExecStatus::Ended, None, Some(signal)) => format!("SIG{signal}"),
        (ExecStatus::Ended, None, None) => "ended".to_owned(),
    };
    let command = exec.argv.join(" ").replace(['\n', '\t'], " ");
    let command = match command.char_indices().nth(MAX_COMMAND) {
        Some((end, _)) => format!("{}…", &command[..end]),
        None => command,
    };
    vec![
        exec.exec.to_string(),
        status,
        human::age(&exec.started_at, now),
        human::duration(exec.duration_ms / 1000),
        human::bytes(exec.output_end),
        command,
    ]
}

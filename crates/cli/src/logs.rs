//! The command `scalebox logs`.

use crate::error::Error;
use crate::guest_args::LogsArgs;
use crate::human;
use crate::output::Output;
use crate::session::Session;
use scalebox_api::{ExecId, OutputLine};
use scalebox_client::Client;
use std::io::{self, Read, Write};

/// Prints the output of the main process, or the console log of a VM without one.
pub(crate) fn logs(client: &Client, args: &LogsArgs, output: &Output) -> Result<(), Error> {
    match args.console || client.vm(&args.vm)?.main.is_none() {
        true => console(client, args),
        false => main_process(client, args, output),
    }
}

/// Prints the console log unchanged: it is the output of a guest, as that of a command.
fn console(client: &Client, args: &LogsArgs) -> Result<(), Error> {
    let mut log = client.console(&args.vm, args.tail, args.follow)?;
    let (mut out, mut piece) = (io::stdout().lock(), vec![0; 64 << 10]);
    loop {
        let read = match log.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Download(error.to_string())),
        };
        out.write_all(&piece[..read])?;
        out.flush()?;
    }
}

/// Prints stdout and stderr of the main process to those of this one.
fn main_process(client: &Client, args: &LogsArgs, output: &Output) -> Result<(), Error> {
    let exec = ExecId::main();
    let status = client.exec(&args.vm, &exec)?;
    let since = match args.tail {
        Some(tail) => status.output_end.saturating_sub(tail).max(status.output_start),
        None => status.output_start,
    };
    if args.tail.is_none() && since > 0 {
        let dropped = human::bytes(since);
        output.hint(&format!("the first {dropped} of the output are no longer available"));
    }
    if args.follow {
        // It also ends when the main process is not started again.
        return Session::attach(client, &args.vm, exec, since)?.run(output).map(drop);
    }
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    for line in client.exec_output(&args.vm, &exec, since, false)? {
        match line? {
            OutputLine::Stdout { bytes, .. } => out.write_all(&bytes)?,
            OutputLine::Stderr { bytes, .. } => err.write_all(&bytes)?,
            OutputLine::Failed(body) => return Err(Error::Download(body.error)),
            OutputLine::Started { .. } | OutputLine::Lost { .. } | OutputLine::Exit { .. } => {}
        }
    }
    out.flush()?;
    Ok(())
}

//! The command `scalebox logs`.

use crate::error::Error;
use crate::guest_args::LogsArgs;
use scalebox_client::Client;
use std::io::{self, Read, Write};

/// Prints the console log unchanged: it is the output of a guest, as that of a command.
pub(crate) fn logs(client: &Client, args: &LogsArgs) -> Result<(), Error> {
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

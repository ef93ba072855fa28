//! Runs the programs `nft` and `iptables-legacy-save`. No other module does.
//!
//! Scripts are passed on standard input; listings are JSON. The error of a failed program contains
//! its whole output.

use crate::error::{Error, Result};
use scalebox_programs::{Program, ProgramError, Run};
use std::io;
use std::process::Output;
use std::time::Duration;

/// Timeout of a program. Changes of all VMs wait for each other, and a listing of the largest
/// rulesets takes seconds.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Maximum output of a program, in bytes: the listing of a set with a million elements.
const MAX_OUTPUT: usize = 256 << 20;

const NFT: Program = Program::new("nft", "nftables").within(TIMEOUT);
const SAVE_LEGACY: Program = Program::new("iptables-legacy-save", "iptables").within(TIMEOUT);
/// The name of [`SAVE_LEGACY`] in distributions that have only the legacy variant.
const SAVE: Program = Program::new("iptables-save", "iptables").within(TIMEOUT);

/// Runs a script as one transaction.
///
/// # Errors
///
/// [`Error::NftMissing`], [`Error::NftStart`], [`Error::Nft`]. Their messages contain `action`,
/// such as "add the forward …".
pub(crate) async fn run(action: &str, script: &str) -> Result<()> {
    let output = call(action, &["-f", "-"], script).await?;
    succeeded(action, output).map(drop)
}

/// Makes the kernel check a script, without changing anything.
///
/// # Errors
///
/// The errors of [`run`].
pub(crate) async fn check(action: &str, script: &str) -> Result<()> {
    let output = call(action, &["-c", "-f", "-"], script).await?;
    succeeded(action, output).map(drop)
}

/// Lists objects as JSON (`man libnftables-json`): returns the items of `nftables`, each an object
/// with one key.
///
/// # Errors
///
/// The errors of [`run`].
pub(crate) async fn list(what: &[&str]) -> Result<Vec<serde_json::Value>> {
    let action = format!("list {}", what.join(" "));
    let mut arguments = vec!["-j", "list"];
    arguments.extend(what);
    let output = succeeded(&action, call(&action, &arguments, "").await?)?;
    let parsed: serde_json::Value = serde_json::from_str(&output).map_err(|error| Error::NftStart {
        program: NFT.name().to_owned(),
        action: action.clone(),
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })?;
    match parsed {
        serde_json::Value::Object(mut object) => match object.remove("nftables") {
            Some(serde_json::Value::Array(items)) => Ok(items),
            _ => Ok(Vec::new()),
        },
        _ => Ok(Vec::new()),
    }
}

/// Returns whether the output of a failed `nft` reports that a table or another object does not
/// exist.
pub(crate) fn is_gone(output: &str) -> bool {
    output.contains("No such file or directory")
}

/// Returns the `filter` table of iptables-legacy, in the format of its own programs.
///
/// # Errors
///
/// [`Error::NftStart`], also if the program is not installed; [`Error::Nft`].
pub(crate) async fn save_legacy() -> Result<String> {
    let action = "list the rules of iptables-legacy";
    let mut saved = call_program(SAVE_LEGACY, action, &["-t", "filter"], "").await;
    if let Err(Error::NftStart { source, .. }) = &saved
        && source.kind() == io::ErrorKind::NotFound
    {
        saved = call_program(SAVE, action, &["-t", "filter"], "").await;
    }
    succeeded(action, saved?)
}

async fn call(action: &str, arguments: &[&str], input: &str) -> Result<Output> {
    call_program(NFT, action, arguments, input).await
}

/// Runs a program on a thread for blocking work. If the future is dropped, the program is killed.
async fn call_program(program: Program, action: &str, arguments: &[&str], input: &str) -> Result<Output> {
    let failed = |source: io::Error| Error::NftStart {
        program: program.name().to_owned(),
        action: action.to_owned(),
        source,
    };
    let why = |error: ProgramError| match error {
        ProgramError::Missing { package, .. } if program == NFT => Error::NftMissing { package },
        ProgramError::Missing { .. } => failed(io::ErrorKind::NotFound.into()),
        ProgramError::Start { source, .. } => failed(source),
        other => failed(io::Error::other(other)),
    };
    let run = Run::of(program)
        .args(arguments)
        .input(input)
        .clean_environment()
        .max_output(MAX_OUTPUT);
    let (run, _killed_on_drop) = run.stoppable().map_err(why)?;
    let output = tokio::task::spawn_blocking(|| run.output()).await;
    output.map_err(|error| failed(error.into()))?.map_err(why)
}

fn succeeded(action: &str, output: Output) -> Result<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let output_text = [text(&output.stderr), text(&output.stdout)]
        .join("\n")
        .trim()
        .to_owned();
    Err(Error::Nft {
        action: action.to_owned(),
        status: output.status,
        output: output_text,
    })
}

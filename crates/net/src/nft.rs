//! Runs the programs `nft` and `iptables-legacy-save`. No other module does.
//!
//! Scripts are passed on standard input; listings are JSON. Programs are run with an argument
//! vector, never a shell, and with a fixed `PATH` and locale. The error of a failed program
//! contains its whole output.

use crate::error::{Error, Result};
use std::io;
use std::process::{Output, Stdio};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

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
        program: "nft".to_owned(),
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
    // Distributions that have only the legacy variant use the shorter name.
    let mut saved = call_program("iptables-legacy-save", action, &["-t", "filter"], "").await;
    if let Err(Error::NftStart { source, .. }) = &saved
        && source.kind() == io::ErrorKind::NotFound
    {
        saved = call_program("iptables-save", action, &["-t", "filter"], "").await;
    }
    succeeded(action, saved?)
}

async fn call(action: &str, arguments: &[&str], input: &str) -> Result<Output> {
    match call_program("nft", action, arguments, input).await {
        Err(Error::NftStart { source, .. }) if source.kind() == io::ErrorKind::NotFound => Err(Error::NftMissing),
        other => other,
    }
}

async fn call_program(program: &str, action: &str, arguments: &[&str], input: &str) -> Result<Output> {
    let failed = |source: io::Error| Error::NftStart {
        program: program.to_owned(),
        action: action.to_owned(),
        source,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    // nft reads its whole input before it writes more than a line, so the two cannot block each
    // other. A pipe that closes early means that the program failed; its status and output explain
    // why.
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(input.as_bytes()).await {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(failed(error)),
            _ => drop(stdin),
        }
    }
    child.wait_with_output().await.map_err(failed)
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

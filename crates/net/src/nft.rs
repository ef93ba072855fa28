//! The one door to the program `nft`, and to `iptables-legacy-save`: a script on its standard
//! input, or a question answered in JSON. By argument vector, never a shell; with a fixed `PATH`
//! and locale. All that a failed one wrote stands in its error.

use crate::error::{Error, Result};
use std::io;
use std::process::{Output, Stdio};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Runs a script as one transaction: all of it, or nothing.
///
/// # Errors
///
/// [`Error::NftMissing`], [`Error::NftStart`], [`Error::Nft`]. `action` says in them what was to be
/// done: "add the forward …".
pub(crate) async fn run(action: &str, script: &str) -> Result<()> {
    let output = call(action, &["-f", "-"], script).await?;
    succeeded(action, output).map(drop)
}

/// Has the kernel check a script as [`run`] would run it, and changes nothing.
///
/// # Errors
///
/// As [`run`].
pub(crate) async fn check(action: &str, script: &str) -> Result<()> {
    let output = call(action, &["-c", "-f", "-"], script).await?;
    succeeded(action, output).map(drop)
}

/// Asks for something in JSON (`man libnftables-json`): the list under `nftables`, each item an
/// object with one key.
///
/// # Errors
///
/// As [`run`].
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

/// Whether what a failed `nft` wrote says that a table or another object is not there.
pub(crate) fn is_gone(output: &str) -> bool {
    output.contains("No such file or directory")
}

/// What the older iptables has in its table `filter`, in the form that its own programs read.
///
/// # Errors
///
/// [`Error::NftStart`] also when its program is not installed, [`Error::Nft`].
pub(crate) async fn save_legacy() -> Result<String> {
    let action = "list the rules of iptables-legacy";
    // A distribution that has no other kind calls it by the shorter name.
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
    // nft reads its whole input before it says anything longer than a line, so the two do not wait
    // for each other. A pipe that closes early is the program's failure, which its status and
    // output tell better.
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

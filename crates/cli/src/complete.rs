//! Completions from the server: names of VMs and templates.

use crate::output::Output;
use crate::settings::{self, Connection};
use clap_complete::engine::{CompletionCandidate, PathCompleter, ValueCompleter};
use scalebox_client::Client;
use std::ffi::OsStr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Maximum time that a shell waits for names.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Completes the names of VMs.
pub(crate) fn vms(current: &OsStr) -> Vec<CompletionCandidate> {
    starting_with(current, names_of_vms(), "")
}

/// Completes the names of templates.
pub(crate) fn templates(current: &OsStr) -> Vec<CompletionCandidate> {
    let names = ask(|client| {
        let templates = client.templates().ok()?;
        Some(templates.into_iter().map(|template| template.name).collect())
    });
    starting_with(current, names, "")
}

/// Completes local paths, and the names of VMs with a colon.
pub(crate) fn places(current: &OsStr) -> Vec<CompletionCandidate> {
    let mut places = starting_with(current, names_of_vms(), ":/");
    places.extend(PathCompleter::any().complete(current));
    places
}

fn names_of_vms() -> Vec<String> {
    ask(|client| Some(client.vms().ok()?.into_iter().map(|vm| vm.name).collect()))
}

/// Queries the server. Without a response there are no candidates, because a shell cannot show an
/// error.
fn ask(query: impl FnOnce(&Client) -> Option<Vec<String>> + Send + 'static) -> Vec<String> {
    let (answer, answered) = mpsc::channel();
    thread::spawn(move || {
        let server = settings::connect(&Connection::default(), &Output::new(false)).ok()?;
        answer.send(query(&server.client)?).ok()
    });
    answered.recv_timeout(TIMEOUT).unwrap_or_default()
}

fn starting_with(current: &OsStr, names: Vec<String>, suffix: &str) -> Vec<CompletionCandidate> {
    let current = current.to_string_lossy();
    // A name with a control character is not one of scaleboxd's.
    let is_candidate = |name: &String| name.starts_with(&*current) && !name.contains(char::is_control);
    let names = names.into_iter().filter(is_candidate);
    names.map(|name| CompletionCandidate::new(name + suffix)).collect()
}

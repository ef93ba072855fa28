//! Creates a VM, and shows the progress of the pull of its image.

use crate::error::Error;
use crate::output::Output;
use crate::template_pull::Progress;
use scalebox_api::{CreateVm, CreateVmQuery, Job, TemplateName, Vm, VmSource};
use scalebox_client::{Client, ClientError};
use std::panic::resume_unwind;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// How often the server is asked for the progress of a pull.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Creates a VM. `text` describes it in the progress. A pull that takes longer than the server
/// waits is waited for by repeating the request, which joins it.
pub(crate) fn create(
    client: &Client,
    request: &CreateVm,
    query: CreateVmQuery,
    text: &str,
    output: &Output,
) -> Result<Vm, Error> {
    let template = match &request.source {
        VmSource::Template(_) => None,
        VmSource::Image(image) => image.template_name().ok(),
    };
    let mut progress = Progress::default();
    progress.begin(text, None, output);
    loop {
        match attempt(client, request, query, template.as_ref(), |job| {
            match job {
                Some(job) => progress.update(job, output),
                None => progress.begin(text, None, output),
            };
        }) {
            Err(error) if error.pending_pull().is_some() => {}
            created => return Ok(created?),
        }
    }
}

/// Sends the request. Meanwhile, calls `show` with the job that makes the template, if there is
/// one.
fn attempt(
    client: &Client,
    request: &CreateVm,
    query: CreateVmQuery,
    template: Option<&TemplateName>,
    mut show: impl FnMut(Option<&Job>),
) -> Result<Vm, ClientError> {
    let Some(template) = template else {
        return client.create_vm_and_wait(request, query);
    };
    // The channel is closed when the request has ended.
    let (open, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let creating = scope.spawn(move || {
            let _open = open;
            client.create_vm_and_wait(request, query)
        });
        while ended.recv_timeout(POLL_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            // An error is not shown: the request gets it too.
            let jobs = client.jobs().unwrap_or_default();
            let makes = |job: &&Job| job.is_running() && job.template == template.as_str();
            show(jobs.iter().find(makes));
        }
        creating.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

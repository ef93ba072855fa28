//! `scalebox template pull`: starts a job on the server, and shows its progress.

use crate::args::PullArgs;
use crate::error::Error;
use crate::human::bytes;
use crate::output::Output;
use indicatif::ProgressBar;
use scalebox_api::{Job, PullTemplate, Template, TemplateName};
use scalebox_client::Client;
use std::io::{self, BufRead};
use std::thread::sleep;
use std::time::Duration;

/// Interval of queries for the progress of the job.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Pulls an image, and waits until it is a template. An interruption of the wait does not end the
/// job.
pub(crate) fn pull(client: &Client, args: &PullArgs, output: &Output) -> Result<(), Error> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => {
            let named = args.reference.template_name();
            named.map_err(|_| Error::NoTemplateName(args.reference.to_string()))?
        }
    };
    let request = PullTemplate {
        reference: args.reference.to_string(),
        username: args.username.clone(),
        password: args.username.is_some().then(read_password).transpose()?,
        insecure: args.insecure,
        replace: args.replace,
    };
    let template = pull_image(client, &name, &request, output)?;
    if output.json {
        return output.json(&template);
    }
    output.line(&format!(
        "pulled {} as the template {name}: {} used of {}",
        template.reference.as_deref().unwrap_or(args.reference.as_str()),
        bytes(template.used_bytes),
        bytes(template.size_bytes)
    ))
}

fn pull_image(
    client: &Client,
    name: &TemplateName,
    request: &PullTemplate,
    output: &Output,
) -> Result<Template, Error> {
    let mut job = client.pull_template(name.as_str(), request)?;
    let mut progress = Progress::default();
    while job.is_running() {
        progress.update(&job, output);
        sleep(POLL_INTERVAL);
        job = client.job(&job.id)?;
    }
    drop(progress);
    if job.status != "done" {
        let reason = job
            .error
            .map_or_else(|| format!("it was {}", job.status), |body| body.error);
        return Err(Error::Pull {
            name: job.template,
            reason,
        });
    }
    Ok(client.template(name.as_str())?)
}

/// Reads a password from the first line of standard input.
fn read_password() -> Result<String, Error> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// The progress bar of the present phase.
#[derive(Default)]
pub(crate) struct Progress {
    text: String,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Shows a phase, if it is not shown already.
    pub(crate) fn begin(&mut self, text: &str, total_bytes: Option<u64>, output: &Output) {
        if self.text != text {
            text.clone_into(&mut self.text);
            // The old bar must be gone before the new one is drawn.
            self.bar = None;
            self.bar = Some(match total_bytes {
                Some(_) => output.bar(text, total_bytes),
                None => output.progress(text),
            });
        }
    }

    /// Shows the progress of a job.
    pub(crate) fn update(&mut self, job: &Job, output: &Output) {
        let text = match job.phase.as_str() {
            "resolve" => "looking for the image",
            "download" => "downloading",
            "unpack" => "unpacking",
            "write" => "writing the file system",
            "import" => "making the template",
            other => other,
        };
        self.begin(text, (job.total_bytes > 0).then_some(job.total_bytes), output);
        if let Some(bar) = &self.bar {
            bar.set_position(job.done_bytes);
        }
    }
}

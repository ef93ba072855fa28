//! `scalebox template pull`: starts a job on the server, and shows its progress.

use crate::args::PullArgs;
use crate::error::Error;
use crate::human::bytes;
use crate::output::Output;
use indicatif::ProgressBar;
use scalebox_api::{InvalidFormat, Job, PullTemplate, Template, TemplateName};
use scalebox_client::Client;
use std::io::{self, BufRead};
use std::thread::sleep;
use std::time::Duration;

/// Interval of queries for the progress of the job.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Maximum length of a template's name.
const MAX_NAME: usize = 63;

/// Pulls an image, and waits until it is a template. An interruption of the wait does not end the
/// job.
pub(crate) fn pull(client: &Client, args: &PullArgs, output: &Output) -> Result<(), Error> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => name_of(&args.reference).map_err(|_| Error::NoTemplateName(args.reference.clone()))?,
    };
    let request = PullTemplate {
        reference: args.reference.clone(),
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
        template.reference.as_deref().unwrap_or(&args.reference),
        bytes(template.used_bytes),
        bytes(template.size_bytes)
    ))
}

/// Pulls an image as the template `name`, shows the progress, and returns the template.
pub(crate) fn pull_image(
    client: &Client,
    name: &TemplateName,
    request: &PullTemplate,
    output: &Output,
) -> Result<Template, Error> {
    let mut job = client.pull_template(name.as_str(), request)?;
    let mut shown = Shown::default();
    while job.is_running() {
        shown.update(&job, output);
        sleep(POLL_INTERVAL);
        job = client.job(&job.id)?;
    }
    drop(shown);
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

/// Derives the name of a template: `ghcr.io/a/python:3.12-slim` becomes `python-3.12-slim`.
pub(crate) fn name_of(reference: &str) -> Result<TemplateName, InvalidFormat> {
    let (tagged, _digest) = reference.split_once('@').unwrap_or((reference, ""));
    let last = tagged.rsplit('/').next().unwrap_or(tagged);
    let name: String = last.strip_suffix(":latest").unwrap_or(last).replace(':', "-");
    name.chars().take(MAX_NAME).collect::<String>().parse()
}

/// Reads a password from the first line of standard input.
fn read_password() -> Result<String, Error> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// The progress bar of the present phase.
#[derive(Default)]
struct Shown {
    phase: String,
    bar: Option<ProgressBar>,
}

impl Shown {
    fn update(&mut self, job: &Job, output: &Output) {
        if self.phase != job.phase {
            self.phase.clone_from(&job.phase);
            let text = match job.phase.as_str() {
                "resolve" => "looking for the image",
                "download" => "downloading",
                "unpack" => "unpacking",
                "write" => "writing the file system",
                "import" => "making the template",
                other => other,
            };
            self.bar = Some(output.bar(text, (job.total_bytes > 0).then_some(job.total_bytes)));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(job.done_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_template_comes_from_the_image() {
        for (reference, name) in [
            ("nginx", "nginx"),
            ("nginx:latest", "nginx"),
            ("python:3.12-slim", "python-3.12-slim"),
            ("localhost:5000/a/b:1@sha256:00", "b-1"),
            ("ghcr.io/owner/tool@sha256:00", "tool"),
        ] {
            assert_eq!(name_of(reference).unwrap().as_str(), name);
        }
        assert!(name_of("").is_err());
    }
}

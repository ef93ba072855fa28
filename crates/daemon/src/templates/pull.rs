//! Pulls a template from a registry, as a job.
//!
//! Layers and intermediate files are in the pool, and are admitted like disks. The job can be
//! cancelled until the file system is complete. Then the file system becomes a template, like an
//! import.

use crate::host::error::ServiceError;
use crate::host::jobs::{JobEntry, RunningJob};
use crate::host::{BASE_TEMPLATE, Host, blocking, fault_point};
use scalebox_api::{EventKind, Job, PullTemplate, TemplateName};
use scalebox_images::oci::{
    Credentials, Deadlines, LayerCache, Limits, Made, Phase, PullRequest, Room, Supervisor, Task, complete_reference,
    pull as pull_image,
};
use scalebox_storage::{ConvertedImage, PulledImage, StorageError};
use scalebox_units::Bytes;
use serde_json::json;
use std::error::Error;
use std::sync::Arc;
use tracing::Instrument;

/// Maximum size of the cache of layers.
const MAX_CACHE: Bytes = Bytes::from_mib(10 << 10);

/// The kind of the jobs.
pub(crate) const KIND: &str = "pull";

/// Starts to pull an image as the template `name`.
///
/// # Errors
/// 400 for a malformed name or reference; 403 for [`BASE_TEMPLATE`]; 409 if the name is in use, or
/// a job makes the template already; 503 if too many jobs are running.
pub(crate) async fn pull(host: &Host, name: String, request: PullTemplate) -> Result<Job, ServiceError> {
    require_unprotected(&name)?;
    let form = |form| ServiceError::invalid(format!("the template name {form}"));
    let parsed: TemplateName = name.parse().map_err(form)?;
    let reference = complete_reference(&request.reference)
        .map_err(|error| ServiceError::invalid_field("reference", error.to_string()))?;
    let job = host.jobs.begin(KIND, &name, Some(reference))?;
    host.detached(|host| async move { start(&host, parsed, request, job).await })
        .await
}

/// Checks that a template may be made by pulling.
///
/// # Errors
/// 403 for [`BASE_TEMPLATE`].
pub(crate) fn require_unprotected(name: &str) -> Result<(), ServiceError> {
    match name {
        BASE_TEMPLATE => Err(ServiceError::Forbidden(format!(
            "the template {BASE_TEMPLATE} is protected: choose another name"
        ))),
        _ => Ok(()),
    }
}

/// Starts the work of a job. The name is checked while the job keeps others from making a template
/// of this name.
///
/// # Errors
/// 409 if the name is in use. The job is then withdrawn.
pub(crate) async fn start(
    host: &Host,
    name: TemplateName,
    request: PullTemplate,
    job: RunningJob,
) -> Result<Job, ServiceError> {
    if let Err(error) = require_free(host, &name, request.replace).await {
        host.jobs.withdraw(&job, error.clone());
        return Err(error);
    }
    let started = job.describe();
    let details = json!({ "job": started.id, "kind": started.kind, "template": name });
    host.events.publish(EventKind::JobStarted, None, details);
    let running = run(host.clone(), name, request, job);
    host.tasks.spawn(running.in_current_span());
    Ok(started)
}

async fn require_free(host: &Host, name: &TemplateName, replace: bool) -> Result<(), ServiceError> {
    if replace {
        return host.templates_in_use.require_idle(name.as_str());
    }
    let (pool, wanted) = (Arc::clone(&host.pool), name.clone());
    match blocking(move || Ok::<_, ServiceError>(pool.template(&wanted))).await? {
        Ok(_) => Err(StorageError::TemplateExists(name.to_string()).into()),
        Err(StorageError::NoTemplate(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Runs the job, and reports its end.
async fn run(host: Host, name: TemplateName, request: PullTemplate, job: RunningJob) {
    let made = tokio::select! {
        made = make(&host, &request, job.entry()) => Some(made),
        () = job.cancelled() => None,
        () = host.closing.cancelled() => None,
    };
    let (status, error) = match made {
        None => ("cancelled", None),
        Some(Err(error)) => ("failed", Some(error)),
        Some(Ok(made)) => match import(&host, name, made, request.replace, &job).await {
            Ok(()) => ("done", None),
            Err(error) => ("failed", Some(error)),
        },
    };
    let error = error.map(Arc::new);
    let ended = job.end(status, error.clone());
    let mut details = json!({ "job": ended.id, "template": ended.template, "status": status });
    match &error {
        Some(error) => {
            tracing::warn!(job = ended.id, template = ended.template, %error, "job failed");
            details["reason"] = json!(error.sentence());
            host.cleanups.sweep_soon();
        }
        None => tracing::info!(job = ended.id, template = ended.template, status, "job ended"),
    }
    host.events.publish(EventKind::JobEnded, None, details);
}

/// Pulls the image into a file system.
async fn make(host: &Host, request: &PullTemplate, job: Arc<JobEntry>) -> Result<Made, ServiceError> {
    let pool = Arc::clone(&host.pool);
    let (work, cache) = blocking(move || {
        let work = pool.build_dir()?;
        let cache = LayerCache::open(&pool.layers_dir()).map_err(ServiceError::from)?;
        Ok::<_, ServiceError>((work, cache))
    })
    .await?;
    let limits = Limits {
        max_disk: host.settings.max_disk_size.bytes(),
        ..Limits::default()
    };
    let watch = Watch {
        host: host.clone(),
        job,
    };
    let credentials = request.username.clone().zip(request.password.clone());
    let wanted = PullRequest {
        reference: request.reference.clone(),
        credentials: credentials.map(|(username, password)| Credentials { username, password }),
        insecure: request.insecure,
        mirrors: host.settings.registry_mirrors.clone(),
        deadlines: Deadlines::default(),
    };
    let made = pull_image(&wanted, &cache, &work, &Task::new(Arc::new(watch), limits)).await?;
    blocking(move || cache.prune(MAX_CACHE)).await?;
    Ok(made)
}

/// Makes the file system a template.
async fn import(
    host: &Host,
    name: TemplateName,
    made: Made,
    replace: bool,
    job: &JobEntry,
) -> Result<(), ServiceError> {
    fault_point("pull: file system made")?;
    report(host, job, "import", 0, 0);
    let (pool, template) = (Arc::clone(&host.pool), name.to_string());
    if replace {
        host.templates_in_use.require_idle(&template)?;
    }
    blocking(move || {
        let pulled = made.reference.clone().zip(made.digest.as_ref());
        let image = ConvertedImage {
            path: &made.image,
            pulled: pulled.map(|(reference, digest)| PulledImage {
                reference,
                digest: digest.to_string(),
            }),
            config: made.config.clone(),
            init: Some(made.init),
            edited_files: &[],
        };
        pool.import_converted(&name, image, replace)
    })
    .await?;
    host.cleanups.sweep_soon();
    tracing::info!(template, "template pulled");
    host.events
        .publish(EventKind::TemplateCreated, None, json!({ "template": template }));
    Ok(())
}

/// Admits the space of a pull, and passes on its progress.
struct Watch {
    host: Host,
    job: Arc<JobEntry>,
}

impl Supervisor for Watch {
    fn reserve(&self, bytes: Bytes) -> Result<Room, Box<dyn Error + Send + Sync>> {
        Ok(Box::new(self.host.pool.admit(bytes)?))
    }

    fn progress(&self, phase: Phase, done: Bytes, total: Bytes) {
        let phase = match phase {
            Phase::Download => "download",
            Phase::Unpack => "unpack",
            Phase::Write => "write",
        };
        report(&self.host, &self.job, phase, done.as_u64(), total.as_u64());
    }
}

fn report(host: &Host, job: &JobEntry, phase: &str, done: u64, total: u64) {
    if let Some(job) = job.progress(phase, done, total) {
        let details = json!({ "job": job.id, "phase": phase, "done_bytes": done, "total_bytes": total });
        host.events.publish(EventKind::JobProgress, None, details);
    }
}

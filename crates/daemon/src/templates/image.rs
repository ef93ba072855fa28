//! The template of an image in a registry, for `POST /vms` with `image`: found, or pulled.

use crate::host::error::ServiceError;
use crate::host::jobs::{Begun, JobEntry};
use crate::host::templates_in_use::TemplateInUse;
use crate::host::{Host, blocking};
use crate::templates::pull;
use scalebox_api::{ImageReference, PullTemplate, TemplateName};
use scalebox_images::oci::complete_reference;
use scalebox_storage::{StorageError, TemplateSource};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

const FIELD: &str = "image";

/// An image, and the template that it becomes.
pub(crate) struct Image {
    /// The complete reference.
    reference: String,
    template: TemplateName,
}

impl Image {
    /// Derives the template of an image.
    ///
    /// # Errors
    /// 400 if the reference is malformed, or no name can be derived from it.
    pub(crate) fn of(image: &ImageReference) -> Result<Image, ServiceError> {
        let reference = complete_reference(image.as_str())
            .map_err(|error| ServiceError::invalid_field(FIELD, error.to_string()))?;
        let template = image.template_name().map_err(|_| {
            ServiceError::invalid_field(
                FIELD,
                format!(
                    "no name of a template can be derived from the image {image}: \
                     pull it under a name, and send that as template"
                ),
            )
        })?;
        Ok(Image { reference, template })
    }

    /// Returns the name of the template.
    pub(crate) fn template(&self) -> &TemplateName {
        &self.template
    }

    /// Finds the template. It is neither deleted nor replaced until the returned guard is dropped.
    ///
    /// # Errors
    /// 409 if the template of this name is not this image.
    pub(crate) async fn find(&self, host: &Host) -> Result<Option<TemplateInUse>, ServiceError> {
        let held = host.templates_in_use.hold(self.template.as_str());
        let (pool, name) = (Arc::clone(&host.pool), self.template.clone());
        let found = blocking(move || match pool.template(&name) {
            Ok(template) => Ok(Some(template)),
            Err(StorageError::NoTemplate(_)) => Ok(None),
            Err(error) => Err(error),
        });
        let Some(found) = found.await? else { return Ok(None) };
        let other = match found.source {
            Some(TemplateSource::Pull(pulled)) if pulled.reference == self.reference => return Ok(Some(held)),
            Some(TemplateSource::Pull(pulled)) => format!("is the image {}", pulled.reference),
            _ => "was not pulled from a registry".to_owned(),
        };
        Err(ServiceError::NameTaken(format!(
            "the image {} would become the template {}, which {other}: \
             pull the image under another name, and send that as template",
            self.reference, self.template
        )))
    }

    /// Pulls the image, or waits for the job that pulls it already. The job continues if this
    /// future is dropped. Returns the guard of [`Image::find`].
    ///
    /// # Errors
    /// 504 after `within`; those of the job; 409 if the job is cancelled, or makes the template of
    /// another image; 503 if too many jobs are running.
    pub(crate) async fn pull(&self, host: &Host, within: Duration) -> Result<TemplateInUse, ServiceError> {
        let deadline = Instant::now() + within;
        loop {
            let job = self.begin(host).await?;
            if timeout_at(deadline, job.ended()).await.is_err() {
                return Err(self.timeout(&job, within));
            }
            match self.outcome(host, &job) {
                // Another pull or import has made the template since it was looked for.
                Ok(()) | Err(ServiceError::NameTaken(_)) => {}
                Err(error) => return Err(error),
            }
            // If it was deleted already, it is pulled again.
            if let Some(found) = self.find(host).await? {
                return Ok(found);
            }
        }
    }

    async fn begin(&self, host: &Host) -> Result<Arc<JobEntry>, ServiceError> {
        pull::require_unprotected(self.template.as_str())?;
        let job = match host
            .jobs
            .begin_or_join(pull::KIND, self.template.as_str(), &self.reference)?
        {
            Begun::Running(job) => return Ok(job),
            Begun::New(job) => job,
        };
        let (entry, name) = (job.entry(), self.template.clone());
        let request = PullTemplate::of(&self.reference);
        let started = host.detached(|host| async move { pull::start(&host, name, request, job).await });
        // A job that could not be started has ended with this error.
        let _started = started.await;
        Ok(entry)
    }

    fn timeout(&self, job: &JobEntry, within: Duration) -> ServiceError {
        let id = job.describe().id;
        ServiceError::PullTimeout {
            message: format!(
                "{} is still being pulled after {} s, and no VM was created: \
                 wait until {id} has ended, and repeat the request",
                self.reference,
                within.as_secs()
            ),
            details: json!({ "job": id, "template": self.template }),
        }
    }

    /// Returns the result of a job that has ended.
    fn outcome(&self, host: &Host, job: &JobEntry) -> Result<(), ServiceError> {
        let (now, reference) = (job.describe(), &self.reference);
        match job.failure().map(|failure| (*failure).clone()) {
            Some(ServiceError::Invalid { message, .. }) => Err(ServiceError::invalid_field(FIELD, message)),
            Some(failure) => Err(failure),
            None if now.status == "done" => Ok(()),
            None if host.closing.is_cancelled() => Err(ServiceError::NotReady(
                "scaleboxd is being stopped: try again later".to_owned(),
            )),
            None => Err(ServiceError::WrongState(format!(
                "the pull of {reference} by {} was cancelled: repeat the request to begin another",
                now.id
            ))),
        }
    }
}

//! Jobs: `POST /templates/{name}/pull`, `GET /jobs`, and `GET` and `DELETE /jobs/{job}`.

use crate::host::Host;
use crate::host::error::ServiceError;
use crate::host::jobs::JobEntry;
use crate::http::error;
use crate::http::extract::{RawBody, Segment};
use crate::templates;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::IntoResponse;
use scalebox_api::{Job, JobList, PullTemplate};

/// Pulls an image from a registry as a template. The response comes at once; the job continues.
#[utoipa::path(
    post, path = "/templates/{name}/pull", tag = "Templates", request_body = PullTemplate,
    params(("name" = String, Path, description = "Name of the template to create.")),
    responses(
        (status = 202, body = Job, headers(("Location" = String, description = "Path of the job."))),
        (status = 400, description = "A field is invalid; the error names it."),
        (status = 403, description = "The template name is protected."),
        (status = 409, description = "The name is in use, or a job makes the template already."),
        (status = 503, description = "Too many jobs are running, or the pool is not mounted."),
    )
)]
pub(crate) async fn pull(
    State(host): State<Host>,
    Segment(name): Segment,
    RawBody(body): RawBody,
) -> Result<impl IntoResponse, ServiceError> {
    let request = PullTemplate::parse(&body)?;
    let job = templates::pull::pull(&host, name, request).await?;
    let location = format!("/jobs/{}", job.id);
    Ok((StatusCode::ACCEPTED, [(LOCATION, location)], Json(job)))
}

/// Lists running jobs and those that ended lately, oldest first.
#[utoipa::path(get, path = "/jobs", tag = "Jobs", responses((status = 200, body = JobList)))]
pub(crate) async fn list(State(host): State<Host>) -> Json<JobList> {
    Json(JobList {
        jobs: host.jobs.list().iter().map(|job| shown(job)).collect(),
    })
}

/// Returns one job.
#[utoipa::path(
    get, path = "/jobs/{job}", tag = "Jobs", params(("job" = String, Path, description = "Id of the job.")),
    responses((status = 200, body = Job), (status = 404, description = "No such job."))
)]
pub(crate) async fn get(State(host): State<Host>, Segment(id): Segment) -> Result<Json<Job>, ServiceError> {
    host.jobs.get(&id).map(|job| Json(shown(&job)))
}

/// Cancels a running job. It ends soon afterwards, and its files are removed.
#[utoipa::path(
    delete, path = "/jobs/{job}", tag = "Jobs", params(("job" = String, Path, description = "Id of the job.")),
    responses((status = 202, body = Job), (status = 404, description = "No such job."), (status = 409, description = "The job has ended."))
)]
pub(crate) async fn cancel(
    State(host): State<Host>,
    Segment(id): Segment,
) -> Result<(StatusCode, Json<Job>), ServiceError> {
    let job = host.jobs.get(&id)?;
    job.cancel()?;
    Ok((StatusCode::ACCEPTED, Json(shown(&job))))
}

/// Describes a job, with its error in the form of all errors.
fn shown(entry: &JobEntry) -> Job {
    Job {
        error: entry.failure().map(|failure| error::body(&failure)),
        ..entry.describe()
    }
}

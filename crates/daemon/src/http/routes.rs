//! The HTTP API: routes, authentication, limits on a request, and the request id in every log line.

use crate::host::Host;
use crate::host::error::{ServiceError, quoted};
use crate::http::auth::{CLOSE_AFTER_RESPONSE, Guard, require_token};
use crate::http::extract::{RawBody, Segment};
use crate::http::metrics::{self, Metrics};
use crate::http::query::Params;
use crate::http::request_id::with_request_id;
use crate::http::{attach, console, event_stream, exec, files, info, jobs, openapi, transfers};
use crate::settings::Token;
use crate::vm::{self, snapshot, view};
use crate::{pool, templates};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::IntoResponse;
use axum::{Extension, Json, Router};
use scalebox_api::{
    CreateVm, CreateVmQuery, Health, HostInfo, IdempotencyKey, PoolInfo, ResizePool, Snapshot, SnapshotVm, Template,
    TemplateList, Trimmed, UpdateVm, Vm, VmList, WaitFor,
};
use scalebox_units::Gib;
use std::sync::Arc;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// Returns all routes; every route except `/health` requires the token.
pub(crate) fn router(host: Host, token: &Token, metrics: Arc<Metrics>) -> Router {
    let guard = Arc::new(Guard::new(token));
    let guarded = OpenApiRouter::new()
        .routes(routes!(list_vms, create_vm))
        .routes(routes!(get_vm, update_vm, delete_vm))
        .routes(routes!(start_vm))
        .routes(routes!(stop_vm))
        .routes(routes!(restart_vm))
        .routes(routes!(trim_vm))
        .routes(routes!(snapshot_vm))
        .routes(routes!(exec::run))
        .routes(routes!(exec::list))
        .routes(routes!(exec::get))
        .routes(routes!(exec::output))
        .routes(routes!(exec::stdin))
        .routes(routes!(exec::signal))
        .routes(routes!(exec::resize))
        .routes(routes!(attach::attach))
        .routes(routes!(files::read, files::write, files::remove))
        .routes(routes!(files::make_directory))
        .routes(routes!(files::rename))
        .routes(routes!(console::stats))
        .routes(routes!(console::console))
        .routes(routes!(list_templates))
        .routes(routes!(get_template, delete_template))
        .routes(routes!(transfers::export))
        .routes(routes!(transfers::import))
        .routes(routes!(jobs::pull))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::get, jobs::cancel))
        .routes(routes!(pool))
        .routes(routes!(grow_pool))
        .routes(routes!(shrink_pool))
        .routes(routes!(trim_pool))
        .routes(routes!(info))
        .routes(routes!(event_stream::events))
        .routes(routes!(metrics::metrics))
        .routes(routes!(openapi::openapi))
        .with_state(host.clone());
    let (guarded, described) = guarded.split_for_parts();
    let (open, mut document) = OpenApiRouter::with_openapi(openapi::Api::openapi())
        .routes(routes!(health))
        .split_for_parts();
    document.merge(described);
    let document = openapi::Served::new(&openapi::complete(&document, host.limits()));
    let guarded = guarded
        .fallback(no_such_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(Extension(document))
        .layer(Extension(Arc::clone(&metrics)))
        .layer(from_fn_with_state(guard, require_token));
    open.method_not_allowed_fallback(method_not_allowed)
        .merge(guarded)
        .layer(from_fn_with_state(metrics, metrics::count))
        .layer(from_fn(with_request_id))
}

/// Reports that the daemon is serving requests.
#[utoipa::path(get, path = "/health", tag = "Host", security(()), responses((status = 200, body = Health)))]
async fn health() -> impl IntoResponse {
    (CLOSE_AFTER_RESPONSE, Json(Health::ok()))
}

/// Creates a VM and starts it. An `image` is pulled first, if it is not a template yet.
#[utoipa::path(
    post, path = "/vms", tag = "VMs", request_body = CreateVm,
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "While the VM exists, repeating the request with the same key returns this VM instead of creating another."),
        ("wait" = Option<String>, Query, description = "`agent` responds when the agent in the guest does, which is when commands can run."),
        ("wait_seconds" = Option<u64>, Query, description = "Maximum time to wait for the pull of an image, and then once more for the agent: 1 to 600; by default 120."),
    ),
    responses(
        (status = 201, body = Vm, description = "The VM. Its guest is still booting, unless the request waits for its agent.", headers(
            ("Idempotent-Replayed" = Option<String>, description = "`true` if an earlier request with the same key created the VM.")
        )),
        (status = 400, description = "A field is invalid; the error names it."),
        (status = 403, description = "The registry denies access to the image, or the template name is protected."),
        (status = 404, description = "No such template, or the registry does not have the image."),
        (status = 409, description = "The name is in use, another template has the name of the image's, the pull was cancelled, a request with this key is still running, or the VM was deleted while it was being created."),
        (status = 422, description = "The key was used for a different request."),
        (status = 503, description = "The host is not ready: it has no guest kernel or no free port, the pool is not mounted, the registry cannot be reached, or too many jobs are running."),
        (status = 504, description = "The pull did not end in time: it continues, no VM was created, and `details` has its `job`. Or the agent did not respond in time: the VM is kept, and `details` has its `id` and `name`."),
        (status = 507, description = "The disk does not fit into the pool, or the state disk is full."),
    )
)]
async fn create_vm(
    State(host): State<Host>,
    uri: Uri,
    headers: HeaderMap,
    RawBody(body): RawBody,
) -> Result<impl IntoResponse, ServiceError> {
    let query = Params::parse(&uri, &["wait", "wait_seconds"])?;
    let query = CreateVmQuery::parse(query.texts()?)?;
    let mut request = CreateVm::parse(&body, host.limits())?;
    query.check(&request)?;
    request.idempotency_key = idempotency_key(&headers)?;
    let (vm, replayed) = vm::create(&host, request, query.max_wait()).await?;
    if query.wait == Some(WaitFor::Agent) {
        vm::guest::wait_for_agent(&host, &vm.id, query.max_wait()).await?;
    }
    // A replay has the same status as the first response, as
    // draft-ietf-httpapi-idempotency-key-header requires; the header marks it.
    let mark = replayed.then_some([(IDEMPOTENT_REPLAYED, "true")]);
    Ok((StatusCode::CREATED, mark, Json(vm)))
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, ServiceError> {
    let mut keys = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(key) = keys.next() else {
        return Ok(None);
    };
    if keys.next().is_some() {
        let twice = "the header Idempotency-Key was sent more than once: send one key per VM";
        return Err(ServiceError::invalid(twice.to_owned()));
    }
    let key = String::from_utf8_lossy(key.as_bytes()).parse();
    key.map(Some)
        .map_err(|form| ServiceError::invalid(format!("the header Idempotency-Key {form}")))
}

/// Lists all VMs, oldest first.
#[utoipa::path(get, path = "/vms", tag = "VMs", responses((status = 200, body = VmList)))]
async fn list_vms(State(host): State<Host>) -> Json<VmList> {
    Json(VmList { vms: view::list(&host) })
}

/// Returns one VM.
#[utoipa::path(get, path = "/vms/{vm}", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")), responses((status = 200, body = Vm), (status = 404, description = "No such VM.")))]
async fn get_vm(State(host): State<Host>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    view::get(&host, &vm).map(Json)
}

/// Deletes a VM, running or not, with its disk.
#[utoipa::path(
    delete, path = "/vms/{vm}", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 204), (status = 404, description = "No such VM."), (status = 409, description = "Another operation is running on the VM."))
)]
async fn delete_vm(State(host): State<Host>, Segment(vm): Segment) -> Result<StatusCode, ServiceError> {
    vm::delete(&host, vm).await.map(|()| StatusCode::NO_CONTENT)
}

/// Changes a VM. The disk of a running VM grows live.
#[utoipa::path(
    patch, path = "/vms/{vm}", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")), request_body = UpdateVm,
    responses(
        (status = 200, body = Vm, description = "The changed VM. `disk` reports whether the guest's file system has grown."),
        (status = 400, description = "A field is invalid; the error names it. Disks do not shrink."),
        (status = 404, description = "No such VM."),
        (status = 409, description = "The disk cannot grow: its file system is damaged, or the VM's hypervisor does not respond."),
        (status = 503, description = "The pool is not mounted."),
        (status = 507, description = "The larger disk does not fit into the pool, or the state disk is full."),
    )
)]
async fn update_vm(
    State(host): State<Host>,
    Segment(vm): Segment,
    RawBody(body): RawBody,
) -> Result<Json<Vm>, ServiceError> {
    let request = UpdateVm::parse(&body, host.limits())?;
    vm::update(&host, vm, request).await.map(Json)
}

/// Starts a stopped VM.
#[utoipa::path(
    post, path = "/vms/{vm}/start", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Vm), (status = 404, description = "No such VM."), (status = 409, description = "The VM is already running, or another operation is running on it."), (status = 503, description = "The host is not ready: it has no guest kernel, or the pool is not mounted."))
)]
async fn start_vm(State(host): State<Host>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    vm::start(&host, vm).await.map(Json)
}

/// Shuts a VM down and starts it again. A stopped VM is started.
#[utoipa::path(
    post, path = "/vms/{vm}/restart", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Vm), (status = 404, description = "No such VM."), (status = 409, description = "Another operation is running on the VM."), (status = 503, description = "The host is not ready: it has no guest kernel, or the pool is not mounted."))
)]
async fn restart_vm(State(host): State<Host>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    vm::restart(&host, vm).await.map(Json)
}

/// Shuts a VM down. A guest that has not shut down after a minute is killed.
#[utoipa::path(
    post, path = "/vms/{vm}/stop", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Vm), (status = 404, description = "No such VM."), (status = 409, description = "The VM is not running, or another operation is running on it."))
)]
async fn stop_vm(State(host): State<Host>, Segment(vm): Segment) -> Result<Json<Vm>, ServiceError> {
    vm::stop(&host, vm).await.map(Json)
}

/// Discards the blocks of deleted files in the guest, which returns their space to the pool.
#[utoipa::path(
    post, path = "/vms/{vm}/trim", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses((status = 200, body = Trimmed), (status = 404, description = "No such VM."), (status = 409, description = "The VM is not running, or its guest agent does not respond."))
)]
async fn trim_vm(State(host): State<Host>, Segment(vm): Segment) -> Result<Json<Trimmed>, ServiceError> {
    vm::trim_vm(&host, vm).await.map(Json)
}

/// Creates a template from a VM's disk. The VM may be running.
#[utoipa::path(
    post, path = "/vms/{vm}/snapshot", tag = "VMs", params(("vm" = String, Path, description = "Id or name of the VM.")), request_body = SnapshotVm,
    responses(
        (status = 201, body = Snapshot),
        (status = 400, description = "A field is invalid; the error names it."),
        (status = 403, description = "The template name is protected."),
        (status = 404, description = "No such VM."),
        (status = 409, description = "The name is in use, another operation is running on the VM, or its disk cannot become a template."),
        (status = 503, description = "The pool is not mounted."),
        (status = 507, description = "The template does not fit into the pool."),
    )
)]
async fn snapshot_vm(
    State(host): State<Host>,
    Segment(vm): Segment,
    RawBody(body): RawBody,
) -> Result<(StatusCode, Json<Snapshot>), ServiceError> {
    let request = SnapshotVm::parse(&body)?;
    Ok((StatusCode::CREATED, Json(snapshot::snapshot(&host, vm, request).await?)))
}

/// Lists all templates.
#[utoipa::path(get, path = "/templates", tag = "Templates", responses((status = 200, body = TemplateList), (status = 503, description = "The pool is not mounted.")))]
async fn list_templates(State(host): State<Host>) -> Result<Json<TemplateList>, ServiceError> {
    Ok(Json(TemplateList {
        templates: templates::list(&host).await?,
    }))
}

/// Returns one template.
#[utoipa::path(
    get, path = "/templates/{name}", tag = "Templates", params(("name" = String, Path, description = "Name of the template.")),
    responses((status = 200, body = Template), (status = 404, description = "No such template."), (status = 503, description = "The pool is not mounted."))
)]
async fn get_template(State(host): State<Host>, Segment(name): Segment) -> Result<Json<Template>, ServiceError> {
    templates::get(&host, name).await.map(Json)
}

/// Deletes a template. VMs created from it are kept.
#[utoipa::path(
    delete, path = "/templates/{name}", tag = "Templates", params(("name" = String, Path, description = "Name of the template.")),
    responses(
        (status = 204),
        (status = 403, description = "The template is protected."),
        (status = 404, description = "No such template."),
        (status = 409, description = "A VM is being created from the template."),
        (status = 503, description = "The pool is not mounted."),
    )
)]
async fn delete_template(State(host): State<Host>, Segment(name): Segment) -> Result<StatusCode, ServiceError> {
    templates::delete(&host, name).await.map(|()| StatusCode::NO_CONTENT)
}

/// Returns the pool's capacity, free space and commitments.
#[utoipa::path(get, path = "/pool", tag = "Pool", responses((status = 200, body = PoolInfo), (status = 503, description = "The pool is not mounted.")))]
async fn pool(State(host): State<Host>) -> Result<Json<PoolInfo>, ServiceError> {
    pool::figures(&host).await.map(Json)
}

/// Grows the pool while it is in use. Without a size, it grows to 80 % of the space on the host
/// disk.
#[utoipa::path(
    post, path = "/pool/grow", tag = "Pool", request_body = Option<ResizePool>,
    responses(
        (status = 200, body = PoolInfo),
        (status = 400, description = "The size is not larger than the pool or exceeds the space available, or the pool is on an existing file system, which Scalebox does not resize."),
        (status = 409, description = "The pool is already being resized."),
        (status = 503, description = "The pool is not mounted."),
    )
)]
async fn grow_pool(State(host): State<Host>, RawBody(body): RawBody) -> Result<Json<PoolInfo>, ServiceError> {
    let request = ResizePool::parse_grow(&body)?;
    pool::grow(&host, request.size_gib.map(Gib::new)).await.map(Json)
}

/// Shrinks the pool while it is in use.
#[utoipa::path(
    post, path = "/pool/shrink", tag = "Pool", request_body = ResizePool,
    responses(
        (status = 200, body = PoolInfo),
        (status = 400, description = "The size is not smaller than the pool, or is too small for the used, committed or reserved space."),
        (status = 409, description = "The pool is already being resized."),
        (status = 503, description = "The pool is not mounted."),
    )
)]
async fn shrink_pool(State(host): State<Host>, RawBody(body): RawBody) -> Result<Json<PoolInfo>, ServiceError> {
    let size = ResizePool::parse_shrink(&body)?;
    pool::shrink(&host, Gib::new(size)).await.map(Json)
}

/// Discards the pool's free blocks, which returns their space to the host disk.
#[utoipa::path(post, path = "/pool/trim", tag = "Pool", responses((status = 200, body = Trimmed), (status = 409, description = "The pool is being resized."), (status = 503, description = "The pool is not mounted.")))]
async fn trim_pool(State(host): State<Host>) -> Result<Json<Trimmed>, ServiceError> {
    pool::trim(&host).await.map(Json)
}

/// Returns information about the host, its VMs and its limits.
#[utoipa::path(get, path = "/info", tag = "Host", responses((status = 200, body = HostInfo), (status = 503, description = "The pool is not mounted.")))]
async fn info(State(host): State<Host>) -> Result<Json<HostInfo>, ServiceError> {
    info::info(&host).await.map(Json)
}

async fn no_such_route(uri: Uri) -> ServiceError {
    ServiceError::NotFound(format!(
        "there is no route {}: GET /openapi.json lists the routes",
        quoted(uri.path())
    ))
}

async fn method_not_allowed(method: Method, uri: Uri) -> ServiceError {
    let (path, method) = (quoted(uri.path()), quoted(method.as_str()));
    ServiceError::MethodNotAllowed(format!(
        "{path} does not support {method}: the header Allow lists the methods"
    ))
}

//! `GET /metrics`: metrics for Prometheus, in its text format
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
//!
//! Requests are counted as they happen, by route and status, which covers all operations and their
//! outcomes. Current values (VMs, the pool) are read for each scrape. The number of label values is
//! limited to the API's routes and statuses, whatever clients send.

use crate::host::Host;
use crate::host::error::ServiceError;
use crate::pool;
use axum::Extension;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use prometheus::{
    Encoder, Gauge, HistogramOpts, HistogramVec, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use scalebox_api::VmStatus;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Upper bounds in seconds. A response from memory takes less than the first; a stop that the guest
/// ignores takes about as long as the last but one.
const BUCKETS: [f64; 12] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 10.0, 60.0, 300.0,
];

/// The metrics that accumulate over the daemon's lifetime.
pub(crate) struct Metrics {
    registry: Registry,
    requests: HistogramVec,
    refusals: IntCounter,
}

impl Metrics {
    /// Creates all metrics at zero; the process start time is now.
    ///
    /// # Errors
    /// [`prometheus::Error`] if a name is invalid or used twice.
    pub(crate) fn new() -> Result<Metrics, prometheus::Error> {
        let registry = Registry::new();
        let requests = HistogramVec::new(
            HistogramOpts::new(
                "scalebox_http_request_duration_seconds",
                "Time from a request's head to its response's head, by route and status.",
            )
            .buckets(BUCKETS.to_vec()),
            &["method", "route", "status"],
        )?;
        let refusals = IntCounter::new(
            "scalebox_storage_refusals_total",
            "Requests rejected because they do not fit into the pool (507).",
        )?;
        let started = Gauge::new(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds.",
        )?;
        // A clock before 1970 counts as zero.
        started.set(
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0.0, |now| now.as_secs_f64()),
        );
        let build = IntGaugeVec::new(
            Opts::new("scalebox_build_info", "Always 1; the label is the release."),
            &["version"],
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(refusals.clone()))?;
        registry.register(Box::new(started))?;
        registry.register(Box::new(build))?;
        Ok(Metrics {
            registry,
            requests,
            refusals,
        })
    }

    async fn text(&self, host: &Host) -> Result<Vec<u8>, ServiceError> {
        let pool = pool::figures(host).await?;
        let failed = |error: prometheus::Error| ServiceError::Internal(format!("cannot collect the metrics: {error}"));
        let mut families = self.registry.gather();
        families.extend(current(host, &pool).map_err(failed)?.gather());
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text).map_err(failed)?;
        Ok(text)
    }
}

/// Reads the current values.
fn current(host: &Host, pool: &scalebox_api::PoolInfo) -> Result<Registry, prometheus::Error> {
    let registry = Registry::new();
    let vms = IntGaugeVec::new(Opts::new("scalebox_vms", "VMs on the host, by status."), &["status"])?;
    for status in [VmStatus::Running, VmStatus::Stopped, VmStatus::Paused, VmStatus::Failed] {
        vms.with_label_values(&[status.as_str()]).set(0);
    }
    for status in host.vms.statuses() {
        vms.with_label_values(&[status.as_str()]).inc();
    }
    registry.register(Box::new(vms))?;
    register_counters(&registry, host)?;
    let cleanups = IntGauge::new(
        "scalebox_cleanups_pending",
        "Stopped and deleted VMs whose cleanup on the host failed and is being retried.",
    )?;
    cleanups.set(i64::try_from(pool.cleanups_pending).unwrap_or(i64::MAX));
    registry.register(Box::new(cleanups))?;
    let sizes = [
        ("capacity", "Size of the pool's file system.", Some(pool.capacity_bytes)),
        (
            "free",
            "Bytes that can be written, limited by the pool, its metadata and the host disk.",
            Some(pool.free_bytes),
        ),
        ("used", "Bytes written.", Some(pool.used_bytes)),
        ("committed", "Sum of all disk sizes.", Some(pool.committed_bytes)),
        (
            "commitment_limit",
            "Maximum commitment.",
            Some(pool.commitment_limit_bytes),
        ),
        (
            "reserved",
            "Space reserved for operations that are running.",
            Some(pool.reserved_bytes),
        ),
        ("buffer", "Always kept free.", Some(pool.buffer_bytes)),
        (
            "host_free",
            "Free space of the file system that contains the pool's image.",
            pool.host_free_bytes,
        ),
        ("unallocated", "Unallocated by btrfs.", Some(pool.unallocated_bytes)),
        ("metadata", "Allocated to metadata.", Some(pool.metadata_bytes)),
        ("metadata_used", "Metadata in use.", Some(pool.metadata_used_bytes)),
    ];
    for (name, help, bytes) in sizes {
        let Some(bytes) = bytes else { continue };
        let gauge = IntGauge::new(format!("scalebox_pool_{name}_bytes"), help)?;
        gauge.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        registry.register(Box::new(gauge))?;
    }
    Ok(registry)
}

fn register_counters(registry: &Registry, host: &Host) -> Result<(), prometheus::Error> {
    let events = IntCounter::new(
        "scalebox_events_total",
        "Events published by GET /events since the start.",
    )?;
    events.inc_by(host.events.count());
    registry.register(Box::new(events))?;
    let execs = IntCounter::new(
        "scalebox_execs_total",
        "Commands started in guests by POST /vms/{vm}/exec since the start.",
    )?;
    execs.inc_by(host.execs.total());
    registry.register(Box::new(execs))?;
    Ok(())
}

/// Returns metrics for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "Host",
    responses(
        (status = 200, content_type = "text/plain", body = String, description = "Metrics in the Prometheus text format."),
        (status = 503, description = "The pool is not mounted."),
    )
)]
pub(crate) async fn metrics(
    State(host): State<Host>,
    Extension(metrics): Extension<Arc<Metrics>>,
) -> Result<impl IntoResponse, ServiceError> {
    let text = metrics.text(&host).await?;
    Ok(([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text))
}

/// Counts each request with its duration and outcome.
pub(crate) async fn count(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = match *request.method() {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PATCH => "PATCH",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        // A client may invent methods.
        _ => "other",
    };
    let path = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let route = path.as_ref().map_or("none", MatchedPath::as_str);
    // Elsewhere, the disk of a guest may be full.
    let concerns_pool = !route.starts_with("/vms/{vm}/files") && !route.starts_with("/vms/{vm}/exec");
    if response.status() == StatusCode::INSUFFICIENT_STORAGE && concerns_pool {
        metrics.refusals.inc();
    }
    metrics
        .requests
        .with_label_values(&[method, route, response.status().as_str()])
        .observe(begun.elapsed().as_secs_f64());
    response
}

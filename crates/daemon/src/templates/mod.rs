//! The list of templates, their deletion, pulls and imports. Their transfers over HTTP are in
//! [`http`](crate::http).

pub(crate) mod image;
pub(crate) mod import;
pub(crate) mod pull;

use crate::host::error::ServiceError;
use crate::host::{BASE_TEMPLATE, Host, blocking, rfc3339, template_name, usage_tracker};
use crate::pool::kernels;
use scalebox_api::{EventKind, Template};
use scalebox_images::oci::LayerCache;
use scalebox_storage::TemplateSource;
use serde_json::json;
use std::sync::Arc;

/// Lists all templates.
///
/// # Errors
/// 500 if the pool cannot be read.
pub(crate) async fn list(host: &Host) -> Result<Vec<Template>, ServiceError> {
    let pool = Arc::clone(&host.pool);
    let templates = blocking(move || pool.templates()).await?;
    Ok(templates.into_iter().map(|template| describe(host, template)).collect())
}

/// Finds a template.
///
/// # Errors
/// 404.
pub(crate) async fn get(host: &Host, name: String) -> Result<Template, ServiceError> {
    let parsed = template_name(&name)?;
    let pool = Arc::clone(&host.pool);
    let template = blocking(move || pool.template(&parsed)).await?;
    Ok(describe(host, template))
}

/// Removes what pulls, imports and builds left that ended with an earlier daemon. Complete layers
/// stay for the next pull.
///
/// # Errors
/// If a file cannot be removed.
pub(crate) async fn remove_abandoned(host: &Host) -> Result<(), ServiceError> {
    let pool = Arc::clone(&host.pool);
    blocking(move || {
        LayerCache::open(&pool.layers_dir())?;
        let removed = scalebox_images::remove_abandoned(&pool.build_dir()?);
        removed.map_err(|error| ServiceError::Internal(error.to_string()))
    })
    .await
}

/// Describes a template, with the latest measurement of its blocks.
pub(crate) fn describe(host: &Host, template: scalebox_storage::Template) -> Template {
    let accounts = host.usage.latest();
    let pulled = match &template.source {
        Some(TemplateSource::Pull(pulled)) => Some(pulled.clone()),
        _ => None,
    };
    Template {
        storage: accounts
            .as_deref()
            .and_then(|accounts| usage_tracker::template_usage(accounts, &template)),
        size_bytes: template.size.as_u64(),
        used_bytes: template.used.as_u64(),
        created_at: rfc3339(template.created_at.try_into().unwrap_or(jiff::Timestamp::UNIX_EPOCH)),
        used_by: host.vms.count_from_template(template.name.as_str()),
        protected: template.name.as_str() == BASE_TEMPLATE,
        name: template.name.to_string(),
        source: template.source.as_ref().map(|source| source.as_str().to_owned()),
        source_vm: match &template.source {
            Some(TemplateSource::Snapshot(vm)) => Some(vm.to_string()),
            _ => None,
        },
        reference: pulled.as_ref().map(|pulled| pulled.reference.clone()),
        manifest_digest: pulled.map(|pulled| pulled.digest),
        config: template.config,
        init: template.init,
        kernel: template.kernel.map(Into::into),
        digest: template.digest,
    }
}

/// Deletes a template. VMs created from it are kept.
///
/// # Errors
/// 403 for [`BASE_TEMPLATE`]; 404; 409 while a VM is being created from it.
pub(crate) async fn delete(host: &Host, name: String) -> Result<(), ServiceError> {
    if name == BASE_TEMPLATE {
        return Err(ServiceError::Forbidden(format!(
            "the template {BASE_TEMPLATE} is protected and cannot be deleted"
        )));
    }
    let parsed = template_name(&name)?;
    host.templates_in_use.require_idle(&name)?;
    let pool = Arc::clone(&host.pool);
    blocking(move || pool.delete_template(&parsed)).await?;
    host.cleanups.sweep_soon();
    tracing::info!(template = name, "template deleted");
    host.events
        .publish(EventKind::TemplateDeleted, None, json!({ "template": name }));
    kernels::remove_unused(host).await;
    Ok(())
}

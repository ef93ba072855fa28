//! `GET /openapi.json`: the OpenAPI description of the API, generated from the routes
//! (<https://spec.openapis.org/oas/v3.1.0>).
//!
//! `routes!` registers a route together with its description, so no route lacks one. This module
//! adds the responses that are common to all routes, and the bounds that come from this host's
//! settings and size.

use crate::http::query::MAX_OFFSET;
use axum::Extension;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use scalebox_api::{CreateVmQuery, ErrorBody, ErrorCode, ImageReference, Limits, TemplateName};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use utoipa::openapi::OpenApi as Document;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

/// The parts that belong to no route: the API's name, its token, and the schema of every error.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Scalebox",
        description = "Disposable virtual machines from copy-on-write templates.\n\nEvery error is `{\"error\": \"…\", \"code\": \"…\"}`, with `field` if one field is wrong, and `details` if there is more data. \
            Programs should compare `code`: the sentences may change. \
            A method that is not described here gets 405 with the header `Allow`; an unknown path gets 404. \
            `HEAD` works wherever `GET` does. Maximum sizes are those of the host that serves this document.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(ErrorBody, ImageReference, TemplateName)),
    security(("token" = [])),
    modifiers(&TokenScheme),
    tags(
        (name = "VMs"), (name = "Exec", description = "Commands in VMs."), (name = "Files", description = "Files of VMs."), (name = "Templates"), (name = "Jobs"), (name = "Pool"), (name = "Host", description = "The host, its events and its metrics.")
    )
)]
pub(crate) struct Api;

struct TokenScheme;

impl Modify for TokenScheme {
    fn modify(&self, document: &mut Document) {
        let token = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(token));
    }
}

/// Matches the id or the name of a VM in a path.
const VM_REFERENCE: &str = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$";
const EXEC_ID: &str = "^(main|exec-[0-9a-f]{12})$";
const TEMPLATE_NAME: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$";
/// Matches an idempotency key, with or without quotes around it.
const IDEMPOTENCY_KEY: &str = r#"^([!#-\[\]-~]{1,255}|"[!#-\[\]-~]{1,255}")$"#;
/// Maximum event id: the largest integer that JSON numbers hold exactly in every language.
pub(crate) const MAX_EVENT_ID: u64 = (1 << 53) - 1;

/// Adds the common responses and this host's bounds to the description.
pub(crate) fn complete(document: &Document, limits: &Limits) -> Value {
    let mut document = serde_json::to_value(document).unwrap_or_else(|error| {
        tracing::error!(%error, "cannot write the OpenAPI description as JSON");
        json!({})
    });
    if let Some(paths) = document["paths"].as_object_mut() {
        for (path, item) in paths {
            for operation in item.as_object_mut().into_iter().flat_map(|item| item.values_mut()) {
                complete_operation(path, operation);
            }
        }
    }
    describe_bytes(&mut document["paths"]);
    document["paths"]["/events"]["get"]["responses"]["200"]["content"] = json!({
        "text/event-stream": { "schema": server_sent_event() }
    });
    // The types do not express that one body is optional, and that the other one requires its
    // field.
    document["paths"]["/pool/grow"]["post"]["requestBody"] =
        json!({ "content": json_body("ResizePool"), "required": false });
    document["paths"]["/pool/shrink"]["post"]["requestBody"]["content"] = json_body("ShrinkPool");
    document["components"]["schemas"]["ErrorBody"]["properties"]["code"]["enum"] = json!(ErrorCode::NAMES);
    bound_requests(&mut document["components"]["schemas"], limits);
    describe_sources(&mut document);
    without_links(&mut document);
    document
}

/// Describes the content of all media types that are bytes.
fn describe_bytes(value: &mut Value) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match key.as_str() {
                    "application/octet-stream" | "application/x-tar" | "application/zstd" => {
                        *value = json!({ "schema": { "type": "string", "format": "binary" } });
                    }
                    _ => describe_bytes(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(describe_bytes),
        _ => {}
    }
}

fn json_body(schema: &str) -> Value {
    json!({ "application/json": { "schema": reference(schema) } })
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

/// Returns the schema of one server-sent event, by its line names
/// (<https://spec.openapis.org/oas/v3.2.0#sequential-media-types>).
fn server_sent_event() -> Value {
    let event = json!({
        "type": "string", "contentMediaType": "application/json", "contentSchema": reference("Event"),
    });
    json!({
        "type": "object",
        "properties": {
            "id": { "type": "string", "pattern": "^[0-9]+$" },
            "event": { "type": "string", "examples": ["created"] },
            "data": event,
        },
    })
}

fn complete_operation(path: &str, operation: &mut Value) {
    let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
    for parameter in parameters.into_iter().flatten() {
        if let Some(schema) = parameter["name"].as_str().and_then(parameter_schema) {
            parameter["schema"] = schema;
        }
    }
    let body = operation["requestBody"]["content"].as_object();
    let (has_body, is_streamed) = (
        body.is_some(),
        body.is_some_and(|body| !body.contains_key("application/json")),
    );
    let Some(responses) = operation["responses"].as_object_mut() else {
        return;
    };
    add(responses, "400", "The request is malformed.");
    add(responses, "414", "The request target is longer than 65534 bytes.");
    add(
        responses,
        "431",
        "The request has more than 100 header fields, or its head is larger than 400 KiB.",
    );
    if path != "/health" {
        add(responses, "401", "The token is missing or wrong.");
        add(
            responses,
            "500",
            "Internal error; see the scaleboxd log for this request id.",
        );
    }
    if has_body {
        add(responses, "408", "The body did not arrive in time.");
        add(
            responses,
            "415",
            "The body has a `Content-Encoding` that is not supported.",
        );
    }
    if has_body && !is_streamed {
        add(responses, "413", "The body is larger than 1 MiB.");
    }
    for (status, response) in responses {
        // OpenAPI 3.1, section 4.8.17, requires a description of every response. For most of them
        // the route's own description is enough.
        if response["description"] == "" {
            response["description"] = "Success.".into();
        }
        if status.starts_with(['4', '5']) {
            response["content"] = json_body("ErrorBody");
        }
    }
}

/// Returns the schema of a parameter, if its type does not express it.
fn parameter_schema(name: &str) -> Option<Value> {
    Some(match name {
        "vm" => json!({ "type": "string", "pattern": VM_REFERENCE }),
        "name" => json!({ "type": "string", "pattern": TEMPLATE_NAME }),
        "exec" => json!({ "type": "string", "pattern": EXEC_ID }),
        "path" => json!({ "type": "string", "minLength": 1, "maxLength": 4095, "pattern": "^/" }),
        "tail" => json!({ "type": "integer", "minimum": 0, "maximum": MAX_OFFSET }),
        "mode" => json!({ "type": "string", "pattern": "^[0-7]{1,4}$" }),
        "wait" => json!({ "type": "string", "enum": ["agent"] }),
        "format" => json!({ "type": "string", "enum": ["tar"] }),
        "wait_seconds" => {
            json!({ "type": "integer", "minimum": 1, "maximum": CreateVmQuery::MAX_WAIT_SECONDS })
        }
        "Idempotency-Key" => json!({ "type": "string", "pattern": IDEMPOTENCY_KEY }),
        "since" | "Last-Event-ID" => json!({ "type": "integer", "minimum": 0, "maximum": MAX_EVENT_ID }),
        _ => return None,
    })
}

fn add(responses: &mut Map<String, Value>, status: &str, description: &str) {
    responses
        .entry(status.to_owned())
        .or_insert_with(|| json!({ "description": description }));
}

/// Adds the two fields for the source of a VM, one of which a request has.
fn describe_sources(document: &mut Value) {
    let create = &mut document["components"]["schemas"]["CreateVm"];
    let field = |description: &str, schema: &str| {
        let mut field = reference(schema);
        field["description"] = description.into();
        field
    };
    create["properties"]["template"] = field("Template to clone the disk from.", "TemplateName");
    create["properties"]["image"] = field(
        "Image of a registry, in place of a template. If it is not a template yet, it is pulled, without credentials.",
        "ImageReference",
    );
    create["oneOf"] = json!([{ "required": ["template"] }, { "required": ["image"] }]);
    document["paths"]["/vms"]["post"]["requestBody"]["content"]["application/json"]["examples"] = json!({
        "template": { "value": { "template": "debian-base", "disk_size_gib": 10 } },
        "image": { "value": { "image": "python:3.12-slim", "name": "py" } },
    });
}

/// Adds this host's minima and maxima to the numbers in requests.
fn bound_requests(schemas: &mut Value, limits: &Limits) {
    let disk = json!({ "minimum": 1, "maximum": limits.max_disk_size_gib });
    let vcpus = json!({ "minimum": 1, "maximum": limits.max_vcpus });
    let memory = json!({ "minimum": limits.min_mem_mib, "maximum": limits.max_mem_mib });
    // Only a request's policy has bounds; the policy of an existing VM may be outside them.
    let mut policy = schemas["AutoExtend"].clone();
    policy["additionalProperties"] = false.into();
    for (field, bounds) in [
        ("threshold_percent", json!({ "minimum": 1, "maximum": 99 })),
        ("increment_gib", disk.clone()),
        ("limit_gib", disk.clone()),
    ] {
        merge(&mut policy["properties"][field], &bounds);
    }
    schemas["AutoExtendRequest"] = policy;
    let policy = reference("AutoExtendRequest");
    for (request, field, bounds) in [
        ("CreateVm", "disk_size_gib", &disk),
        ("CreateVm", "vcpu_count", &vcpus),
        ("CreateVm", "mem_size_mib", &memory),
        ("CreateVm", "disk_auto_extend", &policy),
        ("UpdateVm", "disk_size_gib", &disk),
    ] {
        merge(&mut schemas[request]["properties"][field], bounds);
    }
    // Null removes the policy.
    schemas["UpdateVm"]["properties"]["disk_auto_extend"]["oneOf"] = json!([policy, { "type": "null" }]);
    let mut shrink = schemas["ResizePool"].clone();
    shrink["required"] = json!(["size_gib"]);
    schemas["ShrinkPool"] = shrink;
}

/// Removes rustdoc links from the descriptions: ``[`Vm`](crate::Vm)`` becomes `` `Vm` ``.
fn without_links(value: &mut Value) {
    match value {
        Value::Object(object) => object.iter_mut().for_each(|(key, value)| match value {
            Value::String(text) if key == "description" || key == "summary" => {
                let parts = text.replace("[`", "`").replace("`]", "`\u{0}");
                let mut parts = parts.split('\u{0}');
                let first = parts.next().unwrap_or_default().to_owned();
                let rest = parts.map(
                    |part| match part.strip_prefix('(').and_then(|part| part.split_once(')')) {
                        Some((_, rest)) => rest,
                        None => part,
                    },
                );
                *text = first + &rest.collect::<String>();
            }
            value => without_links(value),
        }),
        Value::Array(values) => values.iter_mut().for_each(without_links),
        _ => {}
    }
}

fn merge(schema: &mut Value, more: &Value) {
    for (key, value) in more.as_object().into_iter().flatten() {
        schema[key] = value.clone();
    }
}

/// The finished document, serialised once for all requests.
#[derive(Clone)]
pub(crate) struct Served(Arc<str>);

impl Served {
    /// Serialises the document.
    pub(crate) fn new(document: &Value) -> Served {
        Served(document.to_string().into())
    }
}

/// Returns this description.
#[utoipa::path(get, path = "/openapi.json", tag = "Host", responses((status = 200, content_type = "application/json", body = Object, description = "This document.")))]
pub(crate) async fn openapi(Extension(Served(document)): Extension<Served>) -> Response {
    ([(CONTENT_TYPE, "application/json")], document.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_contain_no_rustdoc_links() {
        let mut document = json!({ "a": [{
            "description": "See [`VmId`](crate::VmId), [`Vm`] and [`x`] (y).", "summary": "plain",
        }]});
        without_links(&mut document);
        assert_eq!(document["a"][0]["description"], "See `VmId`, `Vm` and `x` (y).");
        assert_eq!(document["a"][0]["summary"], "plain");
    }
}

//! `GET /openapi.json`: the API described for programs, made of the routes themselves (<https://spec.openapis.org/oas/v3.1.0>).
//!
//! A route is registered with its description in one step (`routes!`), so none can be without.

use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use scalebox_client::ErrorBody;
use std::sync::Arc;
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, OpenApi as Document, Ref, RefOr};
use utoipa::{Modify, OpenApi};

/// What the routes do not say: the API's name, its token, and the form of every error.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Scalebox",
        description = "Disposable virtual machines from copy-on-write templates. Every error is `{\"error\": \"…\"}`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(ErrorBody)),
    security(("token" = [])),
    modifiers(&TheRest),
    tags(
        (name = "VMs"), (name = "Templates"), (name = "Pool"), (name = "Host", description = "The host, what happens on it, and numbers of it.")
    )
)]
pub struct Api;

struct TheRest;

impl Modify for TheRest {
    fn modify(&self, document: &mut Document) {
        let token = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(token));
    }
}

/// Gives every error of every route its body, and what each route can fail with besides its own.
pub fn complete(mut document: Document) -> Document {
    for (path, item) in &mut document.paths.paths {
        let operations = [&mut item.get, &mut item.post, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            if path != "/health" {
                add(operation, "401", "No valid token.");
            }
            add(operation, "500", "Something on the host failed; its log tells more.");
            for (status, response) in &mut operation.responses.responses {
                let RefOr::T(response) = response else { continue };
                // Every answer must have one (OpenAPI 3.1, section 4.8.17); most say nothing that the route has not said.
                if response.description.is_empty() {
                    response.description = "Done.".to_owned();
                }
                if status.starts_with(['4', '5']) {
                    let body = Content::new(Some(Ref::from_schema_name("ErrorBody")));
                    response
                        .content
                        .entry("application/json".to_owned())
                        .or_insert(RefOr::T(body));
                }
            }
        }
    }
    document
}

fn add(operation: &mut Operation, status: &str, description: &str) {
    let responses = &mut operation.responses.responses;
    responses
        .entry(status.to_owned())
        .or_insert_with(|| RefOr::T(utoipa::openapi::Response::new(description)));
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "Host", responses((status = 200, description = "This document.")))]
pub async fn openapi(Extension(document): Extension<Arc<Document>>) -> Response {
    Json(&*document).into_response()
}

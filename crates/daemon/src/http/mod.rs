//! The API: connections, routes, events, metrics and the OpenAPI document.

pub(crate) mod auth;
pub(crate) mod error;
pub(crate) mod error_bodies;
pub(crate) mod event_stream;
pub(crate) mod extract;
pub(crate) mod info;
pub(crate) mod jobs;
pub(crate) mod logins;
pub(crate) mod metrics;
pub(crate) mod openapi;
pub(crate) mod request_id;
pub(crate) mod routes;
pub(crate) mod server;
pub(crate) mod transfers;

//! The API: connections, routes, events, metrics and the OpenAPI document.

pub(crate) mod attach;
pub(crate) mod auth;
pub(crate) mod console;
pub(crate) mod error;
pub(crate) mod error_bodies;
pub(crate) mod event_stream;
pub(crate) mod exec;
pub(crate) mod exec_result;
pub(crate) mod extract;
pub(crate) mod files;
pub(crate) mod info;
pub(crate) mod jobs;
pub(crate) mod logins;
pub(crate) mod metrics;
pub(crate) mod openapi;
pub(crate) mod query;
pub(crate) mod request_id;
pub(crate) mod routes;
pub(crate) mod server;
pub(crate) mod transfers;
pub(crate) mod upload;

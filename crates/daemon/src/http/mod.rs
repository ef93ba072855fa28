//! The API: connections, routes, events, metrics and the OpenAPI document.

pub mod error_bodies;
pub mod event_stream;
pub mod logins;
pub mod metrics;
pub mod openapi;
pub mod routes;
pub mod server;
pub mod transfers;

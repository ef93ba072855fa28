//! The API: connections, routes, events, metrics and the OpenAPI document.

pub mod auth;
pub mod error;
pub mod error_bodies;
pub mod event_stream;
pub mod extract;
pub mod info;
pub mod logins;
pub mod metrics;
pub mod openapi;
pub mod request_id;
pub mod routes;
pub mod server;
pub mod transfers;

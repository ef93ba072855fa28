//! The connection between host and agent.

#![allow(clippy::unwrap_used, reason = "a test that fails panics")]

mod support;

use hyper::{Method, StatusCode};
use scalebox_agent_api::FailureCode;
use support::{bytes, failure, host};

#[tokio::test]
async fn unknown_requests_are_answered_with_a_code() {
    let host = host().await;
    let (status, body) = host.json(Method::POST, "/v1/teleport", &()).await;
    assert_eq!(status, StatusCode::NOT_IMPLEMENTED);
    assert_eq!(failure(&body).code, FailureCode::Unsupported);
    let response = host.send(Method::GET, "/", bytes(Vec::new())).await;
    assert_eq!(response.status(), StatusCode::NOT_IMPLEMENTED);
}

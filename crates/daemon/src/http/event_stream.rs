//! `GET /events`: the host's events as server-sent events
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

use crate::host::Host;
use crate::host::error::ServiceError;
use crate::host::events::Subscription;
use crate::http::openapi::MAX_EVENT_ID;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderName};
use axum::response::sse::{KeepAlive, KeepAliveStream, Sse};
use axum::response::{IntoResponse, sse};
use futures::future;
use futures::stream::{self, Stream, StreamExt};
use scalebox_api::Event;
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Interval of keep-alive comments, so that neither a proxy nor a client considers the stream dead.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// The query parameters of `GET /events`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EventsQuery {
    since: Option<String>,
    follow: Option<bool>,
}

/// Streams events, starting after `since` or after the header `Last-Event-ID`.
///
/// The header takes precedence, because a browser that reconnects repeats the query.
#[utoipa::path(
    get, path = "/events", tag = "Host",
    params(
        ("since" = Option<u64>, Query, description = "Start after this event; 0 starts with the oldest event that the daemon has kept."),
        ("follow" = Option<bool>, Query, description = "`false` ends the stream after the events so far."),
        ("Last-Event-ID" = Option<u64>, Header, description = "Takes precedence over `since`; browsers send it when they reconnect."),
    ),
    responses(
        (status = 200, content_type = "text/event-stream", body = Event, description = "Server-sent events. The data of each is an event object."),
        (status = 400, description = "A query parameter or `Last-Event-ID` is invalid."),
    )
)]
pub(crate) async fn events(
    State(host): State<Host>,
    headers: HeaderMap,
    query: Result<Query<EventsQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<impl IntoResponse, ServiceError> {
    let invalid = || {
        ServiceError::invalid(format!(
            "invalid query: only since=ID, with a whole number up to {MAX_EVENT_ID}, and follow=true or follow=false are supported, each once"
        ))
    };
    let Query(query) = query.map_err(|_| invalid())?;
    let since = query
        .since
        .as_deref()
        .map(|id| event_id(id).ok_or_else(invalid))
        .transpose()?;
    let last = headers.get(LAST_EVENT_ID).map(|id| {
        let id = id.to_str().ok().and_then(|id| event_id(id.trim()));
        id.ok_or_else(|| {
            let form = format!("the header Last-Event-ID must be an event id, a whole number up to {MAX_EVENT_ID}");
            ServiceError::invalid(form)
        })
    });
    let since = last.transpose()?.or(since);
    let subscription = host.events.subscribe(since, query.follow.unwrap_or(true));
    Ok(sse(subscription))
}

/// Parses an id. Only digits are allowed; the integer parser would also accept a plus sign.
fn event_id(text: &str) -> Option<u64> {
    let id = text.bytes().all(|byte| byte.is_ascii_digit()).then_some(text)?;
    id.parse().ok().filter(|id| *id <= MAX_EVENT_ID)
}

fn sse(subscription: Subscription) -> Sse<KeepAliveStream<impl Stream<Item = Result<sse::Event, axum::Error>>>> {
    // The position is sent first, so that a client that received no event can still reconnect.
    let position = sse::Event::default()
        .id(subscription.seen().to_string())
        .comment("here");
    let events = stream::unfold(subscription, |mut subscription| async {
        let event = subscription.next().await?;
        let line = sse::Event::default()
            .id(event.id.to_string())
            .event(event.kind.as_str())
            .json_data(Arc::as_ref(&event));
        Some((line, subscription))
    });
    let stream = stream::once(future::ready(Ok(position))).chain(events);
    Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE_INTERVAL))
}

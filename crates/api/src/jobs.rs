//! Jobs: work that continues after the response to the request that started it.

use crate::body::{Fields, Invalid};
use crate::error::ErrorBody;
use scalebox_units::InvalidFormat;
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// A job, as `GET /jobs/{job}` returns it. Ended jobs are kept for a while, until the daemon stops.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Job {
    /// Id of the job.
    pub id: String,
    /// Kind of work: `pull`.
    pub kind: String,
    /// Name of the template that the job makes.
    pub template: String,
    /// Complete reference of the image that is pulled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// `running`, `done`, `failed` or `cancelled`.
    pub status: String,
    /// The present step of a running job, or the last one: `resolve`, `download`, `unpack`, `write`
    /// or `import`.
    pub phase: String,
    /// Bytes that are done in this phase.
    pub done_bytes: u64,
    /// Bytes of the phase as a whole; 0 if unknown.
    pub total_bytes: u64,
    /// Time of the start: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub started_at: String,
    /// Time of the end; absent while the job is running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub ended_at: Option<String>,
    /// The reason why the job failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

impl Job {
    /// Returns whether the job is still running.
    pub fn is_running(&self) -> bool {
        self.status == "running"
    }
}

/// The response to `GET /jobs`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct JobList {
    /// Running jobs and those that ended lately, oldest first.
    pub jobs: Vec<Job>,
}

/// The body of `POST /templates/{name}/pull`.
#[derive(Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PullTemplate {
    /// The image: `[REGISTRY/]NAME[:TAG][@sha256:DIGEST]`.
    pub reference: String,
    /// User name at the registry; requires `password`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// Password, or an access token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// `true` if plain HTTP may be used when HTTPS does not work. Registries on loopback may always
    /// use it.
    pub insecure: bool,
    /// `true` to replace an existing template of this name.
    pub replace: bool,
}

impl PullTemplate {
    /// Creates a request for an image that needs no credentials.
    pub fn of(reference: impl Into<String>) -> Self {
        PullTemplate {
            reference: reference.into(),
            username: None,
            password: None,
            insecure: false,
            replace: false,
        }
    }
}

/// The password stays out of logs.
impl std::fmt::Debug for PullTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PullTemplate")
            .field("reference", &self.reference)
            .finish_non_exhaustive()
    }
}

/// A line of text.
struct Line(String);

impl FromStr for Line {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        match (1..=4096).contains(&text.len()) && !text.chars().any(char::is_control) {
            true => Ok(Line(text.to_owned())),
            false => Err(InvalidFormat::new(
                "must have 1 to 4096 bytes and no control characters",
            )),
        }
    }
}

impl PullTemplate {
    /// Parses a client's body. The caller checks the reference.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &["reference", "username", "password", "insecure", "replace"])?;
        let reference: Line = fields.text("reference", "send the image, such as python:3.12-slim")?;
        let username: Option<Line> = fields.optional_text("username")?;
        let password: Option<Line> = fields.optional_text("password")?;
        if username.is_some() {
            fields.require("password", "send it together with username")?;
        }
        if password.is_some() {
            fields.require("username", "send it together with password")?;
        }
        Ok(PullTemplate {
            reference: reference.0,
            username: username.map(|line| line.0),
            password: password.map(|line| line.0),
            insecure: fields.optional_bool("insecure")?.unwrap_or(false),
            replace: fields.optional_bool("replace")?.unwrap_or(false),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pulls_name_an_image_and_a_user_with_a_password() {
        let parsed = PullTemplate::parse(br#"{"reference": "a:1", "username": "u", "password": "secret"}"#).unwrap();
        assert_eq!(
            (parsed.reference.as_str(), parsed.insecure, parsed.replace),
            ("a:1", false, false)
        );
        assert!(!format!("{parsed:?}").contains("secret"));
        for body in [
            r#"{}"#,
            r#"{"reference": ""}"#,
            r#"{"reference": "a\nb"}"#,
            r#"{"reference": "a", "username": "u"}"#,
            r#"{"reference": "a", "password": "p"}"#,
            r#"{"reference": "a", "insecure": "yes"}"#,
            r#"{"reference": "a", "registry": "b"}"#,
        ] {
            assert!(PullTemplate::parse(body.as_bytes()).is_err(), "{body}");
        }
    }
}

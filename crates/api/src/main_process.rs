//! The main process of a VM whose image has no init system.

use crate::body::{Fields, Invalid};
use crate::command;
use scalebox_units::InvalidFormat;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The main process of a VM: a command that the agent runs from the start of the guest on. It is
/// the exec with the id `main`, and its environment, directory and user are those of other execs by
/// default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MainProcess {
    /// The program and its arguments.
    #[cfg_attr(feature = "openapi", schema(example = json!(["nginx", "-g", "daemon off;"])))]
    pub argv: Vec<String>,
    /// When it is started again after its end.
    pub restart: RestartPolicy,
}

/// When a main process is started again after its end.
///
/// The delay is 100 ms at first, and doubles with each restart up to a minute. After a run of ten
/// seconds, it is 100 ms again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// After any end.
    Always,
    /// After an exit status other than 0, a signal, or a failed start.
    #[default]
    OnFailure,
    /// Never.
    Never,
}

impl RestartPolicy {
    fn is_default(&self) -> bool {
        *self == RestartPolicy::default()
    }

    /// Returns the API's string for the policy.
    pub const fn as_str(self) -> &'static str {
        match self {
            RestartPolicy::Always => "always",
            RestartPolicy::OnFailure => "on_failure",
            RestartPolicy::Never => "never",
        }
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for RestartPolicy {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        let policies = [RestartPolicy::Always, RestartPolicy::OnFailure, RestartPolicy::Never];
        let found = policies.into_iter().find(|policy| policy.as_str() == text);
        found.ok_or_else(|| InvalidFormat::new("must be \"always\", \"on_failure\" or \"never\""))
    }
}

/// How a new VM runs its main process. Only for templates whose VMs have one: those of images
/// without an init system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateMain {
    /// `false` starts no main process.
    #[serde(skip_serializing_if = "is_true")]
    #[cfg_attr(feature = "openapi", schema(required = false, default = true))]
    pub run: bool,
    /// The program and its arguments; by default the entrypoint and the command of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false, min_items = 1))]
    pub argv: Option<Vec<String>>,
    /// When the main process is started again after its end.
    #[serde(skip_serializing_if = "RestartPolicy::is_default")]
    #[cfg_attr(feature = "openapi", schema(required = false, default = "on_failure"))]
    pub restart: RestartPolicy,
}

fn is_true(value: &bool) -> bool {
    *value
}

impl Default for CreateMain {
    fn default() -> Self {
        CreateMain {
            run: true,
            argv: None,
            restart: RestartPolicy::default(),
        }
    }
}

impl CreateMain {
    pub(crate) const FIELD: &str = "main";
    const RUN: &str = "main.run";
    const ARGV: &str = "main.argv";
    const RESTART: &str = "main.restart";

    /// Returns the request for a VM without a main process.
    pub fn none() -> Self {
        CreateMain {
            run: false,
            ..CreateMain::default()
        }
    }

    pub(crate) fn read(fields: &Fields<'_>) -> Result<Option<Self>, Invalid> {
        let known = &[Self::RUN, Self::ARGV, Self::RESTART];
        let Some(fields) = fields.optional_object(Self::FIELD, known)? else {
            return Ok(None);
        };
        let main = CreateMain {
            run: fields.optional_bool(Self::RUN)?.unwrap_or(true),
            argv: command::read_argv(&fields, Self::ARGV)?,
            restart: fields.optional_text(Self::RESTART)?.unwrap_or_default(),
        };
        if !main.run && main.argv.is_some() {
            return Err(command::form(
                Self::ARGV,
                "must not be sent together with \"run\": false",
            ));
        }
        Ok(Some(main))
    }
}

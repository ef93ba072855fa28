//! Names and times, in the forms that other crates and the API use.

use crate::host::error::{ServiceError, quoted};
use scalebox_units::TemplateName;

/// Parses a template name. A malformed name cannot belong to a template.
///
/// # Errors
/// 404.
pub(crate) fn template_name(name: &str) -> Result<TemplateName, ServiceError> {
    name.parse()
        .map_err(|_| ServiceError::NotFound(format!("there is no template {}", quoted(name))))
}

/// Formats a time in UTC, to the millisecond.
pub(crate) fn rfc3339(time: jiff::Timestamp) -> String {
    // Milliseconds are precise enough to sort by and short enough to read.
    format!("{time:.3}")
}

//! Access to a registry: credentials, and the authorization of a request.

use std::fmt;

/// A user name and a password, or an access token in place of a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user name.
    pub username: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// The authorization of a request.
#[derive(Clone)]
pub(crate) enum Access {
    Basic(Credentials),
    Bearer(String),
}

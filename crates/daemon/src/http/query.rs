//! Parses queries strictly: every parameter is known, and given once.

use crate::host::error::{ServiceError, quoted};
use axum::http::Uri;
use percent_encoding::percent_decode;
use scalebox_api::GuestPath;
use std::collections::BTreeMap;
use std::str::FromStr;

/// The largest offset of a request: the largest integer that JSON numbers hold exactly.
pub(crate) const MAX_OFFSET: u64 = (1 << 53) - 1;

/// The parameters of a query, decoded.
pub(crate) struct Params(BTreeMap<&'static str, Vec<u8>>);

impl Params {
    /// Parses the query of `uri`, whose parameters are all in `known`.
    ///
    /// # Errors
    /// 400.
    pub(crate) fn parse(uri: &Uri, known: &'static [&'static str]) -> Result<Params, ServiceError> {
        let mut params = BTreeMap::new();
        let query = uri.query().unwrap_or_default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = String::from_utf8_lossy(&decoded(name)).into_owned();
            let Some(known) = known.iter().copied().find(|known| *known == name) else {
                return Err(ServiceError::invalid(format!(
                    "there is no parameter {}; the parameters are {}",
                    quoted(&name),
                    known.join(", ")
                )));
            };
            if params.insert(known, decoded(value)).is_some() {
                return Err(ServiceError::invalid_field(
                    known,
                    format!("the parameter {known} is given twice"),
                ));
            }
        }
        Ok(Params(params))
    }

    /// Returns a parameter in the form of its type.
    ///
    /// # Errors
    /// 400; `form` describes the valid values.
    pub(crate) fn parsed<T: FromStr>(&self, name: &str, form: &str) -> Result<Option<T>, ServiceError> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        let value = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        let invalid = || ServiceError::invalid_field(name, format!("{name} must be {form}"));
        value.map(Some).ok_or_else(invalid)
    }

    /// Returns a number without a sign.
    ///
    /// # Errors
    /// 400.
    pub(crate) fn number(&self, name: &str, max: u64) -> Result<Option<u64>, ServiceError> {
        let form = format!("a whole number between 0 and {max}");
        // The integer parser would also accept a plus sign.
        let is_number = |text: &Vec<u8>| !text.is_empty() && text.iter().all(u8::is_ascii_digit);
        match self.parsed::<u64>(name, &form)? {
            Some(number) if number <= max && self.0.get(name).is_some_and(is_number) => Ok(Some(number)),
            None => Ok(None),
            Some(_) => Err(ServiceError::invalid_field(name, format!("{name} must be {form}"))),
        }
    }

    /// Returns whether a parameter is `true`; `false` if it is absent.
    ///
    /// # Errors
    /// 400.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, ServiceError> {
        Ok(self.parsed(name, "true or false")?.unwrap_or(false))
    }

    /// Returns the path in a guest. It may be any bytes, as long as it has the form of a
    /// [`GuestPath`].
    ///
    /// # Errors
    /// 400.
    pub(crate) fn path(&self) -> Result<Vec<u8>, ServiceError> {
        let invalid = |form: String| ServiceError::invalid_field("path", format!("path {form}"));
        let Some(path) = self.0.get("path") else {
            return Err(ServiceError::invalid_field(
                "path",
                "path is missing: send an absolute path",
            ));
        };
        // The form concerns ASCII characters only, and the length in bytes.
        let checked = match std::str::from_utf8(path) {
            Ok(text) => text.parse::<GuestPath>(),
            Err(_) => path
                .iter()
                .map(|byte| if byte.is_ascii() { char::from(*byte) } else { 'x' })
                .collect::<String>()
                .parse(),
        };
        checked.map_err(|form| invalid(form.to_string()))?;
        Ok(path.clone())
    }

    /// Returns all parameters as text, in the order of their names.
    ///
    /// # Errors
    /// 400 if one is not UTF-8.
    pub(crate) fn texts(&self) -> Result<Vec<(&'static str, &str)>, ServiceError> {
        self.0
            .iter()
            .map(|(name, value)| {
                let invalid = |_| ServiceError::invalid_field(name, format!("{name} is not UTF-8"));
                Ok((*name, std::str::from_utf8(value).map_err(invalid)?))
            })
            .collect()
    }
}

/// Decodes a part of a query, as HTML forms encode it: a plus sign is a space.
fn decoded(part: &str) -> Vec<u8> {
    let spaced: Vec<u8> = part
        .bytes()
        .map(|byte| if byte == b'+' { b' ' } else { byte })
        .collect();
    percent_decode(&spaced).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<Params, ServiceError> {
        Params::parse(&format!("/x?{query}").parse().unwrap(), &["path", "list", "since"])
    }

    fn field(result: Result<impl Sized, ServiceError>) -> Option<String> {
        match result.err().unwrap() {
            ServiceError::Invalid { field, .. } => field,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn parameters_are_known_and_given_once() {
        let params = parse("path=/a%20b+c%2Bd&list=true&").unwrap();
        assert_eq!(params.path().unwrap(), b"/a b c+d");
        assert!(params.flag("list").unwrap());
        assert_eq!(params.number("since", 9).unwrap(), None);
        assert_eq!(field(parse("lists=true")), None);
        assert_eq!(field(parse("list=true&list=true")), Some("list".to_owned()));
        assert_eq!(field(parse("list").unwrap().flag("list")), Some("list".to_owned()));
        assert_eq!(field(parse("list=1").unwrap().flag("list")), Some("list".to_owned()));
    }

    #[test]
    fn numbers_have_no_sign_and_a_maximum() {
        assert_eq!(parse("since=9").unwrap().number("since", 9).unwrap(), Some(9));
        for wrong in ["10", "%2B1", "-1", "", "a", "99999999999999999999"] {
            let params = parse(&format!("since={wrong}")).unwrap();
            assert_eq!(field(params.number("since", 9)), Some("since".to_owned()), "{wrong}");
        }
    }

    #[test]
    fn paths_are_absolute_and_may_be_any_other_bytes() {
        assert_eq!(parse("path=/%ff/..x").unwrap().path().unwrap(), b"/\xff/..x");
        for wrong in [
            "",
            "a",
            "/../a",
            "/%ff/..",
            "/a%00",
            "%ff",
            &format!("/{}", "x".repeat(4095)),
        ] {
            let params = parse(&format!("path={wrong}")).unwrap();
            assert_eq!(field(params.path()), Some("path".to_owned()), "{wrong}");
        }
        assert_eq!(field(parse("").unwrap().path()), Some("path".to_owned()));
    }
}

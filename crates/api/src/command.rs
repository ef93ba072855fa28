//! Arguments and environment of commands, with the limits of Linux.

use crate::body::{Fields, Invalid};
use scalebox_agent_api::exec::{MAX_ARGUMENT, MAX_ARGUMENTS};
use scalebox_units::InvalidFormat;
use std::collections::BTreeMap;
use std::str::FromStr;

/// A string without zero bytes, which no argument or variable of Linux can have.
pub(crate) struct Text(pub(crate) String);

impl FromStr for Text {
    type Err = InvalidFormat;

    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        if text.contains('\0') {
            return Err(InvalidFormat::new("must not contain a zero byte"));
        }
        if text.len() > MAX_ARGUMENT {
            let form = format!("must not have a string of over {MAX_ARGUMENT} bytes, the limit of Linux");
            return Err(InvalidFormat::new(form));
        }
        Ok(Text(text.to_owned()))
    }
}

/// Returns the error for a value of another form.
pub(crate) fn form(field: &'static str, form: impl Into<String>) -> Invalid {
    Invalid::Form {
        field,
        form: InvalidFormat::new(form),
    }
}

/// Reads the program and its arguments; `None` if the field is absent.
pub(crate) fn read_argv(fields: &Fields<'_>, field: &'static str) -> Result<Option<Vec<String>>, Invalid> {
    let Some(argv) = fields.optional_texts(field)? else {
        return Ok(None);
    };
    let argv: Vec<String> = argv.into_iter().map(|Text(argument)| argument).collect();
    if argv.first().is_none_or(String::is_empty) {
        return Err(form(field, "must begin with the name of a program"));
    }
    if argv.len() > MAX_ARGUMENTS {
        return Err(form(field, format!("must have at most {MAX_ARGUMENTS} arguments")));
    }
    Ok(Some(argv))
}

/// Reads the field `env`; empty if it is absent.
pub(crate) fn read_env(fields: &Fields<'_>) -> Result<BTreeMap<String, String>, Invalid> {
    const ENV: &str = "env";
    let env = fields.optional_text_map(ENV)?.unwrap_or_default();
    let env: BTreeMap<String, String> = env.into_iter().map(|(name, Text(value))| (name, value)).collect();
    if env.len() > MAX_ARGUMENTS {
        return Err(form(ENV, format!("must have at most {MAX_ARGUMENTS} variables")));
    }
    if let Some(name) = env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        let why = format!(
            "must not have the variable {:?}: a name is neither empty nor contains = or a zero byte",
            name.chars().take(40).collect::<String>()
        );
        return Err(form(ENV, why));
    }
    if env
        .iter()
        .any(|(name, value)| size_of_variable(name, value) - 1 > MAX_ARGUMENT)
    {
        let why = format!("must not have a variable of over {MAX_ARGUMENT} bytes, the limit of Linux");
        return Err(form(ENV, why));
    }
    Ok(env)
}

/// Returns the bytes that variables take in the memory of a process.
pub(crate) fn size_of_env(env: &BTreeMap<String, String>) -> usize {
    env.iter().map(|(name, value)| size_of_variable(name, value)).sum()
}

fn size_of_variable(name: &str, value: &str) -> usize {
    name.len() + value.len() + "=\0".len()
}

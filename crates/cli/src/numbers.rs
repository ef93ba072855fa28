//! Parses numbers in arguments.

/// Parses digits only. A unit, a sign or a fraction is rejected, because its meaning would be a
/// guess.
pub(crate) fn whole_number(text: &str) -> Result<u64, String> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("write a whole number without a unit, such as 10".to_owned());
    }
    text.parse().map_err(|_| "the number is too large".to_owned())
}

pub(crate) fn processor_count(text: &str) -> Result<u32, String> {
    whole_number(text)?
        .try_into()
        .map_err(|_| "the number is too large".to_owned())
}

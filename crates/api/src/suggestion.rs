//! Guesses which field a client meant.

use strsim::levenshtein;

/// Finds the known field that a misspelt one most resembles.
///
/// The misspelt field differs only in case and punctuation (`diskSizeGib`), by a few letters
/// (`disk_size_gb`), or contains the same words (`ssh_key`, `memory`).
pub(crate) fn suggestion(name: &str, known: &'static [&'static str]) -> Option<&'static str> {
    if name.len() > 64 {
        return None;
    }
    let words_of = |field: &str| -> Vec<String> { field.split('_').map(str::to_owned).collect() };
    let (letters, words) = (letters(name), words_of(&name.to_lowercase()));
    let within = |field: &&&'static str| {
        let all = words_of(field);
        words
            .iter()
            .all(|word| all.iter().any(|known| share_prefix(word, known)))
    };
    let nearest = known
        .iter()
        .map(|field| (levenshtein(&letters, &self::letters(field)), *field))
        .min();
    match nearest {
        Some((off, field)) if off <= 1 + field.len() / 5 && off < letters.chars().count() => Some(field),
        _ => known.iter().find(within).copied(),
    }
}

/// Returns whether one word begins with the other: `vcpus` and `vcpu`, `memory` and `mem`.
fn share_prefix(a: &str, b: &str) -> bool {
    a.len().min(b.len()) >= 3 && (a.starts_with(b) || b.starts_with(a))
}

/// Returns the letters and digits of a name in lower case.
fn letters(name: &str) -> String {
    name.chars()
        .filter(|c| c.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect()
}

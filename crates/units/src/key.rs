//! SSH public keys: one line of `authorized_keys` without options.

use crate::format::{InvalidFormat, text_newtype};
use serde::{Deserialize, Serialize};
use ssh_key::PublicKey;
use ssh_key::public::KeyData;
use std::fmt;
use std::str::FromStr;

/// A checked OpenSSH public key (`ssh-ed25519 AAAA… comment`), on one line, with single spaces
/// between its parts.
///
/// Surrounding white space is removed, including a line break at the end, so the contents of
/// `id_ed25519.pub` are accepted. Inputs are rejected that would grant access to other people than
/// the holder of one key, or that would grant no access: several keys, options before the key,
/// certificates, DSA, RSA under 2048 bits, and types that `sshd` does not support.
///
/// ```
/// use scalebox_units::SshPublicKey;
/// let line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9S me@laptop";
/// assert_eq!(format!("{line}\r\n").parse::<SshPublicKey>().unwrap().as_str(), line);
/// assert!(format!("{line}\n{line}").parse::<SshPublicKey>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SshPublicKey(String);

text_newtype!(SshPublicKey);

/// Maximum length in bytes. The largest key that `sshd` accepts, RSA with 16384 bits, takes less
/// than 3 KiB; the rest is for the comment.
const MAX_BYTES: usize = 8 << 10;

/// The allowed RSA key lengths. The maximum is OpenSSH's own limit (`SSHBUF_MAX_BIGNUM`); keys
/// under 2048 bits can be broken (NIST SP 800-131A).
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=16384;

/// The key types that `sshd` of current distributions accepts in `authorized_keys`.
const TYPES: [&str; 7] = [
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ssh-rsa",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

const CERTIFICATE: &str = "-cert-v01@openssh.com";
const DSA: &str = "ssh-dss";

impl FromStr for SshPublicKey {
    type Err = InvalidFormat;

    /// Parses a key. No error message contains the text: it may be a private key, sent by mistake.
    fn from_str(text: &str) -> Result<Self, InvalidFormat> {
        if text.trim_start().starts_with("-----BEGIN") {
            return refuse(
                "must be a public key, the line in the file ending in .pub; this is a PEM file, such as a private key"
                    .into(),
            );
        }
        let SshPublicKey(line) = SshPublicKey::of_line(text)?;
        let words: Vec<&str> = line.split(' ').filter(|word| !word.is_empty()).collect();
        check_type(&words)?;
        check_data(&line)?;
        check_comment(words.get(2..).unwrap_or_default())?;
        Ok(SshPublicKey(line))
    }
}

impl SshPublicKey {
    /// Reads a key from a record. An earlier version with other rules for types and comments may
    /// have accepted it.
    ///
    /// Checks only the properties that a guest needs: one line, and not too long.
    ///
    /// # Errors
    /// A text that is empty, has several lines or is too long.
    pub fn from_record(text: &str) -> Result<Self, InvalidFormat> {
        SshPublicKey::of_line(text)
    }

    fn of_line(text: &str) -> Result<Self, InvalidFormat> {
        // Some editors write a byte order mark before the first character.
        let text = text.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            return refuse("must be an OpenSSH public key, such as: ssh-ed25519 AAAAC3Nza... me@laptop".into());
        }
        if let Some(found) = text.chars().find(|c| breaks_a_line(*c)) {
            return refuse(format!(
                "must be one line with one key, without control characters; it contains {}",
                found.escape_unicode()
            ));
        }
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if line.len() > MAX_BYTES {
            return refuse(format!("must be at most {MAX_BYTES} bytes long"));
        }
        Ok(SshPublicKey(line))
    }
}

/// Returns whether a reader of the line would stop at the character, or misread it. U+2028 and
/// U+2029 end a line for YAML 1.1 parsers, such as the one that reads a guest's `user-data`; U+FFFE
/// and U+FFFF are errors there.
fn breaks_a_line(c: char) -> bool {
    (c.is_control() && c != '\t') || matches!(c, '\u{2028}' | '\u{2029}' | '\u{fffe}' | '\u{ffff}')
}

fn check_type(words: &[&str]) -> Result<(), InvalidFormat> {
    let Some((&first, rest)) = words.split_first() else {
        return refuse("must be an OpenSSH public key, such as: ssh-ed25519 AAAAC3Nza... me@laptop".into());
    };
    if TYPES.contains(&first) {
        return Ok(());
    }
    refuse(if first.ends_with(CERTIFICATE) {
        "must be a plain public key, not a certificate".into()
    } else if first == DSA {
        "must not be a DSA key, which sshd no longer accepts; create another with: ssh-keygen -t ed25519".into()
    } else if rest.iter().any(|word| TYPES.contains(word)) {
        "must begin with the type of the key: options before it are not allowed".into()
    } else {
        format!(
            "must be an OpenSSH public key that begins with its type, one of {}",
            TYPES.join(", ")
        )
    })
}

fn check_data(line: &str) -> Result<(), InvalidFormat> {
    let Ok(key) = PublicKey::from_openssh(line) else {
        return refuse(
            "must be a complete OpenSSH public key: the part after the type is damaged or has another type".into(),
        );
    };
    if let KeyData::Rsa(rsa) = key.key_data() {
        let bits = bit_length(rsa.n.as_positive_bytes().unwrap_or_default());
        if !RSA_BITS.contains(&bits) {
            let (min, max) = RSA_BITS.into_inner();
            return refuse(format!(
                "must be an RSA key of {min} to {max} bits, not {bits}; recommended: ssh-keygen -t ed25519"
            ));
        }
    }
    Ok(())
}

/// Rejects a second key in the comment of the first. A comment may contain a type name; a key is a
/// type followed by data.
fn check_comment(words: &[&str]) -> Result<(), InvalidFormat> {
    let is_type = |word: &str| TYPES.contains(&word) || word == DSA || word.ends_with(CERTIFICATE);
    // The data of every key begins with the length of its type, as four bytes in base64.
    let is_key = |pair: &[&str]| matches!(pair, [first, data] if is_type(first) && data.starts_with("AAAA"));
    if words.windows(2).any(is_key) {
        return refuse("must be one key: a second one on the line would be a comment and grant no access; add it to ~/.ssh/authorized_keys in the guest".into());
    }
    Ok(())
}

/// Returns the number of bits of a big-endian number without leading zero bytes.
fn bit_length(number: &[u8]) -> usize {
    number
        .first()
        .map_or(0, |first| number.len() * 8 - first.leading_zeros() as usize)
}

fn refuse<T>(why: String) -> Result<T, InvalidFormat> {
    Err(InvalidFormat::new(why))
}

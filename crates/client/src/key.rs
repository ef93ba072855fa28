//! The form of an SSH public key: one line of `authorized_keys` without options.

use crate::names::{WrongForm, text_newtype};
use serde::{Deserialize, Serialize};
use ssh_key::PublicKey;
use ssh_key::public::KeyData;
use std::fmt;
use std::str::FromStr;

/// An OpenSSH public key (`ssh-ed25519 AAAA… comment`), checked and on one line, spaces between its parts made single.
///
/// What is refused, because it would open more than the holder of one key, or nothing at all: several lines, options before
/// the key, certificates, DSA, RSA under 2048 bits, types that `sshd` does not know.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(try_from = "String", into = "String")]
pub struct SshPublicKey(String);

text_newtype!(SshPublicKey);

/// In bytes. The largest key `sshd` takes, RSA of 16384 bits, has under 3 KiB; the rest is comment.
const LONGEST: usize = 16 << 10;

/// OpenSSH's own bound is `SSHBUF_MAX_BIGNUM`; under 2048 bits RSA is within reach (NIST SP 800-131A).
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=16384;

/// The types that the `sshd` of a current distribution takes in `authorized_keys`.
const TYPES: [&str; 7] = [
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ssh-rsa",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

impl FromStr for SshPublicKey {
    type Err = WrongForm;

    /// No message repeats the text: it may be a private key, sent by mistake.
    fn from_str(text: &str) -> Result<Self, WrongForm> {
        if text.len() > LONGEST {
            return refuse(format!("must be at most {LONGEST} bytes long"));
        }
        if text.trim_start().starts_with("-----BEGIN") {
            return refuse("must be a public key, the one line of the file whose name ends in .pub; this is a PEM file, such as a private key".into());
        }
        if text.chars().any(breaks_a_line) {
            return refuse(
                "must be one line, without line breaks and other control characters, also at its end".into(),
            );
        }
        let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
        check_type(&words)?;
        let line = words.join(" ");
        check_data(&line)?;
        Ok(SshPublicKey(line))
    }
}

/// U+2028 and U+2029 end a line for a YAML 1.1 reader, such as the one that reads a guest's `user-data`.
fn breaks_a_line(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')
}

fn check_type(words: &[&str]) -> Result<(), WrongForm> {
    let Some((&first, rest)) = words.split_first() else {
        return refuse("must be an OpenSSH public key, such as: ssh-ed25519 AAAAC3Nza... me@laptop".into());
    };
    if TYPES.contains(&first) {
        return Ok(());
    }
    refuse(if first.ends_with("-cert-v01@openssh.com") {
        "must be a plain public key, not a certificate".into()
    } else if first == "ssh-dss" {
        "must not be a DSA key: sshd no longer takes them; make one with: ssh-keygen -t ed25519".into()
    } else if rest.iter().any(|word| TYPES.contains(word)) {
        "must begin with the type of the key: options before it are not allowed".into()
    } else {
        format!(
            "must be an OpenSSH public key that begins with its type, one of {}",
            TYPES.join(", ")
        )
    })
}

fn check_data(line: &str) -> Result<(), WrongForm> {
    let Ok(key) = PublicKey::from_openssh(line) else {
        return refuse(
            "must be a whole OpenSSH public key: the part after the type is damaged or of another type".into(),
        );
    };
    if let KeyData::Rsa(rsa) = key.key_data() {
        let bits = bit_length(rsa.n.as_positive_bytes().unwrap_or_default());
        if !RSA_BITS.contains(&bits) {
            let (least, most) = RSA_BITS.into_inner();
            return refuse(format!(
                "must be an RSA key of {least} to {most} bits, not of {bits}; better: ssh-keygen -t ed25519"
            ));
        }
    }
    Ok(())
}

/// Of a big-endian number without leading zero bytes.
fn bit_length(number: &[u8]) -> usize {
    number
        .first()
        .map_or(0, |first| number.len() * 8 - first.leading_zeros() as usize)
}

fn refuse<T>(why: String) -> Result<T, WrongForm> {
    Err(WrongForm(why))
}

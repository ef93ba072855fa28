//! Tests the parsers' rules, and the form of accepted values on which all later code relies.

#![allow(clippy::unwrap_used, reason = "a failed step ends the test")]

use proptest::prelude::*;
use scalebox_units::{SshPublicKey, VmName};

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9S";
const ECDSA: &str = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBCLn9bqzEIFJp3n7bIf/9NptnzfmFzQPCSN1LLP/A5xLuHIw0V59xbHcGco8hhEyVzRMMozl7IJtl9CAr4Iz96Q=";

fn parsed(text: &str) -> Result<String, String> {
    match text.parse::<SshPublicKey>() {
        Ok(key) => Ok(key.as_str().to_owned()),
        Err(form) => Err(form.to_string()),
    }
}

#[test]
fn key_files_are_accepted_and_stored_as_one_line() {
    let line = format!("{KEY} me@laptop");
    for text in [
        format!("{line}\n"),
        format!("{line}\r\n"),
        format!("{line}\t"),
        format!("{line}\u{a0}"),
        format!("\u{3000}{line}\u{85}\u{2028}\n\n"),
        format!("\u{feff}{line}\r\n"),
        format!("  {}  ", line.replace(' ', "   ")),
        line.replace(' ', "\t"),
        line.replace(' ', "\u{a0}"),
    ] {
        assert_eq!(parsed(&text).as_deref(), Ok(line.as_str()), "{text:?}");
    }
}

#[test]
fn line_breaks_and_control_characters_are_rejected_and_named() {
    for (text, named) in [
        (format!("{KEY}\n{ECDSA}"), r"\u{a}"),
        (format!("{KEY}\r{ECDSA}"), r"\u{d}"),
        (format!("{KEY} a\0b"), r"\u{0}"),
        (format!("{KEY} a\u{2028}b"), r"\u{2028}"),
        (format!("{KEY} a\u{85}b"), r"\u{85}"),
        (format!("{KEY} a\u{ffff}"), r"\u{ffff}"),
    ] {
        let form = parsed(&text).unwrap_err();
        assert!(
            form.starts_with("must be one line") && form.ends_with(named),
            "{text:?}: {form}"
        );
    }
}

#[test]
fn a_second_key_on_the_line_is_rejected_and_a_comment_is_not() {
    for second in [
        KEY,
        ECDSA,
        "ssh-dss AAAAB3NzaC1kc3M=",
        "ssh-ed25519-cert-v01@openssh.com AAAAIHNzaC1l",
    ] {
        for between in ["", "me@laptop "] {
            let form = parsed(&format!("{KEY} {between}{second}")).unwrap_err();
            assert!(form.starts_with("must be one key: a second one"), "{second}: {form}");
        }
    }
    for comment in [
        "ssh-ed25519",
        "my ssh-rsa key",
        "ssh-ed25519 of 2024",
        "AAAAC3NzaC1lZDI1NTE5 AAAA",
        "ssh-ed25519 ssh-ed25519",
    ] {
        let line = format!("{KEY} {comment}");
        assert_eq!(parsed(&line).as_deref(), Ok(line.as_str()));
    }
}

#[test]
fn keys_recorded_by_an_earlier_version_are_still_read() {
    let two = format!("{KEY} {ECDSA}");
    assert!(parsed(&two).is_err());
    for (recorded, line) in [(two.clone(), two), (format!("{KEY}\u{a0}"), KEY.to_owned())] {
        assert_eq!(SshPublicKey::from_record(&recorded).unwrap().as_str(), line);
    }
    for damaged in ["", " ", "a\nb", "a\0", &"x".repeat(9000)] {
        assert!(SshPublicKey::from_record(damaged).is_err(), "{damaged:?}");
    }
}

proptest! {
    /// Checks that an accepted key is one line, whatever surrounds it in the input. No character in
    /// it ends a line for a program in the guest.
    #[test]
    fn accepted_keys_are_one_short_line_that_parses_to_the_same_key(
        before in "\\PC{0,3}|[\\s\u{feff}\u{a0}]{0,4}",
        gap in "[ \t\u{a0}\u{2003}]{1,3}",
        comment in "\\PC{0,40}|.{0,40}|[\\x00-\\x{ffff}]{0,10}",
        after in "[\\s\\x00\u{85}\u{a0}\u{2028}\u{feff}]{0,4}",
    ) {
        let text = format!("{before}{}{gap}{comment}{after}", KEY.replace(' ', &gap));
        if let Ok(key) = text.parse::<SshPublicKey>() {
            let line = key.as_str();
            prop_assert!(line.starts_with(KEY) && line.len() <= 8192);
            let stops = |c: char| c.is_control() || ['\u{2028}', '\u{2029}', '\u{fffe}', '\u{ffff}'].contains(&c);
            prop_assert!(!line.contains(stops));
            prop_assert_eq!(line.trim(), line);
            prop_assert_eq!(&line.parse::<SshPublicKey>().unwrap(), &key);
            prop_assert_eq!(&SshPublicKey::from_record(line).unwrap(), &key);
        }
    }

    #[test]
    fn accepted_vm_names_are_host_name_labels(name in "[a-z0-9-]{1,63}|\\PC{0,70}|.{0,5}") {
        if let Ok(name) = name.parse::<VmName>() {
            let name = name.as_str();
            prop_assert!((1..=63).contains(&name.len()));
            prop_assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            prop_assert!(!name.starts_with('-') && !name.ends_with('-'));
        }
    }
}

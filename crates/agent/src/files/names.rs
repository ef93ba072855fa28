//! Names as text.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;

/// Returns a name or path with its bytes that are not UTF-8 percent-encoded, and `%` too.
pub(crate) fn encode(name: impl AsRef<OsStr>) -> String {
    let mut text = String::new();
    for chunk in name.as_ref().as_bytes().utf8_chunks() {
        text.push_str(&chunk.valid().replace('%', "%25"));
        for byte in chunk.invalid() {
            // Writing to a string cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use percent_encoding::percent_decode_str;
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn any_bytes_are_the_same_after_decoding() {
        for bytes in [&b"f\xfcr 100% \xe2\x82"[..], b"plain", "größe".as_bytes(), b"%41"] {
            let text = encode(OsString::from_vec(bytes.to_vec()));
            assert_eq!(percent_decode_str(&text).collect::<Vec<u8>>(), bytes);
        }
        assert_eq!(encode("größe"), "größe");
        assert_eq!(encode(OsString::from_vec(b"\xff%".to_vec())), "%FF%25");
    }
}

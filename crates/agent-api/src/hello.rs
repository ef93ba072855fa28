//! The start of a connection: both sides determine where its bytes begin.
//!
//! The host sends [`request`] and waits for [`response`] with the same nonce, skipping all bytes
//! before it. It repeats the request while no response arrives. The agent skips bytes until it has
//! read a request, and responds. Repeated requests that arrive after the first belong to the same
//! hello: the agent skips them until the first byte of HTTP/2.
//!
//! The request starts with a [`flush`](FLUSH) that is longer than any HTTP/2 frame. An agent that
//! is still reading a frame of an earlier connection completes it with these bytes, rejects the
//! next ones as an invalid frame, drops the connection, and finds the request.

/// Length of the nonce, in hexadecimal digits.
pub const NONCE: usize = 32;

/// Maximum size of an HTTP/2 frame on a connection, without its header of 9 bytes (RFC 9113,
/// section 4.2). Both sides keep this limit.
pub const MAX_FRAME: usize = 16 << 10;

/// Number of [`FILLER`] bytes before a request.
pub const FLUSH: usize = MAX_FRAME + 64;

/// The filler byte: three of them are a frame length over the limit.
pub const FILLER: u8 = 0xff;

/// Maximum number of bytes that a host skips while it waits for a response.
pub const MAX_SKIPPED: usize = 4 << 20;

const REQUEST: &str = "\nscalebox-agent hello ";
const RESPONSE: &str = "\nscalebox-agent ready ";

/// Length of a request or response without the filler, in bytes. Each has the word, the nonce, a
/// blank, the protocol's version in three digits, and a newline.
pub const LINE: usize = REQUEST.len() + NONCE + 5;

/// Returns a host's request, filler included.
pub fn request(nonce: &[u8; NONCE], protocol: u32) -> Vec<u8> {
    let mut bytes = vec![FILLER; FLUSH];
    bytes.extend_from_slice(&line(REQUEST, nonce, protocol));
    bytes
}

/// Returns an agent's response.
pub fn response(nonce: &[u8; NONCE], protocol: u32) -> Vec<u8> {
    line(RESPONSE, nonce, protocol)
}

/// Searches for a request at the end of `bytes`, the newest bytes of a stream. Returns its nonce
/// and the host's protocol.
pub fn find_request(bytes: &[u8]) -> Option<([u8; NONCE], u32)> {
    find(REQUEST, bytes)
}

/// Searches for a response at the end of `bytes`. Returns its nonce and the agent's protocol.
pub fn find_response(bytes: &[u8]) -> Option<([u8; NONCE], u32)> {
    find(RESPONSE, bytes)
}

fn line(word: &str, nonce: &[u8; NONCE], protocol: u32) -> Vec<u8> {
    let mut bytes = word.as_bytes().to_vec();
    bytes.extend_from_slice(nonce);
    bytes.extend_from_slice(format!(" {:03}\n", protocol.min(999)).as_bytes());
    bytes
}

fn find(word: &str, bytes: &[u8]) -> Option<([u8; NONCE], u32)> {
    let line = bytes.get(bytes.len().checked_sub(LINE)?..)?;
    let rest = line.strip_prefix(word.as_bytes())?.strip_suffix(b"\n")?;
    let (nonce, protocol) = rest.split_first_chunk::<NONCE>()?;
    if !nonce.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let protocol = std::str::from_utf8(protocol).ok()?.strip_prefix(' ')?;
    Some((*nonce, protocol.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: [u8; NONCE] = *b"0123456789abcdef0123456789abcdef";

    #[test]
    fn requests_and_responses_are_found_at_the_end_of_any_bytes() {
        let mut stream = b"left over from before".to_vec();
        stream.extend(request(&A, 1));
        assert_eq!(find_request(&stream), Some((A, 1)));
        assert_eq!(find_response(&stream), None);
        let answer = response(&A, 7);
        assert_eq!(answer.len(), LINE);
        assert_eq!(find_response(&answer), Some((A, 7)));
        assert_eq!(find_request(&stream[..stream.len() - 1]), None, "incomplete");
        assert_eq!(find_request(b"short"), None);
    }

    proptest! {
        #[test]
        fn random_bytes_are_not_a_hello(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(find_request(&bytes), None);
            prop_assert_eq!(find_response(&bytes), None);
        }
    }
}

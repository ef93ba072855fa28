//! The guest's agent as a static program, embedded in the daemon. A host has the same release of
//! both, and an image needs no file of Scalebox.

/// `scalebox-agent`, an x86-64 ELF program without an interpreter.
pub static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/scalebox-agent"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_a_static_program_of_moderate_size() {
        assert!(AGENT.starts_with(b"\x7fELF"));
        let interpreter = b"/lib64/ld-linux";
        assert!(!AGENT.windows(interpreter.len()).any(|bytes| bytes == interpreter));
        assert!(
            AGENT.len() < 6 << 20,
            "{} bytes, which every guest loads at boot",
            AGENT.len()
        );
    }
}

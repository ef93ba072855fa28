//! The program `scalebox-agent`; see the library.

fn main() {}

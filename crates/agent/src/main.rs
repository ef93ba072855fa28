//! The program `scalebox-agent`; see the library.

use scalebox_agent::ServeOptions;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        scalebox_agent::init();
    }
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("serve")
        && let Some(options) = ServeOptions::parse(arguments)
    {
        return match scalebox_agent::run(options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("scalebox-agent: {error}");
                ExitCode::FAILURE
            }
        };
    }
    eprintln!("scalebox-agent is the program of Scalebox in a guest; the guest's initramfs starts it");
    ExitCode::from(2)
}

//! `scaleboxd client-config`.

use crate::commands::failed::CommandFailed;
use crate::settings::Settings;
use std::net::Ipv4Addr;

/// Runs `scaleboxd client-config`.
pub(crate) fn client_config(settings: &Settings) -> Result<(), CommandFailed> {
    let token = settings.token()?;
    let mut address = settings.api;
    if address.ip().is_unspecified() {
        address.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    println!("SCALEBOX_URL=http://{address}\nSCALEBOX_TOKEN={}", token.secret());
    Ok(())
}

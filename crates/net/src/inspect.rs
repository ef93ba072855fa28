//! Looking at a host before anything is made on it.

use crate::config::NetConfig;
use crate::error::{Error, Result};
use crate::firewall::{self, FirewallDrop};
use crate::links::Links;
use crate::network::{check_bridge, check_overlap, lacks_the_bridge_family};
use crate::nft;
use crate::ruleset::{Guard, Ruleset};

/// What [`inspect`] found on a host where a network can be made, or is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// Firewall chains of the host that drop what guests send and receive.
    pub firewall_drops: Vec<FirewallDrop>,
    /// Whether the kernel can check frames tap by tap; see
    /// [`Network::guards_taps`](crate::Network::guards_taps).
    pub guards_taps: bool,
}

/// Looks whether [`Network::ensure`](crate::Network::ensure) would succeed, and changes nothing.
/// The network may be there already, and in use.
///
/// # Errors
///
/// [`Error::Foreign`] if the bridge's name is somebody else's, [`Error::Overlap`] if the subnet is
/// in use on this host, [`Error::NftMissing`], and those of the tools.
pub async fn inspect(config: &NetConfig) -> Result<Inspection> {
    let links = Links::open()?;
    check_bridge(&links, config).await?;
    check_overlap(&links, config).await?;
    let own = Ruleset::new(config, Guard::PerTap).table();
    let probe = format!("add table bridge {own}");
    let guards_taps = match nft::check("see what the kernel's nftables can do", &probe).await {
        Ok(()) => true,
        Err(Error::Nft { output, .. }) if lacks_the_bridge_family(&output) => false,
        Err(error) => return Err(error),
    };
    Ok(Inspection {
        firewall_drops: firewall::drops(config, &own, &links).await?,
        guards_taps,
    })
}

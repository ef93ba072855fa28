//! Checks a host without changing it.

use crate::config::NetConfig;
use crate::error::{Error, Result};
use crate::firewall::{self, FirewallDrop};
use crate::host_network::{check_bridge, check_overlap, lacks_the_bridge_family};
use crate::links::Links;
use crate::nft;
use crate::ruleset::{Guard, Ruleset};

/// The result of [`inspect`] on a host that can have, or already has, a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// The host's firewall chains that drop guests' packets.
    pub firewall_drops: Vec<FirewallDrop>,
    /// `true` if the kernel can check frames per tap; see
    /// [`Network::guards_taps`](crate::Network::guards_taps).
    pub guards_taps: bool,
}

/// Checks whether [`Network::ensure`](crate::Network::ensure) would succeed, without changing
/// anything. The network may already exist and be in use.
///
/// # Errors
///
/// [`Error::ForeignBridge`] if another program owns an interface with the bridge's name,
/// [`Error::Overlap`] if the subnet is in use on this host, [`Error::NftMissing`], and the errors
/// of the tools.
pub async fn inspect(config: &NetConfig) -> Result<Inspection> {
    let links = Links::open()?;
    check_bridge(&links, config).await?;
    check_overlap(&links, config).await?;
    let own = Ruleset::new(config, Guard::PerTap).table();
    let probe = format!("add table bridge {own}");
    let guards_taps = match nft::check("probe the kernel's nftables features", &probe).await {
        Ok(()) => true,
        Err(Error::Nft { output, .. }) if lacks_the_bridge_family(&output) => false,
        Err(error) => return Err(error),
    };
    Ok(Inspection {
        firewall_drops: firewall::drops(config, &own, &links).await?,
        guards_taps,
    })
}

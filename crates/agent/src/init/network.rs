//! Sets up the network of a guest without an init of its own.

use crate::init::seed::Facts;
use futures::TryStreamExt;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::net::Ipv4Addr;

/// The interface of the machine: the kernel command line keeps this name.
const INTERFACE: &str = "eth0";

/// Activates `lo` and the machine's interface, with its address and the default route.
pub(crate) async fn configure(facts: &Facts) -> Result<(), String> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|error| format!("cannot open netlink: {error}"))?;
    let connection = tokio::spawn(connection);
    let configured = set_up(&handle, facts).await;
    connection.abort();
    configured.map_err(|error| format!("cannot configure the network: {error}"))
}

async fn set_up(handle: &Handle, facts: &Facts) -> Result<(), rtnetlink::Error> {
    if let Some(index) = index(handle, "lo").await? {
        handle
            .link()
            .set(LinkUnspec::new_with_index(index).up().build())
            .execute()
            .await?;
    }
    let (Some(index), Some((address, prefix))) = (index(handle, INTERFACE).await?, facts.address) else {
        return Ok(());
    };
    handle.address().add(index, address.into(), prefix).execute().await?;
    handle
        .link()
        .set(LinkUnspec::new_with_index(index).up().build())
        .execute()
        .await?;
    if let Some(gateway) = facts.gateway {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
        handle.route().add(route).execute().await?;
    }
    Ok(())
}

async fn index(handle: &Handle, name: &str) -> Result<Option<u32>, rtnetlink::Error> {
    let mut found = handle.link().get().match_name(name.to_owned()).execute();
    match found.try_next().await {
        Ok(link) => Ok(link.map(|link| link.header.index)),
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -rustix::io::Errno::NODEV.raw_os_error() => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

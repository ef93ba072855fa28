//! Interfaces, bridge ports and addresses, by netlink. The one door to the crate `rtnetlink`.

use crate::endpoint::Mac;
use crate::error::{Error, Result};
use futures::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{BridgeStpState, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec};
use std::io;
use std::net::IpAddr;

/// A conversation with the kernel about the interfaces of one network namespace: that of the thread
/// which began it.
#[derive(Clone)]
pub(crate) struct Links(Handle);

/// An interface, as far as it matters here.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) kind: Option<InfoKind>,
    /// The index of the bridge that it is a port of.
    pub(crate) controller: Option<u32>,
    pub(crate) mac: Vec<u8>,
    pub(crate) up: bool,
}

/// An IPv4 address of an interface.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    pub(crate) index: u32,
    pub(crate) net: Ipv4Net,
    message: AddressMessage,
}

impl Links {
    /// Opens the socket and lets the runtime serve it until the last clone is gone.
    pub(crate) fn open() -> Result<Links> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|source| Error::Netlink {
            action: "open a netlink socket".to_owned(),
            source,
        })?;
        tokio::spawn(connection);
        Ok(Links(handle))
    }

    /// The interface of that name, or none.
    pub(crate) async fn find(&self, name: &str) -> Result<Option<Link>> {
        let mut found = Box::pin(self.0.link().get().match_name(name).execute());
        match found.try_next().await {
            Ok(message) => Ok(message.map(Link::from)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(failed(format!("look for the interface {name}"), error)),
        }
    }

    /// All interfaces.
    pub(crate) async fn all(&self) -> Result<Vec<Link>> {
        let links = self.0.link().get().execute().map_ok(Link::from).try_collect().await;
        links.map_err(|error| failed("list the interfaces", error))
    }

    /// Makes a bridge, down. The MAC is fixed in the same message: left to itself a bridge takes
    /// the lowest of its ports', and guests would lose their gateway whenever a VM comes or goes.
    pub(crate) async fn add_bridge(&self, name: &str, mac: Mac) -> Result<()> {
        let message = LinkBridge::new(name)
            .down()
            .address(mac.octets().to_vec())
            .stp_state(BridgeStpState::Disabled)
            .mcast_snooping(false)
            .build();
        let added = self.0.link().add(message).execute().await;
        added.map_err(|error| failed(format!("make the bridge {name}"), error))
    }

    /// Sets the MAC of an interface.
    pub(crate) async fn set_mac(&self, link: &Link, mac: Mac) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index)
            .address(mac.octets().to_vec())
            .build();
        self.change(message, format!("set the MAC of {} to {mac}", link.name))
            .await
    }

    /// Sets an interface up.
    pub(crate) async fn set_up(&self, link: &Link) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).up().build();
        self.change(message, format!("set {} up", link.name)).await
    }

    /// Sets an interface down.
    pub(crate) async fn set_down(&self, link: &Link) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).down().build();
        self.change(message, format!("set {} down", link.name)).await
    }

    /// Makes an interface a port of a bridge.
    pub(crate) async fn enslave(&self, link: &Link, bridge: &Link) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).controller(bridge.index).build();
        self.change(message, format!("make {} a port of {}", link.name, bridge.name))
            .await
    }

    /// Keeps a port from passing frames to other isolated ports of its bridge. Only the bridge
    /// itself is left to talk to.
    pub(crate) async fn isolate(&self, port: &Link) -> Result<()> {
        let message = LinkBridgePort::new(port.index).isolated(true).build();
        let set = self.0.link().set_port(message).execute().await;
        set.map_err(|error| failed(format!("isolate the bridge port {}", port.name), error))
    }

    /// Deletes an interface; one that is gone already is as good.
    pub(crate) async fn delete(&self, link: &Link) -> Result<()> {
        match self.0.link().del(link.index).execute().await {
            Err(error) if !is_missing(&error) => Err(failed(format!("delete the interface {}", link.name), error)),
            _ => Ok(()),
        }
    }

    /// The IPv4 addresses of all interfaces.
    pub(crate) async fn addresses(&self) -> Result<Vec<Address>> {
        let messages: Vec<AddressMessage> = self
            .0
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| failed("list the addresses", error))?;
        Ok(messages.into_iter().filter_map(Address::of).collect())
    }

    /// Gives an address to an interface.
    pub(crate) async fn add_address(&self, link: &Link, address: Ipv4Net) -> Result<()> {
        let request = self
            .0
            .address()
            .add(link.index, IpAddr::V4(address.addr()), address.prefix_len());
        request
            .execute()
            .await
            .map_err(|error| failed(format!("give {address} to {}", link.name), error))
    }

    /// Takes an address away.
    pub(crate) async fn delete_address(&self, address: &Address) -> Result<()> {
        let deleted = self.0.address().del(address.message.clone()).execute().await;
        deleted.map_err(|error| failed(format!("take the address {} away", address.net), error))
    }

    async fn change(&self, message: LinkMessage, action: String) -> Result<()> {
        self.0
            .link()
            .change(message)
            .execute()
            .await
            .map_err(|error| failed(action, error))
    }
}

impl Link {
    pub(crate) fn is_bridge(&self) -> bool {
        self.kind == Some(InfoKind::Bridge)
    }

    /// A tun or a tap: the kernel has one kind for both.
    pub(crate) fn is_tap(&self) -> bool {
        self.kind == Some(InfoKind::Tun)
    }
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Link {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            kind: None,
            controller: None,
            mac: Vec::new(),
            up: message.header.flags.contains(LinkFlags::Up),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        link
    }
}

impl Address {
    fn of(message: AddressMessage) -> Option<Address> {
        // Local is the interface's own; Address is the peer's on a point-to-point link, and the
        // same on all others.
        let own = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(ip)) => Some(*ip),
            _ => None,
        })?;
        let net = Ipv4Net::new(own, message.header.prefix_len).ok()?;
        Some(Address {
            index: message.header.index,
            net,
            message,
        })
    }
}

fn failed(action: impl Into<String>, error: rtnetlink::Error) -> Error {
    let source = match error {
        rtnetlink::Error::NetlinkError(refusal) => refusal.to_io(),
        other => io::Error::other(other),
    };
    Error::Netlink {
        action: action.into(),
        source,
    }
}

fn is_missing(error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(refusal) = error else {
        return false;
    };
    let errno = refusal.to_io().raw_os_error().map(rustix::io::Errno::from_raw_os_error);
    errno == Some(rustix::io::Errno::NODEV)
}

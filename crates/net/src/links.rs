//! Interfaces, bridge ports and addresses, by netlink. No other module uses the crate `rtnetlink`.

use crate::error::{Error, Result};
use futures::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{BridgeStpState, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec};
use scalebox_units::Mac;
use std::io;
use std::net::IpAddr;

/// A netlink connection for the interfaces of the network namespace of the thread that opened it.
#[derive(Clone)]
pub(crate) struct Links(Handle);

/// The properties of an interface that are used here.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) kind: Option<InfoKind>,
    /// Index of the bridge that the interface is a port of.
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
    /// Opens the socket. The runtime serves it until the last clone is dropped.
    pub(crate) fn open() -> Result<Links> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|source| Error::Netlink {
            action: "open a netlink socket".to_owned(),
            source,
        })?;
        tokio::spawn(connection);
        Ok(Links(handle))
    }

    /// Returns the interface of that name, if it exists.
    pub(crate) async fn find(&self, name: &str) -> Result<Option<Link>> {
        let mut found = Box::pin(self.0.link().get().match_name(name).execute());
        match found.try_next().await {
            Ok(message) => Ok(message.map(Link::from)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(failed(format!("look up the interface {name}"), error)),
        }
    }

    /// Returns all interfaces.
    pub(crate) async fn all(&self) -> Result<Vec<Link>> {
        let links = self.0.link().get().execute().map_ok(Link::from).try_collect().await;
        links.map_err(|error| failed("list the interfaces", error))
    }

    /// Creates a bridge in state down. The MAC is set in the same message: by default a bridge
    /// takes the lowest MAC of its ports, and guests would lose their gateway whenever a VM is
    /// added or removed.
    pub(crate) async fn add_bridge(&self, name: &str, mac: Mac) -> Result<()> {
        let message = LinkBridge::new(name)
            .down()
            .address(mac.octets().to_vec())
            .stp_state(BridgeStpState::Disabled)
            .mcast_snooping(false)
            .build();
        let added = self.0.link().add(message).execute().await;
        added.map_err(|error| failed(format!("create the bridge {name}"), error))
    }

    /// Sets the MAC of an interface.
    pub(crate) async fn set_mac(&self, link: &Link, mac: Mac) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index)
            .address(mac.octets().to_vec())
            .build();
        self.change(message, format!("set the MAC of {} to {mac}", link.name))
            .await
    }

    /// Brings an interface up.
    pub(crate) async fn set_up(&self, link: &Link) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).up().build();
        self.change(message, format!("bring {} up", link.name)).await
    }

    /// Deactivates an interface.
    pub(crate) async fn set_down(&self, link: &Link) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).down().build();
        self.change(message, format!("bring {} down", link.name)).await
    }

    /// Makes an interface a port of a bridge.
    pub(crate) async fn enslave(&self, link: &Link, bridge: &Link) -> Result<()> {
        let message = LinkUnspec::new_with_index(link.index).controller(bridge.index).build();
        self.change(message, format!("make {} a port of {}", link.name, bridge.name))
            .await
    }

    /// Isolates a bridge port: it can exchange frames only with the bridge itself, not with other
    /// isolated ports.
    pub(crate) async fn isolate(&self, port: &Link) -> Result<()> {
        let message = LinkBridgePort::new(port.index).isolated(true).build();
        let set = self.0.link().set_port(message).execute().await;
        set.map_err(|error| failed(format!("isolate the bridge port {}", port.name), error))
    }

    /// Deletes an interface. Succeeds if it does not exist.
    pub(crate) async fn delete(&self, link: &Link) -> Result<()> {
        match self.0.link().del(link.index).execute().await {
            Err(error) if !is_missing(&error) => Err(failed(format!("delete the interface {}", link.name), error)),
            _ => Ok(()),
        }
    }

    /// Returns the IPv4 addresses of all interfaces.
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

    /// Adds an address to an interface.
    pub(crate) async fn add_address(&self, link: &Link, address: Ipv4Net) -> Result<()> {
        let request = self
            .0
            .address()
            .add(link.index, IpAddr::V4(address.addr()), address.prefix_len());
        request
            .execute()
            .await
            .map_err(|error| failed(format!("add {address} to {}", link.name), error))
    }

    /// Removes an address.
    pub(crate) async fn delete_address(&self, address: &Address) -> Result<()> {
        let deleted = self.0.address().del(address.message.clone()).execute().await;
        deleted.map_err(|error| failed(format!("remove the address {}", address.net), error))
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

    /// Returns whether this is a tun or a tap device: the kernel has one kind for both.
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
        // `Local` is the interface's own address. `Address` is the peer's on a point-to-point link,
        // and the same as `Local` otherwise.
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
        rtnetlink::Error::NetlinkError(rejection) => rejection.to_io(),
        other => io::Error::other(other),
    };
    Error::Netlink {
        action: action.into(),
        source,
    }
}

fn is_missing(error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(rejection) = error else {
        return false;
    };
    let errno = rejection
        .to_io()
        .raw_os_error()
        .map(rustix::io::Errno::from_raw_os_error);
    errno == Some(rustix::io::Errno::NODEV)
}

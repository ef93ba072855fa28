//! Other people's firewall tables that drop what our guests send and receive. They are found and told of, never
//! changed.

use crate::error::Result;
use crate::nft;
use serde_json::Value;
use std::fmt;

/// A chain of another table that drops forwarded packets unless a rule of that table says otherwise, and has no rule
/// that names our bridge. In nftables a packet has to pass the chains of every table: our `accept` does not overrule
/// this.
///
/// Only nftables is looked at (which `iptables` writes to on current distributions); `iptables-legacy` is not seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardDrop {
    /// Family and name of the table, such as `ip filter`.
    pub table: String,
    /// The chain, such as `FORWARD`.
    pub chain: String,
    /// Our bridge.
    pub bridge: String,
}

impl fmt::Display for ForwardDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ForwardDrop { table, chain, bridge } = self;
        write!(
            f,
            "the firewall of this host (chain {chain} of the nftables table {table}) drops forwarded packets, so guests cannot reach the \
             network, nor other machines the guests; let the bridge through. \
             Docker: iptables -I DOCKER-USER -i {bridge} -j ACCEPT && iptables -I DOCKER-USER -o {bridge} -j ACCEPT. \
             ufw: ufw route allow in on {bridge} && ufw route allow out on {bridge}. \
             firewalld: firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload"
        )
    }
}

/// The chains in the way of `bridge`, those of the table `own` left out.
pub(crate) async fn forward_drops(bridge: &str, own: &str) -> Result<Vec<ForwardDrop>> {
    let mut drops = Vec::new();
    for item in nft::list(&["chains"]).await? {
        let Some(chain) = item.get("chain").filter(|chain| drops_forwarded(chain)) else {
            continue;
        };
        let (family, table) = (text(chain, "family"), text(chain, "table"));
        if table != own && !names(&nft::list(&["table", family, table]).await?, bridge) {
            drops.push(ForwardDrop {
                table: format!("{family} {table}"),
                chain: text(chain, "name").to_owned(),
                bridge: bridge.to_owned(),
            });
        }
    }
    Ok(drops)
}

fn drops_forwarded(chain: &Value) -> bool {
    matches!(text(chain, "family"), "ip" | "inet")
        && text(chain, "hook") == "forward"
        && text(chain, "policy") == "drop"
}

/// Whether a string in there is the bridge's name: somebody has thought of it, and what their rule does is their
/// affair.
fn names(items: &[Value], bridge: &str) -> bool {
    items.iter().any(|item| match item {
        Value::String(string) => string == bridge,
        Value::Array(items) => names(items, bridge),
        Value::Object(object) => object.values().any(|value| names(std::slice::from_ref(value), bridge)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    })
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object.get(key).and_then(Value::as_str).unwrap_or_default()
}

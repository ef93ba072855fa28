//! The groups of rows, and the choice of them.

use crate::outcome::Outcome;

/// A group of rows, measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    /// Creation of disks, lists, a restart, and memory with many VMs.
    Disks,
    /// Random writes to disks.
    Writes,
    /// Boots, and a running guest: growth, commands and files.
    Guest,
    /// Pulls from a registry.
    Pull,
}

impl Group {
    /// All groups, in the order of their measurement.
    pub(crate) const ALL: [Group; 4] = [Group::Disks, Group::Writes, Group::Guest, Group::Pull];

    fn name(self) -> &'static str {
        match self {
            Group::Disks => "disks",
            Group::Writes => "writes",
            Group::Guest => "guest",
            Group::Pull => "pull",
        }
    }

    /// Parses names, separated by spaces; without any, returns all groups.
    ///
    /// # Errors
    /// An unknown name.
    pub(crate) fn parse(names: &str) -> Outcome<Vec<Group>> {
        if names.trim().is_empty() {
            return Ok(Group::ALL.to_vec());
        }
        let parse = |name: &str| {
            let found = Group::ALL.into_iter().find(|group| group.name() == name);
            let known = Group::ALL.map(Group::name).join(", ");
            found.ok_or_else(|| format!("ROWS has an unknown group {name}: use {known}").into())
        };
        names.split_whitespace().map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_choose_groups_and_no_name_chooses_all() {
        assert!(Group::parse(" ").is_ok_and(|groups| groups == Group::ALL));
        assert!(Group::parse("pull  guest").is_ok_and(|groups| groups == [Group::Pull, Group::Guest]));
        assert!(
            Group::parse("guest,pull").is_err_and(|error| error.to_string().contains("disks, writes, guest, pull"))
        );
    }
}

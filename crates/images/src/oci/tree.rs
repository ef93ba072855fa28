//! The merged tree of an image's layers, in memory.
//!
//! Names of layers are keys of this tree and nothing else: no path of an image is ever used on the
//! host. A symbolic link in the middle of a path is followed inside the tree, with `/` and `..`
//! ending at the image's root, as in a container engine that unpacks into a chroot. Therefore no
//! link can lead out of the tree.

use std::collections::BTreeMap;

/// Maximum number of symbolic links in one path (ELOOP).
const MAX_LINKS: u32 = 40;
/// Maximum depth of a folder. Also bounds recursion.
pub(crate) const MAX_DEPTH: usize = 256;

/// The number of a node in [`Tree::nodes`].
pub(crate) type NodeId = u32;
pub(crate) const ROOT: NodeId = 0;

/// Owner, mode and attributes of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits, with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime: u64,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Meta {
    /// Returns the metadata of a folder that no layer describes; it belongs to root.
    pub(crate) fn folder(mode: u32) -> Meta {
        Meta {
            mode,
            uid: 0,
            gid: 0,
            mtime: 0,
            xattrs: Vec::new(),
        }
    }
}

/// A file, folder or link.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) body: Body,
    /// The number of its names; zero once it is removed.
    pub(crate) links: u32,
}

#[derive(Debug)]
pub(crate) enum Body {
    Folder(BTreeMap<Vec<u8>, Name>),
    /// The number of the staged content, `None` if it is empty; and its size.
    File(Option<u64>, u64),
    Symlink(Vec<u8>),
}

/// A name in a folder.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Name {
    pub(crate) node: NodeId,
    /// The last layer that has an entry for it.
    layer: usize,
}

/// The reason why a path cannot be used. The text continues the sentence "the path … which …".
pub(crate) type Invalid = &'static str;

/// The merged tree.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
    /// Staged contents that are no longer part of the tree, for the caller to remove.
    pub(crate) dropped: Vec<u64>,
    /// Steps of look-ups and removals so far; bounded by the caller.
    pub(crate) steps: u64,
}

impl Tree {
    pub(crate) fn new() -> Tree {
        let root = Node {
            meta: Meta::folder(0o755),
            body: Body::Folder(BTreeMap::new()),
            links: 1,
        };
        Tree {
            nodes: vec![root],
            dropped: Vec::new(),
            steps: 0,
        }
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    /// Returns the entries of a folder; `None` for other nodes.
    pub(crate) fn folder(&self, id: NodeId) -> Option<&BTreeMap<Vec<u8>, Name>> {
        match &self.node(id).body {
            Body::Folder(names) => Some(names),
            _ => None,
        }
    }

    fn names_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Vec<u8>, Name>> {
        match &mut self.node_mut(id).body {
            Body::Folder(names) => Some(names),
            _ => None,
        }
    }

    /// Returns the folder with the path `components`, following links. Creates missing folders as
    /// part of `layer`; without a `layer`, returns `None` if one is missing.
    pub(crate) fn walk(&mut self, components: &[&[u8]], layer: Option<usize>) -> Result<Option<NodeId>, Invalid> {
        let mut trail = vec![ROOT];
        let mut left: Vec<Vec<u8>> = components.iter().rev().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(name) = left.pop() {
            self.steps += 1;
            let here = trail.last().copied().unwrap_or(ROOT);
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if trail.len() > 1 {
                        trail.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let found = self
                .folder(here)
                .and_then(|names| names.get(&name))
                .map(|name| name.node);
            let next = match (found, layer) {
                (Some(found), _) => found,
                (None, None) => return Ok(None),
                (None, Some(layer)) => self.add_folder(here, name, layer, Meta::folder(0o755)),
            };
            match &self.node(next).body {
                Body::Folder(_) => trail.push(next),
                Body::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err("leads through too many symbolic links");
                    }
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                    left.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
                }
                Body::File(..) => return Err("leads through a file that is not a folder"),
            }
            if trail.len() > MAX_DEPTH {
                return Err("is too deep");
            }
        }
        Ok(trail.last().copied())
    }

    /// Returns the name of the file that a path leads to in the end.
    pub(crate) fn file_at(&mut self, path: &[u8]) -> Option<Vec<u8>> {
        let mut path = path.to_vec();
        for _ in 0..MAX_LINKS {
            let parts: Vec<&[u8]> = path
                .split(|byte| *byte == b'/')
                .filter(|part| !part.is_empty())
                .collect();
            let (name, parents) = parts.split_last()?;
            let folder = self.walk(parents, None).ok()??;
            let there = self.folder(folder)?.get(*name)?.node;
            path = match &self.node(there).body {
                Body::File(..) => return Some(name.to_vec()),
                Body::Folder(_) => return None,
                Body::Symlink(target) if target.starts_with(b"/") => target.clone(),
                Body::Symlink(target) => [parents.join(&b'/').as_slice(), b"/", target].concat(),
            };
        }
        None
    }

    fn add_folder(&mut self, parent: NodeId, name: Vec<u8>, layer: usize, meta: Meta) -> NodeId {
        let body = Body::Folder(BTreeMap::new());
        self.add(parent, name, layer, meta, body)
    }

    /// Adds a new node under a name, and replaces a node of the same name.
    pub(crate) fn add(&mut self, parent: NodeId, name: Vec<u8>, layer: usize, meta: Meta, body: Body) -> NodeId {
        let node = self.nodes.len() as NodeId;
        self.nodes.push(Node { meta, body, links: 0 });
        self.link(parent, name, layer, node);
        node
    }

    /// Gives a node another name, and replaces a node of the same name.
    pub(crate) fn link(&mut self, parent: NodeId, name: Vec<u8>, layer: usize, node: NodeId) {
        self.node_mut(node).links += 1;
        let old = self
            .names_mut(parent)
            .and_then(|names| names.insert(name, Name { node, layer }));
        if let Some(old) = old {
            self.unlink(old.node);
        }
    }

    /// Makes `name` a folder. An existing folder is kept, with the new metadata.
    pub(crate) fn make_folder(&mut self, parent: NodeId, name: &[u8], layer: usize, meta: Meta) {
        let there = self.folder(parent).and_then(|names| names.get(name)).copied();
        match there {
            Some(there) if self.folder(there.node).is_some() => {
                self.node_mut(there.node).meta = meta;
                if let Some(name) = self.names_mut(parent).and_then(|names| names.get_mut(name)) {
                    name.layer = layer;
                }
            }
            _ => {
                self.add_folder(parent, name.to_vec(), layer, meta);
            }
        }
    }

    pub(crate) fn set_root(&mut self, meta: Meta) {
        self.node_mut(ROOT).meta = meta;
    }

    /// Removes the entries of layers below `layer` under a name.
    pub(crate) fn whiteout(&mut self, parent: NodeId, name: &[u8], layer: usize) {
        let there = self.folder(parent).and_then(|names| names.get(name)).copied();
        if there.is_some_and(|there| self.is_gone_without(there, layer)) {
            let removed = self.names_mut(parent).and_then(|names| names.remove(name));
            if let Some(removed) = removed {
                self.unlink(removed.node);
            }
        }
    }

    /// Removes the entries of layers below `layer` in a folder.
    pub(crate) fn make_opaque(&mut self, folder: NodeId, layer: usize) {
        let names: Vec<(Vec<u8>, Name)> = match self.folder(folder) {
            Some(names) => names.iter().map(|(name, there)| (name.clone(), *there)).collect(),
            None => return,
        };
        for (name, there) in names {
            if self.is_gone_without(there, layer)
                && let Some(removed) = self.names_mut(folder).and_then(|names| names.remove(&name))
            {
                self.unlink(removed.node);
            }
        }
    }

    /// Removes the entries of layers below `layer` under a name, except the name itself. Returns
    /// whether the name can be removed, too: the layer has no entries under it.
    fn is_gone_without(&mut self, name: Name, layer: usize) -> bool {
        self.steps += 1;
        if self.folder(name.node).is_some() {
            self.make_opaque(name.node, layer);
        }
        let is_empty = self.folder(name.node).is_none_or(BTreeMap::is_empty);
        name.layer < layer && is_empty
    }

    /// Removes one name of a node, and the node with its last name.
    fn unlink(&mut self, id: NodeId) {
        let mut queue = vec![id];
        while let Some(id) = queue.pop() {
            self.steps += 1;
            let node = self.node_mut(id);
            node.links = node.links.saturating_sub(1);
            if node.links > 0 {
                continue;
            }
            node.meta.xattrs = Vec::new();
            match std::mem::replace(&mut node.body, Body::File(None, 0)) {
                Body::Folder(names) => queue.extend(names.into_values().map(|name| name.node)),
                Body::File(Some(staged), _) => self.dropped.push(staged),
                Body::File(None, _) | Body::Symlink(_) => {}
            }
        }
    }
}

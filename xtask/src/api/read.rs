//! The modules of a crate, from its sources.

use super::Error;
use std::path::{Path, PathBuf};
use syn::{Attribute, Item, Meta};

/// A module with its items; those of child modules are theirs.
pub(super) struct Module {
    /// `a::b`, empty for the crate's root.
    pub(super) path: String,
    /// What it is compiled under.
    pub(super) cfg: Vec<String>,
    pub(super) items: Vec<Item>,
}

/// The conditions of the attributes, as written between the parentheses of `cfg`.
pub(super) fn conditions(attributes: &[Attribute]) -> Vec<String> {
    attributes
        .iter()
        .filter(|a| a.path().is_ident("cfg"))
        .filter_map(|a| match &a.meta {
            Meta::List(list) => Some(list.tokens.to_string()),
            _ => None,
        })
        .collect()
}

/// The modules below a crate's root file, without those of tests.
pub(super) fn modules(root: &Path) -> Result<Vec<Module>, Error> {
    let mut found = Vec::new();
    let dir = root.parent().unwrap_or(root).to_path_buf();
    file(root, &dir, String::new(), Vec::new(), &mut found)?;
    Ok(found)
}

fn file(path: &Path, dir: &Path, name: String, cfg: Vec<String>, found: &mut Vec<Module>) -> Result<(), Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    let parsed = syn::parse_file(&text).map_err(|source| Error::Syntax { path: path.to_path_buf(), source })?;
    module(path, dir, name, cfg, parsed.items, found)
}

fn module(
    path: &Path,
    dir: &Path,
    name: String,
    cfg: Vec<String>,
    items: Vec<Item>,
    found: &mut Vec<Module>,
) -> Result<(), Error> {
    let mut own = Vec::new();
    for item in items {
        let Item::Mod(mut child) = item else {
            own.push(item);
            continue;
        };
        let mut below = cfg.clone();
        below.extend(conditions(&child.attrs));
        if below.iter().any(|condition| condition == "test") {
            continue;
        }
        let ident = child.ident.to_string();
        let full = if name.is_empty() { ident.clone() } else { format!("{name}::{ident}") };
        match child.content.take() {
            Some((_, items)) => module(path, &dir.join(&ident), full, below, items, found)?,
            None => {
                let beside: [PathBuf; 2] = [dir.join(format!("{ident}.rs")), dir.join(&ident).join("mod.rs")];
                let Some(source) = beside.iter().find(|path| path.is_file()) else {
                    return Err(Error::NoModule { path: path.to_path_buf(), name: ident });
                };
                file(source, &dir.join(&ident), full, below, found)?;
            }
        }
        own.push(Item::Mod(child));
    }
    found.push(Module { path: name, cfg, items: own });
    Ok(())
}

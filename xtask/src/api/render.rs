//! Items as lines.

use super::read::{conditions, Module};
use quote::ToTokens;
use std::collections::BTreeSet;
use syn::{Attribute, Fields, ImplItem, Item, Signature, TraitItem, Visibility};

/// What of an item's attributes its users see.
const SHOWN: [&str; 4] = ["derive", "deprecated", "non_exhaustive", "repr"];

/// Adds the lines of a module.
pub(super) fn items(module: &Module, lines: &mut BTreeSet<String>) {
    let mut add = |of: Option<&str>, attributes: &[Attribute], text: String| {
        let place = match (module.path.as_str(), of) {
            ("", None) => String::new(),
            ("", Some(of)) => format!("{of}: "),
            (path, None) => format!("{path}: "),
            (path, Some(of)) => format!("{path}::{of}: "),
        };
        let mut all = module.cfg.clone();
        all.extend(conditions(attributes));
        if all.iter().any(|condition| condition == "test") {
            return;
        }
        let shown: String =
            attributes.iter().filter(|a| SHOWN.iter().any(|s| a.path().is_ident(s))).map(attribute).collect();
        let under = if all.is_empty() { String::new() } else { format!(" [{}]", all.join(", ")) };
        lines.insert(format!("{place}{shown}{text}{under}"));
    };
    for item in &module.items {
        match item {
            Item::Const(i) if public(&i.vis) => add(None, &i.attrs, format!("const {}: {}", i.ident, type_text(&i.ty))),
            Item::Static(i) if public(&i.vis) => {
                add(None, &i.attrs, format!("static {}: {}", i.ident, type_text(&i.ty)))
            }
            Item::Fn(i) if public(&i.vis) => add(None, &i.attrs, signature(&i.sig)),
            Item::Mod(i) if public(&i.vis) => add(None, &i.attrs, format!("mod {}", i.ident)),
            Item::Type(i) if public(&i.vis) => {
                let mut bare = i.clone();
                (bare.attrs, bare.vis) = (Vec::new(), Visibility::Inherited);
                add(None, &i.attrs, tokens_of(Item::Type(bare)));
            }
            Item::Use(i) if public(&i.vis) => {
                let mut bare = i.clone();
                (bare.attrs, bare.vis) = (Vec::new(), Visibility::Inherited);
                add(None, &i.attrs, tokens_of(Item::Use(bare)));
            }
            Item::Struct(i) if public(&i.vis) => {
                add(None, &i.attrs, format!("struct {}{}", i.ident, generics(&i.generics)));
                let name = i.ident.to_string();
                for (at, field) in i.fields.iter().enumerate().filter(|(_, field)| public(&field.vis)) {
                    let field_name = field.ident.as_ref().map_or_else(|| at.to_string(), ToString::to_string);
                    add(Some(&name), &field.attrs, format!("{field_name}: {}", type_text(&field.ty)));
                }
            }
            Item::Enum(i) if public(&i.vis) => {
                add(None, &i.attrs, format!("enum {}{}", i.ident, generics(&i.generics)));
                let name = i.ident.to_string();
                for variant in &i.variants {
                    add(Some(&name), &variant.attrs, format!("{}{}", variant.ident, fields(&variant.fields)));
                }
            }
            Item::Trait(i) if public(&i.vis) => {
                let bounds: Vec<String> =
                    i.supertraits.iter().map(|b| spaced(&b.to_token_stream().to_string())).collect();
                let bounds = if bounds.is_empty() { String::new() } else { format!(": {}", bounds.join(" + ")) };
                add(None, &i.attrs, format!("trait {}{}{bounds}", i.ident, generics(&i.generics)));
                let name = i.ident.to_string();
                for member in &i.items {
                    match member {
                        TraitItem::Fn(f) => {
                            let provided = if f.default.is_some() { " (provided)" } else { "" };
                            add(Some(&name), &f.attrs, format!("{}{provided}", signature(&f.sig)));
                        }
                        TraitItem::Const(c) => {
                            add(Some(&name), &c.attrs, format!("const {}: {}", c.ident, type_text(&c.ty)));
                        }
                        TraitItem::Type(t) => add(Some(&name), &t.attrs, format!("type {}", t.ident)),
                        _ => {}
                    }
                }
            }
            Item::Impl(i) => {
                let of = type_text(&i.self_ty);
                if let Some((not, path, _)) = &i.trait_ {
                    let not = if not.is_some() { "!" } else { "" };
                    let path = spaced(&path.to_token_stream().to_string());
                    add(None, &i.attrs, format!("impl{} {not}{path} for {of}", generics(&i.generics)));
                    continue;
                }
                for member in &i.items {
                    match member {
                        ImplItem::Fn(f) if public(&f.vis) => {
                            let all: Vec<Attribute> = i.attrs.iter().chain(&f.attrs).cloned().collect();
                            add(Some(&of), &all, signature(&f.sig));
                        }
                        ImplItem::Const(c) if public(&c.vis) => {
                            add(Some(&of), &c.attrs, format!("const {}: {}", c.ident, type_text(&c.ty)));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}

const fn public(vis: &Visibility) -> bool {
    matches!(vis, Visibility::Public(_))
}

fn attribute(attribute: &Attribute) -> String {
    format!("#[{}] ", spaced(&attribute.meta.to_token_stream().to_string()))
}

/// A signature as it would be written, on one line.
fn signature(sig: &Signature) -> String {
    let item = Item::Fn(syn::ItemFn {
        attrs: Vec::new(),
        vis: Visibility::Inherited,
        sig: sig.clone(),
        block: Box::new(syn::Block { brace_token: syn::token::Brace::default(), stmts: Vec::new() }),
    });
    let text = tokens_of(item);
    text.strip_suffix("{}").unwrap_or(&text).trim_end().trim_end_matches(',').to_string()
}

fn type_text(ty: &syn::Type) -> String {
    let item: Item = syn::parse_quote!(type T = #ty;);
    let text = tokens_of(item);
    text.trim_start_matches("type T = ").to_string()
}

fn generics(generics: &syn::Generics) -> String {
    spaced(&generics.to_token_stream().to_string())
}

fn fields(fields: &Fields) -> String {
    let named = |field: &syn::Field| {
        let name = field.ident.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
        format!("{name}{}", type_text(&field.ty))
    };
    let all: Vec<String> = fields.iter().map(named).collect();
    match fields {
        Fields::Unit => String::new(),
        Fields::Named(_) => format!(" {{ {} }}", all.join(", ")),
        Fields::Unnamed(_) => format!("({})", all.join(", ")),
    }
}

/// An item as a formatter writes it, on one line.
fn tokens_of(item: Item) -> String {
    let text = prettyplease::unparse(&syn::File { shebang: None, attrs: Vec::new(), items: vec![item] });
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    // what a list on several lines leaves
    let line = line.replace("( ", "(").replace(", )", ")").replace(" )", ")").replace(", }", " }");
    line.trim_end_matches(';').to_string()
}

/// Tokens without the spaces that nobody writes.
fn spaced(tokens: &str) -> String {
    let mut text = tokens.to_string();
    for (from, to) in [
        (" :: ", "::"),
        (":: ", "::"),
        (" ::", "::"),
        (" < ", "<"),
        (" >", ">"),
        ("< ", "<"),
        (" ,", ","),
        (" (", "("),
        ("( ", "("),
        (" )", ")"),
        (" : ", ": "),
        ("& ", "&"),
    ] {
        text = text.replace(from, to);
    }
    text
}

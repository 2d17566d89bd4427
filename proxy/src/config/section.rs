//! One table of the file: typed access that complains, and remembers what was asked for.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::document::{Complaint, Document};
use super::value;

/// Replicas of one group, and servers of one ensemble.
const MEMBERS_MAX: usize = 15;

/// A value and where it stands, for complaints that arise later.
#[derive(Debug, Clone)]
pub(super) struct Found<T> {
    pub(super) value: T,
    pub(super) key: String,
    pub(super) span: Range<usize>,
}

/// One table of the file. Remembers which keys were asked for: the others are unknown.
pub(super) struct Section<'d, 't> {
    pub(super) document: &'d Document<'t>,
    /// With a dot behind it, as in `group.`; empty for the file itself.
    prefix: String,
    pub(super) span: Range<usize>,
    pub(super) table: &'d DeTable<'d>,
    asked: RefCell<Vec<&'static str>>,
}

impl<'d, 't> Section<'d, 't> {
    pub(super) fn new(
        document: &'d Document<'t>,
        path: &str,
        span: Range<usize>,
        table: &'d DeTable<'d>,
    ) -> Self {
        let prefix = if path.is_empty() {
            String::new()
        } else {
            format!("{path}.")
        };
        Self {
            document,
            prefix,
            span,
            table,
            asked: RefCell::default(),
        }
    }

    pub(super) fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(super) fn get(&self, key: &'static str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.asked.borrow_mut().push(key);
        self.table.get(key)
    }

    pub(super) fn missing(&self, key: &str, expected: impl Into<String>) {
        self.document.problem(
            &self.key(key),
            &self.span,
            false,
            Complaint::new("missing", expected),
        );
    }

    /// The value of `key`, if it is there and right.
    pub(super) fn optional<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&DeValue<'_>) -> Result<T, Complaint>,
    ) -> Option<Found<T>> {
        let found = self.get(key)?;
        match parse(found.get_ref()) {
            Ok(value) => Some(Found {
                value,
                key: self.key(key),
                span: found.span(),
            }),
            Err(complaint) => {
                self.document
                    .problem(&self.key(key), &found.span(), true, complaint);
                None
            }
        }
    }

    /// The value of `key`, which must be there.
    pub(super) fn required<T>(
        &self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&DeValue<'_>) -> Result<T, Complaint>,
    ) -> Option<Found<T>> {
        if self.table.get(key).is_none() {
            self.asked.borrow_mut().push(key);
            self.missing(key, expected);
            return None;
        }
        self.optional(key, parse)
    }

    /// The table under `key`, written as a section or in braces.
    pub(super) fn section(&self, key: &'static str, expected: &str) -> Option<Self> {
        let found = self.get(key)?;
        let DeValue::Table(table) = found.get_ref() else {
            let complaint = value::wrong_type(found.get_ref(), expected);
            self.document
                .problem(&self.key(key), &found.span(), true, complaint);
            return None;
        };
        Some(Section::new(
            self.document,
            &self.key(key),
            found.span(),
            table,
        ))
    }

    /// A whole section that must be in the file.
    pub(super) fn required_section(&self, key: &'static str, expected: &str) -> Option<Self> {
        if self.table.get(key).is_none() {
            self.asked.borrow_mut().push(key);
            let end = self.document.text().trim_end().len();
            let complaint = Complaint::new("missing: the file ends here without it", expected);
            self.document.problem(key, &(end..end), false, complaint);
            return None;
        }
        self.section(key, expected)
    }

    /// `{ name = "IP:PORT", ... }`
    pub(super) fn addresses(
        &self,
        key: &'static str,
    ) -> Option<Found<BTreeMap<String, Found<SocketAddr>>>> {
        const EXPECTED: &str = "a table of names and addresses, as in { r1 = \"10.98.0.11:7400\" }";
        let found = self.get(key);
        let Some(found) = found else {
            self.missing(key, EXPECTED);
            return None;
        };
        let key = self.key(key);
        let DeValue::Table(table) = found.get_ref() else {
            let complaint = value::wrong_type(found.get_ref(), EXPECTED);
            self.document.problem(&key, &found.span(), true, complaint);
            return None;
        };
        if table.is_empty() || table.len() > MEMBERS_MAX {
            let complaint = Complaint::new(
                format!("{} entries", table.len()),
                format!("1 to {MEMBERS_MAX} entries, this node's among them"),
            );
            self.document.problem(&key, &found.span(), true, complaint);
        }
        let mut addresses: BTreeMap<String, Found<SocketAddr>> = BTreeMap::new();
        let mut all_good = true;
        for (name, address) in table.iter() {
            let path = format!("{key}.{}", name.get_ref());
            if let Err(complaint) = value::check_name(name.get_ref()) {
                self.document.problem(&path, &name.span(), false, complaint);
            }
            match value::socket_address(address.get_ref()) {
                Ok(value) => {
                    let found = Found {
                        value,
                        key: path,
                        span: address.span(),
                    };
                    addresses.insert(name.get_ref().to_string(), found);
                }
                Err(complaint) => {
                    self.document
                        .problem(&path, &address.span(), true, complaint);
                    all_good = false;
                }
            }
        }
        all_good.then(|| Found {
            value: addresses,
            key,
            span: found.span(),
        })
    }

    /// Complains about every key that nobody asked for.
    pub(super) fn finish(self) {
        let asked = self.asked.into_inner();
        for (key, value) in self.table.iter() {
            let name = key.get_ref().as_ref();
            if asked.contains(&name) {
                continue;
            }
            let place = match self.prefix.strip_suffix('.') {
                None => "in the file".to_owned(),
                Some(path) => format!("in {path}"),
            };
            let complaint = Complaint::new(
                "unknown key",
                format!("{place} one of: {}", asked.join(", ")),
            );
            let complaint = match value::suggestion(name, &asked) {
                Some(known) => complaint.help(format!("did you mean {known}?")),
                None => complaint,
            };
            // A section's "value" would be its head, which the line shows anyway.
            let value = (!value.get_ref().is_table()).then(|| value.span());
            let path = format!("{}{name}", self.prefix);
            self.document
                .problem_at(&path, &key.span(), value.as_ref(), complaint);
        }
    }
}

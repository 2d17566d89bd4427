//! Defects planted on purpose, for the tests that must find them.
//!
//! Each package lists its own with [`faults!`], and asks at the places where they would be whether one is planted. Only
//! builds with the feature `faults` know of them. There the environment plants one for the life of a process, and of
//! those that it starts:
//!
//! ```text
//! UNBROKEN_FAULT=tcpstate/ack-before-commit cargo test -p unbroken-tcpstate --features faults
//! ```
//!
//! The program `planted` of `unbroken-tests` runs the tests with each of them in turn.

use std::env;

/// Names the defect that a process has from its start on: `PACKAGE/NAME`.
pub const VARIABLE: &str = "UNBROKEN_FAULT";

/// Defines `Fault`, the defects of a package, each with what it is.
#[macro_export]
macro_rules! faults {
    ($package:literal; $($(#[doc = $what:literal])+ $name:ident,)+) => {
        /// A defect that the tests must find.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Fault {
            $($(#[doc = $what])+ $name,)+
        }

        impl Fault {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// How the environment names it.
            #[must_use]
            pub fn name(self) -> String {
                $crate::name($package, &format!("{self:?}"))
            }

            /// What it is, in a sentence.
            #[must_use]
            pub fn what(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($what),+).trim_ascii(),)+
                }
            }

            /// The one that the environment plants into this process.
            ///
            /// # Panics
            /// If it names one of this package that does not exist: a test would pass for nothing.
            #[must_use]
            pub fn of_process() -> Option<Self> {
                static PLANTED: std::sync::OnceLock<Option<Fault>> = std::sync::OnceLock::new();
                *PLANTED.get_or_init(|| {
                    let name = $crate::wanted($package)?;
                    let found = Self::ALL.iter().find(|fault| fault.name() == name);
                    Some(*found.unwrap_or_else(|| panic!("{}={name}: no such defect", $crate::VARIABLE)))
                })
            }
        }
    };
}

/// The name that the environment gives, if it is one of `package`.
#[doc(hidden)]
#[must_use]
pub fn wanted(package: &str) -> Option<String> {
    let name = env::var(VARIABLE).ok()?;
    (name.split_once('/')?.0 == package).then_some(name)
}

/// `package/variant-in-kebab-case`.
#[doc(hidden)]
#[must_use]
pub fn name(package: &str, variant: &str) -> String {
    let mut name = format!("{package}/");
    for (at, letter) in variant.char_indices() {
        if letter.is_uppercase() && at > 0 {
            name.push('-');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

#[cfg(test)]
mod tests {
    #![expect(unreachable_pub, reason = "a list of nobody else's")]

    faults! {
        "planted";
        /// The lease is not
        /// looked at.
        LeaseUnseen,
    }

    #[test]
    fn a_fault_has_a_name_and_says_what_it_is() {
        assert_eq!(Fault::LeaseUnseen.name(), "planted/lease-unseen");
        assert_eq!(Fault::LeaseUnseen.what(), "The lease is not looked at.");
        assert_eq!(Fault::of_process(), None);
    }
}

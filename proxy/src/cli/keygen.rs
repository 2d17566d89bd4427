//! `unbroken keygen`: a fresh key for a group.

use std::process::ExitCode;

use anyhow::anyhow;
use clap::Args;

/// Prints a fresh key for a group
///
/// 256 random bits in hexadecimal on one line. Every node of the group has the same key; whoever
/// has it can read and forge the group's traffic.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  (umask 077; unbroken keygen > /etc/unbroken/group.key)")]
pub struct KeygenArgs {}

pub(super) fn run(_args: &KeygenArgs) -> anyhow::Result<ExitCode> {
    println!("{}", generate()?);
    Ok(ExitCode::SUCCESS)
}

/// A fresh key as it stands in a key file, without the newline.
///
/// # Errors
/// The system has no randomness to give.
pub fn generate() -> anyhow::Result<String> {
    let mut secret = [0_u8; 32];
    getrandom::fill(&mut secret)
        .map_err(|error| anyhow!("no randomness from the system: {error}"))?;
    Ok(secret.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Key;

    #[test]
    fn a_generated_key_is_accepted_and_new_every_time() {
        let (one, other) = (generate().unwrap(), generate().unwrap());
        assert_eq!(one.len(), 64);
        let with_newline = Key::from_file_contents(format!("{one}\n").as_bytes()).unwrap();
        assert_eq!(
            with_newline,
            Key::from_file_contents(one.as_bytes()).unwrap()
        );
        assert_ne!(
            with_newline,
            Key::from_file_contents(other.as_bytes()).unwrap()
        );
        assert_eq!(Key::from_file_contents(&one.as_bytes()[..31]), None);
    }
}

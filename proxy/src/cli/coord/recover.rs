//! `unbroken coord recover`: what is left when a majority of the servers is gone for ever.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use unbroken_coord::driver;

use crate::cli::EXIT_USAGE;
use crate::config::CoordinatorConfig;

/// Makes this stopped server the only member of its ensemble, when a majority is gone for ever
///
/// Writes that this server had not heard of are lost, and if the others still live there are two
/// ensembles that both believe to be the right one: so it is for the day on which most data
/// directories are gone, and for no other. (A majority that is only down comes back by being
/// started; one lost server of several is replaced with `unbroken coord member`.) Choose the server
/// with the highest zxid that is left, stop all others, recover it, start it, empty the others' data
/// directories, and add them again.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  unbroken coord recover -c /etc/unbroken/coord.toml --members c1 --the-others-are-gone"
)]
pub(super) struct RecoverArgs {
    /// Configuration of this server, which must not be running
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Who is left: this server
    #[arg(long, value_name = "NAME")]
    members: String,
    /// Yes, all the others are gone for ever, and what they knew alone is lost
    #[arg(long)]
    the_others_are_gone: bool,
}

pub(super) fn run(args: &RecoverArgs) -> anyhow::Result<ExitCode> {
    let config = CoordinatorConfig::load(&args.config)?;
    let name = &config.node.name;
    if args.members != *name {
        eprintln!(
            "unbroken: error: --members {}: only the server itself can be left, {name}; the others \
             come back with empty data directories",
            args.members
        );
        return Ok(ExitCode::from(EXIT_USAGE));
    }
    if !args.the_others_are_gone {
        eprintln!(
            "unbroken: error: this makes {name} the only member, and loses for ever what the other \
             servers knew and {name} did not; if any of them still runs, there will be two \
             ensembles. If that is what you want, say --the-others-are-gone. Nothing was changed."
        );
        return Ok(ExitCode::from(EXIT_USAGE));
    }
    let survivor = driver::recover(&config.node.data_dir, name)?;
    eprintln!("{name} is the only member of its ensemble now.");
    eprintln!(
        "  up to zxid 0x{:x}, {} znodes",
        survivor.zxid, survivor.znodes
    );
    eprintln!("  no longer members: {}", survivor.others.join(", "));
    eprintln!("Start it, empty the data directories of the others, and add them again:");
    for other in &survivor.others {
        let file = args.config.display();
        eprintln!("  unbroken coord member add -c {file} {other} --peer HOST:PORT");
    }
    Ok(ExitCode::SUCCESS)
}

//! `unbroken completions`: scripts for shells.

use std::io;
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Prints a script that teaches a shell to complete this program's commands and options
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    unbroken completions bash > /etc/bash_completion.d/unbroken\n  \
    unbroken completions zsh > ~/.zfunc/_unbroken")]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

pub(super) fn run<Program: CommandFactory>(args: &CompletionsArgs) -> ExitCode {
    let mut program = Program::command();
    clap_complete::generate(args.shell, &mut program, "unbroken", &mut io::stdout());
    ExitCode::SUCCESS
}

//! A chat: every member sees the same lines in the same order, and who comes and goes between the same lines.
//!
//! `cargo run -p unbroken-group --example chat`

#![expect(clippy::print_stdout, reason = "an example")]

mod local;

use bytes::Bytes;
use local::{Error, Local, argument};
use tokio::sync::watch;
use unbroken_group::MemberId;
use unbroken_group::node::{Group, Handler, Node, Received};
use unbroken_group::process::GroupView;

const HELP: &str = "\
A chat of several nodes in this process: all talk at once, one is killed in the middle and comes back.

Usage: chat [--lines NUMBER]

  --lines NUMBER   lines that each member says [default: 5]

Examples:
  cargo run -p unbroken-group --example chat
  cargo run -p unbroken-group --example chat -- --lines 50";

/// What a member sees. The state of the group is what was said so far.
struct Screen(watch::Sender<Vec<String>>);

impl Screen {
    fn line(&self, line: String) {
        self.0.send_modify(|lines| lines.push(line));
    }
}

impl Handler for Screen {
    async fn message(&self, _: &Group, message: Received) {
        let said = message.body().escape_ascii();
        self.line(format!("{}: {said}", message.from().name));
    }

    async fn view(&self, _: &Group, view: GroupView) {
        let names = |members: &[MemberId]| {
            let names: Vec<&str> = members.iter().map(|m| &m.name[..]).collect();
            names.join(", ")
        };
        if !view.joined.is_empty() {
            self.line(format!("* {} came", names(&view.joined)));
        }
        if !view.departed.is_empty() {
            self.line(format!("* {} went", names(&view.departed)));
        }
    }

    fn state(&self, state: Bytes) {
        let lines = String::from_utf8_lossy(&state);
        self.0
            .send_replace(lines.lines().map(str::to_owned).collect());
    }

    fn snapshot(&self) -> Vec<Bytes> {
        vec![self.0.borrow().join("\n").into()]
    }
}

/// One who takes part.
struct Member {
    node: Node,
    group: Group,
    lines: watch::Receiver<Vec<String>>,
}

impl Member {
    async fn join(site: &Local, name: &str) -> Result<Self, Error> {
        let node = site.start(name)?;
        let (group, events) = Group::join(&node, "chat").await?;
        let (sender, lines) = watch::channel(Vec::new());
        let own = group.clone();
        tokio::spawn(async move { own.run(events, Screen(sender)).await });
        let mut member = Self { node, group, lines };
        member
            .sees(|line| line == &format!("* {name} came"))
            .await?;
        Ok(member)
    }

    async fn say(&self, line: &str) -> Result<(), Error> {
        Ok(self.group.abcast(line.to_owned()).await?)
    }

    /// Waits for a line.
    async fn sees(&mut self, f: impl Fn(&String) -> bool) -> Result<(), Error> {
        self.lines.wait_for(|lines| lines.iter().any(&f)).await?;
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let count = argument(HELP, "--lines", 5, 1);
    let names = ["anna", "bert", "cleo"].map(str::to_owned);
    let site = Local::new(&names)?;
    let mut anna = Member::join(&site, "anna").await?;
    let bert = Member::join(&site, "bert").await?;
    let mut cleo = Member::join(&site, "cleo").await?;
    println!("anna, bert and cleo talk; bert is killed while he does");
    let group = bert.group.clone();
    let talking = tokio::spawn(async move {
        // Until he is dead.
        let mut line = 0;
        while group.abcast(format!("bla {line}")).await.is_ok() {
            line += 1;
            tokio::task::yield_now().await;
        }
    });
    for line in 1..=count {
        anna.say(&format!("my line {line}")).await?;
        cleo.say(&format!("mine is {line}")).await?;
        if line == count.div_ceil(2) {
            anna.sees(|line| line.starts_with("bert: bla")).await?;
            talking.abort();
            bert.group.abcast("I am about to").await?;
            break;
        }
    }
    drop(bert.node);
    for line in count.div_ceil(2) + 1..=count {
        anna.say(&format!("my line {line}")).await?;
        cleo.say(&format!("mine is {line}")).await?;
    }
    anna.sees(|line| line == "* bert went").await?;
    let mut bert = Member::join(&site, "bert").await?;
    bert.say("I am back, and see what I missed").await?;
    for member in [&mut anna, &mut bert, &mut cleo] {
        member
            .sees(|line| line.starts_with("bert: I am back"))
            .await?;
    }
    let lines = anna.lines.borrow().clone();
    let said = lines.iter().filter(|l| !l.starts_with("bert: bla"));
    for line in said {
        println!("    {line}");
    }
    let of_bert = lines.iter().filter(|l| l.starts_with("bert: bla")).count();
    println!("    (and bert said bla {of_bert} times)");
    if [&bert, &cleo].iter().any(|m| *m.lines.borrow() != lines) {
        return Err("they have seen different things".into());
    }
    println!(
        "all three saw the same {} lines in the same order",
        lines.len()
    );
    Ok(())
}

//! A worker that takes jobs as long as it leads: an election, a queue and a group in one.
//!
//! Start it as often as you like, `cargo run -p unbroken-coord --example recipes -- NAME`, beside
//! `--example three`; put jobs in with `... --example recipes -- put TEXT`. End one with Ctrl-C, or
//! kill it, and see the next one go on.

use unbroken_coord::client::{Client, ConnectOptions};
use unbroken_coord::recipes::election::Election;
use unbroken_coord::recipes::group::Group;
use unbroken_coord::recipes::queue::Queue;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options: ConnectOptions = "127.0.0.1:21811,127.0.0.1:21812,127.0.0.1:21813".parse()?;
    let client = Client::connect(options).await?;
    let jobs = Queue::new(&client, "/example/jobs");
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_else(|| "worker".to_owned());
    if name == "put" {
        for job in arguments {
            jobs.put(job).await?;
        }
        return Ok(client.close().await?);
    }

    let workers = Group::new(&client, "/example/workers");
    let _here = workers.join(&name, "").await?;
    let all: Vec<String> = workers.members().await?.into_keys().collect();
    println!("{name}: waits to lead, workers are {}", all.join(", "));
    let leading = Election::new(&client, "/example/leader")
        .label(name.clone())
        .campaign(10)
        .await?;
    println!("{name}: leads, token {}", leading.token());

    let work = async {
        loop {
            // Should we die with it, the next leader gets it.
            let job = jobs.reserve().await?;
            println!("{name}: {}", String::from_utf8_lossy(&job.item().value));
            job.done().await?;
        }
    };
    tokio::select! {
        ended = leading.run(work) => ended?,
        _ = tokio::signal::ctrl_c() => Ok(client.close().await?),
    }
}

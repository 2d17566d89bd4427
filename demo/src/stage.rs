//! Everything in order: hosts, files, cluster, clients, drill, report; and away with it all.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};
use unbroken_tests::netns::{Host, Lab, LabOptions, userns};

use crate::args::{Coordinator, DrillArgs};
use crate::cluster::{Cluster, Server, Service, VIP, write_file};
use crate::drill::{self, Drill, Interrupted};
use crate::ensemble::{self, Ensemble};
use crate::pace::{now_us, seconds};
use crate::picture::{self, Panel};
use crate::report::{self, Report};
use crate::scratch::Scratch;
use crate::screen::Screen;
use crate::traffic::{Client, FILE, Setting};

/// Ended by a signal, as a shell says it.
const EXIT_INTERRUPTED: u8 = 130;

/// Seconds that a fault takes with all that belongs to it, roughly: transfers are spread over the
/// time of all faults, and never end before the last.
const SECONDS_PER_FAULT: u64 = 6;

/// Runs the demonstration.
///
/// # Errors
/// There is no network of hosts, or the machine lacks something: nothing was shown at all.
pub(crate) fn run(args: &DrillArgs) -> Result<ExitCode> {
    userns::reexec_in_user_namespace_if_needed()?;
    let interrupted = on_signals()?;
    let mut screen = Screen::new(args.verbose);
    let seed = args.seed.unwrap_or_else(|| now_us() % 1_000_000);

    // Dropped in the other order: the clients, the cluster's watchers, the hosts with all that runs on
    // them, the files.
    let mut scratch = Scratch::new()?;
    let others = match args.coordinator {
        Coordinator::Builtin => 0,
        Coordinator::Apache => ensemble::SERVERS,
    };
    let lab = Lab::new(LabOptions {
        replicas: args.replicas + others,
    })?;
    let hosts: Vec<&Host> = (1..=args.replicas + others)
        .map(|i| lab.host(&format!("r{i}")))
        .collect();
    let (hosts, others) = hosts.split_at(usize::from(args.replicas));
    let program = std::env::current_exe().context("finding this program")?;
    let services = services(args);
    let bytes = args.size * 1_000_000;
    if args.server.is_none() {
        fs::create_dir(scratch.path().join("files"))?;
        write_file(&scratch.path().join("files").join(FILE), seed, bytes)?;
    }
    small_buffers(&lab);
    let logs = scratch.path().join("c");
    fs::create_dir(&logs)?;
    let ensemble = match args.coordinator {
        Coordinator::Builtin => None,
        Coordinator::Apache => {
            screen.say("starting three Apache ZooKeeper servers");
            Some(Ensemble::start(others, scratch.path())?)
        }
    };
    let mut cluster = Cluster::new(
        hosts,
        ensemble,
        scratch.path(),
        &program,
        services,
        args.verbose,
    )?;
    let behind = if args.server.is_some() {
        "your server"
    } else {
        cluster.file_server()
    };
    screen.say(format!(
        "{} replicas with {behind}, seed {seed}",
        args.replicas
    ));

    let mut clients = Vec::new();
    let plan = drill::plan(seed, args.faults);
    let spread = (plan.len() as u64 * SECONDS_PER_FAULT).max(5);
    let mut drill = Drill {
        lab: &lab,
        cluster: &mut cluster,
        clients: &mut clients,
        screen: &mut screen,
        interrupted: &interrupted,
        spread,
        faults: Vec::new(),
        released_us: None,
    };
    let mut from_us = now_us();
    let mut outcome = drill.bring_up();
    if outcome.is_ok() {
        drill.screen.say("the cluster is whole");
        from_us = now_us();
        let rate = bytes / spread;
        let setting = Setting {
            host: lab.host("c"),
            program: &program,
            logs: &logs,
            rate,
        };
        outcome = start_clients(args, &setting, seed, bytes, drill.clients);
    }
    outcome = outcome.and_then(|()| drill.run(&plan));
    let (faults, released_us) = (drill.faults, drill.released_us);
    let to_us = now_us();
    screen.erase();

    if outcome
        .as_ref()
        .is_err_and(|error| error.is::<Interrupted>())
    {
        eprintln!("interrupted: cleaning up");
        return Ok(ExitCode::from(EXIT_INTERRUPTED));
    }
    let panels: Vec<Panel> = clients
        .iter()
        .map(|client| Panel {
            name: client.name,
            unit: client.unit,
            series: client.series(),
        })
        .collect();
    let picture = args.out.join("throughput.svg");
    let drawn = fs::create_dir_all(&args.out)
        .map_err(anyhow::Error::from)
        .and_then(|()| picture::draw(&picture, &panels, &faults, from_us, released_us, to_us));
    if let Err(error) = &drawn {
        eprintln!("no picture: {error:#}");
    }
    let report = Report {
        passed: outcome.is_ok(),
        failure: outcome.as_ref().err().map(|error| format!("{error:#}")),
        seed,
        replicas: cluster.names(),
        coordinator: args.coordinator,
        seconds: seconds(to_us - from_us),
        faults: report::faults(&faults, &clients, from_us),
        clients: report::clients(&clients, from_us),
        picture: drawn.is_ok().then(|| picture.display().to_string()),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text());
    }
    if !report.passed {
        scratch.keep_logs(&report.text());
        eprintln!(
            "\nThe logs are kept in {}; their ends:\n",
            scratch.path().display()
        );
        eprint!("{}", cluster.tails());
    }
    if args.keep {
        eprint!("{}", how_to_talk(&lab, args, &program, cluster.leader()));
        while !interrupted.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(if report.passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn services(args: &DrillArgs) -> Vec<Service> {
    match (&args.server, args.port) {
        (Some(command), Some(port)) => {
            let server = Server::Command(command.clone());
            vec![Service {
                name: "server",
                port,
                upstream: port,
                server,
            }]
        }
        _ => vec![
            Service {
                name: "web",
                port: 80,
                upstream: 7000,
                server: Server::Files,
            },
            Service {
                name: "exchange",
                port: 7,
                upstream: 7001,
                server: Server::Exchange,
            },
            Service {
                name: "upload",
                port: 9,
                upstream: 7002,
                server: Server::Upload,
            },
        ],
    }
}

fn start_clients(
    args: &DrillArgs,
    setting: &Setting<'_>,
    seed: u64,
    bytes: u64,
    clients: &mut Vec<Client>,
) -> Result<()> {
    let vip = |port: u16| SocketAddr::from((VIP, port));
    if let Some(port) = args.port {
        clients.push(match (&args.request, &args.response) {
            (Some(request), Some(response)) => setting.talk(vip(port), request, response)?,
            _ => setting.echo(vip(port))?,
        });
    } else {
        clients.push(setting.download(vip(80), seed, bytes)?);
        clients.push(setting.exchange(vip(7), seed)?);
        clients.push(setting.upload(vip(9), seed, bytes)?);
    }
    Ok(())
}

/// Gives the client host small socket buffers: megabytes of them would hide every gap from a client
/// that reads a few megabytes a second. (Where the kernel does not let us, they only show less.)
fn small_buffers(lab: &Lab) {
    lab.host("c").enter(|| {
        let _ = fs::write("/proc/sys/net/ipv4/tcp_rmem", "4096 65536 131072");
        let _ = fs::write("/proc/sys/net/ipv4/tcp_wmem", "4096 16384 65536");
    });
}

/// Set once the program is asked to end; the second time it ends at once, and the hosts' janitor cleans
/// up.
fn on_signals() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut signals = {
        let _inside = runtime.enter();
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        (interrupt?, terminate?, hangup?)
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = signals.0.recv() => {}
                        _ = signals.1.recv() => {}
                        _ = signals.2.recv() => {}
                    }
                    if flag.swap(true, Ordering::Relaxed) {
                        std::process::exit(i32::from(EXIT_INTERRUPTED));
                    }
                }
            });
        })?;
    Ok(interrupted)
}

/// What one can do with a cluster that was left up.
fn how_to_talk(
    lab: &Lab,
    args: &DrillArgs,
    program: &Path,
    leader: Option<(String, u64)>,
) -> String {
    let inside = if userns::is_reexecuted() {
        format!(
            "nsenter -t {} -U -m --preserve-credentials ",
            std::process::id()
        )
    } else {
        String::new()
    };
    let on = |host: &str| format!("{inside}ip netns exec {}{host}", lab.prefix());
    let program = program.display();
    let talk = match args.port {
        Some(port) => format!("{} nc {VIP} {port}", on("c")),
        None => format!(
            "{} curl --limit-rate 5M -o /dev/null http://{VIP}/{FILE}",
            on("c")
        ),
    };
    let mut text =
        format!("\nThe cluster is up. The client host talks to it:\n  {talk}\nIts nodes:\n");
    for replica in 1..=args.replicas {
        text += &format!(
            "  {} {program} unbroken status\n",
            on(&format!("r{replica}"))
        );
    }
    let coordinator = match args.coordinator {
        Coordinator::Builtin => 1,
        Coordinator::Apache => args.replicas + 1,
    };
    text += &format!(
        "The coordinator's namespace:\n  {} {program} unbroken zk --server {}:2181 ls /\n\
         Kill all that runs on the leader's host (it is not restarted):\n  \
         {inside}ip netns pids {}{} | xargs kill -9\n\
         Ctrl-C takes it all down.\n",
        on("r1"),
        lab.host(&format!("r{coordinator}")).address(),
        lab.prefix(),
        leader.map_or("r1".to_owned(), |(name, _)| name),
    );
    text
}

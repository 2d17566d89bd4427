//! The user's commands on promotion and demotion, for networks that move addresses by API.
//!
//! One task for each service runs them one after another. If the role changes while a command runs, the
//! next is run for what holds when it has ended: a demotion is never overtaken by the promotion before it.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::config::{Config, ServiceConfig};

/// A command that takes longer is killed.
const RUN_MAX: Duration = Duration::from_secs(30);

/// What a node is for one VIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    leads: bool,
    view: u64,
}

/// The tasks, and where they are told.
pub(crate) struct Hooks {
    /// For each VIP, in the configuration's order, the services that have hooks.
    standings: Vec<watch::Sender<Standing>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Hooks {
    /// Starts the tasks.
    pub(crate) fn start(config: &Config) -> Self {
        let (mut standings, mut tasks) = (Vec::new(), Vec::new());
        for vip in config.vips() {
            let (sender, receiver) = watch::channel(Standing {
                leads: false,
                view: 0,
            });
            standings.push(sender);
            for service in vip.services {
                if !service.hooks.on_promote.is_empty() || !service.hooks.on_demote.is_empty() {
                    let (node, service) = (config.node.name.clone(), service.clone());
                    tasks.push(tokio::spawn(serve(node, service, receiver.clone())));
                }
            }
        }
        Self { standings, tasks }
    }

    /// A node began to lead a VIP, or leads it no more.
    pub(crate) fn turn(&self, vip: usize, leads: bool, view: u64) {
        if let Some(standing) = self.standings.get(vip) {
            standing.send_replace(Standing { leads, view });
        }
    }

    /// The node leads nothing any more; waits until the last commands have ended.
    pub(crate) async fn end(self) {
        for standing in &self.standings {
            standing.send_if_modified(|standing| std::mem::take(&mut standing.leads));
        }
        drop(self.standings);
        for task in self.tasks {
            if let Err(error) = task.await {
                warn!(%error, "a hook's task");
            }
        }
    }
}

async fn serve(node: String, service: ServiceConfig, mut standings: watch::Receiver<Standing>) {
    let mut led = false;
    // What was said last is still seen when the sender is gone.
    loop {
        let standing = *standings.borrow_and_update();
        if standing.leads != led {
            led = standing.leads;
            let (event, command) = if led {
                ("promote", &service.hooks.on_promote)
            } else {
                ("demote", &service.hooks.on_demote)
            };
            if let [program, arguments @ ..] = &command[..] {
                let mut command = Command::new(program);
                command
                    .args(arguments)
                    .env("UNBROKEN_EVENT", event)
                    .env("UNBROKEN_NODE", &node)
                    .env("UNBROKEN_SERVICE", &service.name)
                    .env("UNBROKEN_VIP", service.vip.to_string())
                    .env("UNBROKEN_INTERFACE", &service.interface)
                    .env("UNBROKEN_VIEW", standing.view.to_string());
                run(&service.name, event, command, RUN_MAX).await;
            }
        }
        if standings.changed().await.is_err() {
            return;
        }
    }
}

/// Runs a command to its end, or kills it after `max`, with what it started; what it writes goes where
/// the node's own output goes.
async fn run(service: &str, event: &str, mut command: Command, max: Duration) {
    command.stdin(Stdio::null()).process_group(0);
    let mut child = match command.kill_on_drop(true).spawn() {
        Ok(child) => child,
        Err(error) => {
            warn!(service, event, %error, "the hook cannot be started");
            return;
        }
    };
    match tokio::time::timeout(max, child.wait()).await {
        Ok(Ok(status)) if status.success() => info!(service, event, "the hook has run"),
        Ok(Ok(status)) => warn!(service, event, %status, "the hook failed"),
        Ok(Err(error)) => warn!(service, event, %error, "the hook failed"),
        Err(_) => {
            warn!(service, event, after = ?max, "the hook took too long and is killed");
            // It has no id once it is reaped, so the group is still its own.
            let id = child.id().and_then(|id| i32::try_from(id).ok());
            if let Some(group) = id.and_then(Pid::from_raw) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            // The next one is not to run beside it.
            if let Err(error) = child.wait().await {
                warn!(service, event, %error, "waiting for the hook's end");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A configuration whose hooks write what happens to a file.
    fn config(folder: &Path) -> Config {
        use std::os::unix::fs::PermissionsExt as _;
        let key = folder.join("key");
        std::fs::write(&key, "0123456789abcdef0123456789abcdef").unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        let note = folder.join("notes");
        let hook = format!(
            "[\"sh\", \"-c\", \"echo $UNBROKEN_EVENT $UNBROKEN_VIP $UNBROKEN_VIEW >> {}\"]",
            note.display()
        );
        let text = format!(
            "[node]\nname = \"r1\"\ndata_dir = \"d\"\nkey_file = \"key\"\n\
             [coord]\nclient = \"127.0.0.1:2181\"\npeers = {{ r1 = \"127.0.0.1:2888\" }}\n\
             [group]\nmembers = {{ r1 = \"127.0.0.1:7400\" }}\n\
             [[service]]\nname = \"web\"\nvip = \"10.98.0.100/24\"\nports = [80]\n\
             interface = \"eth0\"\nupstream = \"127.0.0.1:7000\"\n\
             on_promote = {hook}\non_demote = {hook}\n"
        );
        Config::parse(&folder.join("node.toml"), &text).unwrap()
    }

    #[tokio::test]
    async fn each_turn_is_told_and_the_end_is_a_demotion() {
        let folder = std::env::temp_dir().join(format!("unbroken-hooks-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let hooks = Hooks::start(&config(&folder));
        hooks.turn(0, true, 7);
        hooks.turn(7, true, 7);
        let notes = || std::fs::read_to_string(folder.join("notes")).unwrap_or_default();
        let promoted = async {
            while notes().lines().count() < 1 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(RUN_MAX, promoted).await.unwrap();
        hooks.turn(0, true, 8);
        hooks.end().await;
        let said = notes();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(said, "promote 10.98.0.100 7\ndemote 10.98.0.100 8\n");
    }

    #[tokio::test]
    async fn one_that_takes_too_long_is_killed_with_what_it_started() {
        // What it started holds the pipe: the end is read when that is gone too.
        let (reader, writer) = std::io::pipe().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 600 & wait"]).stdout(writer);
        run("web", "promote", command, Duration::from_millis(50)).await;
        let read = tokio::task::spawn_blocking(move || std::io::read_to_string(reader));
        let read = tokio::time::timeout(RUN_MAX, read).await.unwrap();
        assert_eq!(read.unwrap().unwrap(), "");
    }
}

use std::net::TcpListener;

use mio::{Poll, Token};

use super::*;

const SERVER: &str = "import os,socket,sys,time\n\
    open('files','w').write(' '.join(sorted(os.listdir('.'))))\n\
    s=socket.socket()\ns.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1)\n\
    s.bind(('127.0.0.1',int(sys.argv[1])))\ns.listen()\ntime.sleep(60)";

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
        thread::sleep(LOOK_EVERY);
    }
}

#[test]
fn a_server_begins_anew_from_nothing_or_from_a_checkpoint() {
    let poll = Poll::new().unwrap();
    let waker = Arc::new(Waker::new(poll.registry(), Token(0)).unwrap());
    let base = std::env::temp_dir().join(format!("unbroken-runner-{}", std::process::id()));
    let folder = base.join("web");
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
    let program = Program {
        name: "web".to_owned(),
        target: Target::Tcp(address),
        command: Some(words(&[
            "python3",
            "-c",
            SERVER,
            &address.port().to_string(),
        ])),
        restore: Some(words(&["sh", "-c", "cp \"$UNBROKEN_CHECKPOINT\" restored"])),
        ready: Some(words(&["test", "-e", "files"])),
        checkpoint: Some(words(&[
            "sh",
            "-c",
            "cp wish \"$UNBROKEN_CHECKPOINT\" || exit 75; echo taken; cat wish >&2",
        ])),
        folder: folder.clone(),
        shared_state: true,
    };
    let seen = || fs::read_to_string(folder.join("files")).unwrap();
    let liveness = Liveness::watch([program.target.clone()]).unwrap();
    let start = |program| Runner::start(program, liveness.clone(), Arc::clone(&waker)).unwrap();
    let mut runner = start(program.clone());
    wait("the first", || runner.up());
    assert_eq!(seen(), "files");
    fs::write(folder.join("rubbish"), "").unwrap();
    // A checkpoint when its command finds what it wants, and not before.
    let end = |attempt: Attempt| {
        let mut end = Progress::Running;
        wait("the attempt's end", || {
            end = attempt.progress();
            !matches!(end, Progress::Running | Progress::Taken)
        });
        end
    };
    assert!(matches!(end(runner.checkpoint()), Progress::NotNow));
    fs::write(folder.join("wish"), "state").unwrap();
    let Progress::Done(image) = end(runner.checkpoint()) else {
        panic!("no checkpoint")
    };
    let bytes: Vec<u8> = image.iter().flat_map(|p| p.read().unwrap()).collect();
    assert_eq!(bytes, b"state");
    runner.restart(Some(image));
    wait("the second", || runner.up());
    assert_eq!(seen(), "files restored", "the folder was empty but for it");
    runner.restart(None);
    wait("the third", || runner.up());
    assert_eq!(seen(), "files");
    // Its own end is seen, and it stays down: its state is gone.
    let pid = || -> u32 {
        let text = fs::read_to_string(folder.with_extension("pid")).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    };
    let master = Pid::from_raw(i32::try_from(pid()).unwrap()).unwrap();
    rustix::process::kill_process(master, Signal::KILL).unwrap();
    wait("its end", || runner.down());
    runner.restart(None);
    wait("the fourth", || runner.up());
    // What a killed node has left behind gives way.
    let left = pid();
    std::mem::forget(runner);
    let runner = start(program);
    wait("the fifth", || runner.up());
    assert_ne!(pid(), left);
    drop(runner);
    assert!(!liveness::accepts(&Target::Tcp(address)));
    fs::remove_dir_all(&base).unwrap();
}

/// A runner of shell lines, in a folder of its own; the target listens if one is given.
struct Lines {
    base: PathBuf,
    program: Program,
    _poll: Poll,
    waker: Arc<Waker>,
}

impl Lines {
    fn new(name: &str, address: std::net::SocketAddr) -> Self {
        let poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), Token(0)).unwrap());
        let base = std::env::temp_dir().join(format!("unbroken-{name}-{}", std::process::id()));
        let program = Program {
            name: name.to_owned(),
            target: Target::Tcp(address),
            command: None,
            restore: None,
            ready: None,
            checkpoint: None,
            folder: base.join("s"),
            shared_state: true,
        };
        Self {
            base,
            program,
            _poll: poll,
            waker,
        }
    }

    fn start(&self) -> Runner {
        let liveness = Liveness::watch([self.program.target.clone()]).unwrap();
        Runner::start(self.program.clone(), liveness, Arc::clone(&self.waker)).unwrap()
    }

    /// What a command has written, once it has.
    fn read(&self, name: &str) -> String {
        let mut text = String::new();
        wait(name, || {
            text = fs::read_to_string(self.program.folder.join(name)).unwrap_or_default();
            text.ends_with('\n')
        });
        text
    }

    fn end(self, runner: Runner) {
        let ending = thread::spawn(move || drop(runner));
        wait("the runner's end", || ending.is_finished());
        ending.join().unwrap();
        fs::remove_dir_all(&self.base).unwrap();
    }
}

fn sh(line: &str) -> Option<Vec<String>> {
    Some(["sh", "-c", line].map(str::to_owned).to_vec())
}

const NOWHERE: std::net::SocketAddr =
    std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9);

#[test]
fn a_checkpoint_that_is_given_up_is_killed_whoever_holds_its_output() {
    let mut lines = Lines::new("given-up", NOWHERE);
    lines.program.restore = sh("echo > restored");
    lines.program.checkpoint =
        sh("setsid sh -c 'echo $$ > apart; exec sleep 600' & echo taken; wait");
    let runner = lines.start();
    lines.read("restored");
    let attempt = runner.checkpoint();
    wait("its word", || matches!(attempt.progress(), Progress::Taken));
    let apart = lines.read("apart");
    assert!(!runner.has_checkpoints());
    drop(attempt);
    wait("the next may begin", || runner.has_checkpoints());
    let apart = Pid::from_raw(apart.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(apart, Signal::KILL).unwrap();
    lines.end(runner);
}

#[test]
fn an_order_does_not_wait_for_a_command() {
    let mut lines = Lines::new("restore", NOWHERE);
    lines.program.restore = sh("echo > begun; sleep 600 & wait");
    let runner = lines.start();
    lines.read("begun");
    lines.end(runner);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut lines = Lines::new("ready", listener.local_addr().unwrap());
    lines.program.command = sh("sleep 600 & wait");
    lines.program.ready = sh("echo > begun; sleep 600 & wait");
    let runner = lines.start();
    lines.read("begun");
    lines.end(runner);
}

#[test]
fn what_a_server_started_ends_with_it() {
    let mut lines = Lines::new("workers", NOWHERE);
    lines.program.command = sh("sleep 600 & echo $$ $! > pids; wait");
    let runner = lines.start();
    let pids: Vec<i32> = lines
        .read("pids")
        .split_whitespace()
        .map(|w| w.parse().unwrap())
        .collect();
    rustix::process::kill_process(Pid::from_raw(pids[0]).unwrap(), Signal::KILL).unwrap();
    wait("its end", || runner.down());
    let worker = pids[1].unsigned_abs();
    wait("the worker's end", || start_time(worker).is_none());
    lines.end(runner);
}

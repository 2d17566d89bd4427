//! The leader dies at every output it makes, in every kind of conversation and every order of
//! closing; the client and every server must end with exactly the bytes they would have had.
#![allow(clippy::cast_possible_truncation, reason = "small numbers, in tests")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod sim;

use sim::app::App;
use sim::client::{Close, Script};
use sim::{Plan, Run, World};

const CALM: Plan = Plan {
    app: App::Echo,
    script: Script {
        sends: 8,
        close: Close::ServerClosed,
        ping_pong: None,
        aborts_after: None,
        reads_slowly: None,
        timestamps: true,
        buffer: 30_000,
        idles_us: None,
        keep_alive_us: None,
    },
    ipv6: false,
    offload: false,
    capacity: 24_000,
    seed: 1,
    crash_at: None,
    crash_again_after: None,
    crash_at_us: None,
    loss: None,
};

fn run(plan: Plan) -> Run {
    World::new(plan).run()
}

/// Runs the plan undisturbed, then once for every output of the leader, killing it there.
fn crash_everywhere(name: &str, plan: Plan) {
    for (ipv6, offload) in [(false, false), (true, true)] {
        let plan = Plan {
            ipv6,
            offload,
            ..plan
        };
        let calm = run(plan);
        println!(
            "{name} ipv6={ipv6}: {} events, {} outputs, {} us",
            calm.events, calm.outputs, calm.micros
        );
        for at in 0..calm.outputs {
            for round in 0..3 {
                let seed = plan.seed.wrapping_mul(1000) + 3 * at as u64 + round;
                let run = run(Plan {
                    seed,
                    crash_at: Some(at),
                    ..plan
                });
                let known = calm.opened_at <= at;
                assert!(
                    !(run.handshake_lost && known),
                    "only before the connection is known"
                );
            }
        }
    }
}

const fn script() -> Script {
    CALM.script
}

#[test]
fn download_client_closes_first() {
    crash_everywhere(
        "download, client first",
        Plan {
            app: App::Download {
                bytes: 90_000,
                asks: true,
                closes: false,
            },
            script: Script {
                close: Close::Received(90_000),
                ..script()
            },
            ..CALM
        },
    );
}

#[test]
fn download_server_closes_first() {
    crash_everywhere(
        "download, server first",
        Plan {
            app: App::Download {
                bytes: 90_000,
                asks: true,
                closes: true,
            },
            ..CALM
        },
    );
}

#[test]
fn server_speaks_first() {
    crash_everywhere(
        "server speaks first",
        Plan {
            app: App::Download {
                bytes: 5_000,
                asks: false,
                closes: true,
            },
            script: Script {
                sends: 0,
                ..script()
            },
            ..CALM
        },
    );
}

#[test]
fn upload() {
    crash_everywhere(
        "upload",
        Plan {
            app: App::Upload,
            script: Script {
                sends: 90_000,
                close: Close::Sent,
                ..script()
            },
            ..CALM
        },
    );
}

#[test]
fn echo() {
    crash_everywhere(
        "echo",
        Plan {
            app: App::Echo,
            script: Script {
                sends: 20_000,
                ping_pong: Some(700),
                close: Close::Received(20_000),
                ..script()
            },
            ..CALM
        },
    );
}

#[test]
fn echo_in_bulk_half_closed() {
    crash_everywhere(
        "echo in bulk",
        Plan {
            app: App::Echo,
            script: Script {
                sends: 60_000,
                close: Close::Sent,
                ..script()
            },
            ..CALM
        },
    );
}

#[test]
fn both_close_at_once() {
    crash_everywhere(
        "both at once",
        Plan {
            app: App::Download {
                bytes: 3_000,
                asks: true,
                closes: true,
            },
            script: Script {
                close: Close::Sent,
                ..script()
            },
            ..CALM
        },
    );
}

#[test]
fn server_closes_before_the_upload() {
    crash_everywhere(
        "server closes first",
        Plan {
            app: App::ClosesFirst { bytes: 2_000 },
            script: Script {
                sends: 50_000,
                close: Close::Sent,
                ..script()
            },
            ..CALM
        },
    );
}

#[test]
fn a_client_that_reads_slowly() {
    crash_everywhere(
        "slow reader",
        Plan {
            app: App::Download {
                bytes: 30_000,
                asks: true,
                closes: true,
            },
            script: Script {
                reads_slowly: Some(2_000),
                buffer: 6_000,
                ..script()
            },
            ..CALM
        },
    );
}

/// It says nothing for an hour, with and without a kernel that asks now and then whether we are there. The leader dies at
/// every output, and while nothing happens.
#[test]
fn idle_for_an_hour() {
    const MINUTE_US: u64 = 60_000_000;
    for keep_alive_us in [None, Some(10 * MINUTE_US)] {
        let plan = Plan {
            app: App::Echo,
            script: Script {
                sends: 2_800,
                ping_pong: Some(700),
                close: Close::Received(2_800),
                idles_us: Some(60 * MINUTE_US),
                keep_alive_us,
                ..script()
            },
            ..CALM
        };
        crash_everywhere("idle for an hour", plan);
        for minute in [1, 5, 6, 30, 59] {
            let run = run(Plan {
                seed: minute,
                crash_at_us: Some(minute * MINUTE_US + 1),
                crash_again_after: Some(2),
                ..plan
            });
            assert!(run.micros > 60 * MINUTE_US);
        }
    }
}

#[test]
fn without_timestamps_and_with_a_large_window() {
    crash_everywhere(
        "no timestamps",
        Plan {
            app: App::Echo,
            script: Script {
                sends: 40_000,
                close: Close::Sent,
                timestamps: false,
                buffer: 200_000,
                ..script()
            },
            capacity: 100_000,
            ..CALM
        },
    );
}

#[test]
fn the_client_breaks_off() {
    crash_everywhere(
        "client RST",
        Plan {
            app: App::Download {
                bytes: 60_000,
                asks: true,
                closes: true,
            },
            script: Script {
                aborts_after: Some(20_000),
                ..script()
            },
            ..CALM
        },
    );
}

#[test]
fn the_server_breaks_off() {
    crash_everywhere(
        "server RST",
        Plan {
            app: App::Breaks { after: 9_000 },
            script: Script {
                sends: 30_000,
                ..script()
            },
            ..CALM
        },
    );
}

/// It has nothing to say and would wait for ever: it must be told, by whoever leads then.
#[test]
fn the_server_breaks_off_an_idle_client() {
    crash_everywhere(
        "server RST, idle client",
        Plan {
            app: App::Breaks { after: 9_000 },
            script: Script {
                sends: 9_000,
                ..script()
            },
            ..CALM
        },
    );
}

/// Two leaders die one after the other; the last replica serves alone.
#[test]
fn two_leaders_die() {
    for seed in 0..150 {
        for (app, script) in [
            (
                App::Echo,
                Script {
                    sends: 30_000,
                    close: Close::Sent,
                    ..script()
                },
            ),
            (
                App::Upload,
                Script {
                    sends: 60_000,
                    close: Close::Sent,
                    ..script()
                },
            ),
            (
                App::Download {
                    bytes: 60_000,
                    asks: true,
                    closes: true,
                },
                script(),
            ),
        ] {
            run(Plan {
                app,
                script,
                ipv6: seed % 2 == 1,
                offload: seed % 3 == 1,
                seed: 7_000 + seed,
                crash_at: Some(2 + (seed as usize * 7) % 60),
                crash_again_after: Some((seed as usize * 5) % 40),
                ..CALM
            });
        }
    }
}

/// The same on a path that loses segments, both ways.
#[test]
fn on_a_lossy_path() {
    for seed in 0..120 {
        for (app, script) in [
            (
                App::Echo,
                Script {
                    sends: 30_000,
                    close: Close::Sent,
                    ..script()
                },
            ),
            (
                App::Upload,
                Script {
                    sends: 40_000,
                    close: Close::Sent,
                    ..script()
                },
            ),
            (
                App::Download {
                    bytes: 60_000,
                    asks: true,
                    closes: true,
                },
                script(),
            ),
        ] {
            run(Plan {
                app,
                script,
                ipv6: seed % 2 == 1,
                offload: seed % 3 == 1,
                capacity: CALM.capacity,
                seed: 9_000 + seed,
                crash_at: Some(2 + (seed as usize * 11) % 90),
                crash_again_after: (seed % 4 == 0).then_some(30),
                crash_at_us: None,
                loss: Some(10 + 10 * (seed % 5)),
            });
        }
    }
}

/// Found by this seed: the client held more than the new leader knew of, so it took every segment of
/// ours for old; its sender had gone back on a timeout, so we took every segment of its for old; and
/// each answered the other for ever.
#[test]
fn old_segments_from_both_sides_end_in_agreement() {
    run(Plan {
        app: App::Echo,
        script: Script {
            sends: 58_795,
            close: Close::Sent,
            timestamps: false,
            buffer: 5_000,
            ..script()
        },
        offload: true,
        seed: 21_229,
        crash_at: Some(22),
        crash_again_after: Some(24),
        loss: Some(58),
        ..CALM
    });
}

/// One seed, one run: byte for byte.
#[test]
fn a_seed_repeats_its_run() {
    let plan = Plan {
        app: App::Echo,
        script: Script {
            sends: 30_000,
            close: Close::Sent,
            ..script()
        },
        crash_at: Some(25),
        crash_again_after: Some(20),
        loss: Some(20),
        seed: 77,
        ..CALM
    };
    assert_eq!(run(plan), run(plan));
}

//! Real faults, in this process and in children.

use super::*;
use crate::rng::Rng;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

fn below(rng: &mut Rng, n: usize) -> usize {
    usize::try_from(rng.next_u64() % n as u64).unwrap()
}

fn diff(offset: usize, bytes: &[u8]) -> Diff {
    Diff {
        offset: offset as u64,
        bytes: Bytes::copy_from_slice(bytes),
    }
}

#[test]
fn the_first_write_to_a_page_is_noticed_and_collected_once() {
    let mut region = Pages::new(1).unwrap();
    assert_eq!(region.len(), page_bytes());
    assert_eq!(region.dirty_pages(), 0);
    assert!(region.as_slice().iter().all(|b| *b == 0));
    assert_eq!(region.dirty_pages(), 0, "reading is no write");
    region.as_mut_slice()[7] = 9;
    region.as_mut_slice()[8] = 8;
    assert_eq!(region.dirty_pages(), 1);
    assert_eq!(region.collect(), [diff(7, &[9, 8])]);
    assert_eq!(region.dirty_pages(), 0);
    assert!(region.collect().is_empty());
    region.as_mut_slice()[8] = 5;
    assert_eq!(region.collect(), [diff(8, &[5])], "protected again");
    region.write(3, &[0, 0]);
    assert_eq!(region.dirty_pages(), 1);
    assert!(region.collect().is_empty(), "the same values");
}

#[test]
fn runs_cross_pages_and_words_and_hold_only_what_changed() {
    let page = page_bytes();
    let region = Pages::new(4 * page).unwrap();
    let long: Vec<u8> = (1..=250).cycle().take(page + 13).collect();
    region.write(page - 5, &long);
    region.write(3 * page + 11, &[1]);
    region.write(3 * page + 13, &[2]);
    region.write(4 * page - 1, &[3]);
    assert_eq!(
        region.collect(),
        [
            diff(page - 5, &long),
            diff(3 * page + 11, &[1]),
            diff(3 * page + 13, &[2]),
            diff(4 * page - 1, &[3]),
        ]
    );
}

#[test]
fn an_update_keeps_what_was_written_here_and_is_not_collected() {
    let region = Pages::new(2 * page_bytes()).unwrap();
    region.write(100, &[1, 1, 1, 1]);
    region.apply(&diff(102, &[7; 30])).unwrap();
    region.apply(&diff(page_bytes(), &[])).unwrap();
    assert_eq!(region.dirty_pages(), 1);
    assert_eq!(region.collect(), [diff(100, &[1, 1])]);
    region.apply(&diff(page_bytes() - 3, &[5; 6])).unwrap();
    assert_eq!(region.dirty_pages(), 0);
    assert!(region.collect().is_empty());
    let mut seen = [0; 32];
    region.read(100, &mut seen);
    assert_eq!(seen[..3], [1, 1, 7]);
    region.read(page_bytes() - 3, &mut seen[..6]);
    assert_eq!(seen[..6], [5; 6]);
    // A write after the update is one.
    region.write(page_bytes(), &[6]);
    assert_eq!(region.collect(), [diff(page_bytes(), &[6])]);
}

#[test]
fn a_diff_outside_is_refused_in_whole() {
    let region = Pages::new(1).unwrap();
    let end = region.len();
    for offset in [end as u64 - 1, end as u64, u64::MAX, u64::MAX - 1] {
        let bytes = Bytes::from_static(&[1, 1]);
        assert_eq!(region.apply(&Diff { offset, bytes }), Err(OutOfRange));
    }
    assert!(region.contents().is_empty());
}

/// Replicas that apply each other's diffs are equal, whatever is written, as long as it is not to the same byte.
#[test]
fn diffs_carry_random_writes_exactly() {
    for seed in 0..40 {
        let mut rng = Rng::new(seed);
        let pages = 1 + below(&mut rng, 70);
        let bytes = pages * page_bytes();
        let regions = [Pages::new(bytes).unwrap(), Pages::new(bytes).unwrap()];
        let mut expected = vec![0; bytes];
        for _ in 0..8 {
            // Runs of random places, owned by one or the other in turns.
            for _ in 0..below(&mut rng, 60) {
                let at = below(&mut rng, bytes);
                let most = if rng.next_u64().is_multiple_of(8) {
                    3 * page_bytes()
                } else {
                    40
                };
                let len = (1 + below(&mut rng, most)).min(bytes - at);
                for n in at..at + len {
                    let value = (rng.next_u64() % 4) as u8;
                    expected[n] = value;
                    // Who owns a byte is fixed: half a word each.
                    regions[(n / 4) % 2].write(n, &[value]);
                }
            }
            let diffs = [regions[0].collect(), regions[1].collect()];
            for (diffs, to) in [(&diffs[0], &regions[1]), (&diffs[1], &regions[0])] {
                assert!(diffs.windows(2).all(|d| d[0].end().unwrap() < d[1].offset));
                for d in diffs {
                    assert!(!d.bytes.is_empty());
                    to.apply(d).unwrap();
                }
            }
            // Half of the time something is in the making meanwhile: it is in the memory, not in the contents.
            for region in &regions {
                let mut now = vec![0; bytes];
                region.read(0, &mut now);
                assert!(now == expected, "seed {seed}");
                assert_eq!(region.dirty_pages(), 0);
                let copy = Pages::new(bytes).unwrap();
                region.write(0, &[now[0] ^ 1]);
                for d in region.contents() {
                    copy.apply(&d).unwrap();
                }
                region.write(0, &[now[0]]);
                copy.read(0, &mut now);
                assert!(now == expected, "seed {seed}");
                assert!(region.collect().is_empty());
            }
        }
    }
}

#[test]
fn threads_write_pages_and_regions_at_once() {
    const PAGES: usize = 256;
    let page = page_bytes();
    let regions: Vec<Pages> = (0..3).map(|_| Pages::new(PAGES * page).unwrap()).collect();
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let regions = &regions;
            scope.spawn(move || {
                // Every thread its own byte of every page of every region, so that first writes meet.
                for n in 0..PAGES {
                    for region in regions {
                        region.write(n * page + usize::from(thread) * 2, &[thread + 1]);
                    }
                }
            });
        }
    });
    for region in &regions {
        assert_eq!(region.dirty_pages(), PAGES);
        let diffs = region.collect();
        assert_eq!(diffs.len(), PAGES * 4);
        for (n, d) in diffs.iter().enumerate() {
            let (index, thread) = (n / 4, n % 4);
            let value = u8::try_from(thread).unwrap() + 1;
            assert_eq!(*d, diff(index * page + thread * 2, &[value]));
        }
    }
}

/// Nothing is lost that is written while others collect and apply: all pages change hands all the time.
#[test]
fn collecting_and_applying_meets_writers_without_loss() {
    const PAGES: usize = 8;
    const ROUNDS: u64 = 3000;
    let page = page_bytes();
    let region = Pages::new(PAGES * page).unwrap();
    let replica = Pages::new(PAGES * page).unwrap();
    let writers_left = AtomicUsize::new(2);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (region, left) = (&region, &writers_left);
            scope.spawn(move || {
                let mut rng = Rng::new(thread as u64);
                for round in 1..=ROUNDS {
                    let at = below(&mut rng, PAGES) * page + 8 + thread * 8;
                    region.write(at, &round.to_le_bytes());
                }
                for n in 0..PAGES {
                    region.write(n * page + 8 + thread * 8, &u64::MAX.to_le_bytes());
                }
                left.fetch_sub(1, Ordering::SeqCst);
            });
        }
        let mut round = 0;
        loop {
            let last = writers_left.load(Ordering::SeqCst) == 0;
            for d in region.collect() {
                replica.apply(&d).unwrap();
            }
            // An update from elsewhere to the same pages.
            round += 1_u32;
            for n in 0..PAGES {
                region.apply(&diff(n * page, &round.to_le_bytes())).unwrap();
                replica
                    .apply(&diff(n * page, &round.to_le_bytes()))
                    .unwrap();
            }
            if last {
                break;
            }
        }
    });
    assert!(region.collect().is_empty());
    let (mut one, mut other) = (vec![0; PAGES * page], vec![0; PAGES * page]);
    region.read(0, &mut one);
    replica.read(0, &mut other);
    assert!(one == other);
    for n in 0..PAGES {
        assert_eq!(one[n * page + 8..][..16], [0xff; 16]);
    }
}

/// A page that was writable without being noted would stay so, and its writes would never be found again. The window
/// is too small for chance to hit it often: so the turn is held, and nobody else may come through.
#[test]
fn protection_and_note_change_together() {
    let region = Pages::new(2 * page_bytes()).unwrap();
    region.write(0, &[1]);
    let through = AtomicUsize::new(0);
    let diffs = std::thread::scope(|scope| {
        let turn = region.slot.turn();
        let collected = scope.spawn(|| {
            let diffs = region.collect();
            through.fetch_add(1, Ordering::SeqCst);
            diffs
        });
        scope.spawn(|| {
            region.write(page_bytes(), &[1]);
            through.fetch_add(1, Ordering::SeqCst);
        });
        for _ in 0..20_000 {
            std::thread::yield_now();
        }
        assert_eq!(through.load(Ordering::SeqCst), 0);
        assert_eq!(region.dirty_pages(), 1);
        drop(turn);
        collected.join().unwrap()
    });
    assert_eq!(diffs.len() + region.collect().len(), 2);
}

#[test]
fn places_in_the_table_are_used_again() {
    // Other tests hold regions meanwhile.
    for _ in 0..3 * REGIONS_MAX {
        let region = Pages::new(1).unwrap();
        region.write(0, &[1]);
        assert_eq!(region.collect().len(), 1);
    }
    assert_eq!(
        Pages::new(0).unwrap_err().kind(),
        io::ErrorKind::InvalidInput
    );
    assert!(Pages::new(usize::MAX).is_err());
}

#[test]
fn one_region_too_many_is_refused() {
    // In a process of its own: other tests need regions meanwhile.
    if is_child("one_region_too_many_is_refused") {
        let mut all: Vec<_> = (0..REGIONS_MAX).map(|_| Pages::new(1).unwrap()).collect();
        let refused = Pages::new(1).unwrap_err().kind();
        assert_eq!(refused, io::ErrorKind::QuotaExceeded);
        all.pop();
        all.push(Pages::new(1).unwrap());
        for region in &all {
            region.write(0, &[1]);
            assert_eq!(region.collect().len(), 1);
        }
        std::process::exit(44);
    }
    let (status, text) = child("one_region_too_many_is_refused");
    assert_eq!(status.code(), Some(44), "{text}");
}

#[test]
fn the_kernel_does_not_write_into_a_protected_page() {
    let region = Pages::new(1).unwrap();
    let file = rustix::fs::memfd_create("source", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(rustix::io::pwrite(&file, &[1, 2, 3, 4], 0).unwrap(), 4);
    let read = |region: &Pages| {
        // SAFETY: four bytes of the region, which nobody else uses.
        let buffer = unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), 4) };
        rustix::io::pread(&file, buffer, 0)
    };
    assert_eq!(read(&region), Err(rustix::io::Errno::FAULT));
    assert_eq!(region.dirty_pages(), 0);
    region.write(10, &[1]);
    assert_eq!(read(&region), Ok(4), "once it is open it is memory as any");
    assert_eq!(region.collect()[0], diff(0, &[1, 2, 3, 4]));
}

/// Runs one test of this file in a child whose environment says so.
fn child(test: &str) -> (ExitStatus, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("dsm::pages::tests::{test}")])
        .args(["--nocapture", "--test-threads=1"])
        .env("UNBROKEN_DSM_CHILD", test)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status, text)
}

/// Whether this process is that child. It is meant to die: without a core file.
fn is_child(test: &str) -> bool {
    let yes = std::env::var_os("UNBROKEN_DSM_CHILD").is_some_and(|t| t == test);
    if yes {
        rustix::process::setrlimit(
            rustix::process::Resource::Core,
            rustix::process::Rlimit {
                current: Some(0),
                maximum: Some(0),
            },
        )
        .unwrap();
    }
    yes
}

fn use_a_region() -> Pages {
    let region = Pages::new(3 * page_bytes()).unwrap();
    region.write(page_bytes(), &[1]);
    assert_eq!(region.collect().len(), 1);
    println!("the region works");
    region
}

fn wild_write(address: usize) {
    // SAFETY: none: this process ends here, and that is what is tested.
    unsafe { std::ptr::write_volatile(address as *mut u8, 1) };
}

#[test]
fn a_foreign_fault_still_kills() {
    if is_child("a_foreign_fault_still_kills") {
        let _region = use_a_region();
        wild_write(64);
        std::process::exit(0);
    }
    let (status, text) = child("a_foreign_fault_still_kills");
    assert!(text.contains("the region works"), "{text}");
    assert_eq!(status.signal(), Some(libc::SIGSEGV));
}

#[test]
fn a_write_to_a_dropped_region_kills() {
    if is_child("a_write_to_a_dropped_region_kills") {
        let region = use_a_region();
        let address = region.as_ptr() as usize;
        drop(region);
        wild_write(address);
        std::process::exit(0);
    }
    let (status, _) = child("a_write_to_a_dropped_region_kills");
    assert_eq!(status.signal(), Some(libc::SIGSEGV));
}

#[test]
fn a_jump_into_a_region_kills() {
    if cfg!(not(target_arch = "x86_64")) {
        return; // only there the handler can tell a jump from a write
    }
    if is_child("a_jump_into_a_region_kills") {
        let region = use_a_region();
        // SAFETY: none: this process ends here, and that is what is tested.
        let code: extern "C" fn() = unsafe { std::mem::transmute(region.as_ptr()) };
        code();
        std::process::exit(0);
    }
    let (status, text) = child("a_jump_into_a_region_kills");
    assert!(text.contains("the region works"), "{text}");
    assert_eq!(status.signal(), Some(libc::SIGSEGV));
}

#[test]
fn a_signal_that_was_sent_still_kills() {
    if is_child("a_signal_that_was_sent_still_kills") {
        let _region = use_a_region();
        // std's handler, which was there before ours, takes itself away at the first.
        loop {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::SEGV)
                .unwrap();
            std::thread::yield_now();
        }
    }
    let (status, text) = child("a_signal_that_was_sent_still_kills");
    assert!(text.contains("the region works"), "{text}");
    assert_eq!(status.signal(), Some(libc::SIGSEGV));
}

#[test]
fn the_handler_before_ours_gets_what_is_not_ours() {
    extern "C" fn before(_: libc::c_int) {
        // SAFETY: `_exit` may be called in a handler.
        unsafe { libc::_exit(42) }
    }
    if is_child("the_handler_before_ours_gets_what_is_not_ours") {
        // SAFETY: a valid handler of the plain kind.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = before as *const () as usize;
            libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut());
        }
        let _region = use_a_region();
        wild_write(64);
        std::process::exit(0);
    }
    let (status, text) = child("the_handler_before_ours_gets_what_is_not_ours");
    assert!(text.contains("the region works"), "{text}");
    assert_eq!(status.code(), Some(42));
}

#[test]
fn a_full_stack_is_still_recognised() {
    #[expect(unconditional_recursion, reason = "that is what is tested")]
    fn deep(n: u64) -> u64 {
        std::hint::black_box(n) + deep(n + 1) * 2
    }
    if is_child("a_full_stack_is_still_recognised") {
        let _region = use_a_region();
        println!("{}", deep(0));
        std::process::exit(0);
    }
    let (status, text) = child("a_full_stack_is_still_recognised");
    assert!(text.contains("the region works"), "{text}");
    // std says so, and aborts.
    assert_eq!(status.signal(), Some(libc::SIGABRT));
}

/// Where the kernel allows no more mappings, a region is opened in whole.
#[test]
fn writes_go_on_when_mappings_run_out() {
    if is_child("writes_go_on_when_mappings_run_out") {
        let page = page_bytes();
        let region = use_a_region();
        let filler = MmapOptions::new().len(page * 300_000).map_anon().unwrap();
        let mut refused = false;
        for n in (0..300_000).step_by(2) {
            refused = !protect(filler.as_ptr() as usize + n * page, page, libc::PROT_NONE);
            if refused {
                break;
            }
        }
        // Without a limit within reach there is nothing to see.
        let expected = if refused { 3 } else { 1 };
        region.write(page + 1, &[5]);
        let dirty = region.dirty_pages();
        let first = region.collect();
        region.write(1, &[6]);
        region.write(page + 2, &[7]);
        let second = region.collect();
        let right = dirty == expected
            && first == [diff(page + 1, &[5])]
            && second == [diff(1, &[6]), diff(page + 2, &[7])];
        println!("{dirty} of {expected}, {first:?}, {second:?}");
        // SAFETY: ends the process at once: dropping what was mapped needs mappings too.
        unsafe { libc::_exit(if right { 43 } else { 1 }) }
    }
    let (status, text) = child("writes_go_on_when_mappings_run_out");
    assert_eq!(status.code(), Some(43), "{text}");
}

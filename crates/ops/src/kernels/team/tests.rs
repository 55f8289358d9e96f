//! The team: every task once, whoever calls, panics, sleeps or limits.

use super::*;

#[test]
fn a_roused_thread_waits_for_a_moment_and_sleeps_again() {
    let team = Team::new(1);
    let asleep = || team.shared.sleeping.load(Ordering::SeqCst) == 1;
    let wait_until = |what: &str, asleep: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !asleep() {
            assert!(start.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::yield_now();
        }
    };
    wait_until("the helper never sleeps", &asleep);
    for _ in 0..3 {
        let naps = team.shared.naps.load(Ordering::SeqCst);
        team.shared.rouse(1);
        wait_until("the helper is not woken, or does not sleep again", &|| {
            asleep() && team.shared.naps.load(Ordering::SeqCst) > naps
        });
        // and it still works
        let count = AtomicUsize::new(0);
        team.run(0, 9, 2, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 9);
        wait_until("the helper never sleeps", &asleep);
    }
}

#[test]
fn every_task_runs_once_with_any_number_of_callers() {
    let team = Team::new(3);
    let rounds = if cfg!(miri) { 5 } else { 2000 };
    std::thread::scope(|scope| {
        for caller in 0..3 {
            let team = &team;
            scope.spawn(move || {
                for round in 0..rounds {
                    let tasks = (round * 7 + caller) % 23;
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    team.run(0, tasks, 4, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{caller} {round}");
                    if round % 100 == 0 {
                        // long enough for the helpers to sleep
                        std::thread::sleep(HOT * 3);
                    }
                }
            });
        }
    });
}

#[test]
fn a_panic_of_a_task_reaches_the_caller_and_the_team_goes_on() {
    let team = Team::new(2);
    for round in 0..20 {
        let ran = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            team.run(LONG_NS, 8, 3, &|i| {
                ran.fetch_add(1, Ordering::Relaxed);
                assert!(i != round % 8, "task {i}");
            });
        }));
        assert!(outcome.is_err());
        let counts = AtomicUsize::new(0);
        team.run(LONG_NS, 8, 3, &|_| {
            counts.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(counts.load(Ordering::Relaxed), 8);
    }
}

#[test]
fn the_other_threads_take_part() {
    let team = Team::new(1);
    let caller = std::thread::current().id();
    // both wait for the other: one thread alone would never end
    let met = std::sync::Barrier::new(2);
    let helped = AtomicBool::new(false);
    team.run(LONG_NS, 2, 2, &|_| {
        met.wait();
        if std::thread::current().id() != caller {
            helped.store(true, Ordering::Relaxed);
        }
    });
    assert!(helped.load(Ordering::Relaxed));
}

#[test]
fn sleepers_are_woken_for_long_work_and_by_a_busy_caller_only() {
    let team = Team::new(1);
    let caller = std::thread::current().id();
    let helped = |ns: usize, tasks: usize, each: Duration| {
        while team.shared.sleeping.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(HOT);
        }
        std::thread::sleep(2 * HOT);
        let helped = AtomicBool::new(false);
        team.run(ns, tasks, 2, &|_| {
            std::thread::sleep(each);
            if std::thread::current().id() != caller {
                helped.store(true, Ordering::Relaxed);
            }
        });
        helped.load(Ordering::Relaxed)
    };
    assert!(helped(LONG_NS, 8, Duration::from_millis(20)), "a long job");
    assert!(helped(0, 8, Duration::from_millis(20)), "a job that turned out to be long");
    // how long a job takes is the machine's to say, but one of several tries is short
    assert!((0..50).any(|_| !helped(0, 2, Duration::ZERO)), "a short job");
}

#[test]
fn no_more_threads_take_part_than_are_allowed() {
    let team = Team::new(3);
    let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    for _ in 0..20 {
        team.run(0, 12, 2, &|_| {
            most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(50));
            inside.fetch_sub(1, Ordering::SeqCst);
        });
    }
    assert!(most.load(Ordering::SeqCst) <= 2);
}

#[test]
fn tasks_are_not_cut_further_and_limits_are_restored() {
    assert_eq!(with_threads(5, threads), 5);
    assert_eq!(with_threads(0, threads), 1);
    assert_eq!(with_threads(3, || with_threads(2, threads)), 2);
    assert_eq!(threads(), all());
    with_threads(4, || each(0, vec![0, 1, 2], |_| assert_eq!(threads(), 1)));
    with_threads(4, || {
        let sum = AtomicUsize::new(0);
        each(0, (0..100).collect(), |i: usize| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
        let mut data = [0usize; 100];
        each_chunk(0, &mut data, 3, |first, piece| {
            for (i, v) in piece.iter_mut().enumerate() {
                *v += first * 3 + i;
            }
        });
        assert!(data.iter().enumerate().all(|(i, v)| i == *v));
        let sum = AtomicUsize::new(0);
        each_group(0, (0..100).collect(), 4, |group: Vec<usize>| {
            assert!(group.windows(2).all(|w| w[1] == w[0] + 1));
            sum.fetch_add(group.iter().sum(), Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
    });
}

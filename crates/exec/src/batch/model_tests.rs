//! Every order in which threads can take their turns at the line, by loom. The source is that of `line` and `task`, with loom's locks.

use loom::thread;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};
use std::time::Instant;

#[path = "line.rs"]
#[allow(clippy::duplicate_mod, dead_code)] // on purpose: the same source, with other locks, and not all of it
mod line;
#[path = "../future/task.rs"]
#[allow(clippy::duplicate_mod, dead_code)]
mod task;

/// What they are made of here.
mod sync {
    use super::task::held;
    pub(super) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
    use std::time::Instant;

    /// Time does not pass in a model: whoever waits for it is told.
    pub(super) fn wait_until<'a, T>(on: &Condvar, guard: MutexGuard<'a, T>, _: Instant) -> MutexGuard<'a, T> {
        held(on.wait(guard))
    }

    pub(super) fn nap() {
        loom::thread::yield_now();
    }
}

use line::{Line, Place, Refused, Wanted};
use sync::{Arc, Condvar, Mutex};

type Jobs = Arc<Line<usize, usize>>;

fn place() -> Place {
    Place { lane: 0, step: 16, arrived: Instant::now(), deadline: None }
}

/// Answers everything with ten times itself until the line is closed; how much that was.
fn serve(line: &Jobs, most: usize) -> thread::JoinHandle<usize> {
    serve_when(line, most, |_, _| None)
}

fn serve_when(
    line: &Jobs,
    most: usize,
    more: impl Fn(usize, Instant) -> Option<Wanted> + Send + 'static,
) -> thread::JoinHandle<usize> {
    let line = line.clone();
    thread::spawn(move || {
        let mut served = 0;
        while let Some(started) = line.draw(most, &more) {
            for one in started {
                served += 1;
                let asker = one.task.end(one.job * 10);
                if asker.asleep {
                    one.task.tell();
                }
                if let Some(waker) = asker.waker {
                    waker.wake();
                }
            }
        }
        served
    })
}

fn model(capacity: usize, f: impl Fn(Jobs) + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || f(Arc::new(Line::new(capacity))));
}

#[test]
fn every_job_is_answered_once_and_a_closed_line_is_drained() {
    model(2, |line| {
        let server = serve(&line, 2);
        let other = {
            let line = line.clone();
            thread::spawn(move || {
                let task = line.push_when_room(2, place()).ok().unwrap();
                assert_eq!(task.sleep(), Some(20));
            })
        };
        let task = line.push_when_room(1, place()).ok().unwrap();
        assert_eq!(task.sleep(), Some(10));
        other.join().unwrap();
        assert!(line.close(false).is_empty());
        assert_eq!(server.join().unwrap(), 2);
        assert!(matches!(line.push(3, place()), Err(Refused::Closed(3))));
    });
}

#[test]
fn a_drawer_at_leisure_comes_when_somebody_waits_and_leaves_alone_what_others_drew() {
    model(3, |line| {
        let far = Instant::now() + std::time::Duration::from_secs(1 << 20);
        let server = serve_when(&line, 2, move |_, _| Some(Wanted { enough: usize::MAX, until: far, leisurely: true }));
        let other = {
            let line = line.clone();
            thread::spawn(move || {
                let task = line.push(2, place()).ok().unwrap();
                line.hurry();
                assert_eq!(task.sleep(), Some(20));
            })
        };
        // this one serves itself, unless it was drawn on the way
        let mine = line.push(1, place()).ok().unwrap();
        let drawn = line.try_draw_unwatched(1, |&job| job == 1);
        for started in &drawn {
            assert_eq!(started.job, 1);
            if started.task.end(10).asleep {
                started.task.tell();
            }
        }
        if drawn.is_empty() {
            line.hurry();
        }
        assert_eq!(mine.sleep(), Some(10));
        other.join().unwrap();
        line.close(false);
        assert_eq!(server.join().unwrap() + drawn.len(), 2);
    });
}

#[test]
fn who_waits_for_room_gets_in_when_a_job_is_drawn_or_abandoned() {
    model(1, |line| {
        let first = line.push(1, place()).ok().unwrap();
        let other = {
            let line = line.clone();
            thread::spawn(move || line.push_when_room(2, place()).ok().unwrap().sleep())
        };
        if first.abandon() {
            line.forget();
        }
        let server = serve(&line, 1);
        assert_eq!(other.join().unwrap(), Some(20));
        line.close(false);
        assert_eq!(server.join().unwrap(), 1);
        assert_eq!(line.len(), 0);
    });
}

#[test]
fn who_waits_for_room_gets_in_when_a_server_has_a_free_slot() {
    model(1, |line| {
        let first = line.push(1, place()).ok().unwrap();
        let other = {
            let line = line.clone();
            thread::spawn(move || line.push_when_room(2, place()).ok().unwrap())
        };
        line.set_slots(1);
        // nobody draws before it is in
        let second = other.join().unwrap();
        assert!(matches!(line.push(3, place()), Err(Refused::Full(3))));
        let server = serve(&line, 1);
        assert_eq!((first.sleep(), second.sleep()), (Some(10), Some(20)));
        line.close(false);
        assert_eq!(server.join().unwrap(), 2);
    });
}

/// Sleeps until it is woken.
struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Wake for Bell {
    fn wake(self: std::sync::Arc<Self>) {
        *self.rung.lock().unwrap() = true;
        self.heard.notify_one();
    }
}

#[test]
fn who_knocks_is_woken_when_there_is_room_or_the_line_is_closed() {
    for how in ["closed", "drawn", "slots"] {
        model(1, move |line| {
            let first = line.push(1, place()).ok().unwrap();
            let other = {
                let line = line.clone();
                thread::spawn(move || match how {
                    "closed" => assert_eq!(line.close(true).len(), 1),
                    "drawn" => assert_eq!(line.try_draw(1).len(), 1),
                    _ => line.set_slots(1),
                })
            };
            let bell = std::sync::Arc::new(Bell { rung: Mutex::new(false), heard: Condvar::new() });
            if !line.knock(7, &Waker::from(bell.clone())) {
                let mut rung = bell.rung.lock().unwrap();
                while !*rung {
                    rung = bell.heard.wait(rung).unwrap();
                }
            }
            assert_eq!(line.push(2, place()).is_ok(), how != "closed");
            other.join().unwrap();
            drop(first);
        });
    }
}

#[test]
fn a_job_is_either_drawn_or_cancelled_with_the_line() {
    static DRAWN: AtomicUsize = AtomicUsize::new(0);
    model(2, |line| {
        let (one, two) = (line.push(1, place()).ok().unwrap(), line.push(2, place()).ok().unwrap());
        let server = serve(&line, 1);
        let cancelled = line.close(true);
        for started in &cancelled {
            if started.task.end(0).asleep {
                started.task.tell();
            }
        }
        let served = server.join().unwrap();
        DRAWN.fetch_max(served, Ordering::Relaxed);
        assert_eq!(served + cancelled.len(), 2);
        assert!(matches!(one.sleep(), Some(0 | 10)));
        assert!(matches!(two.sleep(), Some(0 | 20)));
    });
    assert!(DRAWN.load(Ordering::Relaxed) > 0);
}

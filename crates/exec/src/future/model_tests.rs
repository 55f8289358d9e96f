//! Every order in which threads can take their turns at the queue, by loom. The source is that of `queue` and `task`, with loom's locks.

use loom::thread;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, Wake, Waker};

#[path = "queue.rs"]
#[allow(clippy::duplicate_mod)] // on purpose: the same source, with other locks
mod queue;
#[path = "task.rs"]
#[allow(clippy::duplicate_mod, dead_code)]
mod task;

/// What they are made of here.
mod sync {
    pub(super) use loom::sync::{Arc, Condvar, Mutex};

    pub(super) fn nap() {
        loom::thread::yield_now();
    }
}

use queue::Queue;
use sync::{Arc, Condvar, Mutex};

/// A number to be multiplied by ten; `None` ends the engine.
type Job = Option<usize>;
type Line = Arc<Queue<Job, usize>>;
type Task = Arc<task::Task<Job, usize>>;

/// How often each job ran.
type Runs = std::sync::Arc<[AtomicUsize; 3]>;

fn run(queue: &Line, task: &Task, job: usize, runs: &Runs) {
    runs[job].fetch_add(1, Ordering::Relaxed);
    if let Some(waker) = queue.finish(task, job * 10) {
        waker.wake();
    }
}

fn engine(queue: &Line, runs: &Runs) -> thread::JoinHandle<()> {
    let (queue, runs) = (queue.clone(), runs.clone());
    thread::spawn(move || loop {
        let (task, job) = queue.next();
        match job {
            Some(job) => run(&queue, &task, job, &runs),
            None => {
                assert!(queue.finish(&task, 0).is_none());
                return;
            }
        }
    })
}

fn wait(queue: &Line, task: &Task, runs: &Runs) -> Option<usize> {
    if let Some(Some(job)) = queue.claim(task) {
        run(queue, task, job, runs);
    }
    task.sleep()
}

fn model(f: impl Fn(Line, Runs) + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || f(Arc::new(Queue::new()), Runs::default()));
}

fn ran(runs: &Runs) -> Vec<usize> {
    runs.iter().map(|n| n.load(Ordering::Relaxed)).collect()
}

#[test]
fn a_job_runs_once_on_either_thread_and_an_abandoned_one_at_most_once() {
    model(|queue, runs| {
        let engine = engine(&queue, &runs);
        let (first, second) = (queue.submit(Some(1)), queue.submit(Some(2)));
        second.abandon();
        assert_eq!(wait(&queue, &first, &runs), Some(10));
        assert!(first.ready().is_some_and(|again| again.is_none()), "a result is taken once");
        queue.submit(None);
        engine.join().unwrap();
        assert!(matches!(ran(&runs)[..], [0, 1, 0 | 1]));
    });
}

#[test]
fn two_that_wait_and_the_engine_never_wait_for_each_other() {
    model(|queue, runs| {
        let engine = engine(&queue, &runs);
        let other = {
            let (queue, runs) = (queue.clone(), runs.clone());
            thread::spawn(move || {
                let task = queue.submit(Some(2));
                assert_eq!(wait(&queue, &task, &runs), Some(20));
            })
        };
        let task = queue.submit(Some(1));
        assert_eq!(wait(&queue, &task, &runs), Some(10));
        other.join().unwrap();
        queue.submit(None);
        engine.join().unwrap();
        assert_eq!(ran(&runs), [0, 1, 1]);
    });
}

/// Sleeps until it is woken, and counts how often it was.
struct Bell {
    rung: Mutex<usize>,
    heard: Condvar,
}

impl Wake for Bell {
    fn wake(self: std::sync::Arc<Self>) {
        *self.rung.lock().unwrap() += 1;
        self.heard.notify_one();
    }
}

#[test]
fn who_was_told_to_wait_is_woken_once_and_finds_the_result() {
    model(|queue, runs| {
        let engine = engine(&queue, &runs);
        let bell = std::sync::Arc::new(Bell { rung: Mutex::new(0), heard: Condvar::new() });
        let waker = Waker::from(bell.clone());
        let task = queue.submit(Some(1));
        let mut waited = 0;
        if task.poll(&waker).is_pending() {
            let mut rung = bell.rung.lock().unwrap();
            while *rung == 0 {
                rung = bell.heard.wait(rung).unwrap();
            }
            drop(rung);
            waited = 1;
            assert_eq!(task.poll(&waker), Poll::Ready(Some(10)));
        }
        queue.submit(None);
        engine.join().unwrap();
        assert_eq!((*bell.rung.lock().unwrap(), ran(&runs)), (waited, vec![0, 1, 0]));
    });
}

//! The threads that share a kernel's work.
//!
//! One team for the process. The caller works too; the others wait hot for up to 50 µs after a job and sleep then. Waking one costs the
//! caller time, and it comes late, takes a task whose data another core has, and the caller waits for it: a short kernel is done
//! sooner alone. So sleepers are woken at once for long work only, else when
//! the caller has been busy for some time, with this kernel or with those just before it. Where kernels follow one another, as
//! in a plan, the team is awake: who knows that they will take long in all [rouses](rouse) it before the first.
//! A caller who finds the team at work for someone else, and a task that calls a kernel itself, does all of its work alone. A process
//! that was forked from one whose team has worked must not use it: its helpers do not exist there.

use parking_lot::{Condvar, Mutex};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long a thread without work waits before it sleeps.
const HOT: Duration = Duration::from_micros(50);
/// Work that takes one thread this long, in nanoseconds, is worth waking the others.
const LONG_NS: usize = 150_000;
/// A caller who has been busy for so long wakes the others for what is left.
const BUSY: Duration = Duration::from_micros(100);
/// The most threads of a team.
const MOST: usize = 256;

thread_local! {
    /// The limit of [`with_threads`], if any.
    static LIMIT: Cell<Option<usize>> = const { Cell::new(None) };
    /// Whether this thread is inside a task.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with kernels that cut their work for at most `n` threads (at least one) where the calling thread runs them. No result
/// depends on it, only the time.
pub fn with_threads<R>(n: usize, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<usize>);
    impl Drop for Restore {
        fn drop(&mut self) {
            LIMIT.set(self.0);
        }
    }
    let _restore = Restore(LIMIT.replace(Some(n.clamp(1, MOST))));
    f()
}

/// How many threads a kernel that the calling thread runs may use: as many as Candle uses (`RAYON_NUM_THREADS`, or the machine's),
/// fewer within [`with_threads`], one within a task.
pub fn threads() -> usize {
    if INSIDE.get() {
        return 1;
    }
    LIMIT.get().unwrap_or_else(all)
}

fn all() -> usize {
    // asked once: Candle reads the environment and `/proc/cpuinfo` each time
    static ALL: OnceLock<usize> = OnceLock::new();
    *ALL.get_or_init(|| candle_core::utils::get_num_threads().clamp(1, MOST))
}

/// Calls `f` with each of `items`, on this thread and on those of the team that are free. `ns` is about how many nanoseconds one
/// thread would take for all of them.
///
/// A panic of `f` reaches the caller after all tasks have ended.
pub fn each<T: Send>(ns: usize, items: Vec<T>, f: impl Fn(T) + Sync) {
    if items.len() < 2 || threads() < 2 {
        return items.into_iter().for_each(f);
    }
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    run(ns, items.len(), &|i| {
        let item = items.get(i).and_then(|item| item.lock().take());
        if let Some(item) = item {
            f(item);
        }
    });
}

/// About how many nanoseconds one thread takes to read and write so much data.
pub(crate) fn moving<T>(data: &[T]) -> usize {
    moving_bytes(std::mem::size_of_val(data))
}

/// The same of so many bytes.
pub(crate) fn moving_bytes(bytes: usize) -> usize {
    bytes / 8
}

/// Pieces of work for each thread: several, so that they even out.
const PIECES: usize = 4;

/// Calls `f` with pieces of `data`, each a whole number of `unit`s of elements (the last may be cut short), and the number of its
/// first unit; `ns` as for [`each`].
pub(crate) fn each_chunk<T: Send>(ns: usize, data: &mut [T], unit: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let unit = unit.max(1);
    let units = data.len().div_ceil(unit).div_ceil(threads() * PIECES).max(1);
    each(ns, data.chunks_mut(units * unit).enumerate().collect(), |(i, piece)| f(i * units, piece));
}

/// Calls `f` with groups of neighbouring items, cut for `threads`.
pub(crate) fn each_group<T: Send>(ns: usize, mut items: Vec<T>, threads: usize, f: impl Fn(Vec<T>) + Sync) {
    if threads < 2 {
        return f(items);
    }
    let len = items.len().div_ceil(threads * PIECES).max(1);
    let mut groups = Vec::new();
    while items.len() > len {
        let rest = items.split_off(len);
        groups.push(std::mem::replace(&mut items, rest));
    }
    groups.push(items);
    each(ns, groups, f);
}

/// The team of the process.
fn team() -> &'static Team {
    static TEAM: OnceLock<Team> = OnceLock::new();
    TEAM.get_or_init(|| Team::new(all() - 1))
}

/// Calls `f` with `0..tasks`.
fn run(ns: usize, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
    team().run(ns, tasks, threads(), f);
}

/// Wakes the team for kernels that follow at once and take one thread about `ns` nanoseconds in all, if so much is worth it: each of them
/// alone may be too short for that.
pub fn rouse(ns: u64) {
    let threads = threads();
    if threads > 1 && ns >= LONG_NS as u64 {
        team().shared.rouse(threads - 1);
    }
}

/// A job that is being worked on: how to call it, and how many tasks it has.
#[derive(Clone, Copy)]
struct Job {
    f: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// The next task of a share, on a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Share(AtomicUsize);

/// The tasks of share `i` of `shares`: neighbours, and the same ones whenever a kernel runs again over memory of the same size. What a
/// thread wrote for one kernel it then reads for the next, from its own cache.
fn share(i: usize, shares: usize, tasks: usize) -> std::ops::Range<usize> {
    tasks * i / shares..tasks * (i + 1) / shares
}

/// What the threads of a team share.
///
/// `state` is the heart: a number that grows with each job, whether the job is open to helpers, and how many are inside. A helper
/// enters by adding itself while the job is open; the owner closes the job, and leaves when nobody is inside any more. So whoever
/// is inside has the job's closure alive.
struct Shared {
    state: AtomicU64,
    /// The job; written by the owner while the state is closed and nobody is inside.
    job: UnsafeCell<Option<Job>>,
    /// Each thread's share of the tasks, the caller's first: the next one that nobody has taken.
    shares: Vec<Share>,
    /// How many helpers may be inside.
    most: AtomicU64,
    /// The first panic of a helper.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// How many helpers sleep, or are about to.
    sleeping: AtomicUsize,
    /// How often they were woken for a job that is still to come.
    roused: AtomicUsize,
    /// How often one of them has gone to sleep.
    #[cfg(test)]
    naps: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    quit: AtomicBool,
}

// SAFETY: `job` is the only field that is not `Sync`. The owner (one at a time, see `Team::owned`) writes it while nobody is inside
// and none can enter; helpers read it only while they are inside, after they saw the state that was stored behind the write.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is to a closure that is `Sync`, and is followed only as described above.
unsafe impl Send for Shared {}

/// How often a thread that waits looks before it offers its processor: the one it waits for may need that very processor, since a
/// thread that was woken often begins on its waker's.
const PATIENCE: u64 = 32;

/// Where an offered processor comes back later than this, somebody else had it.
const SHARED: Duration = Duration::from_micros(25);

/// Passes a moment; now and then another thread may have the processor, and the result says how long that took.
fn look_again(spins: u64) -> Option<Duration> {
    if !spins.is_multiple_of(PATIENCE) {
        std::hint::spin_loop();
        return None;
    }
    let offered = Instant::now();
    std::thread::yield_now();
    Some(offered.elapsed())
}

const OPEN: u64 = 1 << 16;
const INSIDERS: u64 = OPEN - 1;

fn number(state: u64) -> u64 {
    state >> 17
}

/// A team: helpers, and the caller of [`Team::run`].
struct Team {
    shared: Arc<Shared>,
    /// Whether somebody's job is being run.
    owned: AtomicBool,
    /// When the owners' present stretch of work began, and when the last job ended, in nanoseconds since `birth`.
    busy_since: AtomicU64,
    last_end: AtomicU64,
    birth: Instant,
    helpers: Vec<std::thread::JoinHandle<()>>,
}

impl Team {
    fn new(helpers: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            shares: (0..=helpers).map(|_| Share::default()).collect(),
            most: AtomicU64::new(0),
            panic: Mutex::new(None),
            sleeping: AtomicUsize::new(0),
            roused: AtomicUsize::new(0),
            #[cfg(test)]
            naps: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            quit: AtomicBool::new(false),
        });
        let helper = |i: usize| {
            let shared = shared.clone();
            // where the system gives no thread, the others do the work
            std::thread::Builder::new().name(format!("candle-lazy-{i}")).spawn(move || shared.help(i)).ok()
        };
        let helpers = (1..=helpers).filter_map(helper).collect();
        let (busy_since, last_end) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { shared, owned: AtomicBool::new(false), busy_since, last_end, birth: Instant::now(), helpers }
    }

    /// Nanoseconds since `birth`.
    fn now(&self) -> u64 {
        u64::try_from(self.birth.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// How long ago, at `now`, a moment was.
    fn since(now: u64, moment: &AtomicU64) -> Duration {
        Duration::from_nanos(now.saturating_sub(moment.load(Ordering::Relaxed)))
    }

    /// Whether the caller has been busy, at `now`, for long enough to wake the others.
    fn is_busy(&self, now: u64) -> bool {
        Self::since(now, &self.busy_since) > BUSY
    }

    fn run(&self, ns: usize, tasks: usize, threads: usize, f: &(dyn Fn(usize) + Sync)) {
        let alone = tasks < 2 || threads < 2 || self.helpers.is_empty();
        if alone || self.owned.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            return inside(|| (0..tasks).for_each(f));
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is followed by threads that are inside, and this function ends, or goes on
        // with a panic, only after it has closed the job and seen nobody inside.
        let f: *const (dyn Fn(usize) + Sync + 'static) =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), _>(std::ptr::from_ref(f)) };
        // SAFETY: this thread owns the team, and the last owner left it closed with nobody inside.
        unsafe { *shared.job.get() = Some(Job { f, tasks }) };
        let most = (threads.min(tasks) - 1).min(self.helpers.len());
        for (i, next) in shared.shares.iter().take(most + 1).enumerate() {
            next.0.store(share(i, most + 1, tasks).start, Ordering::Relaxed);
        }
        shared.most.store(most as u64, Ordering::Relaxed);
        let fresh = (number(shared.state.load(Ordering::Relaxed)) + 1) << 17 | OPEN;
        shared.state.store(fresh, Ordering::SeqCst);
        // a stretch of shared work is over when the pause behind a job is longer than helpers wait
        let now = self.now();
        if Self::since(now, &self.last_end) > HOT {
            self.busy_since.store(now, Ordering::Relaxed);
        }
        // whether sleepers have been woken, or nobody slept
        let called = Cell::new(shared.sleeping.load(Ordering::SeqCst) == 0);
        let call = || {
            called.set(true);
            shared.call(most);
        };
        if !called.get() && (ns >= LONG_NS || self.is_busy(now)) {
            call();
        }
        let mine = |f: &(dyn Fn(usize) + Sync), i: usize| {
            f(i);
            if !called.get() && shared.left(most + 1, tasks) && self.is_busy(self.now()) {
                call();
            }
        };
        // SAFETY: the closure is alive until this function ends.
        let own =
            catch_unwind(AssertUnwindSafe(|| inside(|| shared.work(0, most + 1, |i| mine(unsafe { &*f }, i), tasks))));
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u64;
        while shared.state.load(Ordering::Acquire) & INSIDERS != 0 {
            spins += 1;
            if spins > 1 << 20 {
                std::thread::sleep(HOT);
            } else {
                look_again(spins);
            }
        }
        self.last_end.store(self.now(), Ordering::Relaxed);
        let theirs = shared.panic.lock().take();
        self.owned.store(false, Ordering::Release);
        if let Err(panic) = own {
            // dropping a second one could panic while the first unwinds
            std::mem::forget(theirs);
            resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        {
            let _guard = self.shared.sleep.lock();
            self.shared.quit.store(true, Ordering::SeqCst);
            self.shared.wake.notify_all();
        }
        for helper in self.helpers.drain(..) {
            // a helper catches the panics of its tasks
            let _ = helper.join();
        }
    }
}

/// Runs `f` as a task: kernels within use one thread.
fn inside(f: impl FnOnce()) {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            INSIDE.set(self.0);
        }
    }
    let _restore = Restore(INSIDE.replace(true));
    f();
}

impl Shared {
    /// Takes tasks until none is left: those of share `own` of `shares` first, then the others'.
    fn work(&self, own: usize, shares: usize, f: impl Fn(usize), tasks: usize) {
        for k in 0..shares {
            let s = (own + k) % shares;
            let end = share(s, shares, tasks).end;
            let Some(Share(next)) = self.shares.get(s) else {
                return;
            };
            while next.load(Ordering::Relaxed) < end {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i < end {
                    f(i);
                }
            }
        }
    }

    /// Whether a task is left that nobody has taken.
    fn left(&self, shares: usize, tasks: usize) -> bool {
        let open = |(s, next): (usize, &Share)| next.0.load(Ordering::Relaxed) < share(s, shares, tasks).end;
        self.shares.iter().take(shares).enumerate().any(open)
    }

    /// Wakes `most` of those that sleep.
    fn call(&self, most: usize) {
        let _guard = self.sleep.lock();
        for _ in 0..most {
            self.wake.notify_one();
        }
    }

    /// Wakes `most` of those that sleep, who then wait hot for a job.
    fn rouse(&self, most: usize) {
        if self.sleeping.load(Ordering::SeqCst) > 0 {
            self.roused.fetch_add(1, Ordering::SeqCst);
            self.call(most);
        }
    }

    /// The life of helper `own`.
    fn help(&self, own: usize) {
        INSIDE.set(true);
        let mut done = 0;
        while let Some(state) = self.wait(done) {
            let entered =
                self.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
            if !entered {
                continue;
            }
            done = number(state);
            // SAFETY: this thread is inside, so nobody writes the job; the state that it saw was stored after the write.
            if let Some(Job { f, tasks }) = unsafe { *self.job.get() } {
                let shares = self.most.load(Ordering::Relaxed) as usize + 1;
                // SAFETY: the owner keeps the closure alive while somebody is inside.
                let outcome = catch_unwind(AssertUnwindSafe(|| self.work(own, shares, unsafe { &*f }, tasks)));
                if let Err(panic) = outcome {
                    let mut first = self.panic.lock();
                    match &*first {
                        None => *first = Some(panic),
                        // dropping it could panic again, and the owner waits for this thread
                        Some(_) => std::mem::forget(panic),
                    }
                }
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for an open job other than number `done`; `None` at the end.
    fn wait(&self, done: u64) -> Option<u64> {
        let news = |state: u64| {
            let room = state & INSIDERS < self.most.load(Ordering::Relaxed);
            state & OPEN != 0 && number(state) != done && room
        };
        loop {
            let begin = Instant::now();
            for spins in 1u64.. {
                let state = self.state.load(Ordering::Acquire);
                if news(state) {
                    return Some(state);
                }
                let offered = look_again(spins);
                if offered.is_some_and(|time| time > SHARED) || begin.elapsed() > HOT {
                    break;
                }
            }
            let mut guard = self.sleep.lock();
            let roused = self.roused.load(Ordering::SeqCst);
            #[cfg(test)]
            self.naps.fetch_add(1, Ordering::SeqCst);
            self.sleeping.fetch_add(1, Ordering::SeqCst);
            // the owner stores the state, then looks for sleepers; a sleeper says that it is one, then looks at the state
            let state = loop {
                if self.quit.load(Ordering::SeqCst) {
                    break Some(None);
                }
                let state = self.state.load(Ordering::SeqCst);
                if news(state) {
                    break Some(Some(state));
                }
                if self.roused.load(Ordering::SeqCst) != roused {
                    break None;
                }
                self.wake.wait(&mut guard);
            };
            self.sleeping.fetch_sub(1, Ordering::SeqCst);
            if let Some(state) = state {
                return state;
            }
        }
    }
}

#[cfg(test)]
mod tests;

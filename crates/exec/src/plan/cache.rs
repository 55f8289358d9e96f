//! The plan cache: bounded, keyed in relative form, compared in full on a hit.

use super::guards::{Guarded, Guards};
use super::Plan;
use crate::config::{EvalOptions, OptionsKey};
use candle_lazy_graph::{Bindings, FastMap, GraphKey, Guard, NodeRef};
use candle_lazy_ops::fault;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

struct Entry {
    graph: GraphKey,
    /// The options that change plans.
    options: OptionsKey,
    plan: Arc<Plan>,
    last_used: u64,
    /// How often a guard was made for it, or could not be.
    guards: u32,
}

/// A plan gets so many guards: graphs of other shapes may have one key where equal nodes were merged.
const GUARDS: u32 = 4;

struct Cache {
    entries: FastMap<u64, Vec<Entry>>,
    guards: Guards,
    len: usize,
    capacity: usize,
    clock: u64,
    hits: u64,
    guarded: u64,
    misses: u64,
    evicted: u64,
}

static LIVE: AtomicU64 = AtomicU64::new(0);

/// Counts the plan that holds it.
#[derive(Debug)]
pub(crate) struct Alive(());

impl Default for Alive {
    fn default() -> Self {
        LIVE.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Clone for Alive {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        LIVE.fetch_sub(1, Ordering::Relaxed);
    }
}

static CACHE: Mutex<Option<Cache>> = Mutex::new(None);

/// How many plans are kept unless [`set_cache_capacity`] says otherwise.
const DEFAULT_CAPACITY: usize = 1024;

fn with_cache<R>(f: impl FnOnce(&mut Cache) -> R) -> R {
    let mut guard = CACHE.lock();
    f(guard.get_or_insert_with(|| Cache {
        entries: FastMap::default(),
        guards: Guards::default(),
        len: 0,
        capacity: DEFAULT_CAPACITY,
        clock: 0,
        hits: 0,
        guarded: 0,
        misses: 0,
        evicted: 0,
    }))
}

/// What a plan is looked up by.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    hash: u64,
    words: &'a [u64],
    options: &'a OptionsKey,
}

impl Cache {
    fn entry(&mut self, hash: u64, plan: &Arc<Plan>) -> Option<&mut Entry> {
        self.entries.get_mut(&hash)?.iter_mut().find(|entry| Arc::ptr_eq(&entry.plan, plan))
    }

    fn find(&mut self, wanted: Wanted<'_>) -> Option<Arc<Plan>> {
        self.clock += 1;
        let clock = self.clock;
        if fault::active("cache.any_graph") {
            let mut all = self.entries.values().flatten();
            let alike = |e: &&Entry| e.graph.words().len() == wanted.words.len() && e.options == *wanted.options;
            return all.find(alike).map(|e| e.plan.clone());
        }
        let same = |e: &&mut Entry| e.graph.words() == wanted.words && e.options == *wanted.options;
        let entry = self.entries.get_mut(&wanted.hash)?.iter_mut().find(same)?;
        entry.last_used = clock;
        Some(entry.plan.clone())
    }

    fn insert(&mut self, graph: GraphKey, options: OptionsKey, plan: Arc<Plan>) {
        if self.capacity == 0 {
            return;
        }
        while self.len >= self.capacity {
            // the scan is linear, but it only runs when a new plan was made, which costs far more
            let oldest =
                self.entries.iter().flat_map(|(hash, list)| list.iter().map(move |e| (e.last_used, *hash))).min();
            let Some((last_used, hash)) = oldest else {
                break;
            };
            if let Some(list) = self.entries.get_mut(&hash) {
                let before = list.len();
                let guards = &mut self.guards;
                list.retain(|e| {
                    let stays = e.last_used != last_used;
                    if !stays && e.guards > 0 {
                        guards.forget(&e.plan);
                    }
                    stays
                });
                self.len -= before - list.len();
                self.evicted += (before - list.len()) as u64;
                if list.is_empty() {
                    self.entries.remove(&hash);
                }
            }
        }
        let last_used = self.clock;
        self.entries.entry(graph.hash()).or_default().push(Entry { graph, options, plan, last_used, guards: 0 });
        self.len += 1;
    }
}

/// The cached plan of the graph whose key these words are. It counts as a hit by [`hit`].
pub(crate) fn find(hash: u64, words: &[u64], options: &EvalOptions) -> Option<Arc<Plan>> {
    let wanted = Wanted { hash, words, options: &options.key() };
    with_cache(|c| c.find(wanted))
}

/// An evaluation takes a plan that was found.
pub(crate) fn hit() {
    with_cache(|c| c.hits += 1);
}

/// Keeps a plan that was made because there was none. Where another thread was first, its plan.
pub(crate) fn keep(key: GraphKey, options: &EvalOptions, plan: Arc<Plan>) -> Arc<Plan> {
    let options = options.key();
    with_cache(|c| {
        c.misses += 1;
        if let Some(first) = c.find(Wanted { hash: key.hash(), words: key.words(), options: &options }) {
            return first;
        }
        c.insert(key, options, plan.clone());
        plan
    })
}

/// What a guard knows.
pub(crate) struct Known {
    pub(crate) bindings: Bindings,
    pub(crate) guard: Arc<Guarded>,
}

/// The plan of the graph of `roots` and what to bind to it, if a guard knows the graph.
pub(crate) fn known(roots: &[NodeRef], options: &EvalOptions) -> Option<Known> {
    let options = options.key();
    let candidates = with_cache(|c| c.guards.candidates(roots, &options));
    candidates.into_iter().find_map(|guard| Some(Known { bindings: guard.bind(roots)?, guard }))
}

/// An evaluation takes the plan of a guard.
pub(crate) fn guarded_hit(guard: &Arc<Guarded>) {
    with_cache(|c| {
        c.clock += 1;
        c.hits += 1;
        c.guarded += 1;
        c.guards.used(guard);
        let clock = c.clock;
        c.entry(guard.hash(), guard.plan()).into_iter().for_each(|entry| entry.last_used = clock);
    });
}

/// Whether the plan of a guard is kept under this key.
pub(crate) fn is_of(guard: &Guarded, key: &GraphKey) -> bool {
    with_cache(|c| c.entry(guard.hash(), guard.plan()).is_some_and(|entry| entry.graph == *key))
}

/// Whether a guard is to be made for the plan, which was found by its key. The asking counts: a plan gets only so many.
pub(crate) fn wants_guard(hash: u64, plan: &Arc<Plan>) -> bool {
    with_cache(|c| {
        let entry = c.entry(hash, plan).filter(|entry| entry.guards < GUARDS);
        entry.map(|entry| entry.guards += 1).is_some()
    })
}

/// No guard knows graphs like the plan's.
pub(crate) fn no_guard(hash: u64, plan: &Arc<Plan>) {
    with_cache(|c| c.entry(hash, plan).into_iter().for_each(|entry| entry.guards = GUARDS));
}

/// Keeps a guard of a plan, if the plan is kept and its graph has this key. What the guard binds for `roots`.
pub(crate) fn keep_guard(
    roots: &[NodeRef],
    options: &EvalOptions,
    plan: &Arc<Plan>,
    guard: Guard,
    key: &GraphKey,
) -> Option<Bindings> {
    let guard = Arc::new(Guarded::new(guard, plan.clone(), options.key(), key.hash(), roots));
    // others may have changed the graph since its key was made
    let kept = with_cache(|c| {
        let same = c.entry(key.hash(), plan).is_some_and(|entry| entry.graph == *key);
        if same {
            // one that found no room may be made again
            for old in c.guards.insert(guard.clone()) {
                c.entry(old.hash(), old.plan()).into_iter().for_each(|entry| entry.guards = 0);
            }
        }
        same
    });
    kept.then(|| guard.bind(roots)).flatten()
}

/// What the plan cache holds and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheStats {
    /// Plans kept.
    pub plans: usize,
    /// The most that are kept.
    pub capacity: usize,
    /// Evaluations that found their plan.
    pub hits: u64,
    /// Those of them whose graph was known by a guard, so that no key was made of it.
    pub guarded: u64,
    /// Evaluations that had to make one.
    pub misses: u64,
    /// Plans dropped for room.
    pub evicted: u64,
    /// Plans in memory: those kept and those that are running.
    pub alive: u64,
}

/// What the plan cache holds and did since the process began.
#[must_use]
pub fn cache_stats() -> CacheStats {
    with_cache(|c| CacheStats {
        plans: c.len,
        capacity: c.capacity,
        hits: c.hits,
        guarded: c.guarded,
        misses: c.misses,
        evicted: c.evicted,
        alive: LIVE.load(Ordering::Relaxed),
    })
}

/// Forgets every plan.
pub fn clear_cache() {
    with_cache(|c| {
        c.entries.clear();
        c.guards.clear();
        c.len = 0;
    });
}

/// Sets how many plans are kept (1,024 by default); the least recently used go first.
pub fn set_cache_capacity(capacity: usize) {
    with_cache(|c| {
        c.capacity = capacity;
        if c.len > capacity {
            c.entries.clear();
            c.guards.clear();
            c.len = 0;
        }
    });
}

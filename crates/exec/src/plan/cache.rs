//! The plan cache: bounded, keyed in relative form, compared in full on a hit.

use super::Plan;
use crate::config::EvalOptions;
use crate::error::Result;
use candle_lazy_graph::{FastMap, Graph};
use candle_lazy_ops::fault;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// What a plan depends on: the graph in relative form, and the options that change plans.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PlanKey {
    pub(crate) graph: Graph,
    pub(crate) options: (Vec<&'static str>, bool, bool, bool),
}

impl PlanKey {
    pub(crate) fn new(graph: Graph, options: &EvalOptions) -> Self {
        Self { graph, options: options.key() }
    }
}

struct Entry {
    key: PlanKey,
    plan: Arc<Plan>,
    last_used: u64,
}

struct Cache {
    entries: FastMap<u64, Vec<Entry>>,
    len: usize,
    capacity: usize,
    clock: u64,
    hits: u64,
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
        len: 0,
        capacity: DEFAULT_CAPACITY,
        clock: 0,
        hits: 0,
        misses: 0,
        evicted: 0,
    }))
}

impl Cache {
    fn find(&mut self, hash: u64, key: &PlanKey) -> Option<Arc<Plan>> {
        self.clock += 1;
        let clock = self.clock;
        if fault::active("cache.any_graph") {
            let shape = |k: &PlanKey| (k.graph.nodes.len(), k.graph.outputs.len(), k.options.clone());
            let mut all = self.entries.values().flatten();
            return all.find(|e| shape(&e.key) == shape(key)).map(|e| e.plan.clone());
        }
        let entry = self.entries.get_mut(&hash)?.iter_mut().find(|e| e.key == *key)?;
        entry.last_used = clock;
        Some(entry.plan.clone())
    }

    fn insert(&mut self, hash: u64, key: PlanKey, plan: Arc<Plan>) {
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
                list.retain(|e| e.last_used != last_used);
                self.len -= before - list.len();
                self.evicted += (before - list.len()) as u64;
                if list.is_empty() {
                    self.entries.remove(&hash);
                }
            }
        }
        let last_used = self.clock;
        self.entries.entry(hash).or_default().push(Entry { key, plan, last_used });
        self.len += 1;
    }
}

/// The cached plan of `key`, or a new one made by `make`. Returns whether it was cached.
pub(crate) fn lookup_or_make(
    key: PlanKey,
    use_cache: bool,
    make: impl FnOnce(&Graph) -> Result<Plan>,
) -> Result<(Arc<Plan>, bool)> {
    if !use_cache {
        return Ok((Arc::new(make(&key.graph)?), false));
    }
    let hash = key.graph.key_hash();
    if let Some(plan) = with_cache(|c| c.find(hash, &key)) {
        with_cache(|c| c.hits += 1);
        return Ok((plan, true));
    }
    // outside the lock: two threads may make the same plan, and the first one stays
    let plan = Arc::new(make(&key.graph)?);
    with_cache(|c| {
        c.misses += 1;
        match c.find(hash, &key) {
            Some(first) => Ok((first, false)),
            None => {
                c.insert(hash, key, plan.clone());
                Ok((plan, false))
            }
        }
    })
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
        misses: c.misses,
        evicted: c.evicted,
        alive: LIVE.load(Ordering::Relaxed),
    })
}

/// Forgets every plan.
pub fn clear_cache() {
    with_cache(|c| {
        c.entries.clear();
        c.len = 0;
    });
}

/// Sets how many plans are kept (1,024 by default); the least recently used go first.
pub fn set_cache_capacity(capacity: usize) {
    with_cache(|c| {
        c.capacity = capacity;
        if c.len > capacity {
            c.entries.clear();
            c.len = 0;
        }
    });
}

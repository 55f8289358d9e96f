//! A small hash table from 64-bit keys to indices, which keeps its memory from capture to capture.

/// What no index is.
const FREE: u32 = u32::MAX;

/// Open addressing with linear probing. Several indices may have the same key.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<(u64, u32)>,
    len: usize,
}

impl Table {
    /// Empties the table and makes room for `expected` keys.
    pub(super) fn reset(&mut self, expected: usize) {
        let size = (2 * expected.max(8)).next_power_of_two();
        self.slots.clear();
        self.slots.resize(size, (0, FREE));
        self.len = 0;
    }

    /// The slot where a search for `key` begins: the upper bits of a product, into which all bits of the key went.
    #[inline]
    fn home(&self, key: u64) -> usize {
        let bits = self.slots.len().trailing_zeros();
        (key.wrapping_mul(crate::hash::MULTIPLIER) >> (64 - bits)) as usize
    }

    /// The first index under `key` that `is` accepts.
    #[inline]
    pub(super) fn find(&self, key: u64, mut is: impl FnMut(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let mut at = self.home(key);
        loop {
            let (k, index) = self.slots[at];
            if index == FREE {
                return None;
            }
            if k == key && is(index) {
                return Some(index);
            }
            at = (at + 1) & mask;
        }
    }

    /// Adds an index under `key`.
    #[inline]
    pub(super) fn insert(&mut self, key: u64, index: u32) {
        if 2 * (self.len + 1) > self.slots.len() {
            let size = 2 * self.slots.len();
            let old = std::mem::replace(&mut self.slots, vec![(0, FREE); size]);
            for (key, index) in old {
                if index != FREE {
                    self.put(key, index);
                }
            }
        }
        self.put(key, index);
        self.len += 1;
    }

    #[inline]
    fn put(&mut self, key: u64, index: u32) {
        let mask = self.slots.len() - 1;
        let mut at = self.home(key);
        while self.slots[at].1 != FREE {
            at = (at + 1) & mask;
        }
        self.slots[at] = (key, index);
    }

    /// How many keys there is memory for.
    pub(super) fn capacity(&self) -> usize {
        self.slots.capacity() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_finds_what_a_map_finds(keys in prop::collection::vec(0u64..40, 0..200), room in 0usize..20) {
            let mut table = Table::default();
            table.reset(3);
            table.insert(1, 7);
            table.reset(room);
            let mut map: std::collections::BTreeMap<u64, Vec<u32>> = Default::default();
            for (i, &key) in keys.iter().enumerate() {
                table.insert(key << 40 | key, i as u32);
                map.entry(key).or_default().push(i as u32);
            }
            for key in 0..40 {
                let mut found = Vec::new();
                prop_assert_eq!(table.find(key << 40 | key, |i| { found.push(i); false }), None);
                // growing may turn the order of equal keys
                found.sort_unstable();
                prop_assert_eq!(found, map.remove(&key).unwrap_or_default());
            }
        }
    }
}

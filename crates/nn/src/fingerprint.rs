//! What tells data from other data in a file that holds none of it.

/// The FNV-1a hash of words (Fowler, Noll and Vo, RFC 9923), eight bytes each, lowest first: the same on every machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fingerprint(u64);

impl Default for Fingerprint {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fingerprint {
    /// Takes a word in.
    pub(crate) fn add(&mut self, word: u64) {
        self.add_bytes(&word.to_le_bytes());
    }

    fn add_bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// The hash so far.
    pub(crate) fn value(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_published_hash() {
        // the test vectors of the RFC
        for (text, want) in
            [("", 0xcbf2_9ce4_8422_2325u64), ("a", 0xaf63_dc4c_8601_ec8c), ("foobar", 0x8594_4171_f739_67e8)]
        {
            let mut print = Fingerprint::default();
            print.add_bytes(text.as_bytes());
            assert_eq!(print.value(), want, "{text}");
        }
        let (mut one, mut other) = (Fingerprint::default(), Fingerprint::default());
        one.add(1);
        other.add(1 << 8);
        assert_ne!(one.value(), other.value());
    }
}

//! Who computes how many positions in the next step.

/// Shares of a step: for each of `behind`, how many of its positions are computed.
///
/// Who is one position behind (a running text) gets that one. The others share `budget` evenly, except that nobody gets more than there
/// is: what is left goes to those who want more. Who is left out for want of budget gets 0 and has its turn once others have caught up.
pub(super) fn shares(behind: &[usize], budget: usize) -> Vec<usize> {
    let mut shares: Vec<usize> = behind.iter().map(|&count| count.min(1)).collect();
    let mut prompts: Vec<usize> =
        (0..behind.len()).filter(|&i| behind.get(i).is_some_and(|&count| count > 1)).collect();
    // the shortest first: what it leaves of its share is the others'
    prompts.sort_by_key(|&i| behind.get(i).copied());
    let (mut left, mut sharers) = (budget, prompts.len());
    for i in prompts {
        let want = behind.get(i).copied().unwrap_or(0);
        let share = want.min(left.div_ceil(sharers.max(1)));
        if let Some(slot) = shares.get_mut(i) {
            *slot = share;
        }
        left -= share;
        sharers = sharers.saturating_sub(1);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_texts_get_their_position_and_prompts_share_the_budget() {
        assert_eq!(shares(&[1, 1, 1], 4), [1, 1, 1]);
        assert_eq!(shares(&[1, 100, 1], 32), [1, 32, 1]);
        assert_eq!(shares(&[100, 4, 100], 32), [14, 4, 14]);
        assert_eq!(shares(&[10, 10, 10], 2), [1, 1, 0]);
        assert_eq!(shares(&[], 8), [0usize; 0]);
    }

    #[test]
    fn no_budget_is_lost_while_somebody_wants_it() {
        for budget in 1..40 {
            for behind in [vec![2, 3, 50], vec![9, 9], vec![2, 2, 2, 2, 30, 1]] {
                let shares = shares(&behind, budget);
                let prompts = || behind.iter().zip(&shares).filter(|(behind, _)| **behind > 1);
                let wanted: usize = prompts().map(|(behind, _)| behind).sum();
                assert_eq!(prompts().map(|(_, share)| share).sum::<usize>(), wanted.min(budget), "{behind:?} {budget}");
                assert!(behind.iter().zip(&shares).all(|(behind, share)| share <= behind));
            }
        }
    }
}

//! Shares a step's prefill rows among the prompts that wait for them.

/// Gives each of `backlogs`, oldest first, its rows of a budget, at most its backlog.
///
/// Half of the budget goes to the oldest, so that prompts of equal length finish one after the other instead
/// of all at the end; the other half is shared equally, so that a short prompt never waits for a long one.
/// Unneeded rows go to the others.
pub(super) fn share_rows(backlogs: &[u32], budget: u32) -> Vec<u32> {
    let mut shares = vec![0; backlogs.len()];
    let mut left = budget - give(backlogs, &mut shares, budget / 2);
    loop {
        let hungry = (0..shares.len())
            .filter(|&i| shares[i] < backlogs[i])
            .count() as u32;
        if hungry == 0 || left == 0 {
            return shares;
        }
        let each = left / hungry;
        if each == 0 {
            give(backlogs, &mut shares, left);
            return shares;
        }
        for (share, &backlog) in shares.iter_mut().zip(backlogs) {
            let more = each.min(backlog - *share);
            *share += more;
            left -= more;
        }
    }
}

/// Gives up to `rows` to the first that still need some; returns how many were given.
fn give(backlogs: &[u32], shares: &mut [u32], rows: u32) -> u32 {
    let mut left = rows;
    for (share, &backlog) in shares.iter_mut().zip(backlogs) {
        let more = left.min(backlog - *share);
        *share += more;
        left -= more;
    }
    rows - left
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_oldest_gets_half_and_all_share_the_rest() {
        assert_eq!(share_rows(&[1000, 1000, 1000, 1000], 80), [50, 10, 10, 10]);
        assert_eq!(share_rows(&[1000, 5, 1000], 80), [58, 5, 17]);
        assert_eq!(share_rows(&[10, 10], 80), [10, 10]);
        assert_eq!(share_rows(&[1000], 80), [80]);
        assert_eq!(share_rows(&[], 80), [0; 0]);
        assert_eq!(share_rows(&[3, 3, 3], 1), [1, 0, 0]);
    }

    proptest! {
        #[test]
        fn no_row_is_wasted_or_invented(
            backlogs in prop::collection::vec(0u32..500, 0..20),
            budget in 0u32..1000,
        ) {
            let shares = share_rows(&backlogs, budget);
            prop_assert!(shares.iter().zip(&backlogs).all(|(share, backlog)| share <= backlog));
            let total: u32 = backlogs.iter().sum();
            prop_assert_eq!(shares.iter().sum::<u32>(), budget.min(total));
        }
    }
}

//! src/grouping.rs by itself.

#[path = "../../src/grouping.rs"]
mod source;

use source::{Gathered, highest, padded};

#[test]
fn rows_are_gathered_by_expert_and_padded_to_whole_tiles() {
    // Two experts of each of seven rows.
    let experts = [3, 0, 0, 2, 0, 3, 0, 2, 0, 3, 2, 0, 0, 2];
    let mut gathered = Gathered::default();
    gathered.gather(&experts, 4, 2, 8);
    let groups: Vec<_> = gathered
        .groups
        .iter()
        .map(|g| (g.expert, g.rows.clone()))
        .collect();
    assert_eq!(groups, [(0, 0..8), (2, 8..12), (3, 12..16)]);
    assert_eq!(
        gathered.from,
        [0, 1, 2, 3, 4, 5, 6, 6, 1, 3, 5, 6, 0, 2, 4, 4]
    );
    for (i, &place) in gathered.places.iter().enumerate() {
        assert_eq!(gathered.from[place as usize], i as u32 / 2);
    }
    assert_eq!(
        [1, 2, 3, 5, 8, 11, 13].map(|rows| padded(rows, 8)),
        [1, 2, 4, 8, 8, 12, 16]
    );
    assert_eq!([1, 3, 7].map(|rows| padded(rows, 1)), [1, 3, 7]);
}

#[test]
fn the_highest_scores_come_first_and_equal_ones_in_order() {
    let scores = [1.0, f32::NAN, 3.0, 1.0, f32::NEG_INFINITY, 3.0, 2.0];
    let (mut experts, mut best) = ([9; 5], [0.0; 5]);
    highest(&scores, &mut experts, &mut best);
    assert_eq!(
        (experts, best),
        ([2, 5, 6, 0, 3], [3.0, 3.0, 2.0, 1.0, 1.0])
    );
    let (mut experts, mut best) = ([9; 7], [0.0; 7]);
    highest(&scores, &mut experts, &mut best);
    assert_eq!(experts, [2, 5, 6, 0, 3, 1, 4]);
}

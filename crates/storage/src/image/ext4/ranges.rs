//! Sets of numbers, as sorted ranges that neither overlap nor touch.

use std::ops::Range;

/// Sorts ranges, joins those that overlap or touch, and drops empty ones.
pub(crate) fn normalize(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Returns the parts of `range` that are in `set`.
pub(crate) fn within<'s>(range: &Range<u64>, set: &'s [Range<u64>]) -> impl Iterator<Item = Range<u64>> + use<'s> {
    let Range { start, end } = *range;
    let first = set.partition_point(|part| part.end <= start);
    set.iter()
        .skip(first)
        .take_while(move |part| part.start < end)
        .map(move |part| part.start.max(start)..part.end.min(end))
}

/// Returns the parts of `range` that are not in `set`.
pub(crate) fn without(range: &Range<u64>, set: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut rest, mut from) = (Vec::new(), range.start);
    for part in within(range, set) {
        if from < part.start {
            rest.push(from..part.start);
        }
        from = part.end;
    }
    if from < range.end {
        rest.push(from..range.end);
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec((0..60u64, 0..8u64), 0..12)
            .prop_map(|parts| parts.into_iter().map(|(start, length)| start..start + length).collect())
    }

    proptest! {
        #[test]
        fn sets_contain_exactly_the_numbers_of_their_ranges(parts in ranges(), start in 0..60u64, length in 0..30u64) {
            let (set, range) = (normalize(parts.clone()), start..start + length);
            prop_assert!(set.windows(2).all(|pair| pair[0].end < pair[1].start));
            let (inside, outside): (Vec<_>, _) = (within(&range, &set).collect(), without(&range, &set));
            for number in 0..100 {
                let held = parts.iter().any(|part| part.contains(&number));
                prop_assert_eq!(set.iter().any(|part| part.contains(&number)), held);
                let asked = range.contains(&number);
                prop_assert_eq!(inside.iter().any(|part| part.contains(&number)), asked && held);
                prop_assert_eq!(outside.iter().any(|part| part.contains(&number)), asked && !held);
            }
        }
    }
}

//! Division of an attention call into tasks for the threads.

use super::KvSegment;
use super::kernel::CHUNK;

/// A range of rows of one segment and one key/value head, over a range of chunks.
#[derive(Debug, Clone, Copy)]
pub(super) struct AttentionTask {
    pub(super) segment: usize,
    pub(super) kv_head: usize,
    /// Rows within the segment.
    pub(super) row: usize,
    pub(super) rows: usize,
    /// Index of the split that receives the chunk results, for a task that does not see all chunks.
    pub(super) split: Option<usize>,
    pub(super) first_chunk: usize,
    pub(super) end_chunk: usize,
}

/// The chunk results of one segment and head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Split {
    pub(super) segment: usize,
    pub(super) kv_head: usize,
    /// Number of chunks that the row sees.
    pub(super) chunks: usize,
    /// Index of the result of the first of them and its first query.
    pub(super) first: usize,
}

/// Rows of a prompt per task.
pub(super) const TASK_ROWS: usize = 16;

/// The first position that a row at `position` sees.
#[inline(always)]
pub(super) fn seen_from(window: Option<usize>, position: usize) -> usize {
    match window {
        Some(window) => (position + 1).saturating_sub(window),
        None => 0,
    }
}

/// Parameters of the division into tasks.
pub(super) struct Cut {
    pub(super) threads: usize,
    pub(super) kv_heads: usize,
    pub(super) group: usize,
    pub(super) window: Option<usize>,
}

impl Cut {
    /// Cuts the work into tasks and splits; gives the number of chunk results to store.
    pub(super) fn plan(
        &self,
        segments: &[KvSegment],
        tasks: &mut Vec<AttentionTask>,
        splits: &mut Vec<Split>,
    ) -> usize {
        tasks.clear();
        splits.clear();
        let whole: usize = segments
            .iter()
            .map(|s| s.rows.div_ceil(TASK_ROWS) * self.kv_heads)
            .sum();
        let mut results = 0;
        for (index, segment) in segments.iter().enumerate() {
            if segment.rows == 0 {
                continue;
            }
            let end = (segment.position + segment.rows).div_ceil(CHUNK);
            let start = seen_from(self.window, segment.position) / CHUNK;
            let chunks = end - start;
            // Long single rows are cut until every thread has a few tasks.
            let cuts = (4 * self.threads).div_ceil(whole).min(chunks);
            for kv_head in 0..self.kv_heads {
                if self.threads > 1 && segment.rows == 1 && cuts > 1 {
                    splits.push(Split {
                        segment: index,
                        kv_head,
                        chunks,
                        first: results,
                    });
                    let step = chunks.div_ceil(cuts);
                    for first_chunk in (start..end).step_by(step) {
                        tasks.push(AttentionTask {
                            segment: index,
                            kv_head,
                            row: 0,
                            rows: 1,
                            split: Some(results),
                            first_chunk,
                            end_chunk: (first_chunk + step).min(end),
                        });
                    }
                    results += chunks * self.group;
                    continue;
                }
                for row in (0..segment.rows).step_by(TASK_ROWS) {
                    tasks.push(AttentionTask {
                        segment: index,
                        kv_head,
                        row,
                        rows: TASK_ROWS.min(segment.rows - row),
                        split: None,
                        first_chunk: seen_from(self.window, segment.position + row) / CHUNK,
                        end_chunk: end,
                    });
                }
            }
        }
        results
    }
}

//! Matrices whose bytes lie scattered over a model's files, in the order that everything else reads them.
//!
//! gpt-oss's folders store experts with inputs and outputs exchanged, gate and up in turns, and the scales of
//! MXFP4 weights in a tensor of their own (<https://huggingface.co/openai/gpt-oss-20b>).

use std::ops::Range;

use crate::file::{FileError, ModelFile};

/// A place in one of the model's files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Position in the list of files.
    pub(crate) file: usize,
    /// Position in the file.
    pub(crate) at: usize,
}

/// Where the bytes of a matrix lie. All of it was checked to lie within the files.
#[derive(Debug)]
pub(crate) enum Gather {
    /// Elements at regular distances.
    Elements {
        /// The first element.
        first: Place,
        /// Bytes of an element.
        size: usize,
        columns: usize,
        /// Elements from one row to the next, and from one column to the next.
        strides: [usize; 2],
    },
    /// MXFP4 blocks without their scales, and the scales.
    Mxfp4 {
        /// Codes of the first row; 16 bytes a block.
        codes: Place,
        /// Scales of the first row; a byte a block.
        scales: Place,
        /// Blocks of a row.
        blocks: usize,
        /// Stored rows from one row of the matrix to the next.
        stride: usize,
    },
}

impl Gather {
    /// Fills `out` with the matrix's bytes from byte `at` on.
    pub(crate) fn read_at(
        &self,
        files: &[ModelFile],
        at: usize,
        out: &mut [u8],
    ) -> Result<(), FileError> {
        let row = self.row_bytes();
        let rows = at / row..(at + out.len()).div_ceil(row);
        let bytes = self.rows(files, rows.clone())?;
        out.copy_from_slice(&bytes[at - rows.start * row..][..out.len()]);
        Ok(())
    }

    /// True if reading a few rows reads most of the matrix.
    pub(crate) fn crosses_rows(&self) -> bool {
        match self {
            Gather::Elements { strides, .. } => strides[1] > strides[0],
            Gather::Mxfp4 { .. } => false,
        }
    }

    /// Position of the first byte in its file.
    pub(crate) fn offset(&self) -> u64 {
        match self {
            Gather::Elements { first: place, .. } | Gather::Mxfp4 { codes: place, .. } => {
                place.at as u64
            }
        }
    }

    fn row_bytes(&self) -> usize {
        match self {
            Gather::Elements { size, columns, .. } => size * columns,
            Gather::Mxfp4 { blocks, .. } => blocks * (CODES + 1),
        }
    }

    fn rows(&self, files: &[ModelFile], rows: Range<usize>) -> Result<Vec<u8>, FileError> {
        let mut out = Vec::with_capacity(rows.len() * self.row_bytes());
        if rows.is_empty() {
            return Ok(out);
        }
        // What lies between the rows' ends, with what others have of it.
        let span = |place: Place, start: usize, len: usize| {
            let mut bytes = vec![0; len];
            let read = files[place.file].read_at((place.at + start) as u64, &mut bytes);
            read.map(|()| bytes)
        };
        let apart = rows.len() - 1;
        match *self {
            Gather::Elements {
                first,
                size,
                columns,
                strides: [row, column],
            } => {
                let last = apart * row + (columns - 1) * column;
                let bytes = span(first, rows.start * row * size, (last + 1) * size)?;
                for r in 0..rows.len() {
                    let places = (0..columns).map(|c| (r * row + c * column) * size);
                    places.for_each(|at| out.extend_from_slice(&bytes[at..at + size]));
                }
            }
            Gather::Mxfp4 {
                codes,
                scales,
                blocks,
                stride,
            } => {
                let first = rows.start * stride * blocks;
                let count = (apart * stride + 1) * blocks;
                let codes = span(codes, first * CODES, count * CODES)?;
                let scales = span(scales, first, count)?;
                for row in 0..rows.len() {
                    for block in row * stride * blocks..(row * stride + 1) * blocks {
                        out.push(scales[block]);
                        out.extend(halves_apart(&codes[block * CODES..][..CODES]));
                    }
                }
            }
        }
        Ok(out)
    }
}

/// Bytes of a block's 32 codes.
const CODES: usize = 16;

/// Codes of a block as ggml has them, code i beside code i + 16, from codes of which each is beside the next.
fn halves_apart(codes: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let code = |i: usize| codes[i / 2] >> (4 * (i % 2)) & 15;
    (0..CODES).map(move |i| code(i) | code(i + CODES) << 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_taken_at_their_distances_wherever_a_read_begins() {
        let files = [
            ModelFile::from_bytes(Vec::new()),
            ModelFile::from_bytes((0..60).collect()),
        ];
        // The odd columns of [4 inputs, 6 columns] of 2 bytes, behind 2 bytes of something else.
        let gather = Gather::Elements {
            first: Place { file: 1, at: 2 + 2 },
            size: 2,
            columns: 4,
            strides: [2, 6],
        };
        assert!(gather.crosses_rows());
        let whole: Vec<u8> = (0..3)
            .flat_map(|row| (0..4).map(move |column| 4 + 2 * (row * 2 + column * 6)))
            .flat_map(|at| [at, at + 1])
            .collect();
        for start in 0..whole.len() {
            for end in start..=whole.len() {
                let mut out = vec![0; end - start];
                gather.read_at(&files, start, &mut out).unwrap();
                assert_eq!(out, whole[start..end], "{start}..{end}");
            }
        }
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let files = [ModelFile::from_bytes(vec![0; 40])];
        let place = Place { file: 0, at: 0 };
        let gather = Gather::Mxfp4 {
            codes: place,
            scales: place,
            blocks: 1,
            stride: 2,
        };
        assert!(gather.read_at(&files, 0, &mut [0; 17]).is_ok());
        assert!(gather.read_at(&files, 0, &mut [0; 34]).is_err());
    }
}

// A sparse weight as a stream: its non-zeros in the order in which the kernels use them.
//
// The weight is cut into tiles of `tile_rows` x `tile_cols`, row block by row block. The activations of a tile stay in the first-level
// cache, its outputs in the second. Inside a tile the rows are sorted by how many non-zeros they have, so that the inner loop's trip
// count seldom changes and the branch predictor seldom misses. All index arrays are 16 bits wide and are read strictly forward.
//
// Rows that share their columns make a unit: `grain` = 4, 2 or 1 rows, found in the mask itself (blocks of 4 x anything have grain 4).
// A unit's entry is one column and `grain` values; an activation is loaded once for all of them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

struct Stream {
  int64_t rows, cols;            // of the matrix that the stream multiplies by: the weight, or its transpose
  int64_t row_step, col_step;    // from one element of that matrix to the next in the weight's memory
  int64_t tile_rows, tile_cols;  // tile_rows is a multiple of 4, tile_cols of 64
  int grain;
  bool paired;                   // every unit has an even number of entries in a tile; padding is at the tile's end: a row of zeros
  std::vector<uint16_t> units;   // tile by tile: which unit of the row block
  std::vector<uint16_t> counts;  // its number of entries
  std::vector<uint16_t> columns; // entry by entry, from the tile's first column on
  std::vector<int64_t> tiles;    // first entry of each tile, and the end
  std::vector<unsigned char> values;  // entry by entry `grain` floats, or bfloat16s if paired: the weight as rs_load_* last saw it

  int64_t row_blocks() const { return (rows + tile_rows - 1) / tile_rows; }
  int64_t col_blocks() const { return (cols + tile_cols - 1) / tile_cols; }
  int64_t entries() const { return (int64_t)columns.size(); }
  int64_t rows_of(int64_t row_block) const { return smaller(rows - row_block * tile_rows, tile_rows); }
  int64_t cols_of(int64_t col_block) const { return smaller(cols - col_block * tile_cols, tile_cols); }
  int64_t units_of(int64_t row_block) const { return rows_of(row_block) / grain; }
  // Of a tile: where its units and counts begin, and its entries.
  int64_t first_unit(int64_t row_block, int64_t col_block) const {
    return row_block * (tile_rows / grain) * col_blocks() + col_block * units_of(row_block);
  }
  int64_t first_entry(int64_t row_block, int64_t col_block) const { return tiles[(size_t)(row_block * col_blocks() + col_block)]; }
  // Of a panel of activations: its rows (see panel.h), and those of one tile.
  int64_t panel_stride() const { return tile_cols + paired; }
  int64_t panel_rows() const { return col_blocks() * panel_stride(); }
  // The tile's corner in the weight's memory.
  int64_t corner(int64_t row_block, int64_t col_block) const {
    return row_block * tile_rows * row_step + col_block * tile_cols * col_step;
  }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
};

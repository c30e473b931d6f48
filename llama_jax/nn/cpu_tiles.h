// AMX's tiles: the product of a block of bfloat16 weights with x, of up to 32 outputs by 32 rows.
//
// One instruction multiplies 16 outputs by 16 rows over 32 terms, a step. A sum is, step by step,
// the sum of the step's even terms plus that of its odd ones, added to what was there. So its bits
// depend on its row and its output alone, however many of them a tile has.

#ifndef LLAMA_JAX_NN_CPU_TILES_H_
#define LLAMA_JAX_NN_CPU_TILES_H_

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kTileSide = 16;  // outputs or rows of a tile
constexpr int64_t kTileStep = 32;  // terms of a step
constexpr int64_t kTileBlock = 2 * kTileSide;  // outputs or rows of a block, whose sums are tiles

// GCC does not know that the instructions for tiles read memory.
inline void WriteBeforeTiles() { asm volatile("" ::: "memory"); }

// The shapes of this thread's tiles: 0 to 3 are sums [outputs, rows], 4 and 5 weights
// [outputs, terms], 6 and 7 rows of x [terms / 2, rows, 2].
class TileShapes {
 public:
  TileShapes() = default;
  TileShapes(const TileShapes&) = delete;
  ~TileShapes() {
    if (outputs_) _tile_release();  // else the system saves them whenever it switches threads
  }

  // Sets them for a block of so many outputs and rows, 1 to 32, unless that is what they are.
  void Set(int64_t outputs, int64_t rows) {
    if (outputs == outputs_ && rows == rows_) return;
    outputs_ = outputs, rows_ = rows;
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    static_assert(sizeof(shapes) == 64);
    const int64_t outputs_of[] = {std::min(outputs, kTileSide), outputs - kTileSide};
    const int64_t rows_of[] = {std::min(rows, kTileSide), rows - kTileSide};
    const auto set = [&](int tile, int64_t count, int64_t bytes) {
      if (count > 0 && bytes > 0) shapes.rows[tile] = count, shapes.row_bytes[tile] = bytes;
    };
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) set(2 * i + j, outputs_of[i], 4 * rows_of[j]);
      set(4 + i, outputs_of[i], 2 * kTileStep);
      set(6 + i, kTileStep / 2, 4 * rows_of[i]);
    }
    WriteBeforeTiles();
    _tile_loadconfig(&shapes);
  }

 private:
  int64_t outputs_ = 0, rows_ = 0;
};

// Packs the terms of up to 16 rows, rounded to bfloat16, as [steps][16][rows][2], with zeros after
// the last term.
//   x: [rows, terms]
inline void PackTile(const float* x, int64_t rows, int64_t terms, uint16_t* to) {
  const __m512i places = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_set1_epi32(rows));
  for (int64_t i = 0; i < terms; i += kTileStep, to += rows * kTileStep) {
    const int64_t left = std::min(kTileStep, terms - i);
    const uint32_t some = left == kTileStep ? ~0u : (1u << left) - 1;
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = x + r * terms + i;
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(some), from);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(some >> 16), from + 16);
      const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_i32scatter_epi32(to + 2 * r, places, pairs, 4);
    }
  }
}

// Sets y[r, o] = the sum of x[r] w[o], for a block.
//   first, second: the block's rows as PackTile packs them; second: null if there are at most 16.
//   w: [outputs, terms]
//   stride: between rows of y.
//   is_first: the weights come from memory: those ahead are fetched.
template <bool kMoreOutputs, bool kMoreRows>
void TileBlock(TileShapes& shapes, const uint16_t* first, const uint16_t* second, int64_t rows,
               const uint16_t* w, int64_t outputs, int64_t terms, float* y, int64_t stride,
               bool is_first) {
  constexpr int64_t kAhead = 512;  // bytes
  alignas(64) uint16_t rest[kTileBlock * kTileStep];
  const int64_t first_rows = std::min(rows, kTileSide), second_rows = rows - first_rows;
  shapes.Set(outputs, rows);
  _tile_zero(0);
  if constexpr (kMoreRows) _tile_zero(1);
  if constexpr (kMoreOutputs) _tile_zero(2);
  if constexpr (kMoreOutputs && kMoreRows) _tile_zero(3);
  WriteBeforeTiles();
  for (int64_t i = 0; i < terms; i += kTileStep) {
    const uint16_t* at = w + i;
    int64_t apart = terms;
    if (terms - i < kTileStep) {  // the row ends within a step: nothing beyond it is read
      std::memset(rest, 0, sizeof(rest));
      for (int64_t o = 0; o < outputs; ++o) {
        std::memcpy(rest + o * kTileStep, at + o * terms, (terms - i) * sizeof(rest[0]));
      }
      at = rest, apart = kTileStep;
      WriteBeforeTiles();
    } else if (is_first) {
      // Beyond a row's end: the next block's, for the next row was read with this one.
      const int64_t next = 2 * (terms - i) > kAhead ? 0 : (outputs - 1) * terms;
      for (int64_t o = 0; o < outputs; ++o) {
        __builtin_prefetch(reinterpret_cast<const char*>(at + next + o * terms) + kAhead);
      }
    }
    _tile_loadd(4, at, apart * sizeof(*at));
    _tile_loadd(6, first, first_rows * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kMoreRows) {
      _tile_loadd(7, second, second_rows * 4);
      _tile_dpbf16ps(1, 4, 7);
      second += second_rows * kTileStep;
    }
    if constexpr (kMoreOutputs) {
      _tile_loadd(5, at + kTileSide * apart, apart * sizeof(*at));
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kMoreRows) _tile_dpbf16ps(3, 5, 7);
    }
    first += first_rows * kTileStep;
  }
  alignas(64) float sums[kTileBlock * kTileBlock];  // [outputs, rows]
  constexpr int64_t kApart = kTileBlock * sizeof(float);
  _tile_stored(0, sums, kApart);
  if constexpr (kMoreRows) _tile_stored(1, sums + kTileSide, kApart);
  if constexpr (kMoreOutputs) _tile_stored(2, sums + kTileSide * kTileBlock, kApart);
  if constexpr (kMoreOutputs && kMoreRows) {
    _tile_stored(3, sums + kTileSide * kTileBlock + kTileSide, kApart);
  }
  WriteBeforeTiles();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outputs; ++o) y[r * stride + o] = sums[o * kTileBlock + r];
  }
}

}  // namespace

#endif  // LLAMA_JAX_NN_CPU_TILES_H_

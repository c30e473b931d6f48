// The kernels that a CPU needs beside XLA: products with weights, attention over a cache, the norm
// and RoPE.
//
// XLA's own 16-bit products on a CPU first widen the whole matrix to float32, which takes ten times
// as long as reading it. Here weights, keys and values are widened in registers as they stream by.
//
// Every result is summed in one fixed order. The number of rows, a row's place among them, the
// size of the cache and the number of threads do not enter: a token has the same bits alone, in a
// batch and in a prompt.
//
// Compiled once per instruction set (see setup.py); cpu_kernels.py picks what the CPU has.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu_registers.h"
#ifdef __AMX_BF16__
#include "cpu_tiles.h"
#endif
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kDepth = 4096;      // bytes of a row of x in a partial sum: a tile stays in L1
constexpr int64_t kPanel = 128;       // outputs that a thread takes at a time
constexpr int64_t kRuns = 8;          // of memory that a thread reads at once, for few rows of x
constexpr int64_t kRunAhead = 512;    // bytes to prefetch ahead in each run
constexpr int64_t kKeysAhead = 1024;  // bytes to prefetch ahead in keys
constexpr int64_t kLine = 64;         // bytes of a line of the cache

// Whole lines of the cache: a register that is as wide is not loaded from two of them.
template <class T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <class U>
  Lines(const Lines<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(kLine)));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(kLine)); }
  bool operator==(const Lines&) const { return true; }
};
template <class T>
using Packed = std::vector<T, Lines<T>>;

inline void Prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// exp(x) for x <= 0, to within 2 units in the last place; 0 where it would be subnormal.
inline Sum Exp(Sum x) {
  const Sum n = Round(x * Spread(1.44269504f));
  Sum r = Add(x, n, Spread(-0.693359375f));  // ln 2 in two parts, the first exact times n
  r = Add(r, n, Spread(2.12194440e-4f));
  Sum p = Spread(1.98756915e-4f);  // the minimax polynomial of Cephes' expf
  for (float c : {1.39819995e-3f, 8.33345190e-3f, 4.16657955e-2f, 1.66666654e-1f, 0.5f, 1.f, 1.f}) {
    p = Add(Spread(c), p, r);
  }
  return ZeroBelow(p * PowerOfTwo(n), x, Spread(-87.f));
}

uint16_t RoundToBfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;  // NaN stays NaN
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;                 // to nearest, ties to even
}

// ---- Types of weights: how they are stored, what x becomes, and how a step is added.

struct Float32 {
  using Weight = float;
  using Input = float;
  static constexpr int64_t kStep = kLanes;
  static Input Convert(float x) { return x; }
  static Sum LoadWeight(const Weight* w) { return Load(w); }
  static Sum LoadInput(const Input* x) { return Load(x); }
  static Sum Widen(const Weight* w) { return Load(w); }
};

struct Float16 : Float32 {  // x stays float32: rounding it would gain nothing
  using Weight = uint16_t;
  static Sum LoadWeight(const Weight* w) { return LoadHalf(w); }
  static Sum Widen(const Weight* w) { return LoadHalf(w); }
};

struct Int8 : Float32 {  // x stays float32, whatever the run's dtype
  using Weight = int8_t;
  static Sum LoadWeight(const Weight* w) { return LoadInt8(w); }
};

#ifdef __AVX512BF16__

struct Bfloat16 {
  using Weight = uint16_t;
  using Input = uint16_t;
  static constexpr int64_t kStep = 32;
  static Input Convert(float x) { return RoundToBfloat(x); }
  static __m512bh LoadWeight(const Weight* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static __m512bh LoadInput(const Input* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static Sum Widen(const Weight* w) { return LoadBfloat(w); }
};
inline Sum Add(Sum a, __m512bh x, __m512bh w) { return _mm512_dpbf16_ps(a, x, w); }

#else

struct Bfloat16 {
  using Weight = uint16_t;
  using Input = float;
  static constexpr int64_t kStep = kLanes;
  static Input Convert(float x) {
    uint32_t bits = uint32_t{RoundToBfloat(x)} << 16;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static Sum LoadWeight(const Weight* w) { return LoadBfloat(w); }
  static Sum LoadInput(const Input* x) { return Load(x); }
  static Sum Widen(const Weight* w) { return LoadBfloat(w); }
};

#endif

// ---- Tiles of a product. Inputs are packed [steps][rows][kStep], with zeros after the last term.

template <class Type>
constexpr int64_t Steps(int64_t terms) {
  return (terms + Type::kStep - 1) / Type::kStep;
}

// Packs one step's terms of one row, scaled.
template <class Type>
void PackStep(const float* from, int64_t terms, float scale, typename Type::Input* to) {
  for (int64_t i = 0; i < Type::kStep; ++i) to[i] = Type::Convert(i < terms ? from[i] * scale : 0);
}

// Which weights a tile prefetches: none, where they are in the cache or the hardware does as well by
// itself; those ahead in memory; or the next outputs'.
enum class Fetch { kNothing, kAhead, kNext };

// Sets y[r, o], or adds to it, the sum of `steps` steps of in[r] w[o], for each `apart`-th o.
//   w: from the first step on; rows have `terms` terms, and `terms_left` from w on.
//   outputs: how many exist; at most kOutputs are computed.
template <class Type, int kTileRows, int kOutputs, Fetch kFetch>
void Tile(const typename Type::Input* in, const typename Type::Weight* w, int64_t terms,
          int64_t terms_left, int64_t steps, int64_t outputs, int64_t apart, float* y,
          int64_t stride, bool add) {
  constexpr int64_t kStep = Type::kStep;
  Sum sums[kTileRows][kOutputs];
  const typename Type::Weight* at[kOutputs];
  LLAMA_JAX_UNROLL(8)
  for (int o = 0; o < kOutputs; ++o) {  // outputs that do not exist repeat the last
    at[o] = w + std::min(o * apart, outputs - 1) * terms;
    LLAMA_JAX_UNROLL(6)
    for (int r = 0; r < kTileRows; ++r) sums[r][o] = Zero();
  }
  const int64_t whole = std::min(steps, terms_left / kStep);
  for (int64_t s = 0; s < whole; ++s, in += kTileRows * kStep) {
    decltype(Type::LoadWeight(nullptr)) weights[kOutputs];
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
      weights[o] = Type::LoadWeight(at[o]);
      constexpr int64_t kAhead = kRunAhead / sizeof(typename Type::Weight);
      if (kFetch == Fetch::kAhead) __builtin_prefetch(at[o] + kAhead);
      if (kFetch == Fetch::kNext) __builtin_prefetch(at[o] + kOutputs * terms);
      at[o] += kStep;
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const auto inputs = Type::LoadInput(in + r * kStep);
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) sums[r][o] = Add(sums[r][o], inputs, weights[o]);
    }
  }
  if (whole < steps) {  // the row ends within a step: nothing beyond it is read
    LLAMA_JAX_UNROLL(8)
    for (int o = 0; o < kOutputs; ++o) {
      typename Type::Weight rest[kStep] = {};
      std::memcpy(rest, at[o], terms_left % kStep * sizeof(rest[0]));
      LLAMA_JAX_UNROLL(6)
      for (int r = 0; r < kTileRows; ++r) {
        sums[r][o] = Add(sums[r][o], Type::LoadInput(in + r * kStep), Type::LoadWeight(rest));
      }
    }
  }
  LLAMA_JAX_UNROLL(6)
  for (int r = 0; r < kTileRows; ++r) {
    LLAMA_JAX_UNROLL(2)
    for (int o = 0; o < kOutputs; o += 4) {
      float* to = y + r * stride + o * apart;
      Four four = SumLanes(sums[r][o], sums[r][o + 1], sums[r][o + 2], sums[r][o + 3]);
      if (apart == 1 && outputs - o >= 4) {
        if (add) four = LoadFour(to) + four;
        Store(to, four);
      } else {
        float some[4];
        Store(some, four);
        for (int i = 0; i < 4 && (o + i) * apart < outputs; ++i, to += apart) {
          *to = add ? *to + some[i] : some[i];
        }
      }
    }
  }
}

constexpr int Width(int64_t tile_rows) { return tile_rows <= kWideRows ? 8 : 4; }

// Calls f with `rows`, 1 to kRows, as a compile-time constant.
template <int kTileRows = 1, class F>
void WithRows(int64_t rows, F f) {
  if constexpr (kTileRows < kRows) {
    if (rows > kTileRows) return WithRows<kTileRows + 1>(rows, f);
  }
  f(std::integral_constant<int, kTileRows>());
}

// Runs f(0) .. f(n - 1) on XLA's threads and this one, which would do it all if they were busy.
void Parallel(ffi::ThreadPool& pool, int64_t n, std::function<void(int64_t)> f) {
  struct Job {
    Job(std::function<void(int64_t)> f, int64_t n) : f(std::move(f)), n(n) {}  // for Clang < 16
    std::function<void(int64_t)> f;
    int64_t n;
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
    void Run() {
      for (int64_t i; (i = next++) < n;) {
        try {
          f(i);
        } catch (...) {  // no memory: nothing may cross a thread or XLA's C interface
          failed = true;
        }
        if (++done == n) done.notify_all();
      }
    }
  };
  auto job = std::make_shared<Job>(std::move(f), n);  // a late helper outlives this call
  const int64_t helpers = std::min(pool.num_threads(), n) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([job] { job->Run(); });
  job->Run();
  for (int64_t done; (done = job->done) < n;) job->done.wait(done);
  if (job->failed) throw std::bad_alloc();
}

// Runs f(0) .. f(rows - 1), of which each takes little.
template <class F>
void ParallelRows(ffi::ThreadPool& pool, int64_t rows, F f) {
  constexpr int64_t kBlock = 8;  // rows that a thread takes at a time
  Parallel(pool, (rows + kBlock - 1) / kBlock, [&](int64_t block) {
    for (int64_t r = block * kBlock; r < std::min(rows, (block + 1) * kBlock); ++r) f(r);
  });
}

// ---- y = x W^T, for one x and several W.

template <class Type>
struct Output {
  const typename Type::Weight* weights;  // [count, inputs]
  float* y;  // [rows, count]
  int64_t count;
  const float* scales;  // [count]; null: the weights are not quantized
};

// Runs f(output, begin) for each panel of outputs.
template <class Type, class F>
void EachPanel(ffi::ThreadPool& pool, const std::vector<Output<Type>>& outputs, F f) {
  std::vector<std::pair<const Output<Type>*, int64_t>> panels;
  for (const Output<Type>& output : outputs) {
    for (int64_t o = 0; o < output.count; o += kPanel) panels.emplace_back(&output, o);
  }
  Parallel(pool, panels.size(), [&](int64_t i) { f(*panels[i].first, panels[i].second); });
}

template <class Type>
struct Product {
  using Input = typename Type::Input;

  const float* x;  // [rows, inputs]
  int64_t rows, inputs;
  std::vector<Output<Type>> outputs;
  Packed<Input> packed;  // tile by tile

  void Run(ffi::ThreadPool& pool) {
    packed.resize(rows * Steps<Type>(inputs) * Type::kStep);
    Parallel(pool, Tiles(), [&](int64_t tile) { Pack(tile); });
    EachPanel(pool, outputs, [&](const Output<Type>& output, int64_t o) { Panel(output, o); });
  }

  // Few rows wait for the weights; with more, or once int8 fills a tile, arithmetic takes longer.
  bool IsFew() const { return rows <= (sizeof(typename Type::Weight) > 1 ? 8 : kRows); }
  int64_t Tiles() const { return (rows + kRows - 1) / kRows; }
  int64_t TileRows(int64_t tile) const { return std::min(kRows, rows - tile * kRows); }
  Input* PackedTile(int64_t tile) {
    return packed.data() + tile * kRows * Steps<Type>(inputs) * Type::kStep;
  }

  void Pack(int64_t tile) {
    Input* to = PackedTile(tile);
    for (int64_t i = 0; i < inputs; i += Type::kStep) {
      for (int64_t r = 0; r < TileRows(tile); ++r, to += Type::kStep) {
        PackStep<Type>(x + (tile * kRows + r) * inputs + i, inputs - i, 1, to);
      }
    }
  }

  // Computes y[:, begin .. begin + kPanel), as far as they exist.
  void Panel(const Output<Type>& output, int64_t begin) {
    const int64_t end = std::min(output.count, begin + kPanel);
    if (IsFew()) {
      // The first weights of every run, then the second: so each run is read from end to end.
      const int64_t run = (end - begin + kRuns - 1) / kRuns;
      for (int64_t o = begin; o < begin + run; ++o) Part<true>(output, o, end, run);
    } else {
      Part<false>(output, begin, end, 1);
    }
    if (output.scales) Scale(output, begin, end);
  }

  // Computes y[:, o] for each `apart`-th o from `begin` on.
  template <bool kFew>
  void Part(const Output<Type>& output, int64_t begin, int64_t end, int64_t apart) {
    constexpr int64_t kSteps = kDepth / (Type::kStep * sizeof(Input));
    constexpr bool kWidens = sizeof(typename Type::Weight) < sizeof(Input);
    for (int64_t step = 0; step < Steps<Type>(inputs); step += kSteps) {
      const int64_t steps = std::min(kSteps, Steps<Type>(inputs) - step);
      for (int64_t tile = 0; tile < Tiles(); ++tile) {
        WithRows(TileRows(tile), [&](auto tile_rows) {
          // Those after the first find the weights in the L2 cache, which 6 rows do not wait for.
          constexpr Fetch kMany =
              kWidens && tile_rows > kWideRows ? Fetch::kNext : Fetch::kNothing;
          constexpr Fetch kFirst = kFew ? Fetch::kAhead : kMany;
          constexpr Fetch kLater = kFew || tile_rows >= 6 ? Fetch::kNothing : kMany;
          if (kFirst != kLater && tile == 0) {
            Strip<tile_rows, kFirst>(output, tile, begin, end, apart, step, steps);
          } else {
            Strip<tile_rows, kLater>(output, tile, begin, end, apart, step, steps);
          }
        });
      }
    }
  }

  // Multiplies y[:, begin .. end), when they are whole.
  void Scale(const Output<Type>& output, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; ++r) {
      float* y = output.y + r * output.count;
      for (int64_t o = begin; o < end; ++o) y[o] *= output.scales[o];
    }
  }

  template <int kTileRows, Fetch kFetch>
  void Strip(const Output<Type>& output, int64_t tile, int64_t begin, int64_t end, int64_t apart,
             int64_t step, int64_t steps) {
    const int64_t done = step * Type::kStep;  // terms
    const Input* in = PackedTile(tile) + done * kTileRows;
    for (int64_t o = begin; o < end; o += Width(kTileRows) * apart) {
      Tile<Type, kTileRows, Width(kTileRows), kFetch>(
          in, output.weights + o * inputs + done, inputs, inputs - done, steps, end - o, apart,
          output.y + tile * kRows * output.count + o, output.count, step > 0);
    }
  }
};

#ifdef __AMX_BF16__

// The same by tiles: every row and output of a block is a sum of its own in them.
template <>
struct Product<Bfloat16> {
  const float* x;  // [rows, inputs]
  int64_t rows, inputs;
  std::vector<Output<Bfloat16>> outputs;
  Packed<uint16_t> packed;  // tile by tile

  void Run(ffi::ThreadPool& pool) {
    packed.resize(rows * Steps<Bfloat16>(inputs) * kTileStep);
    Parallel(pool, (rows + kTileSide - 1) / kTileSide, [&](int64_t tile) {
      const int64_t first = tile * kTileSide;
      PackTile(x + first * inputs, std::min(kTileSide, rows - first), inputs, PackedRow(first));
    });
    EachPanel(pool, outputs, [&](const Output<Bfloat16>& output, int64_t o) { Panel(output, o); });
  }

  // Returns where a tile begins, by its first row.
  uint16_t* PackedRow(int64_t row) {
    return packed.data() + row * Steps<Bfloat16>(inputs) * kTileStep;
  }

  // Computes y[:, begin .. begin + kPanel), as far as they exist.
  void Panel(const Output<Bfloat16>& output, int64_t begin) {
    static constexpr decltype(&TileBlock<true, true>) kBlocks[2][2] = {
        {TileBlock<false, false>, TileBlock<false, true>},
        {TileBlock<true, false>, TileBlock<true, true>}};
    TileShapes shapes;
    const int64_t end = std::min(output.count, begin + kPanel);
    for (int64_t o = begin; o < end; o += kTileBlock) {
      const int64_t width = std::min(kTileBlock, end - o);
      for (int64_t r = 0; r < rows; r += kTileBlock) {
        const int64_t height = std::min(kTileBlock, rows - r);
        const bool more = height > kTileSide;
        kBlocks[width > kTileSide][more](
            shapes, PackedRow(r), more ? PackedRow(r + kTileSide) : nullptr, height,
            output.weights + o * inputs, width, inputs, output.y + r * output.count + o,
            output.count, r == 0);
      }
    }
  }
};

#endif

// ---- Attention over a cache.

template <class Type>
struct Attention {
  using Element = typename Type::Weight;
  using Input = typename Type::Input;

  const float* q;  // [batch, length, kv_heads * group, head_dim]
  const Element *k, *v;  // [slots, kv_heads, capacity, head_dim]
  const int32_t* positions;  // [batch, length]
  const int32_t* cache_slots;  // [batch]
  float* out;  // as q
  int64_t batch, length, slots, kv_heads, group, head_dim, capacity;

  // A head's queries are length * group rows, cut into tiles.
  int64_t HeadRows() const { return length * group; }
  int64_t HeadTiles() const { return (HeadRows() + kRows - 1) / kRows; }
  int64_t Tiles() const { return batch * kv_heads * HeadTiles(); }

  void Run(int64_t index) {
    const int64_t first = index % HeadTiles() * kRows;
    const int64_t head = index / HeadTiles() % kv_heads, b = index / HeadTiles() / kv_heads;
    WithRows(std::min(kRows, HeadRows() - first),
             [&](auto tile_rows) { Attend<tile_rows>(b, head, first); });
  }

  template <int kTileRows>
  void Attend(int64_t b, int64_t head, int64_t first) {
    const float* queries[kTileRows];
    float* outs[kTileRows];
    int64_t seen[kTileRows], most = 0;  // positions that a query attends to
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t t = b * length + (first + r) / group;
      const int64_t at = ((t * kv_heads + head) * group + (first + r) % group) * head_dim;
      queries[r] = q + at;
      outs[r] = out + at;
      // Clamped, as XLA does: what is out of range must not be read.
      seen[r] = std::clamp<int64_t>(int64_t{positions[t]} + 1, 1, capacity);
      most = std::max(most, seen[r]);
    }
    const int64_t slot = std::clamp<int64_t>(cache_slots[b], 0, slots - 1);
    const int64_t slice = (slot * kv_heads + head) * capacity * head_dim;
    const int64_t stride = (most + kLanes - 1) / kLanes * kLanes;
    std::vector<float> weights(kTileRows * stride);
    Scores<kTileRows>(queries, k + slice, v + slice, most, weights.data(), stride);
    float totals[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      totals[r] = Softmax(weights.data() + r * stride, seen[r], stride);
    }
    int64_t h = 0;
    for (; h + 4 * kLanes <= head_dim; h += 4 * kLanes) {
      Values<kTileRows, 4>(weights.data(), stride, v + slice + h, seen, kLanes, totals, outs, h);
    }
    for (; h < head_dim; h += kLanes) {
      const int64_t lanes = std::min(kLanes, head_dim - h);
      Values<kTileRows, 1>(weights.data(), stride, v + slice + h, seen, lanes, totals, outs, h);
    }
  }

  // scores[r, s] = q[r] k[s] / sqrt(head_dim) for the first `count` slots. The values, which are
  // read next, are prefetched meanwhile.
  template <int kTileRows>
  void Scores(const float* const* queries, const Element* keys, const Element* values,
              int64_t count, float* scores, int64_t stride) {
    constexpr int64_t kStep = Type::kStep;
    const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
    Packed<Input> packed(kTileRows * Steps<Type>(head_dim) * kStep);
    Input* to = packed.data();
    for (int64_t i = 0; i < head_dim; i += kStep) {
      for (int r = 0; r < kTileRows; ++r, to += kStep) {
        PackStep<Type>(queries[r] + i, head_dim - i, scale, to);
      }
    }
    const int64_t bytes = Width(kTileRows) * head_dim * sizeof(Element);  // that a tile reads
    for (int64_t s = 0; s < count; s += Width(kTileRows)) {
      Prefetch(keys + s * head_dim + kKeysAhead / sizeof(Element), bytes);
      Prefetch(values + s * head_dim, bytes);
      Tile<Type, kTileRows, Width(kTileRows), Fetch::kNothing>(
          packed.data(), keys + s * head_dim, head_dim, head_dim, Steps<Type>(head_dim), count - s,
          1, scores + s, stride, false);
    }
  }

  // Replaces the first `count` scores by exp(score - highest), the rest by 0; returns the sum.
  float Softmax(float* scores, int64_t count, int64_t stride) {
    std::fill(scores + count, scores + stride, -INFINITY);
    float lanes[kLanes];
    Sum highest = Spread(-INFINITY), total = Zero();
    for (int64_t s = 0; s < stride; s += kLanes) highest = Max(highest, Load(scores + s));
    Store(lanes, highest);
    highest = Spread(*std::max_element(lanes, lanes + kLanes));
    for (int64_t s = 0; s < stride; s += kLanes) {
      const Sum weight = Exp(Load(scores + s) - highest);
      Store(scores + s, weight);
      total = total + weight;
    }
    return SumLanes(total, total, total, total)[0];
  }

  // outs[r][h ..] = the mean of values[s], kChunks registers of them, weighted by weights[r, s].
  template <int kTileRows, int kChunks>
  void Values(const float* weights, int64_t stride, const Element* values, const int64_t* seen,
              int64_t lanes, const float* totals, float* const* outs, int64_t h) {
    const int64_t least = *std::min_element(seen, seen + kTileRows);
    const int64_t most = *std::max_element(seen, seen + kTileRows);
    Sum sums[kTileRows][kChunks];
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kChunks; ++c) sums[r][c] = Zero();
    }
    for (int64_t s = 0; s < most; ++s, values += head_dim) {
      Sum value[kChunks];
      Element part[kLanes] = {};
      if (kChunks == 1) std::memcpy(part, values, lanes * sizeof(Element));
#pragma GCC unroll 4
      for (int c = 0; c < kChunks; ++c) {
        value[c] = Type::Widen(kChunks == 1 ? part : values + c * kLanes);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        if (s >= least && s >= seen[r]) continue;  // 0 times infinity would not be 0
        const Sum weight = Spread(weights[r * stride + s]);
#pragma GCC unroll 4
        for (int c = 0; c < kChunks; ++c) sums[r][c] = Add(sums[r][c], weight, value[c]);
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kChunks; ++c) {
        float mean[kLanes];
        Store(mean, sums[r][c] / Spread(totals[r]));
        std::memcpy(outs[r] + h + c * kLanes, mean, lanes * sizeof(float));
      }
    }
  }
};

// ---- The norm: y = x weight / sqrt(mean(x x) + eps), for one row.

template <class Type>
void NormalizeRow(const float* x, const typename Type::Weight* weight, int64_t width, float eps,
                  float* y) {
  const int64_t whole = width / kLanes * kLanes, left = width - whole;
  float rest[kLanes] = {};
  std::memcpy(rest, x + whole, left * sizeof(float));
  Sum squares = Load(rest) * Load(rest);
  for (int64_t i = 0; i < whole; i += kLanes) squares = Add(squares, Load(x + i), Load(x + i));
  const float total = SumLanes(squares, squares, squares, squares)[0];
  const Sum scale = Spread(1 / std::sqrt(total / width + eps));
  for (int64_t i = 0; i < whole; i += kLanes) {
    Store(y + i, Load(x + i) * scale * Type::Widen(weight + i));
  }
  typename Type::Weight last[kLanes] = {};
  std::memcpy(last, weight + whole, left * sizeof(last[0]));
  Store(rest, Load(rest) * scale * Type::Widen(last));
  std::memcpy(y + whole, rest, left * sizeof(float));
}

// ---- RoPE, for one position: each pair (x[i], x[i + half]) of a head is turned by angle i.

void RotateRow(const float* x, const float* cos, const float* sin, int64_t heads, int64_t half,
               float* y) {
  for (int64_t h = 0; h < heads; ++h, x += 2 * half, y += 2 * half) {
    for (int64_t i = 0; i < half; ++i) {
      y[i] = std::fma(x[i], cos[i], -(x[half + i] * sin[i]));
      y[half + i] = std::fma(x[half + i], cos[i], x[i] * sin[i]);
    }
  }
}

// ---- The interface to XLA.

template <class Type>
ffi::Error Multiply(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& x,
                    const std::vector<ffi::AnyBuffer>& weights, ffi::RemainingRets& y) {
  Product<Type> product{x.typed_data(), x.dimensions()[0], x.dimensions()[1], {}, {}};
  for (size_t i = 0; i < y.size(); ++i) {
    auto out = y.get<ffi::Buffer<ffi::F32>>(i);
    const auto shape = weights[i].dimensions();
    if (!out.has_value() || shape.size() != 2 || shape[1] != product.inputs ||
        weights[i].element_type() != weights[0].element_type() ||
        (*out)->element_count() != static_cast<size_t>(product.rows * shape[0])) {
      return ffi::Error::InvalidArgument("expected x [T, K], w [O, K] of one dtype, y [T, O]");
    }
    const float* scales = nullptr;
    if (std::is_same_v<Type, Int8>) {
      const auto& own = weights[y.size() + i];
      if (own.element_type() != ffi::F32 || own.element_count() != static_cast<size_t>(shape[0])) {
        return ffi::Error::InvalidArgument("expected float32 scales [O] of int8 weights [O, K]");
      }
      scales = static_cast<const float*>(own.untyped_data());
    }
    product.outputs.push_back({static_cast<typename Type::Weight*>(weights[i].untyped_data()),
                               (*out)->typed_data(), shape[0], scales});
  }
  product.Run(pool);
  return ffi::Error::Success();
}

// x: float32 [T, K]; each w: [O, K], of one dtype, and after all those of int8 the scales of each,
// float32 [O]; each y: float32 [T, O].
ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs w,
                  ffi::RemainingRets y) {
  std::vector<ffi::AnyBuffer> weights;
  for (size_t i = 0; i < w.size(); ++i) {
    const auto weight = w.get<ffi::AnyBuffer>(i);
    if (weight.has_value()) weights.push_back(*weight);
  }
  const size_t of_each = !weights.empty() && weights[0].element_type() == ffi::S8 ? 2 : 1;
  if (x.dimensions().size() != 2 || x.dimensions()[1] == 0 || weights.empty() ||
      weights.size() != of_each * y.size()) {
    return ffi::Error::InvalidArgument("expected x [T, K], and as many results as weights");
  }
  try {
    switch (weights[0].element_type()) {
      case ffi::F32: return Multiply<Float32>(pool, x, weights, y);
      case ffi::F16: return Multiply<Float16>(pool, x, weights, y);
      case ffi::BF16: return Multiply<Bfloat16>(pool, x, weights, y);
      case ffi::S8: return Multiply<Int8>(pool, x, weights, y);
      default:
        return ffi::Error::InvalidArgument("expected float32, float16, bfloat16 or int8 weights");
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error::Internal("out of memory in a product");
  }
}

template <class Type>
ffi::Error Attend(ffi::ThreadPool& pool, const float* q, const ffi::AnyBuffer& k,
                  const ffi::AnyBuffer& v, const int32_t* positions, const int32_t* cache_slots,
                  float* out, ffi::Span<const int64_t> shape) {
  const auto cache = k.dimensions();
  using Element = typename Type::Weight;
  const auto* keys = static_cast<const Element*>(k.untyped_data());
  const auto* values = static_cast<const Element*>(v.untyped_data());
  Attention<Type> attention{q, keys, values, positions, cache_slots, out,
                            shape[0], shape[1], cache[0], cache[1], shape[2] / cache[1], shape[3],
                            cache[2]};
  Parallel(pool, attention.Tiles(), [&](int64_t tile) { attention.Run(tile); });
  return ffi::Error::Success();
}

// q, out: float32 [B, T, N, H]; k, v: [slots, K, S, H]; positions: [B, T]; cache_slots: [B].
ffi::Error AttendCache(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k,
                       ffi::AnyBuffer v, ffi::Buffer<ffi::S32> positions,
                       ffi::Buffer<ffi::S32> cache_slots, ffi::ResultBuffer<ffi::F32> out) {
  const auto shape = q.dimensions(), cache = k.dimensions();
  if (shape.size() != 4 || cache.size() != 4 || k.element_count() == 0 || cache[3] != shape[3] ||
      shape[2] % cache[1] != 0 || v.dimensions() != cache || v.element_type() != k.element_type() ||
      out->dimensions() != shape ||
      positions.element_count() != static_cast<size_t>(shape[0] * shape[1]) ||
      cache_slots.element_count() != static_cast<size_t>(shape[0])) {
    return ffi::Error::InvalidArgument(
        "expected q [B, T, N, H], k and v [slots, K, S, H], positions [B, T] and cache_slots [B]");
  }
  const auto run = [&](auto type) {
    return Attend<decltype(type)>(pool, q.typed_data(), k, v, positions.typed_data(),
                                  cache_slots.typed_data(), out->typed_data(), shape);
  };
  try {
    switch (k.element_type()) {
      case ffi::F32: return run(Float32());
      case ffi::F16: return run(Float16());
      case ffi::BF16:
      case ffi::U16: return run(Bfloat16());  // its bits
      default: return ffi::Error::InvalidArgument("expected a float32, float16 or bfloat16 cache");
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error::Internal("out of memory in attention");
  }
}

// x, y: float32 [..., D]; weight: [D].
ffi::Error Normalize(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer weight,
                     float eps, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t width = weight.element_count(), size = x.element_count();
  if (x.dimensions().size() == 0 || width == 0 || x.dimensions().back() != width ||
      y->dimensions() != x.dimensions()) {
    return ffi::Error::InvalidArgument("expected x and y [..., D], weight [D]");
  }
  const auto run = [&](auto type) {
    using Weight = typename decltype(type)::Weight;
    ParallelRows(pool, size / width, [&](int64_t r) {
      NormalizeRow<decltype(type)>(x.typed_data() + r * width,
                                   static_cast<const Weight*>(weight.untyped_data()), width, eps,
                                   y->typed_data() + r * width);
    });
    return ffi::Error::Success();
  };
  switch (weight.element_type()) {
    case ffi::F32: return run(Float32());
    case ffi::F16: return run(Float16());
    case ffi::BF16: return run(Bfloat16());
    default: return ffi::Error::InvalidArgument("expected float32, float16 or bfloat16 weights");
  }
}

// cos, sin: float32 [B, T, H / 2]; each x, y: [B, T, heads, H].
ffi::Error Rotate(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                  ffi::RemainingArgs x, ffi::RemainingRets y) {
  const auto angles = cos.dimensions();
  if (angles.size() != 3 || sin.dimensions() != angles || x.size() != y.size()) {
    return ffi::Error::InvalidArgument("expected cos and sin [B, T, H / 2], as many x as y");
  }
  const int64_t rows = angles[0] * angles[1], half = angles[2];
  for (size_t n = 0; n < x.size(); ++n) {
    const auto from = x.get<ffi::Buffer<ffi::F32>>(n);
    auto to = y.get<ffi::Buffer<ffi::F32>>(n);
    if (!from.has_value() || !to.has_value() || from->dimensions().size() != 4 ||
        from->dimensions()[0] != angles[0] || from->dimensions()[1] != angles[1] ||
        from->dimensions()[3] != 2 * half || (*to)->dimensions() != from->dimensions()) {
      return ffi::Error::InvalidArgument("expected float32 x and y [B, T, heads, H]");
    }
    const int64_t heads = from->dimensions()[2], width = heads * 2 * half;
    ParallelRows(pool, rows, [&](int64_t r) {
      RotateRow(from->typed_data() + r * width, cos.typed_data() + r * half,
                sin.typed_data() + r * half, heads, half, (*to)->typed_data() + r * width);
    });
  }
  return ffi::Error::Success();
}

}  // namespace

// Returns the version of this interface, for cpu_kernels.py to compare, or 0 if this CPU lacks an
// instruction.
extern "C" int LlamaJaxInterface() { return HasInstructions() ? 4 : 0; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlamaJaxLinear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlamaJaxAttention, AttendCache,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlamaJaxNorm, Normalize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlamaJaxRope, Rotate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

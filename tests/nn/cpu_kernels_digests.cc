// Prints what the CPU kernels compute of fixed inputs, as one digest a line, for each case.
// test_instruction_sets.py compiles this for two kinds of CPU, whose lines must be the same.

#include "../../llama_jax/nn/cpu_kernels.cc"

#include <cinttypes>
#include <cstdio>
#include <limits>
#include <string>

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kSubnormal = 1e-40f;
constexpr float kSpecial[] = {kInfinity, -kInfinity, kNan, kSubnormal, -kSubnormal, 0.f, -0.f,
                              3e38f, -3e38f, 1.1754944e-38f};

// ---- Inputs, of whole numbers that every CPU draws alike.

uint64_t random_state;

uint32_t Draw() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (z ^ z >> 31) >> 32;
}

float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Returns a number from -2 to 2; one of `special` is anything (none, if that is 0).
float DrawFloat(uint32_t special) {
  if (special && Draw() % special == 0) return kSpecial[Draw() % std::size(kSpecial)];
  return static_cast<int32_t>(Draw()) * 0x1p-30f;
}

// Draws a weight as it is stored: of float16 half are of any size below 2, subnormals among them.
template <class Type>
typename Type::Weight DrawWeight(uint32_t special) {
  if constexpr (std::is_same_v<Type, Float32>) return DrawFloat(special);
  if constexpr (std::is_same_v<Type, Int8>) return Draw();
  if constexpr (std::is_same_v<Type, Bfloat16>) return RoundToBfloat(DrawFloat(special));
  if (special && Draw() % special == 0) return Draw();
  const uint32_t bits = Draw();
  return (bits & 0xbfff) | (bits >> 31 ? 0x3000 : 0);
}

template <class T, class F>
std::vector<T> Fill(int64_t count, F draw) {
  std::vector<T> values(count);
  for (T& value : values) value = draw();
  return values;
}

std::vector<float> Floats(int64_t count, uint32_t special) {
  return Fill<float>(count, [&] { return DrawFloat(special); });
}

template <class Type>
std::vector<typename Type::Weight> Weights(int64_t count, uint32_t special) {
  return Fill<typename Type::Weight>(count, [&] { return DrawWeight<Type>(special); });
}

// ---- Output.

// A line for each case; every NaN counts as the same one, for its sign and payload are the CPU's.
void Print(const std::string& name, const std::vector<float>& values) {
  uint64_t digest = 0xcbf29ce484222325;  // FNV-1a
  int64_t nans = 0, infinities = 0;
  for (float value : values) {
    uint32_t bits = 0x7fc00000;
    if (std::isnan(value)) {
      ++nans;
    } else {
      std::memcpy(&bits, &value, 4);
      infinities += std::isinf(value);
    }
    for (int byte = 0; byte < 4; ++byte) {
      digest = (digest ^ (bits >> 8 * byte & 0xff)) * 0x100000001b3;
    }
  }
  std::printf("%s: %016" PRIx64 ", %zu values, %" PRId64 " NaN, %" PRId64 " infinite\n",
              name.c_str(), digest, values.size(), nans, infinities);
}

// Applies f, of Sum and Sum, to all pairs of two lists.
template <class F>
std::vector<float> Pairs(const std::vector<float>& left, const std::vector<float>& right, F f) {
  std::vector<float> results;
  for (float a : left) {
    for (size_t i = 0; i + kLanes <= right.size(); i += kLanes) {
      float lanes[kLanes];
      Store(lanes, f(Spread(a), Load(right.data() + i)));
      results.insert(results.end(), lanes, lanes + kLanes);
    }
  }
  return results;
}

// ---- Cases.

template <class Type>
void PrintWiden(const char* name) {  // every value of 8 or 16 bits
  std::vector<float> all;
  constexpr int64_t kCount = int64_t{1} << 8 * sizeof(typename Type::Weight);
  for (int64_t i = 0; i < kCount; i += kLanes) {
    typename Type::Weight weights[kLanes];
    float lanes[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) weights[lane] = i + lane;
    Store(lanes, Type::LoadWeight(weights));
    all.insert(all.end(), lanes, lanes + kLanes);
  }
  Print(std::string("widened ") + name, all);
}

void PrintRegisters(const std::string& mode) {
  std::vector<float> some(std::begin(kSpecial), std::end(kSpecial));
  for (float x : {-87.f, -87.00001f, -86.99999f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 8388609.f, -1e9f,
                  1.f, -1.f, 1e30f, -2e-38f}) {
    some.push_back(x);
  }
  const std::vector<float> powers = Fill<float>(8, [] { return float(int(Draw() % 252) - 126); });
  // In a difference, as in the softmax: by itself, a subnormal is 0 already on one kind of CPU.
  Print(mode + "differences from Max",
        Pairs(some, some, [](Sum a, Sum b) { return Spread(0.5f) - Max(a, b); }));
  Print(mode + "Round", Pairs({0.f}, some, [](Sum, Sum b) { return Round(b); }));
  Print(mode + "PowerOfTwo", Pairs({0.f}, powers, [](Sum, Sum b) { return PowerOfTwo(b); }));
  Print(mode + "ZeroBelow", Pairs(some, some, [](Sum a, Sum b) { return ZeroBelow(b, b, a); }));
  Print(mode + "Add", Pairs(some, some, [](Sum a, Sum b) { return Add(a, b, b); }));
  Print(mode + "quotients", Pairs(some, some, [](Sum a, Sum b) { return a / b; }));
  std::vector<float> exponents = Fill<float>(1 << 16, [] { return Draw() * -0x1p-25f; });
  exponents.insert(exponents.end(), some.begin(), some.end());
  for (float& x : exponents) x = x > 0 ? -x : x;
  Print(mode + "Exp", Pairs({0.f}, exponents, [](Sum, Sum b) { return Exp(b); }));
  std::vector<float> rounded, any = Fill<float>(1 << 16, [] { return FromBits(Draw()); });
  for (float x : any) rounded.push_back(FromBits(uint32_t{RoundToBfloat(x)} << 16));
  Print(mode + "rounded to bfloat16", rounded);
}

template <class Type>
void PrintProduct(ffi::ThreadPool& pool, const std::string& name, bool is_special) {
  constexpr std::pair<int64_t, int64_t> kSizes[] = {{1, 1},  {5, 3},      {8, 4},
                                                    {67, 9}, {1030, 130}, {2100, 13}};
  for (auto [inputs, outputs] : kSizes) {
    const uint32_t special = is_special ? 2 * inputs + 5 : 0;  // not each sum is to be NaN
    const auto x = Floats(10 * inputs, special);
    const auto first = Weights<Type>(outputs * inputs, special);
    const auto second = Weights<Type>(7 * inputs, 0);
    const auto scales = Floats(outputs, special);
    for (int64_t rows : {1, 2, 3, 4, 10}) {
      std::vector<float> y(rows * (outputs + 7));
      Product<Type> product{x.data(), rows, inputs, {}, {}};
      const float* own = std::is_same_v<Type, Int8> ? scales.data() : nullptr;
      product.outputs.push_back({first.data(), y.data(), outputs, own});
      product.outputs.push_back({second.data(), y.data() + rows * outputs, 7, nullptr});
      product.Run(pool);
      Print(name + " product, " + std::to_string(rows) + " x " + std::to_string(inputs) + " x " +
                std::to_string(outputs),
            y);
    }
  }
}

template <class Type>
void PrintAttention(ffi::ThreadPool& pool, const std::string& name, bool is_special) {
  constexpr int64_t kBatch = 3, kLength = 5, kSlots = 4, kHeads = 2, kGroup = 3, kCapacity = 99;
  for (int64_t head_dim : {1, 5, 40, 64}) {
    const int64_t count = kBatch * kLength * kHeads * kGroup * head_dim;
    const int64_t cached = kSlots * kHeads * kCapacity * head_dim;
    const uint32_t special = is_special ? 40 : 0;
    auto q = Floats(count, 0);
    if (is_special) {
      for (float& x : q) x *= 40;  // some weights of the softmax are 0
    }
    const auto k = Weights<Type>(cached, special * 10 * head_dim);
    const auto v = Weights<Type>(cached, special);
    std::vector<int32_t> positions;
    for (int32_t start : {0, 50, 200}) {  // the last are clamped
      for (int32_t t = 0; t < kLength; ++t) positions.push_back(start + 7 * t - 1);
    }
    const int32_t slots[] = {2, -5, 9};
    std::vector<float> out(count);
    Attention<Type> attention{q.data(), k.data(), v.data(), positions.data(), slots, out.data(),
                              kBatch, kLength, kSlots, kHeads, kGroup, head_dim, kCapacity};
    Parallel(pool, attention.Tiles(), [&](int64_t tile) { attention.Run(tile); });
    Print(name + " attention, heads of " + std::to_string(head_dim), out);
  }
}

template <class Type>
void PrintNorm(const std::string& name, bool is_special) {
  for (int64_t width : {1, 7, 8, 30, 2051}) {
    std::vector<float> all;
    for (int row = 0; row < 8; ++row) {
      const auto x = Floats(width, is_special && row % 2 ? width + 5 : 0);
      const auto weight = Weights<Type>(width, is_special ? 40 : 0);
      std::vector<float> y(width);
      NormalizeRow<Type>(x.data(), weight.data(), width, 1e-5f, y.data());
      all.insert(all.end(), y.begin(), y.end());
    }
    Print(name + " norm of " + std::to_string(width), all);
  }
}

void PrintRope(const std::string& mode) {
  for (int64_t half : {1, 4, 7, 64}) {
    constexpr int64_t kHeads = 3;
    const auto x = Floats(kHeads * 2 * half, 0), cos = Floats(half, 0), sin = Floats(half, 0);
    std::vector<float> y(x.size());
    RotateRow(x.data(), cos.data(), sin.data(), kHeads, half, y.data());
    Print(mode + "RoPE of " + std::to_string(2 * half), y);
  }
}

template <class Type>
void PrintKernels(ffi::ThreadPool& pool, const std::string& name) {
  for (bool special : {false, true}) {
    const std::string all = name + (special ? ", special values," : "");
    PrintProduct<Type>(pool, all, special);
    if constexpr (!std::is_same_v<Type, Int8>) {
      PrintAttention<Type>(pool, all, special);
      PrintNorm<Type>(all, special);
    }
  }
}

// Takes subnormals for 0 from here on, as XLA's threads do.
void FlushSubnormals() {
#ifdef __x86_64__
  _mm_setcsr(_mm_getcsr() | 0x8040);
#else
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  asm volatile("msr fpcr, %0" : : "r"(control | 1 << 24));
#endif
}

}  // namespace

int main() {
  if (LlamaJaxInterface() == 0) {
    std::fputs("this CPU lacks the instructions\n", stderr);
    return 1;
  }
  XLA_FFI_Api api{};  // of one thread
  api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) {
    *args->num_threads = 1;
    return static_cast<XLA_FFI_Error*>(nullptr);
  };
  ffi::DiagnosticEngine diagnostic;
  auto pool = *ffi::CtxDecoding<ffi::ThreadPool>::Decode(&api, nullptr, diagnostic);
  PrintWiden<Float16>("float16");
  PrintWiden<Bfloat16>("bfloat16");
  PrintWiden<Int8>("int8");
  for (const std::string mode : {"", "flushed, "}) {
    if (!mode.empty()) FlushSubnormals();
    PrintRegisters(mode);
    PrintRope(mode);
    PrintKernels<Float32>(pool, mode + "float32");
    PrintKernels<Float16>(pool, mode + "float16");
    PrintKernels<Bfloat16>(pool, mode + "bfloat16");
    PrintKernels<Int8>(pool, mode + "int8");
  }
}

// The registers of cpu_kernels.cc, in one set per kind of CPU. It alone includes this, and nothing
// else knows intrinsics but for AVX-512's bfloat16.
//
// A Sum has kLanes float32; a Four has four. The lanes of NEON's Sum are those of AVX2's, and
// every function computes the same of them, so the kernels of both have the same bits. What may
// differ is the sign and the payload of a NaN.

#ifndef LLAMA_JAX_NN_CPU_REGISTERS_H_
#define LLAMA_JAX_NN_CPU_REGISTERS_H_

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#else
#include <arm_neon.h>
#endif

#include <cstdint>

// GCC keeps the sums of a tile in memory unless every loop over them is unrolled, which it does not
// do by itself for NEON's pairs of registers.
#define LLAMA_JAX_PRAGMA(text) _Pragma(#text)
#ifdef __aarch64__
#define LLAMA_JAX_UNROLL(count) LLAMA_JAX_PRAGMA(GCC unroll count)
#else
#define LLAMA_JAX_UNROLL(count)
#endif

namespace {

// A tile multiplies up to kRows rows by 4 outputs at once, or up to kWideRows by 8.

#ifdef __x86_64__

using Four = __m128;

inline Four LoadFour(const float* p) { return _mm_loadu_ps(p); }
inline void Store(float* p, Four a) { _mm_storeu_ps(p, a); }

#endif

#if defined(__AVX512F__)

using Sum = __m512;
constexpr int64_t kRows = 6;  // 6 x 4 sums fill 24 of 32 registers
constexpr int64_t kWideRows = 3;  // 3 x 8 do
constexpr int64_t kLanes = 16;

inline Sum Zero() { return _mm512_setzero_ps(); }
inline Sum Load(const float* p) { return _mm512_loadu_ps(p); }
inline Sum Add(Sum a, Sum x, Sum w) { return _mm512_fmadd_ps(x, w, a); }
inline Sum Spread(float x) { return _mm512_set1_ps(x); }
inline Sum Max(Sum a, Sum b) { return _mm512_max_ps(a, b); }
inline Sum Round(Sum a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline Sum PowerOfTwo(Sum n) {  // of whole numbers
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline Sum ZeroBelow(Sum a, Sum x, Sum bound) {  // NaN stays NaN
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), a);
}
inline void Store(float* p, Sum a) { _mm512_storeu_ps(p, a); }
inline Sum LoadHalf(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Sum LoadInt8(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Sum LoadBfloat(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// Returns the sums over the lanes of a, b, c and d.
inline Four SumLanes(Sum a, Sum b, Sum c, Sum d) {
  const Sum ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const Sum cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  Sum s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
  const __m512i firsts = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s));
}

#elif defined(__AVX2__)

using Sum = __m256;
constexpr int64_t kRows = 3;  // 3 x 4 sums fill 12 of 16 registers
constexpr int64_t kWideRows = 1;  // 8 fill half
constexpr int64_t kLanes = 8;

inline Sum Zero() { return _mm256_setzero_ps(); }
inline Sum Load(const float* p) { return _mm256_loadu_ps(p); }
inline Sum Add(Sum a, Sum x, Sum w) { return _mm256_fmadd_ps(x, w, a); }
inline Sum Spread(float x) { return _mm256_set1_ps(x); }
inline Sum Max(Sum a, Sum b) { return _mm256_max_ps(a, b); }
inline Sum Round(Sum a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline Sum PowerOfTwo(Sum n) {  // of whole numbers
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Sum ZeroBelow(Sum a, Sum x, Sum bound) {  // NaN stays NaN
  return _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_NLT_UQ), a);
}
inline void Store(float* p, Sum a) { _mm256_storeu_ps(p, a); }
inline Sum LoadHalf(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Sum LoadInt8(const int8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Sum LoadBfloat(const uint16_t* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Four SumLanes(Sum a, Sum b, Sum c, Sum d) {
  const Sum s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

#elif defined(__aarch64__)

struct Sum {
  float32x4_t low, high;
};
using Four = float32x4_t;
constexpr int64_t kRows = 3;  // 3 x 4 sums fill 24 of 32 registers
constexpr int64_t kWideRows = 1;  // 8 fill half
constexpr int64_t kLanes = 8;

inline Sum operator+(Sum a, Sum b) { return {a.low + b.low, a.high + b.high}; }
inline Sum operator-(Sum a, Sum b) { return {a.low - b.low, a.high - b.high}; }
inline Sum operator*(Sum a, Sum b) { return {a.low * b.low, a.high * b.high}; }
inline Sum operator/(Sum a, Sum b) { return {a.low / b.low, a.high / b.high}; }

inline Sum Spread(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline Sum Zero() { return Spread(0); }
inline Sum Load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline Four LoadFour(const float* p) { return vld1q_f32(p); }
inline void Store(float* p, Four a) { vst1q_f32(p, a); }
inline void Store(float* p, Sum a) {
  Store(p, a.low);
  Store(p + 4, a.high);
}
inline Sum Add(Sum a, Sum x, Sum w) {
  return {vfmaq_f32(a.low, x.low, w.low), vfmaq_f32(a.high, x.high, w.high)};
}
inline Four Max(Four a, Four b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // as x86: b if NaN
inline Sum Max(Sum a, Sum b) { return {Max(a.low, b.low), Max(a.high, b.high)}; }
inline Sum Round(Sum a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
inline Four PowerOfTwo(Four n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline Sum PowerOfTwo(Sum n) { return {PowerOfTwo(n.low), PowerOfTwo(n.high)}; }
inline Four ZeroBelow(Four a, Four x, Four bound) {
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a), vcltq_f32(x, bound)));
}
inline Sum ZeroBelow(Sum a, Sum x, Sum bound) {
  return {ZeroBelow(a.low, x.low, bound.low), ZeroBelow(a.high, x.high, bound.high)};
}
inline Sum LoadHalf(const uint16_t* p) {
  const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(p));
  return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
}
inline Sum LoadInt8(const int8_t* p) {
  const int16x8_t wide = vmovl_s8(vld1_s8(p));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
}
inline Sum LoadBfloat(const uint16_t* p) {  // its bits above 16 zeros
  const uint16x8_t bits = vld1q_u16(p), zeros = vdupq_n_u16(0);
  return {vreinterpretq_f32_u16(vzip1q_u16(zeros, bits)),
          vreinterpretq_f32_u16(vzip2q_u16(zeros, bits))};
}
inline Four SumLanes(Sum a, Sum b, Sum c, Sum d) {
  const Four low = vpaddq_f32(vpaddq_f32(a.low, b.low), vpaddq_f32(c.low, d.low));
  const Four high = vpaddq_f32(vpaddq_f32(a.high, b.high), vpaddq_f32(c.high, d.high));
  return low + high;
}

#else
#error "expected AVX2, AVX-512 or 64-bit ARM: see setup.py"
#endif

#ifdef __x86_64__

#ifdef __AMX_BF16__

// Asks the system to save tiles for all threads of this process. Only Linux does, from 5.16.
inline bool MayUseTiles() {
#ifdef __linux__
  constexpr int kRequestState = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
#else
  return false;
#endif
}

#endif

// Clang's __builtin_cpu_supports knows neither f16c nor avx512bf16: these come from cpuid. Whether
// the system saves their registers is part of the answer for avx2 and avx512f.
inline bool HasInstructions() {
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
#ifdef __AVX512F__
  has = has && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef __AVX512BF16__
  has = has && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & bit_AVX512BF16);
#endif
#ifdef __AMX_BF16__
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;  // compilers name them differently
  has = has && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBfloat16) &&
        (edx & kTiles) && MayUseTiles();
#endif
  return has;
}

#else

inline bool HasInstructions() { return true; }  // every 64-bit ARM CPU has NEON

#endif

}  // namespace

#endif  // LLAMA_JAX_NN_CPU_REGISTERS_H_

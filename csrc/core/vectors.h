// Registers of each set of instructions that has some: how to fill kLanes floats from numbers as core/weights.h stores
// them (all lanes, or the first `count` and zeros), how to store them, or the sums of the lanes of four registers,
// times four factors and plus four numbers of the bias where there are some; how to multiply, and add to numbers in
// memory. What a whole number times its scale is may be found another way than by multiplying, as long as it has the
// same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "core/instruction_set.h"
#include "core/weights.h"

#if PANTHER_HAS_AVX
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of the registers that its own intrinsics leave undefined
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif PANTHER_HAS_NEON
#include <arm_neon.h>
#endif

namespace panther::core {

struct alignas(64) Line {  // of the cache, so that a register is not read from two of them
  float numbers[16];
};

// Room for some numbers, at least for one.
inline std::unique_ptr<Line[]> lines_of(int64_t numbers) { return std::unique_ptr<Line[]>(new Line[numbers / 16 + 1]); }

#if PANTHER_HAS_AVX

namespace avx2 {

using Vector = __m256;
inline constexpr int64_t kLanes = 8;

PANTHER_AVX2 inline Vector zeros() { return _mm256_setzero_ps(); }
PANTHER_AVX2 inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

// sum += a * b, in the register that the sum is in. What a compiler makes of the intrinsic may give it to another one,
// and sums that are carried from one step of an unrolled loop to the next are moved about and stored then:
// core/gemm.cpp took 1.06 times as long as rolled up, and takes 0.85 to 1 times as long with this.
PANTHER_AVX2 __attribute__((always_inline)) inline void accumulate(Vector& sum, Vector a, Vector b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}

// See avx512. With AVX2, whose processors read two or three such registers a cycle, it was not measured.
PANTHER_AVX2 inline void load_once(Vector&) {}

PANTHER_AVX2 inline Vector load(const float* numbers) { return _mm256_loadu_ps(numbers); }

PANTHER_AVX2 inline Vector load(const BFloat16* numbers) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

PANTHER_AVX2 inline Vector load(const int8_t* numbers) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(numbers));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

using Mask = __m256i;

PANTHER_AVX2 inline Mask first_lanes(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
}

PANTHER_AVX2 inline Mask both(Mask a, Mask b) { return _mm256_and_si256(a, b); }
PANTHER_AVX2 inline Mask without(Mask a, Mask b) { return _mm256_andnot_si256(b, a); }
PANTHER_AVX2 inline Vector load_masked(const float* numbers, Mask lanes) { return _mm256_maskload_ps(numbers, lanes); }
PANTHER_AVX2 inline void store_masked(float* to, Vector a, Mask lanes) { _mm256_maskstore_ps(to, lanes, a); }
PANTHER_AVX2 inline Vector load(const float* numbers, int64_t count) {
  return load_masked(numbers, first_lanes(count));
}

template <class T>  // of narrower numbers
PANTHER_AVX2 inline Vector load(const T* numbers, int64_t count) {
  float some[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) some[lane] = widened(numbers, lane);
  return _mm256_loadu_ps(some);
}

PANTHER_AVX2 inline Vector all_lanes(float number) { return _mm256_set1_ps(number); }
PANTHER_AVX2 inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
PANTHER_AVX2 inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
PANTHER_AVX2 inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
// Each lane gets all of the four bytes and keeps its own four bits where they are, so that its number is 16^lane times
// as large; its scale is as much smaller. The product is the same to the last bit unless a scale is below 2^-98.
PANTHER_AVX2 inline Vector factor_of(const Nibbles*, float scale) {
  const Vector parts = _mm256_setr_ps(0x1p0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 0x1p-28f);
  return _mm256_mul_ps(_mm256_set1_ps(scale), parts);
}

PANTHER_AVX2 inline Vector scaled_in_place(int32_t bytes, Vector factor) {
  const __m256i own = _mm256_sllv_epi32(_mm256_set1_epi32(15), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  const __m256i eights = _mm256_sllv_epi32(_mm256_set1_epi32(8), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  const __m256i numbers = _mm256_sub_epi32(_mm256_and_si256(_mm256_set1_epi32(bytes), own), eights);
  return _mm256_mul_ps(_mm256_cvtepi32_ps(numbers), factor);
}

PANTHER_AVX2 inline Vector scaled(const Nibbles* numbers, Vector factor) {
  int32_t bytes;
  std::memcpy(&bytes, numbers, sizeof(bytes));
  return scaled_in_place(bytes, factor);
}

PANTHER_AVX2 inline Vector scaled(const Nibbles* numbers, int64_t count, Vector factor) {
  int32_t bytes = 0;
  std::memcpy(&bytes, numbers, static_cast<size_t>(count + 1) / 2);
  return _mm256_and_ps(scaled_in_place(bytes, factor), _mm256_castsi256_ps(first_lanes(count)));
}

PANTHER_AVX2 inline void store(float* to, Vector a) { _mm256_storeu_ps(to, a); }

PANTHER_AVX2 inline void add_to(float* to, Vector a) { store(to, add(load(to), a)); }

PANTHER_AVX2 inline void add_to(double* to, Vector a) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1));
  _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), low));
  _mm256_storeu_pd(to + 4, _mm256_add_pd(_mm256_loadu_pd(to + 4), high));
}

PANTHER_AVX2 inline void store(float* to, Vector a, int64_t count) { store_masked(to, a, first_lanes(count)); }

PANTHER_AVX2 inline void store_sums(Vector a, Vector b, Vector c, Vector d, const float* factors, const float* bias,
                                    float* to) {
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  if (factors) sums = _mm_mul_ps(sums, _mm_loadu_ps(factors));
  if (bias) sums = _mm_add_ps(sums, _mm_loadu_ps(bias));
  _mm_storeu_ps(to, sums);
}

#define PANTHER_VECTOR PANTHER_AVX2
#include "core/vectors_block.h"
#undef PANTHER_VECTOR

}  // namespace avx2

namespace avx512 {

using Vector = __m512;
inline constexpr int64_t kLanes = 16;

PANTHER_AVX512 inline Vector zeros() { return _mm512_setzero_ps(); }
PANTHER_AVX512 inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

PANTHER_AVX512 inline void accumulate(Vector& sum, Vector a, Vector b) { sum = _mm512_fmadd_ps(a, b, sum); }

using Mask = __mmask16;

PANTHER_AVX512 inline Mask first_lanes(int64_t count) { return static_cast<Mask>((1u << count) - 1); }
PANTHER_AVX512 inline Mask both(Mask a, Mask b) { return a & b; }
PANTHER_AVX512 inline Mask without(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }
// What was loaded stays in a register: GCC would read it from memory in each instruction that uses it. Two and three
// rows times weights of 384 numbers a row, on an Intel processor: .73 times the time.
PANTHER_AVX512 __attribute__((always_inline)) inline void load_once(Vector& numbers) { asm("" : "+v"(numbers)); }

PANTHER_AVX512 inline Vector load_masked(const float* numbers, Mask lanes) {
  return _mm512_maskz_loadu_ps(lanes, numbers);
}
PANTHER_AVX512 inline void store_masked(float* to, Vector a, Mask lanes) { _mm512_mask_storeu_ps(to, lanes, a); }

PANTHER_AVX512 inline Vector load(const float* numbers) { return _mm512_loadu_ps(numbers); }

PANTHER_AVX512 inline Vector load(const float* numbers, int64_t count) {
  return load_masked(numbers, first_lanes(count));
}

PANTHER_AVX512 inline Vector widened_lanes(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

PANTHER_AVX512 inline Vector load(const BFloat16* numbers) {
  return widened_lanes(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
}

PANTHER_AVX512 inline Vector load(const BFloat16* numbers, int64_t count) {
  return widened_lanes(_mm256_maskz_loadu_epi16(first_lanes(count), numbers));
}

PANTHER_AVX512 inline Vector widened_lanes(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

PANTHER_AVX512 inline Vector load(const int8_t* numbers) {
  return widened_lanes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers)));
}

PANTHER_AVX512 inline Vector load(const int8_t* numbers, int64_t count) {
  return widened_lanes(_mm_maskz_loadu_epi8(first_lanes(count), numbers));
}

PANTHER_AVX512 inline Vector all_lanes(float number) { return _mm512_set1_ps(number); }
PANTHER_AVX512 inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
PANTHER_AVX512 inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
PANTHER_AVX512 inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
PANTHER_AVX512 inline void store(float* to, Vector a) { _mm512_storeu_ps(to, a); }

PANTHER_AVX512 inline void add_to(float* to, Vector a) { store(to, add(load(to), a)); }

PANTHER_AVX512 inline void add_to(double* to, Vector a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
  _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
  _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), high));
}

PANTHER_AVX512 inline void store(float* to, Vector a, int64_t count) { store_masked(to, a, first_lanes(count)); }

// Four bits choose one of the sixteen multiples of a scale, which are what the numbers are worth.
PANTHER_AVX512 inline Vector factor_of(const Nibbles*, float scale) {
  const Vector numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_mul_ps(numbers, _mm512_set1_ps(scale));
}

// Each byte lies in two lanes, whose last four bits are those of a number; a choice looks at no others. The product is
// the byte and, 28 bits further up, the byte again: it costs less than shifting where shuffles share their units with
// shifts.
PANTHER_AVX512 inline __m512i choices(__m128i bytes) {
  return _mm512_mul_epu32(_mm512_cvtepu8_epi64(bytes), _mm512_set1_epi64((1 << 28) + 1));
}

PANTHER_AVX512 inline Vector scaled(const Nibbles* numbers, Vector multiples) {
  return _mm512_permutexvar_ps(choices(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(numbers))), multiples);
}

PANTHER_AVX512 inline Vector scaled(const Nibbles* numbers, int64_t count, Vector multiples) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes((count + 1) / 2), numbers);
  return _mm512_maskz_permutexvar_ps(first_lanes(count), choices(bytes), multiples);
}

PANTHER_AVX512 inline __m256 halved(Vector a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

PANTHER_AVX512 inline void store_sums(Vector a, Vector b, Vector c, Vector d, const float* factors, const float* bias,
                                      float* to) {
  avx2::store_sums(halved(a), halved(b), halved(c), halved(d), factors, bias, to);
}

#define PANTHER_VECTOR PANTHER_AVX512
#include "core/vectors_block.h"
#undef PANTHER_VECTOR

}  // namespace avx512

#elif PANTHER_HAS_NEON

namespace neon {

using Vector = float32x4_t;
inline constexpr int64_t kLanes = 4;

inline Vector zeros() { return vdupq_n_f32(0); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
inline Vector all_lanes(float number) { return vdupq_n_f32(number); }
inline Vector multiply(Vector a, Vector b) { return vmulq_f32(a, b); }
inline void store(float* to, Vector a) { vst1q_f32(to, a); }

inline void store(float* to, Vector a, int64_t count) {
  float some[kLanes];
  vst1q_f32(some, a);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = some[lane];
}

inline void load_once(Vector&) {}  // its instructions read no memory

inline Vector load(const float* numbers) { return vld1q_f32(numbers); }

inline Vector load(const BFloat16* numbers) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&numbers->bits), 16)); }

inline Vector load(const int8_t* numbers) {
  int32_t bytes;
  std::memcpy(&bytes, numbers, sizeof(bytes));
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

inline Vector load(const Nibbles* numbers) {
  uint16_t bytes;
  std::memcpy(&bytes, numbers, sizeof(bytes));
  const int32_t places[kLanes] = {0, -4, -8, -12};
  const uint32x4_t stored = vandq_u32(vshlq_u32(vdupq_n_u32(bytes), vld1q_s32(places)), vdupq_n_u32(15));
  return vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(stored), vdupq_n_s32(8)));
}

template <class T>
inline Vector load(const T* numbers, int64_t count) {
  float some[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) some[lane] = widened(numbers, lane);
  return vld1q_f32(some);
}

inline void store_sums(Vector a, Vector b, Vector c, Vector d, const float* factors, const float* bias, float* to) {
  Vector sums = vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
  if (factors) sums = vmulq_f32(sums, vld1q_f32(factors));
  vst1q_f32(to, bias ? vaddq_f32(sums, vld1q_f32(bias)) : sums);
}

#define PANTHER_VECTOR
#include "core/vectors_block.h"
#undef PANTHER_VECTOR

}  // namespace neon

#endif

}  // namespace panther::core

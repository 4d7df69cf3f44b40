#include "core/conv.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "core/panels.h"
#include "core/vectors.h"

namespace panther::core {

// Windows [i, i + rows) times rows [first, last) of w.
struct ConvPart {
  int64_t i;
  int64_t rows;
  int64_t first;
  int64_t last;
};

// The twin without intrinsics.
template <class W>
void conv_part_scalar(const Conv<W>& p, const ConvPart& part) {
  const std::unique_ptr<float[]> window(new float[p.x.depth]);
  for (int64_t i = part.i; i < part.i + part.rows; ++i) {
    unfold(p.x, i, i + 1, window.get());
    for (int64_t o = part.first; o < part.last; ++o) {
      float sum = 0;
      for (int64_t k = 0; k < p.x.depth; ++k) sum += window[k] * p.w.value(o, k);
      *p.y.at(o, i) = p.bias ? sum + p.bias[o] : sum;
    }
  }
}

static void low_rank_part_scalar(const LowRankConv& p, const ConvPart& part) {
  const std::unique_ptr<float[]> window(new float[p.down.x.depth]), inner(new float[p.rank()]);
  for (int64_t i = part.i; i < part.i + part.rows; ++i) {
    unfold(p.down.x, i, i + 1, window.get());
    for (int64_t r = 0; r < p.rank(); ++r) {
      inner[r] = 0;
      for (int64_t k = 0; k < p.down.x.depth; ++k) inner[r] += window[k] * p.down.w.value(r, k);
    }
    for (int64_t o = part.first; o < part.last; ++o) {
      float sum = 0;
      for (int64_t r = 0; r < p.rank(); ++r) sum += inner[r] * p.up.value(o, r);
      *p.down.y.at(o, i) = p.down.bias ? sum + p.down.bias[o] : sum;
    }
  }
}

#if PANTHER_HAS_AVX

namespace avx2 {

using Bits = uint8_t;  // a lane each
using Indices = __m256i;

inline Bits first_bits(int64_t count) { return static_cast<Bits>((1u << count) - 1); }
PANTHER_AVX2 inline Indices load_indices(const int32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

PANTHER_AVX2 inline Mask mask_of(Bits some) {
  const __m256i of_lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(some), of_lanes), of_lanes);
}

// As below.
inline bool are_one_run(const int64_t* windows, int64_t count, int64_t step) {
  if (step != 1 && step != 2) return false;
  bool is_one = true;
  for (int64_t i = 1; i < count; ++i) is_one &= windows[i] == windows[0] + i * step;
  return is_one;
}

PANTHER_AVX2 inline Vector every_second(const float* numbers, Bits some) {
  const __m256i spread = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3),
                even = _mm256_setr_epi32(-1, 0, -1, 0, -1, 0, -1, 0);
  const auto lanes = [&](int of) PANTHER_AVX2 {
    return _mm256_and_si256(_mm256_permutevar8x32_epi32(mask_of(static_cast<Bits>(of)), spread), even);
  };
  __m256 fours;
  if (some == 0xFF) {  // numbers 0, 2, 8, 10 and 4, 6, 12, 14
    fours = _mm256_shuffle_ps(load(numbers), load(numbers + kLanes - 1), 0xD8);
  } else {
    const __m256 low = load_masked(numbers, lanes(some)), high = load_masked(numbers + kLanes, lanes(some >> 4));
    fours = _mm256_shuffle_ps(low, high, 0x88);
  }
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(fours), 0xD8));
}

PANTHER_AVX2 inline Vector filled(Vector values, const float* from, Bits some) {
  if (some == 0xFF) return load(from);
  return _mm256_or_ps(values, load_masked(from, mask_of(some)));  // which has zeros there
}

PANTHER_AVX2 inline Vector joined(Vector values, Vector others, Bits) { return _mm256_or_ps(values, others); }

PANTHER_AVX2 inline Vector gathered(const float* from, Indices places, Bits some) {
  const Mask lanes = mask_of(some);
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, places, _mm256_castsi256_ps(lanes), sizeof(float));
}

PANTHER_AVX2 inline Bits bits_within(const int32_t* begins, int32_t shift, int32_t size, Bits some) {
  const __m256i places = _mm256_add_epi32(_mm256_maskload_epi32(begins, mask_of(some)), _mm256_set1_epi32(shift));
  const __m256i nearest = _mm256_min_epu32(places, _mm256_set1_epi32(size - 1));  // below 0: a large number
  const __m256i is_within = _mm256_cmpeq_epi32(places, nearest);
  return static_cast<Bits>(_mm256_movemask_ps(_mm256_castsi256_ps(is_within)) & some);
}

#define PANTHER_VECTOR PANTHER_AVX2
#include "core/conv_block.h"
#undef PANTHER_VECTOR

}  // namespace avx2

namespace avx512 {

using Bits = __mmask16;  // a lane each
using Indices = __m512i;

PANTHER_AVX512 inline Bits first_bits(int64_t count) { return first_lanes(count); }
PANTHER_AVX512 inline Indices load_indices(const int32_t* from) { return _mm512_loadu_si512(from); }

// Whether each window begins `step` numbers after the one before.
PANTHER_AVX512 inline bool are_one_run(const int64_t* windows, int64_t count, int64_t step) {
  if (step != 1 && step != 2) return false;
  const __m512i zero_to_seven = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i steps = step == 2 ? _mm512_add_epi64(zero_to_seven, zero_to_seven) : zero_to_seven;
  for (int64_t i = 0; i < count; i += 8) {
    const __mmask8 some = static_cast<__mmask8>((1u << std::min<int64_t>(8, count - i)) - 1);
    const __m512i wanted = _mm512_add_epi64(_mm512_set1_epi64(windows[0] + i * step), steps);
    if (_mm512_mask_cmpneq_epi64_mask(some, _mm512_maskz_loadu_epi64(some, windows + i), wanted) != 0) return false;
  }
  return true;
}

// Number 2 i in lane i, for some lanes; no others are read.
PANTHER_AVX512 inline __m512 every_second(const float* numbers, Bits some) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const uint32_t spread = _pdep_u32(some, 0x55555555u);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(spread), numbers);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(spread >> 16), numbers + kLanes);
  return _mm512_permutex2var_ps(low, even, high);
}

// `values`, and in some lanes the numbers from there on.
PANTHER_AVX512 inline Vector filled(Vector values, const float* from, Bits some) {
  return _mm512_mask_loadu_ps(values, some, from);
}

PANTHER_AVX512 inline Vector joined(Vector values, Vector others, Bits some) {
  return _mm512_mask_mov_ps(values, some, others);
}

// Zeros elsewhere.
PANTHER_AVX512 inline Vector gathered(const float* from, Indices places, Bits some) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, places, from, sizeof(float));
}

// Those of some lanes in which a number from there on, plus `shift`, is not negative and less than `size`.
PANTHER_AVX512 inline Bits bits_within(const int32_t* begins, int32_t shift, int32_t size, Bits some) {
  const __m512i places = _mm512_add_epi32(_mm512_maskz_loadu_epi32(some, begins), _mm512_set1_epi32(shift));
  return _mm512_mask_cmplt_epu32_mask(some, places, _mm512_set1_epi32(size));  // below 0: a large number
}

#define PANTHER_VECTOR PANTHER_AVX512
#include "core/conv_block.h"
#undef PANTHER_VECTOR

}  // namespace avx512

#endif

// What a thread fills parts of y with.
template <class W>
class Convolver {
 public:
  explicit Convolver(const Conv<W>& whole)
      : whole_(whole),
        of_out_(parts_of(whole.out, kChannels)),
        of_positions_(parts_of(whole.x.positions, most_windows())) {
#if PANTHER_HAS_AVX
    const InstructionSet set = instruction_set_in_use().load();
    if (set == InstructionSet::avx512) avx512_.reset(new avx512::ConvRoom(whole.x));
    if (set == InstructionSet::avx2) avx2_.reset(new avx2::ConvRoom(whole.x));
#endif
  }

  void parts(int64_t first, int64_t last) const {
    for (int64_t count; first < last; first += count) {
      const int64_t begin = first % of_out_;
      count = std::min(of_out_ - begin, last - first);
      part(first / of_out_, begin, begin + count);
    }
  }

  void channels(int64_t first, int64_t last) const {
    for (int64_t windows = 0; windows < whole_.samples * of_positions_; ++windows) part(windows, first, last);
  }

 private:
  void part(int64_t windows, int64_t first, int64_t last) const {
    const int64_t i = start_of(windows % of_positions_, of_positions_, whole_.x.positions),
                  end = start_of(windows % of_positions_ + 1, of_positions_, whole_.x.positions);
    const ConvPart part{i, end - i, first * kChannels, std::min(whole_.out, last * kChannels)};
    const Conv<W> p = whole_.sample(windows / of_positions_);
#if PANTHER_HAS_AVX
    if (avx512_) return avx512::conv_part(p, part, *avx512_);
    if (avx2_) return avx2::conv_part(p, part, *avx2_);
#endif
    conv_part_scalar(p, part);
  }

  const Conv<W>& whole_;
  const int64_t of_out_;
  const int64_t of_positions_;
#if PANTHER_HAS_AVX
  std::unique_ptr<avx512::ConvRoom> avx512_;
  std::unique_ptr<avx2::ConvRoom> avx2_;
#endif
};

template <class W>
void conv(const Conv<W>& p, int64_t first, int64_t last) {
  Convolver<W>(p).parts(first, last);
}

template <class W>
void conv_channels(const Conv<W>& p, int64_t first, int64_t last) {
  Convolver<W>(p).channels(first, last);
}

void low_rank_conv(const LowRankConv& p, int64_t first, int64_t last) {
  const Windows& x = p.down.x;
  const int64_t each = parts_of(x.positions, p.windows);
  const auto of_parts = [&](const auto& fill) {
    for (int64_t i = first; i < last; ++i) {
      LowRankConv sample = p;
      sample.down = p.down.sample(i / each);
      const int64_t begin = start_of(i % each, each, x.positions), end = start_of(i % each + 1, each, x.positions);
      fill(sample, ConvPart{begin, end - begin, 0, p.down.out});
    }
  };
#if PANTHER_HAS_AVX
  const InstructionSet set = instruction_set_in_use().load();
  if (set == InstructionSet::avx512) {
    const avx512::ConvRoom room(x, p.windows, p.rank());
    return of_parts([&](const LowRankConv& of, const ConvPart& part) { avx512::low_rank_part(of, part, room); });
  }
  if (set == InstructionSet::avx2) {
    const avx2::ConvRoom room(x, p.windows, p.rank());
    return of_parts([&](const LowRankConv& of, const ConvPart& part) { avx2::low_rank_part(of, part, room); });
  }
#endif
  of_parts([&](const LowRankConv& of, const ConvPart& part) { low_rank_part_scalar(of, part); });
}

template void conv(const Conv<Plain<float>>&, int64_t, int64_t);
template void conv(const Conv<Plain<BFloat16>>&, int64_t, int64_t);
template void conv(const Conv<Int8>&, int64_t, int64_t);
template void conv(const Conv<Int4>&, int64_t, int64_t);

template void conv_channels(const Conv<Plain<float>>&, int64_t, int64_t);
template void conv_channels(const Conv<Plain<BFloat16>>&, int64_t, int64_t);
template void conv_channels(const Conv<Int8>&, int64_t, int64_t);
template void conv_channels(const Conv<Int4>&, int64_t, int64_t);

}  // namespace panther::core

// Which instructions the kernels use: the best that this processor has, unless another set is asked for.
#pragma once

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

// GCC and Clang compile single functions for what not every x86 processor has; every 64-bit ARM processor has NEON.
// Elsewhere, and where PANTHER_SCALAR is defined, the scalar kernels serve alone.
#define PANTHER_HAS_AVX 0
#define PANTHER_HAS_NEON 0
#define PANTHER_INLINE inline
#if !defined(PANTHER_SCALAR) && (defined(__GNUC__) || defined(__clang__))
// Before a loop whose counter chooses a register: else GCC keeps them all in memory.
#if defined(__clang__)
#define PANTHER_UNROLL _Pragma("unroll")
#else
#define PANTHER_UNROLL _Pragma("GCC unroll 16")
#endif
#if defined(__x86_64__) || defined(__i386__)
#undef PANTHER_HAS_AVX
#define PANTHER_HAS_AVX 1
#define PANTHER_AVX2 __attribute__((target("avx2,fma")))
#define PANTHER_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi2,fma")))
// A body that is compiled for whoever calls it: once for every processor and once for AVX2.
#undef PANTHER_INLINE
#define PANTHER_INLINE __attribute__((always_inline)) inline
#elif defined(__aarch64__)
#undef PANTHER_HAS_NEON
#define PANTHER_HAS_NEON 1
#endif
#endif

namespace panther::core {

enum class InstructionSet { scalar, avx2, avx512, neon };

inline constexpr std::array<const char*, 4> kInstructionSetNames{"scalar", "avx2", "avx512", "neon"};

inline std::string name_of(InstructionSet set) { return kInstructionSetNames[static_cast<size_t>(set)]; }

inline bool has(InstructionSet set) {
#if PANTHER_HAS_AVX
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (set == InstructionSet::avx2) return has_avx2;
  if (set == InstructionSet::avx512) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2");
  }
#elif PANTHER_HAS_NEON
  if (set == InstructionSet::neon) return true;
#endif
  return set == InstructionSet::scalar;
}

inline bool is_made_by_intel() {
#if PANTHER_HAS_AVX
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// MKL, which torch multiplies with on x86, takes AVX2 where Intel did not make the processor, whatever that could do.
inline bool mkl_keeps_to_avx2() { return has(InstructionSet::avx512) && !is_made_by_intel(); }

// The sets this processor can run, the best one last.
inline std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
  for (const auto set : {InstructionSet::scalar, InstructionSet::avx2, InstructionSet::avx512, InstructionSet::neon}) {
    if (has(set)) sets.push_back(set);
  }
  return sets;
}

inline InstructionSet instruction_set_named(const std::string& name) {
  for (const InstructionSet set : instruction_sets()) {
    if (name_of(set) == name) return set;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one that this processor has");
}

inline std::atomic<InstructionSet>& instruction_set_in_use() {
  static std::atomic<InstructionSet> chosen{instruction_sets().back()};
  return chosen;
}

}  // namespace panther::core

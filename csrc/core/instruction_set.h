// Which instructions the kernels use: the best that this processor has, unless another set is asked for.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

// GCC and Clang compile single functions for AVX2; every 64-bit ARM processor has NEON. Elsewhere, and where
// PANTHER_SCALAR is defined, the scalar kernels serve alone.
#define PANTHER_HAS_AVX2 0
#define PANTHER_HAS_NEON 0
#if !defined(PANTHER_SCALAR) && (defined(__GNUC__) || defined(__clang__))
#if defined(__x86_64__) || defined(__i386__)
#undef PANTHER_HAS_AVX2
#define PANTHER_HAS_AVX2 1
#define PANTHER_AVX2 __attribute__((target("avx2,fma")))
#elif defined(__aarch64__)
#undef PANTHER_HAS_NEON
#define PANTHER_HAS_NEON 1
#endif
#endif

namespace panther::core {

enum class InstructionSet { scalar, avx2, neon };

inline std::string name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx2: return "avx2";
    case InstructionSet::neon: return "neon";
    default: return "scalar";
  }
}

// The sets this processor can run, the best one last.
inline std::vector<InstructionSet> instruction_sets() {
#if PANTHER_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {InstructionSet::scalar, InstructionSet::avx2};
  }
#elif PANTHER_HAS_NEON
  return {InstructionSet::scalar, InstructionSet::neon};
#endif
  return {InstructionSet::scalar};
}

inline InstructionSet instruction_set_named(const std::string& name) {
  for (InstructionSet known : instruction_sets()) {
    if (name_of(known) == name) return known;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one that this processor has");
}

inline std::atomic<InstructionSet>& instruction_set_in_use() {
  static std::atomic<InstructionSet> chosen{instruction_sets().back()};
  return chosen;
}

}  // namespace panther::core

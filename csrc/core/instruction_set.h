// Which instructions the kernels use: the best that this processor has, unless another set is asked for.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

// GCC and Clang compile single functions for AVX2; elsewhere, and where PANTHER_SCALAR is defined, the scalar kernels
// serve alone.
#if !defined(PANTHER_SCALAR) && (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define PANTHER_HAS_AVX2 1
#define PANTHER_AVX2 __attribute__((target("avx2,fma")))
#else
#define PANTHER_HAS_AVX2 0
#endif

namespace panther::core {

enum class InstructionSet { scalar, avx2 };

// The sets this processor can run, the best one last.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names{"scalar"};
#if PANTHER_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back("avx2");
#endif
  return names;
}

inline InstructionSet instruction_set_named(const std::string& name) {
  for (const std::string& known : instruction_sets()) {
    if (known == name) return name == "avx2" ? InstructionSet::avx2 : InstructionSet::scalar;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one that this processor has");
}

inline std::atomic<InstructionSet>& instruction_set_in_use() {
  static std::atomic<InstructionSet> chosen{instruction_set_named(instruction_sets().back())};
  return chosen;
}

inline std::string name_of(InstructionSet set) { return set == InstructionSet::avx2 ? "avx2" : "scalar"; }

}  // namespace panther::core

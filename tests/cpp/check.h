// What the drivers of this folder share: buffers whose ends a sanitizer sees, random numbers, and a rounding bound.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <random>

namespace check {

// The widest load of any kernel.
inline constexpr std::align_val_t kAlignment{64};

// An allocation that ends with its last number, and starts at an aligned address or one number after it.
template <class T>
class Buffer {
 public:
  Buffer(int64_t size, bool is_aligned)
      : numbers_(static_cast<T*>(operator new((size + !is_aligned) * sizeof(T), kAlignment))),
        start_(numbers_.get() + !is_aligned) {}
  T* data() const { return start_; }

 private:
  struct Free {
    void operator()(T* numbers) const { operator delete(numbers, kAlignment); }
  };
  std::unique_ptr<T, Free> numbers_;
  T* start_;
};

// Of 1/2 to 1 in size: no product comes near the smallest numbers of a type, which round more coarsely.
inline float random_number() {
  static std::mt19937 generator(0);
  const float size = std::uniform_real_distribution<float>(0.5f, 1)(generator);
  return generator() % 2 ? size : -size;
}

inline void require(bool holds, const char* claim) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", claim);
  std::exit(1);
}

// A sum in double, and how far a sum in float may be from it: by one rounding of the absolute values for each term.
class Exact {
 public:
  void add(double term) {
    sum_ += term;
    absolute_ += std::fabs(term);
    ++terms_;
  }
  bool is_near(float got, double rounding_of_result = 0) const {
    const double roundings = terms_ * static_cast<double>(std::numeric_limits<float>::epsilon()) + rounding_of_result;
    return std::fabs(got - sum_) <= roundings * absolute_;
  }

 private:
  double sum_ = 0, absolute_ = 0;
  int terms_ = 0;
};

}  // namespace check

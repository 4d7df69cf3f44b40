// What the ops that convolve share: which windows fit, where they lie in the input, and the kernel of core/conv.h on
// all of torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/conv.h"
#include "gemm.h"
#include "tensors.h"
#include "threads.h"

namespace panther {

using Sizes = std::vector<int64_t>;

// The most windows that are copied side by side for the kernels of few rows: before torch's own convolution, before
// core/conv.h, and without vector instructions.
inline constexpr int64_t kFewWindows = 128, kFewBeforeOwn = 28, kFewScalarWindows = 1;

// Windows of a sample, below which all samples are one: panels take up to 48 at a time. From a register of them on,
// results go where they belong at once.
inline constexpr int64_t kJoined = 96, kJoinedInPlace = 16;

// Of a chain of two: numbers of windows and of what becomes of them that stay in a second cache beside the weights.
inline constexpr int64_t kChainRoom = 80 * 1024;

inline int64_t product(const Sizes& sizes) {
  int64_t all = 1;
  for (const int64_t size : sizes) all *= size;
  return all;
}

inline std::string sizes_text(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// Of x with a batch: a tensor, or the sizes of one.
template <class X>
struct ConvOf {
  const X& x;
  const Sizes& kernel_size;
  const Sizes& stride;
  const Sizes& padding;  // before all axes, then after all
  const Sizes& dilation;

  int64_t dims() const { return static_cast<int64_t>(kernel_size.size()); }
  double padded(int64_t axis) const {
    return static_cast<double>(x.size(axis + 2)) + static_cast<double>(padding[axis]) +
           static_cast<double>(padding[axis + dims()]);
  }
  int64_t depth() const { return x.size(1) * product(kernel_size); }

  Sizes positions() const {
    Sizes sizes;
    for (int64_t axis = 0; axis < dims(); ++axis) {
      const int64_t span = dilation[axis] * (kernel_size[axis] - 1) + 1;
      sizes.push_back((x.size(axis + 2) + padding[axis] + padding[axis + dims()] - span) / stride[axis] + 1);
    }
    return sizes;
  }

  Sizes result_size(int64_t out) const {
    Sizes sizes = positions();
    sizes.insert(sizes.begin(), {x.size(0), out});
    return sizes;
  }

  bool fits() const {
    const size_t count = kernel_size.size();
    bool fits = count >= 1 && count <= 3 && stride.size() == count && padding.size() == 2 * count &&
                dilation.size() == count && x.dim() == dims() + 2;
    for (int64_t axis = 0; fits && axis < dims(); ++axis) {
      fits = kernel_size[axis] > 0 && stride[axis] > 0 && padding[axis] >= 0 && padding[axis + dims()] >= 0 &&
             dilation[axis] > 0 && x.size(axis + 2) > 0 &&
             static_cast<double>(dilation[axis]) * static_cast<double>(kernel_size[axis] - 1) < padded(axis);
    }
    return fits && x.size(1) > 0;
  }

  // Refuses in the words of panther/ops/_windows.py.
  void check(const std::string& name, const Tensor& given) const {
    if (fits()) return;
    throw std::invalid_argument(
        name +
        ": expected x (batch, channels, *size) or (channels, *size) of one to three sizes, for each of them a positive "
        "kernel_size, stride and dilation, and what is padded before all and after all of them, of windows that fit; "
        "got " +
        shape_text(given) + ", " + sizes_text(kernel_size) + ", " + sizes_text(stride) + ", " + sizes_text(dilation) +
        ", " + sizes_text(padding));
  }

  int64_t windows() const { return x.size(0) * product(positions()); }

  // Whether kernels of panther's own can run at all; places are counted in 32 bits.
  bool has_numbers() const {
    double places = static_cast<double>(x.size(0)) * static_cast<double>(x.size(1));
    for (int64_t axis = 0; axis < dims(); ++axis) places *= padded(axis);
    return x.size(0) > 0 && places < std::numeric_limits<int32_t>::max();
  }
};

using ConvShape = ConvOf<Tensor>;

// The sizes of a tensor that is not there.
struct TensorSizes {
  const Sizes& sizes;

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }
  int64_t size(int64_t axis) const { return sizes[axis]; }
  int64_t numel() const { return product(sizes); }
};

inline constexpr int64_t kImageChannels = 4;  // of pictures as they come in, which torch has kernels for

// Whether torch's convolution of single places is a plain product of its BLAS.
template <class X>
bool torch_multiplies(const ConvOf<X>& p) {
  constexpr int64_t kManySamples = 16, kSmall = 20480;
  if (p.dims() > 2 || product(p.kernel_size) > 1 || product(p.stride) > 1 || p.x.size(0) >= kManySamples) return false;
  return torch::stable::get_num_threads() == 1 || (p.x.size(0) == 1 && p.x.numel() <= kSmall);
}

// Whether torch's own convolution of many windows is as fast as core/conv.h with AVX-512, or faster. It takes channels
// sixteen at a time, and slows down where these do not come out even, for long kernels and for few windows; of single
// places it is slower while their numbers stay in the caches, and where there are enough channels for packing them to
// pay. Measured on Zen 4, one and two threads, batches of 1 to 32.
template <class X>
bool torch_is_fast_with_avx512(const ConvOf<X>& p, int64_t out) {
  constexpr int64_t kInCaches = 1 << 22, kInNearCaches = 1 << 20, kLongKernel = 32, kManyWindows = 512,
                    kFewChannels = 24;
  const int64_t taps = product(p.kernel_size), in = p.x.size(1), windows = p.windows();
  if (taps == 1) return std::min(in, out) < kFewChannels || p.x.numel() + windows * out > kInCaches;
  if (p.dims() > 1 && in <= kImageChannels) return true;
  if (in % 16 != 0 || taps >= kLongKernel || windows < kManyWindows) return false;
  return out % 16 == 0 || p.x.numel() > kInNearCaches;
}

// The same with AVX2: eight channels at a time, kernels of up to seven places in a row, large samples, and single
// places of many windows unless channels are many and become more. Measured on Zen 3, one and two threads, batches of 1
// and 8.
template <class X>
bool torch_is_fast_with_avx2(const ConvOf<X>& p, int64_t out) {
  constexpr int64_t kLongRow = 8, kLargeLine = 256, kLargePicture = 512, kManyChannels = 96, kManyWindows = 1024;
  const int64_t taps = product(p.kernel_size), in = p.x.size(1);
  if (p.windows() <= kFewWindows) return false;
  if (taps == 1) return p.windows() > kManyWindows && (in < kManyChannels || out <= in);
  if (p.dims() > 1 && in <= kImageChannels) return true;
  if (in % 8 != 0 || out % 8 != 0 || p.kernel_size.back() >= kLongRow) return false;
  return product(p.positions()) >= (p.dims() > 1 ? kLargePicture : kLargeLine);
}

template <class X>
bool torch_is_fast(const ConvOf<X>& p, int64_t out) {
  return uses(core::InstructionSet::avx2) ? torch_is_fast_with_avx2(p, out) : torch_is_fast_with_avx512(p, out);
}

// Whether all strides are those of a new tensor. Others, of axes of one number too, can mean that channels lie last,
// and then torch gives a result of that layout.
inline bool has_default_strides(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t axis = tensor.dim() - 1; axis >= 0; --axis) {
    if (tensor.stride(axis) != expected) return false;
    expected *= std::max<int64_t>(1, tensor.size(axis));
  }
  return true;
}

inline bool has_own_conv() { return uses(core::InstructionSet::avx512) || uses(core::InstructionSet::avx2); }

inline int64_t few_windows() {
  if (has_own_conv()) return kFewBeforeOwn;
  const bool is_scalar = core::instruction_set_in_use().load() == core::InstructionSet::scalar;
  return is_scalar ? kFewScalarWindows : kFewWindows;
}

// Whether kernels of panther's own are faster than torch's convolution, for float32 numbers in the order of their axes.
// With AVX2 its BLAS is the faster one for many columns; a weight that has to be widened first is faster here.
template <class X>
bool runs_here(const ConvOf<X>& p, int64_t out) {
  if (!p.has_numbers()) return false;
  if (p.windows() <= few_windows()) return true;
  const bool is_product = torch_multiplies(p) && product(p.positions()) > kFewWindows;
  return has_own_conv() && !torch_is_fast(p, out) && !(uses(core::InstructionSet::avx2) && is_product);
}

// The windows of a contiguous sample, or of all samples where they are joined.
struct Geometry {
  core::Windows windows;
  Sizes offsets;
  std::vector<int32_t> shifts;
  int64_t samples;   // that each have these windows
  int64_t x_sample;  // from one to the next

  Geometry(const ConvShape& p, const float* x, bool is_joined);
  Geometry(const Geometry&) = delete;  // `windows` points into it
};

// `places` and, for each of them, those of `count` neighbours that are `step` apart.
template <class T>
std::vector<T> multiplied_out(const std::vector<T>& places, int64_t count, int64_t step) {
  std::vector<T> all;
  all.reserve(places.size() * count);
  for (const T place : places) {
    for (int64_t i = 0; i < count; ++i) all.push_back(place + static_cast<T>(i * step));
  }
  return all;
}

// Axes without an edge to reach over, whose windows follow those of the last one without a step between, are one with
// it.
inline void merge(std::array<core::Axis, core::kAxes>& axes) {
  for (int axis = core::kAxes - 2; axis >= 0; --axis) {
    core::Axis &outer = axes[axis], &inner = axes[core::kAxes - 1];
    const bool is_one = outer.windows == 1 || outer.apart == inner.windows * inner.apart;
    if (outer.size != 0 || inner.size != 0 || !is_one) return;
    inner.windows *= outer.windows;
    outer = {};
  }
}

inline Geometry::Geometry(const ConvShape& p, const float* x, bool is_joined) : windows{} {
  const int64_t dims = p.dims();
  const Sizes positions = p.positions();
  Sizes apart(dims, 1);  // numbers from a place to the next one along an axis
  for (int64_t axis = dims - 1; axis > 0; --axis) apart[axis - 1] = apart[axis] * p.x.size(axis + 2);
  const int64_t volume = apart[0] * p.x.size(2);
  x_sample = p.x.size(1) * volume;
  samples = is_joined ? 1 : p.x.size(0);
  windows.numbers = x;
  windows.positions = product(positions) * (is_joined ? p.x.size(0) : 1);
  windows.taps = product(p.kernel_size);
  windows.depth = p.depth();
  if (is_joined) windows.axes[0] = {p.x.size(0), x_sample, 0, 0, 0};
  offsets = multiplied_out(Sizes{0}, p.x.size(1), volume);
  shifts.assign((core::kAxes - dims) * windows.taps, 0);
  for (int64_t axis = 0; axis < dims; ++axis) {
    const bool is_padded = p.padding[axis] > 0 || p.padding[axis + dims] > 0;
    windows.start -= p.padding[axis] * apart[axis];
    windows.axes[core::kAxes - dims + axis] = {
        positions[axis], p.stride[axis] * apart[axis], static_cast<int32_t>(-p.padding[axis]),
        static_cast<int32_t>(p.stride[axis]), is_padded ? static_cast<int32_t>(p.x.size(axis + 2)) : 0};
    offsets = multiplied_out(offsets, p.kernel_size[axis], p.dilation[axis] * apart[axis]);
    std::vector<int32_t> along{0};
    for (int64_t other = 0; other < dims; ++other) {
      along = multiplied_out(along, p.kernel_size[other], other == axis ? p.dilation[axis] : 0);
    }
    shifts.insert(shifts.end(), along.begin(), along.end());
  }
  merge(windows.axes);
  windows.offsets = offsets.data();
  windows.shifts = shifts.data();
}

// Joined samples: number (n, p, o) of `from`, wherever these strides say, -> (samples, out, positions).
struct Strides {
  int64_t sample, position, channel;
};

inline void put_channels_second(const float* from, const Strides& by, int64_t samples, int64_t positions, int64_t out,
                                float* to) {
  torch::stable::parallel_for(0, samples * out, std::max<int64_t>(1, kGrain / positions),
                              [&](int64_t first, int64_t last) {
                                for (int64_t row = first; row < last; ++row) {
                                  const float* numbers = from + row / out * by.sample + row % out * by.channel;
                                  for (int64_t i = 0; i < positions; ++i) {
                                    to[row * positions + i] = numbers[i * by.position];
                                  }
                                }
                              });
}

// All windows of all samples, side by side -> (windows, depth).
inline std::unique_ptr<float[]> unfolded(const core::Windows& x) {
  std::unique_ptr<float[]> rows(new float[x.positions * x.depth]);
  torch::stable::parallel_for(
      0, x.positions, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, x.depth)),
      [&](int64_t first, int64_t last) { core::unfold(x, first, last, rows.get() + first * x.depth); });
  return rows;
}

template <class W>
void run(const core::Conv<W>& p) {
  const int64_t windows = p.samples * p.x.positions, depth = std::max<int64_t>(1, p.x.depth);
  if (p.out > windows) {  // the weight is larger than what it is for
    const int64_t work = windows * core::kChannels * depth;
    torch::stable::parallel_for(0, core::parts_of(p.out, core::kChannels),
                                std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)),
                                [&](int64_t first, int64_t last) { core::conv_channels(p, first, last); });
    return;
  }
  const int64_t work = core::most_windows() * core::kChannels * depth;
  torch::stable::parallel_for(0, core::parts_of(p), std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) { core::conv(p, first, last); });
}

// How many windows of a chain are packed at a time: as many as stay in the second cache with what becomes of them, and
// that leave a part for each thread.
inline int64_t windows_at_once(const core::Conv<core::Plain<float>>& down, int64_t rank) {
  const int64_t room = uses(core::InstructionSet::avx2) ? kChainRoom : 2 * kChainRoom;
  const int64_t depth = core::depth_at_once(down.x.depth), threads = torch::stable::get_num_threads();
  const int64_t fitting = room / std::max<int64_t>(1, depth + rank);
  const int64_t shared = core::parts_of(down.samples * down.x.positions, threads) + core::kUnit - 1;
  return std::clamp(std::min(fitting, shared) / core::kUnit * core::kUnit, core::kUnit, core::kMostWindows);
}

// A chain: `down` with the weight of the first convolution, and all else as in one.
inline void run_chain(const core::Conv<core::Plain<float>>& down, const core::Plain<float>& up) {
  const core::LowRankConv p{down, up, windows_at_once(down, up.in)};
  const int64_t work = p.windows * std::max<int64_t>(1, up.in * (down.x.depth + down.out));
  torch::stable::parallel_for(0, core::parts_of(p), std::max<int64_t>(1, kGrain / work),
                              [&](int64_t first, int64_t last) { core::low_rank_conv(p, first, last); });
}

// Few windows: `thin(rows, count, found)` multiplies (count, depth) into (count, out). x is contiguous float, and so is
// y.
template <class Thin>
void conv_of_few(const ConvShape& p, const Tensor& x, int64_t out, float* y, const Thin& thin) {
  const Geometry of(p, numbers<float>(x), true);
  const int64_t samples = x.size(0), all = of.windows.positions;
  const std::unique_ptr<float[]> rows = unfolded(of.windows), found(new float[all * out]);
  thin(rows.get(), all, found.get());
  put_channels_second(found.get(), {all / samples * out, out, 1}, samples, all / samples, out, y);
}

// Many windows: `convolve` gets a core::Conv of w.
template <class W, class Convolve>
void conv_of_many(const ConvShape& p, const Tensor& x, const W& w, const float* bias, int64_t out, float* y,
                  const Convolve& convolve) {
  const int64_t samples = x.size(0), each = product(p.positions());
  const bool is_joined = samples > 1 && each < kJoined;
  const Geometry of(p, numbers<float>(x), is_joined);
  if (!is_joined)
    return convolve(core::Conv<W>{of.windows, w, bias, {y, each, each}, out, samples, of.x_sample, out * each});
  const int64_t all = samples * each;
  if (each >= kJoinedInPlace) {
    return convolve(core::Conv<W>{of.windows, w, bias, {y, each, each, (out - 1) * each}, out, 1, 0, 0});
  }
  const std::unique_ptr<float[]> found(new float[all * out]);
  convolve(core::Conv<W>{of.windows, w, bias, {found.get(), all, all}, out, 1, 0, 0});
  put_channels_second(found.get(), {each, 1, all}, samples, each, out, y);
}

template <class W>
void conv_of_many(const ConvShape& p, const Tensor& x, const W& w, const float* bias, int64_t out, float* y) {
  conv_of_many(p, x, w, bias, out, y, [](const core::Conv<W>& whole) { run(whole); });
}

// torch's own convolution pads both sides of an axis alike; the rest is padded before.
inline Tensor torch_conv(const ConvShape& p, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  Sizes common, more;
  for (int64_t axis = p.dims() - 1; axis >= 0; --axis) {
    const int64_t before = p.padding[axis], after = p.padding[axis + p.dims()], both = std::min(before, after);
    common.insert(common.begin(), both);
    more.insert(more.end(), {before - both, after - both});
  }
  const bool has_more = std::any_of(more.begin(), more.end(), [](int64_t amount) { return amount > 0; });
  const Tensor x = has_more ? torch::stable::pad(p.x, more) : p.x;
  const Sizes zeros(p.kernel_size.size(), 0);
  std::array<StableIValue, 9> stack{from(x),          from(weight), from(bias),  from(p.stride),  from(common),
                                    from(p.dilation), from(false),  from(zeros), from(int64_t{1})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x with a batch, where it has none for so many axes, and the result without it.
inline Tensor batched(const Tensor& x, size_t dims) {
  const bool is_one = dims > 0 && x.dim() == static_cast<int64_t>(dims) + 1;
  return is_one ? torch::stable::unsqueeze(x, 0) : x;
}

inline Tensor like_given(const Tensor& y, const Tensor& given) {
  return given.dim() < y.dim() ? torch::stable::squeeze(y, 0) : y;
}

// torch's own convolution, or panther's where that is faster. x has a batch; all fit together.
inline Tensor fast_conv(const ConvShape& shape, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor& x = shape.x;
  const int64_t out = weight.size(0);
  const bool is_plain = x.scalar_type() == ScalarType::Float && has_default_strides(x) && has_default_strides(weight);
  if (!is_plain || !runs_here(shape, out)) return torch_conv(shape, weight, bias);
  const Tensor offset = bias ? packed(*bias) : Tensor();
  const core::Plain<float> w{numbers<float>(weight), shape.depth()};
  const float* added = bias ? numbers<float>(offset) : nullptr;
  const Tensor y = torch::stable::new_empty(x, shape.result_size(out));
  float* to = static_cast<float*>(y.mutable_data_ptr());
  if (shape.windows() <= few_windows()) {
    conv_of_few(shape, x, out, to, [&](const float* rows, int64_t count, float* found) {
      run_few({rows, w, added, found, count, w.in, out, w.in, out});
    });
  } else {
    conv_of_many(shape, x, w, added, out, to);
  }
  return y;
}

}  // namespace panther

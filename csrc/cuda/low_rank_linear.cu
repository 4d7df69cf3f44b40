// panther::low_rank_linear on CUDA: y = (x down^T) up^T + bias.
//
// Few rows of float32, bfloat16 or float16 run in the kernel below, once for each factor; the rest is two products of
// torch's own. Bytes moved by the kernel: those of R * (in + out) numbers, each factor once, plus x, y and
// rows * R floats between. All is enqueued on torch's current stream and nothing waits, so a CUDA graph can hold it.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "core/warp_thin_linear.h"
#include "low_rank_linear.h"

namespace {

using namespace panther;
using namespace panther::warp;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kThreads = 128;  // four warps: many small blocks spread evenly over the processors

// A warp computes `Rows` rows and columns_at_once(Rows) columns of y; its lanes share the sum over k.
template <int Rows, int Count, class X, class W, class Y>
__global__ void __launch_bounds__(kThreads) thin_linear_kernel(const ThinLinear<X, W, Y> p) {
  constexpr int kColumns = columns_at_once(Rows);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t column = warp * kColumns;
  if (column >= p.out) return;
  float sums[Rows][kColumns] = {};
  add_up<Rows, Count>(p, column, lane, sums);
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float sum = sums[i][j];
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      if (lane == (i * kColumns + j) % kLanes) store(p, i, column + j, sum);
    }
  }
}

template <int Rows, int Count, class X, class W, class Y>
void launch(const ThinLinear<X, W, Y>& p, cudaStream_t stream) {
  constexpr int64_t kColumnsOfBlock = kThreads / kLanes * columns_at_once(Rows);
  const unsigned blocks = static_cast<unsigned>((p.out + kColumnsOfBlock - 1) / kColumnsOfBlock);
  thin_linear_kernel<Rows, Count><<<blocks, kThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int Count, class X, class W, class Y>
void launch_for_rows(const ThinLinear<X, W, Y>& p, cudaStream_t stream) {
  if (p.rows == 1) return launch<1, Count>(p, stream);
  if (p.rows <= 4) return launch<4, Count>(p, stream);
  if (p.rows <= 8) return launch<8, Count>(p, stream);
  launch<kMostRows, Count>(p, stream);
}

template <class X, class W, class Y>
void thin_linear(const ThinLinear<X, W, Y>& p, cudaStream_t stream) {
  if (p.out == 0) return;  // a grid without blocks is an error
  const int count = numbers_at_once(p);
  count == 1 ? launch_for_rows<1>(p, stream) : launch_for_rows<16 / sizeof(W)>(p, stream);
}

// x (rows, in) -> y (rows, out), all contiguous. `inner` is float and goes back to torch's allocator, which gives it
// only to later work on the same stream.
template <class W>
void few_rows(const Inputs& inputs, int64_t rows, const Tensor& y, cudaStream_t stream) {
  const Tensor inner = torch::stable::new_empty(inputs.x, {rows, inputs.rank()}, ScalarType::Float);
  float* between = static_cast<float*>(inner.mutable_data_ptr());
  const W* bias = inputs.bias ? numbers<W>(*inputs.bias) : nullptr;
  thin_linear<W, W, float>(
      {numbers<W>(inputs.x), numbers<W>(inputs.down), nullptr, between, rows, inputs.in(), inputs.rank()}, stream);
  thin_linear<float, W, W>(
      {between, numbers<W>(inputs.up), bias, static_cast<W*>(y.mutable_data_ptr()), rows, inputs.rank(), inputs.out()},
      stream);
}

using FewRows = void (*)(const Inputs&, int64_t, const Tensor&, cudaStream_t);

// The kernel for this type of numbers, or null.
FewRows few_rows_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return few_rows<float>;
    case ScalarType::BFloat16: return few_rows<BFloat16>;
    case ScalarType::Half: return few_rows<Half>;
    default: return nullptr;
  }
}

std::string device_text(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "cpu";
}

// Where one input is on a GPU, torch calls this file whatever the others are on.
void check_devices(const Inputs& inputs) {
  const int32_t device = inputs.x.get_device_index();
  if (!inputs.all([&](const Tensor& tensor) { return tensor.is_cuda() && tensor.get_device_index() == device; })) {
    throw std::invalid_argument("low_rank_linear: expected one device for x, down, up, bias; got " +
                                inputs.list(device_text, false));
  }
}

cudaStream_t current_stream(int32_t device) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor low_rank_linear(const Tensor& x, const Tensor& down, const Tensor& up, const std::optional<Tensor>& bias) {
  const Inputs inputs{x, down, up, bias};
  check(inputs);
  check_devices(inputs);
  const int64_t rows = inputs.in() ? x.numel() / inputs.in() : 0;
  const FewRows few_rows = few_rows_of(x.scalar_type());
  if (!few_rows || rows < 1 || rows > kMostRows) return linear(linear(x, down, {}), up, bias);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = new_output(inputs);
  const Tensor packed_x = packed(x), packed_down = packed(down), packed_up = packed(up);
  const std::optional<Tensor> packed_bias = bias ? std::optional<Tensor>(packed(*bias)) : std::nullopt;
  few_rows({packed_x, packed_down, packed_up, packed_bias}, rows, y, current_stream(x.get_device_index()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(panther, CUDA, library) { library.impl("low_rank_linear", TORCH_BOX(&low_rank_linear)); }

// PyTorch's side of the kernels in block_linear.h and attention.h: the operators blockvit::cpu_linear and
// blockvit::cpu_attention and, the same without autograd, cpu_linear_no_grad and cpu_attention_no_grad, on PyTorch's own
// threads (at::parallel_for).
// Written against PyTorch's stable ABI: its headers compile in 3 seconds where those of at::Tensor take 12 and
// <torch/extension.h> a minute, and a call costs the same (5 microseconds; through an operator written in Python 10 to
// 20).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "attention.h"
#include "block_linear.h"
#include "peak.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// On PyTorch's threads. Inside another parallel region PyTorch calls the function once, and that call takes all units.
struct TorchThreads {
  template <typename Body>
  void operator()(int64_t threads, const Body& body) const {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(); });
  }
};

// The packed weight tells the sizes: (blocks * b / NR, b, NR) in float32, (blocks * b / NR, b / 2, NR, 2) in bfloat16.
struct Sizes {
  int64_t block_size, panel_width, rows;
};

Sizes check(const Tensor& x, const Tensor& weight, const Tensor& crow, const Tensor& col, bool is_bf16) {
  STD_TORCH_CHECK(weight.dim() == (is_bf16 ? 4 : 3), "blockvit::cpu_linear: packed weight has ", weight.dim(),
                  " dimensions; expected 3 in float32, 4 in bfloat16: pack it for this dtype");
  const Sizes sizes{weight.size(1) * (is_bf16 ? 2 : 1), weight.size(2), crow.size(0) - 1};
  STD_TORCH_CHECK(blockvit::is_panel_width(sizes.panel_width) && sizes.block_size > 0 &&
                      sizes.block_size % sizes.panel_width == 0 && weight.is_contiguous(),
                  "blockvit::cpu_linear: packed weight has panels of ", sizes.panel_width, " outputs in blocks of ",
                  sizes.block_size, "; expected contiguous panels of 8, 16 or 32 that divide the block size");
  STD_TORCH_CHECK(crow.scalar_type() == ScalarType::Int && col.scalar_type() == ScalarType::Int &&
                      crow.is_contiguous() && col.is_contiguous(),
                  "blockvit::cpu_linear: expected contiguous int32 indices");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % sizes.block_size == 0, "blockvit::cpu_linear: expected x of shape "
                  "(tokens, inputs), inputs a multiple of the block size ", sizes.block_size);
  // Columns ascend within a row, so the last one is the largest.
  const int32_t *rows = data<int32_t>(crow), *columns = data<int32_t>(col);
  const int64_t block_columns = x.size(1) / sizes.block_size;
  const int64_t runs = col.size(0) * sizes.block_size / sizes.panel_width;
  STD_TORCH_CHECK(rows[sizes.rows] == col.size(0) && runs == weight.size(0),
                  "blockvit::cpu_linear: ", weight.size(0), " packed panels do not belong to ", col.size(0), " blocks");
  for (int64_t row = 0; row < sizes.rows; ++row) {
    STD_TORCH_CHECK(rows[row] == rows[row + 1] || columns[rows[row + 1] - 1] < block_columns,
                    "blockvit::cpu_linear: x has ", x.size(1), " features, fewer than the weight reads");
  }
  return sizes;
}

// Contiguous. new_empty through the dispatcher costs 2 microseconds more.
Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like) {
  int64_t strides[4], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype, device_type, 0, &handle));
  return Tensor(handle);
}

template <typename T>
Tensor run(const Tensor& x, const Tensor& weight, const Tensor& crow, const Tensor& col,
           const std::optional<Tensor>& bias, int64_t activation, const Sizes& sizes) {
  const int64_t outputs = sizes.rows * sizes.block_size;
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->numel() == outputs && bias->scalar_type() == x.scalar_type()),
                  "blockvit::cpu_linear: expected a bias of ", outputs, " numbers of x's dtype");
  const Tensor offsets = !bias || bias->is_contiguous() ? bias.value_or(Tensor()) : torch::stable::contiguous(*bias);
  Tensor y = empty({x.size(0), outputs}, x);
  const blockvit::Layer<T> layer{
      data<T>(x),
      data<T>(weight),
      data<int32_t>(crow),
      data<int32_t>(col),
      bias ? data<T>(offsets) : nullptr,
      static_cast<T*>(y.mutable_data_ptr()),
      x.size(0),
      x.size(1),
      outputs,
      x.stride(0),
      sizes.block_size,
      blockvit::Activation(activation),
  };
  blockvit::block_linear(layer, sizes.panel_width, torch::stable::get_num_threads(), TorchThreads{});
  return y;
}

Tensor cpu_linear(const Tensor& x, const Tensor& weight, const Tensor& crow, const Tensor& col,
                  const std::optional<Tensor>& bias, int64_t activation) {
  const bool is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((is_bf16 || x.scalar_type() == ScalarType::Float) && weight.scalar_type() == x.scalar_type(),
                  "blockvit::cpu_linear: expected x and weight both float32 or both bfloat16");
  STD_TORCH_CHECK(activation >= blockvit::NONE && activation <= blockvit::GELU_TANH,
                  "blockvit::cpu_linear: activation is ", activation, "; expected 0 (none), 1 (gelu) or 2 (gelu_tanh)");
  const Sizes sizes = check(x, weight, crow, col, is_bf16);
  // Rows may lie anywhere, also all at one place; within a row the numbers must be neighbours.
  const Tensor rows = x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  return is_bf16 ? run<blockvit::bf16>(rows, weight, crow, col, bias, activation, sizes)
                 : run<float>(rows, weight, crow, col, bias, activation, sizes);
}

template <typename T>
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto heads = [](const Tensor& t) {
    return blockvit::Heads<T>{data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
  };
  Tensor y = empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q);
  const blockvit::Attention<T> attention{
      heads(q),  heads(k),  heads(v),  static_cast<T*>(y.mutable_data_ptr()),
      q.size(0), q.size(1), q.size(2), k.size(2), q.size(3),
  };
  blockvit::attend(attention, torch::stable::get_num_threads(), TorchThreads{});
  return y;
}

Tensor cpu_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  const bool is_bf16 = q.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((is_bf16 || q.scalar_type() == ScalarType::Float) && k.scalar_type() == q.scalar_type() &&
                      v.scalar_type() == q.scalar_type(),
                  "blockvit::cpu_attention: expected q, k and v all float32 or all bfloat16");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "blockvit::cpu_attention: expected q, k and v of shape (batch, heads, tokens, size)");
  for (const int64_t i : {0, 1, 3}) {
    STD_TORCH_CHECK(k.size(i) == q.size(i) && v.size(i) == q.size(i), "blockvit::cpu_attention: q, k and v have ",
                    q.size(i), ", ", k.size(i), " and ", v.size(i), " in dimension ", i, "; expected the same");
  }
  STD_TORCH_CHECK(k.size(2) == v.size(2) && k.size(2) > 0, "blockvit::cpu_attention: ", k.size(2), " keys and ",
                  v.size(2), " values; expected as many of each, at least one");
  // Tokens may lie anywhere; the numbers of one must be neighbours.
  const auto neighbours = [](const Tensor& t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); };
  return is_bf16 ? attend<blockvit::bf16>(neighbours(q), neighbours(k), neighbours(v))
                 : attend<float>(neighbours(q), neighbours(k), neighbours(v));
}

int64_t cpu_panel_width(int64_t block_size) { return blockvit::panel_width(block_size); }

// Floating-point operations that a call of blockvit::cpu_multiply_adds does, on all of PyTorch's threads.
double cpu_multiply_adds(int64_t rounds, bool in_bf16) {
  const auto of_one_core = in_bf16 ? blockvit::multiply_add_bf16 : blockvit::multiply_add;
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) of_one_core(rounds);
  });
  return of_one_core(1) * double(rounds) * double(threads);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blockvit, library) {
  library.def("cpu_linear(Tensor x, Tensor weight, Tensor crow, Tensor col, Tensor? bias, int activation) -> Tensor");
  library.def(
      "cpu_linear_no_grad(Tensor x, Tensor weight, Tensor crow, Tensor col, Tensor? bias, int activation) -> Tensor");
  library.def("cpu_attention(Tensor q, Tensor k, Tensor v) -> Tensor");
  library.def("cpu_attention_no_grad(Tensor q, Tensor k, Tensor v) -> Tensor");
  library.def("cpu_panel_width(int block_size) -> int");
  library.def("cpu_multiply_adds(int rounds, bool in_bf16) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(blockvit, CPU, library) {
  library.impl("cpu_linear", TORCH_BOX(&cpu_linear));
  library.impl("cpu_linear_no_grad", TORCH_BOX(&cpu_linear));
  library.impl("cpu_attention", TORCH_BOX(&cpu_attention));
  library.impl("cpu_attention_no_grad", TORCH_BOX(&cpu_attention));
}

STABLE_TORCH_LIBRARY_IMPL(blockvit, CompositeExplicitAutograd, library) {
  library.impl("cpu_panel_width", TORCH_BOX(&cpu_panel_width));
  library.impl("cpu_multiply_adds", TORCH_BOX(&cpu_multiply_adds));
}

// Block-sparse linear layer for CPUs: y = activation(x W^T + bias), W block-sparse, float32 or bfloat16.
//
// One source for every instruction set: vectors are those of the compiler (`vector_size`), and LANES is all that
// differs. No header of PyTorch is needed here, so that the kernel can be tested alone, under sanitizers.
//
// The arithmetic is done in tiles of `mr` tokens x NR outputs that stay in registers over all blocks of a block row:
// each step in k loads NR weights, broadcasts one number of each token, and y is written once, activation included.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace blockvit {

// --- what the instruction set has ------------------------------------------------------------------------------------

#ifndef BLOCKVIT_LANES  // float32 numbers in a vector register
#if defined(__AVX512F__)
#define BLOCKVIT_LANES 16
#elif defined(__AVX2__)
#define BLOCKVIT_LANES 8
#else
#define BLOCKVIT_LANES 4
#endif
#endif

#ifndef BLOCKVIT_REGISTERS
#if defined(__AVX512F__) || defined(__aarch64__)
#define BLOCKVIT_REGISTERS 32
#else
#define BLOCKVIT_REGISTERS 16
#endif
#endif
constexpr int REGISTERS = BLOCKVIT_REGISTERS;

// Vectors of sums a tile holds. What they leave of the registers is for weights, a token's number and a mask. 12 hide
// the latency of two FMA units (2 x 4 cycles = 8).
constexpr int ACCUMULATORS = REGISTERS == 32 ? 24 : 12;
constexpr int MAX_TOKENS = 12;  // in a tile; more only lengthens the code, one instance for each number of tokens

template <int NR>
constexpr int LANES = NR < BLOCKVIT_LANES ? NR : BLOCKVIT_LANES;

// Tokens of a full tile that is NR outputs wide.
template <int NR>
constexpr int MR = std::clamp(ACCUMULATORS * LANES<NR> / NR, 1, MAX_TOKENS);

template <int N>
struct Vector {
  typedef float f32 __attribute__((vector_size(4 * N)));
  typedef uint32_t u32 __attribute__((vector_size(4 * N)));
  typedef int32_t i32 __attribute__((vector_size(4 * N)));
  typedef uint16_t u16 __attribute__((vector_size(2 * N)));
  // In memory: aligned as its elements are, and of any type.
  typedef float f32_in_memory __attribute__((vector_size(4 * N), aligned(4), may_alias));
  typedef uint32_t u32_in_memory __attribute__((vector_size(4 * N), aligned(2), may_alias));
  typedef uint16_t u16_in_memory __attribute__((vector_size(2 * N), aligned(2), may_alias));
};
template <int N>
using f32v = typename Vector<N>::f32;
template <int N>
using u32v = typename Vector<N>::u32;

constexpr int64_t LINE = 64;  // bytes that the caches move together

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define BLOCKVIT_INLINE inline __attribute__((always_inline))

// --- bfloat16 --------------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

BLOCKVIT_INLINE float widen(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

template <int N>
BLOCKVIT_INLINE f32v<N> load(const float* from) {
  return *reinterpret_cast<const typename Vector<N>::f32_in_memory*>(from);
}

template <int N>
BLOCKVIT_INLINE f32v<N> load(const bf16* from) {
  const auto narrow = *reinterpret_cast<const typename Vector<N>::u16_in_memory*>(from);
  return (f32v<N>)(__builtin_convertvector(narrow, u32v<N>) << 16);
}

template <int N>
BLOCKVIT_INLINE void store(float* to, f32v<N> values) {
  *reinterpret_cast<typename Vector<N>::f32_in_memory*>(to) = values;
}

// Rounds to the nearest, ties to even; NaN stays NaN.
template <int N>
BLOCKVIT_INLINE void store(bf16* to, f32v<N> values) {
  const auto bits = (u32v<N>)values;
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto is_number = (u32v<N>)(values == values);
  const auto result = (rounded & is_number) | (0x7fc0 & ~is_number);
  *reinterpret_cast<typename Vector<N>::u16_in_memory*>(to) =
      __builtin_convertvector(result, typename Vector<N>::u16);
}

// --- activations -----------------------------------------------------------------------------------------------------

enum Activation : int64_t { NONE = 0, GELU = 1, GELU_TANH = 2 };

template <int N>
BLOCKVIT_INLINE f32v<N> polynomial(f32v<N> x, std::initializer_list<float> highest_first) {
  const float* coefficient = highest_first.begin();
  f32v<N> sum = f32v<N>{} + *coefficient;
  while (++coefficient != highest_first.end()) sum = sum * x + *coefficient;
  return sum;
}

// 2^x for x in [-126, 126]; relative error 2e-7.
template <int N>
BLOCKVIT_INLINE f32v<N> exp2(f32v<N> x) {
  constexpr float ROUNDS = 12582912.0f;  // 1.5 * 2^23: a sum with it has no room for a fraction
  const f32v<N> whole = x + ROUNDS;
  const u32v<N> exponent = (u32v<N>)whole << 23;
  const f32v<N> fraction = x - (whole - ROUNDS);
  const f32v<N> power = polynomial<N>(fraction, {1.32764713e-3f, 9.67554189e-3f, 5.55071346e-2f, 2.40221202e-1f,
                                                 6.93146944e-1f, 1.00000012f});
  return (f32v<N>)((u32v<N>)power + exponent);
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), and Phi(-a) = exp(-a^2 / 2) times a smooth function, here a fitted quotient.
// Absolute error below 1e-7 for x < 0, relative error below 3e-7 for x > 0 (against float64); PyTorch's: 3e-7, 5e-7.
// Beyond 11.7 nothing changes any more (2^-98), and further out the products would be subnormal, which are slow.
template <int N>
BLOCKVIT_INLINE f32v<N> gelu(f32v<N> x) {
  const f32v<N> zero{}, far = zero + 11.7f;
  const f32v<N> size = (f32v<N>)((u32v<N>)x & 0x7fffffffu);
  const f32v<N> a = size < far ? size : far;  // NaN goes far
  const f32v<N> bell = exp2<N>(a * a * -0.72134751f);  // log2(e) / 2
  const f32v<N> above = polynomial<N>(a, {1.21568684e-2f, 9.75437462e-2f, 3.21173936e-1f, 4.99999940e-1f});
  const f32v<N> below = polynomial<N>(a, {3.05059105e-2f, 2.43706167e-1f, 8.44241858e-1f, 1.44023013f, 1.0f});
  return (zero > x ? zero : x) - a * bell * (above / below);  // NaN stays NaN
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
// Below -10 nothing changes any more: the result is -1e-37, and the exponent just below 126.
template <int N>
BLOCKVIT_INLINE f32v<N> gelu_tanh(f32v<N> x) {
  const f32v<N> low = f32v<N>{} - 10.0f, lowest = f32v<N>{} - 100.0f;
  x = low > x ? low : x;  // NaN stays NaN
  f32v<N> exponent = x * (x * x * -0.102943242f + -2.30220819f);  // both times log2(e)
  exponent = exponent > lowest ? exponent : lowest;
  return x / (exp2<N>(exponent) + 1.0f);
}

// --- the work --------------------------------------------------------------------------------------------------------

// A panel is NR neighbouring outputs; block row r holds the panels r * b / NR to (r + 1) * b / NR - 1. The weights of a
// panel lie in one run of memory, in the order in which they are read: [block][k][NR] in float32 and, two neighbours in
// k side by side as the bfloat16 instructions want them, [block][k / 2][NR][2] in bfloat16.
template <typename T>
struct Layer {
  const T* x;            // (tokens, inputs), rows x_stride apart
  const T* weight;       // (stored blocks * block_size / NR) runs of block_size * NR
  const int32_t* crow;   // (block rows + 1)
  const int32_t* col;    // (stored blocks)
  const T* bias;         // (outputs) or null
  T* y;                  // (tokens, outputs), contiguous
  int64_t tokens, inputs, outputs, x_stride, block_size;
  Activation activation;
};

template <int NR, typename T>
struct Panel {
  const T* weight;
  const int32_t* col;
  int64_t blocks;
  int64_t output;  // the first

  Panel(const Layer<T>& layer, int64_t index) {
    const int64_t b = layer.block_size, panels = b / NR, row = index / panels;
    const int64_t first = layer.crow[row];
    blocks = layer.crow[row + 1] - first;
    weight = layer.weight + first * b * b + (index % panels) * blocks * b * NR;
    col = layer.col + first;
    output = index * NR;
  }
};

// --- one tile --------------------------------------------------------------------------------------------------------

#define BLOCKVIT_UNROLL _Pragma("GCC unroll 16")

template <int mr, int NR>
using Sums = f32v<LANES<NR>>[mr][NR / LANES<NR>];

// sums += x[:, 0:b] @ weight, in float32.
template <int mr, int NR>
BLOCKVIT_INLINE void add_block(Sums<mr, NR>& sums, const float* x, int64_t x_stride, const float* weight, int64_t b) {
  constexpr int N = LANES<NR>, V = NR / N;
  for (int64_t k = 0; k < b; ++k, ++x, weight += NR) {
    f32v<N> w[V];
    BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) w[v] = load<N>(weight + v * N);
    BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) {
      BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) sums[m][v] += w[v] * x[m * x_stride];
    }
  }
}

BLOCKVIT_INLINE uint32_t pair(const bf16* from) {
  uint32_t both;
  std::memcpy(&both, from, 4);
  return both;
}

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
BLOCKVIT_INLINE f32v<16> dot_pairs(f32v<16> sum, u32v<16> w, u32v<16> x) {
  return (f32v<16>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}
BLOCKVIT_INLINE f32v<8> dot_pairs(f32v<8> sum, u32v<8> w, u32v<8> x) {
  return (f32v<8>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)w, (__m256bh)x);
}
#endif

// The same from pairs of bfloat16. Widening one is a shift (the even k) or a mask (the odd k) of the pair: whole-number
// work that goes to other ports than the multiply-adds.
template <int mr, int NR>
BLOCKVIT_INLINE void add_block(Sums<mr, NR>& sums, const bf16* x, int64_t x_stride, const bf16* weight, int64_t b) {
  constexpr int N = LANES<NR>, V = NR / N;
  using in_memory = typename Vector<N>::u32_in_memory;
  for (int64_t k = 0; k < b; k += 2, x += 2, weight += 2 * NR) {
    u32v<N> w[V];
    BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) w[v] = *reinterpret_cast<const in_memory*>(weight + 2 * v * N);
    BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) {
      const u32v<N> both = u32v<N>{} + pair(x + m * x_stride);
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
      BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) sums[m][v] = dot_pairs(sums[m][v], w[v], both);
#else
      const f32v<N> even = (f32v<N>)(both << 16), odd = (f32v<N>)(both & 0xffff0000u);
      BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) {
        sums[m][v] += (f32v<N>)(w[v] << 16) * even;
        sums[m][v] += (f32v<N>)(w[v] & 0xffff0000u) * odd;
      }
#endif
    }
  }
}

template <int NR, typename T, typename Function>
BLOCKVIT_INLINE void apply(const Layer<T>& layer, const float* sums, int64_t output, int64_t first_token,
                           int64_t last_token, const Function& function) {
  constexpr int N = LANES<NR>;
  T* y = layer.y + first_token * layer.outputs + output;
  for (int64_t token = first_token; token < last_token; ++token, y += layer.outputs, sums += NR) {
    BLOCKVIT_UNROLL for (int v = 0; v < NR; v += N) store<N>(y + v, function(load<N>(sums + v)));
  }
}

// y[tokens, panel] = activation(sums). For all tokens of a unit at once, so that the processor finds vectors enough to
// work on side by side: 3% of a layer with GELU.
template <int NR, typename T>
void finish(const Layer<T>& layer, const float* sums, int64_t output, int64_t first_token, int64_t last_token) {
  using V = f32v<LANES<NR>>;
  if (layer.activation == GELU) {
    apply<NR>(layer, sums, output, first_token, last_token, [](V x) { return gelu<LANES<NR>>(x); });
  } else {
    apply<NR>(layer, sums, output, first_token, last_token, [](V x) { return gelu_tanh<LANES<NR>>(x); });
  }
}

// Sums of more products than about this are added up in parts, for two reasons. The weights of a part (16 outputs: 6
// KiB) stay in the first-level cache while all tokens of a unit pass by. And rounding errors grow with the square root
// of the number of products added in one run. PyTorch's dense linear adds 128, most of them zeros where the weight is
// sparse. Largest error, as a multiple of its own, over shapes and sparsities of ViT-B/16: 2.9 with parts of 256, 2.1
// with 128 (with blocks of 32 and less; 1.3 above), 1.7 with 64, which is 3% slower.
constexpr int64_t PART = 96;

// Where a tile finds its tokens: element k of input block c of its token m is x[c * block_stride + m * stride + k].
template <typename T>
struct Tokens {
  const T* x;
  int64_t stride, block_stride;
};

// What a tile does: `blocks` blocks of the panel from `first_block` on, for the tokens from `token` on.
struct Step {
  int64_t token, first_block, blocks;
  float* totals;  // (mr, NR): sums of the parts before; and, unless they go to y at once, of this one
  bool first, last;
};

template <int mr, int NR, typename T>
void tile(const Layer<T>& layer, const Panel<NR, T>& panel, const Tokens<T>& tokens, const Step& step) {
  constexpr int N = LANES<NR>, V = NR / N, IN_LINE = LINE / sizeof(T);
  Sums<mr, NR> sums{};
  T* const y = layer.y + step.token * layer.outputs + panel.output;
  if (step.last) {
    // The rows of y lie far apart. Asked for now, they are there when the sums are: 1.05 to 1.2 times faster at 90%.
    BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) {
      BLOCKVIT_UNROLL for (int i = 0; i < NR; i += IN_LINE) __builtin_prefetch(y + m * layer.outputs + i, 1, 3);
    }
  }
  const int64_t b = layer.block_size;
  const T* weight = panel.weight + step.first_block * b * NR;
  const int32_t* col = panel.col + step.first_block;
  for (int64_t i = 0; i < step.blocks; ++i, weight += b * NR) {
    add_block<mr, NR>(sums, tokens.x + col[i] * tokens.block_stride, tokens.stride, weight, b);
  }
  if (!step.first) {
    BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) {
      BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) sums[m][v] += load<N>(step.totals + m * NR + v * N);
    }
  }
  // The bias comes last: sums that start with it are larger all the way, and so are their rounding errors (1.7 times).
  if (step.last && layer.bias) {
    BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) {
      const f32v<N> bias = load<N>(layer.bias + panel.output + v * N);
      BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) sums[m][v] += bias;
    }
  }
  if (step.last && layer.activation == NONE) {
    BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) {
      BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) store<N>(y + m * layer.outputs + v * N, sums[m][v]);
    }
    return;
  }
  BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) {
    BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) store<N>(step.totals + m * NR + v * N, sums[m][v]);
  }
}

// The tile functions for 1, 2, ... MR<NR> tokens.
template <int NR, typename T>
struct Tiles {
  using Function = void (*)(const Layer<T>&, const Panel<NR, T>&, const Tokens<T>&, const Step&);
  template <int... i>
  static constexpr Function at(int mr, std::integer_sequence<int, i...>) {
    constexpr Function functions[] = {tile<i + 1, NR, T>...};
    return functions[mr - 1];
  }
  static Function of(int mr) { return at(mr, std::make_integer_sequence<int, MR<NR>>{}); }
};

// --- sharing it out --------------------------------------------------------------------------------------------------

// x of the tokens that are worked on at once is to stay in a core's second-level cache beside the weights that stream
// by. 192 to 384 KiB are alike at 768 inputs; at 3072 a larger tile means that the weights stream by less often (up to
// 1.1 times faster).
#ifndef BLOCKVIT_CACHE_KIB
#define BLOCKVIT_CACHE_KIB 384
#endif
constexpr int64_t CACHE_BYTES = BLOCKVIT_CACHE_KIB << 10;
// Tokens of a unit at most: their sums (16 outputs: 8 KiB) stay in the first-level cache beside a part of the weights.
constexpr int64_t MAX_UNIT_TOKENS = 120;
// Per panel and thread: what it costs beside its blocks, in steps of k.
constexpr int64_t PANEL_OVERHEAD = 16;
// Units of work a thread, so that none waits long for the last.
constexpr int64_t UNITS_PER_THREAD = 16;
// Multiply-adds below which waking another thread costs more than it saves.
constexpr int64_t GRAIN = 1 << 19;

// Tokens x panels, cut into units of about the same work. Block rows differ in length, so panels are cut where the
// running sum of blocks says; a unit is a range of tokens and a range of panels. A thread stays with a range of tokens,
// which it copies together once, as long as there are panels left to do for it, and then helps with another: at 90%
// sparsity and 197 tokens 1.1 to 1.3 times as fast on 4 threads as taking units in one order for all.
template <int NR, typename T>
class Plan {
 public:
  Plan(const Layer<T>& layer, int64_t threads) : layer_(layer) {
    const int64_t rows = layer.outputs / layer.block_size;
    panels_ = layer.outputs / NR;
    steps_ = layer.crow[rows] * (layer.block_size / NR) * layer.block_size + panels_ * PANEL_OVERHEAD;
    threads_ = std::clamp<int64_t>(layer.tokens * steps_ * NR / GRAIN, 1, threads);
    const int64_t fit = std::max<int64_t>(CACHE_BYTES / (layer.inputs * int64_t(sizeof(T))), MR<NR>);
    token_cuts_ = ceil_div(layer.tokens, std::min(fit, MAX_UNIT_TOKENS / MR<NR> * MR<NR>));
    tokens_ = ceil_div(ceil_div(layer.tokens, token_cuts_), MR<NR>) * MR<NR>;
    token_cuts_ = ceil_div(layer.tokens, tokens_);
    panel_cuts_ = threads_ == 1 ? 1 : std::min(panels_, ceil_div(threads_ * UNITS_PER_THREAD, token_cuts_));
    taken_ = std::vector<std::atomic<int64_t>>(token_cuts_);
  }

  int64_t threads() const { return threads_; }

  // The share of one thread; all are done when as many as there are threads, or one alone, have returned. A core may be
  // busy with other work: units go to whoever is free.
  void work() {
    const int64_t start = arrived_++ * token_cuts_ / threads_;
    for (int64_t i = 0; i < token_cuts_; ++i) {
      const int64_t token_cut = (start + i) % token_cuts_;
      int64_t panel_cut = taken_[token_cut]++;
      if (panel_cut >= panel_cuts_) continue;
      const int64_t first_token = token_cut * tokens_;
      const int64_t last_token = std::min(first_token + tokens_, layer_.tokens);
      // For the last panels of another thread's tokens copying would take longer than it saves.
      const Tokens<T> tokens = 2 * panel_cut > panel_cuts_ ? in_place(first_token)
                                                           : gather(first_token, last_token - first_token);
      for (; panel_cut < panel_cuts_; panel_cut = taken_[token_cut]++) {
        const int64_t last_panel = panel_at(panel_cut + 1);
        for (int64_t index = panel_at(panel_cut); index < last_panel; ++index) {
          run_panel(Panel<NR, T>(layer_, index), tokens, first_token, last_token);
        }
      }
    }
  }

 private:
  Tokens<T> in_place(int64_t first_token) const {
    return {layer_.x + first_token * layer_.x_stride, layer_.x_stride, layer_.block_size};
  }

  // The unit's tokens copied together, block column by block column. In place, the rows of a tile lie a power of two
  // apart or nearly so, which lets them fall on the same few sets of the first-level cache, and the processor fetches
  // neighbours of a block that nobody reads: at 3072 inputs and 90% sparsity copying is 1.5 times faster with blocks of
  // 16, 1.15 times with 64. Not worth it for a single tile.
  Tokens<T> gather(int64_t first_token, int64_t count) const {
    if (count <= MR<NR>) return in_place(first_token);
    const int64_t b = layer_.block_size;
    const T* from = layer_.x + first_token * layer_.x_stride;
    thread_local std::vector<T> buffer;
    const size_t size = size_t(count * layer_.inputs) + LINE / sizeof(T);
    if (buffer.size() < size) buffer = std::vector<T>(size);
    const size_t ahead = -reinterpret_cast<uintptr_t>(buffer.data()) % LINE / sizeof(T);
    T* const aligned = buffer.data() + ahead;
    for (int64_t token = 0; token < count; ++token, from += layer_.x_stride) {
      T* to = aligned + token * b;
      for (int64_t k = 0; k < layer_.inputs; k += b, to += count * b) {
        for (int64_t i = 0; i < b; i += 8) std::memcpy(to + i, from + k + i, 8 * sizeof(T));
      }
    }
    return {aligned, b, count * b};
  }

  void run_panel(const Panel<NR, T>& panel, const Tokens<T>& tokens, int64_t first_token, int64_t last_token) const {
    alignas(64) float totals[MAX_UNIT_TOKENS * NR];
    const int64_t b = layer_.block_size, part = ceil_div(PART, b);
    int64_t first_block = 0;
    do {
      const int64_t blocks = std::min(part, panel.blocks - first_block);
      const bool last = first_block + blocks == panel.blocks;
      uintptr_t next = reinterpret_cast<uintptr_t>(panel.weight + (first_block + blocks) * b * NR);
      for (int64_t token = first_token; token < last_token; token += MR<NR>) {
        const int mr = int(std::min<int64_t>(MR<NR>, last_token - token));
        float* sums = totals + (token - first_token) * NR;
        const Tokens<T> here{tokens.x + (token - first_token) * tokens.stride, tokens.stride, tokens.block_stride};
        const Step step{token, first_block, blocks, sums, first_block == 0, last};
        // Where rows are short the weights stay in the second-level cache anyway, and asking costs 3%.
        if (blocks == part) next = prefetch(next, blocks * b * NR * int64_t(sizeof(T)));
        if (mr == MR<NR>) {
          tile<MR<NR>, NR, T>(layer_, panel, here, step);
        } else {
          Tiles<NR, T>::of(mr)(layer_, panel, here, step);
        }
      }
      first_block += blocks;
    } while (first_block < panel.blocks);
    if (layer_.activation != NONE) finish<NR>(layer_, totals, panel.output, first_token, last_token);
  }

  // Asks for a tile's share of the weights that are read after this part, which follow in memory: `bytes` in all, line
  // by line from `address` on. Returns the address behind it. May point behind the last weight, where it does nothing.
  uintptr_t prefetch(uintptr_t address, int64_t bytes) const {
    const uintptr_t end = address + uintptr_t(bytes * MR<NR> / tokens_);
    for (; address < end; address += LINE) __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
    return address;
  }

  // The first panel before which `cut` parts of the work lie, found by bisection of the running sum.
  int64_t panel_at(int64_t cut) const {
    const int64_t wanted = steps_ * cut / panel_cuts_;
    int64_t low = 0, high = panels_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (steps_before(middle) < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  int64_t steps_before(int64_t panel) const {
    const int64_t b = layer_.block_size, in_row = b / NR, row = panel / in_row, rest = panel % in_row;
    const int64_t before = layer_.crow[row], own = rest ? layer_.crow[row + 1] - before : 0;
    return (before * in_row + own * rest) * b + panel * PANEL_OVERHEAD;
  }

  const Layer<T>& layer_;
  int64_t panels_, steps_, threads_, tokens_, token_cuts_, panel_cuts_;
  std::atomic<int64_t> arrived_{0};          // threads that work
  std::vector<std::atomic<int64_t>> taken_;  // panel cuts, for each token cut
};

// `parallel(n, body)` must call body() n times, on n threads if it can, and return when all have.
template <int NR, typename T, typename Parallel>
void run_panels(const Layer<T>& layer, int64_t threads, const Parallel& parallel) {
  Plan<NR, T> plan(layer, threads);
  if (plan.threads() == 1) {
    plan.work();
  } else {
    parallel(plan.threads(), [&] { plan.work(); });
  }
}

// Whether the kernel was built for panels of `nr` outputs.
constexpr bool is_panel_width(int64_t nr) { return nr == 8 || nr == 16 || nr == 32; }

// The panel width that suits this instruction set: the most that a tile can hold without running short of tokens.
constexpr int64_t panel_width(int64_t block_size) {
  constexpr int64_t widest = std::max(8, BLOCKVIT_LANES * (REGISTERS == 32 && BLOCKVIT_LANES == 4 ? 4 : 2));
  for (int64_t nr = widest; nr > 8; nr /= 2) {
    if (block_size % nr == 0) return nr;
  }
  return 8;
}

template <typename T, typename Parallel>
void block_linear(const Layer<T>& layer, int64_t nr, int64_t threads, const Parallel& parallel) {
  if (layer.tokens == 0 || layer.outputs == 0) return;
  if (nr == 32) {
    run_panels<32>(layer, threads, parallel);
  } else if (nr == 16) {
    run_panels<16>(layer, threads, parallel);
  } else {
    run_panels<8>(layer, threads, parallel);
  }
}

// --- the peak --------------------------------------------------------------------------------------------------------

// Multiply-adds of registers alone, `rounds` times; returns their number of floating-point operations. What one core
// can do at most, for rooflines.
inline double multiply_add(int64_t rounds) {
  constexpr int N = BLOCKVIT_LANES;
  f32v<N> sums[12];
  f32v<N> factor = f32v<N>{} + 0.999f, term = f32v<N>{} + 0.001f;
  BLOCKVIT_UNROLL for (int i = 0; i < 12; ++i) sums[i] = f32v<N>{} + float(i);
  for (int64_t round = 0; round < rounds; ++round) {
    BLOCKVIT_UNROLL for (int i = 0; i < 12; ++i) sums[i] = sums[i] * factor + term;
  }
  f32v<N> total{};
  BLOCKVIT_UNROLL for (int i = 0; i < 12; ++i) total += sums[i];
  volatile float kept = total[0];  // so that the compiler does not leave the loop out
  (void)kept;
  return double(rounds) * 12 * N * 2;
}

}  // namespace blockvit

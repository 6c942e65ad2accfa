// The arithmetic: tiles of a few tokens x NR outputs that stay in registers while the blocks of a block row, or of a
// part of it, pass by. Each step in k loads NR weights and broadcasts one number of each token; or AMX multiplies whole
// registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "activations.h"
#include "amx.h"
#include "vectors.h"

namespace blockvit {

constexpr int64_t LINE = 64;  // bytes that the caches move together

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- sizes -----------------------------------------------------------------------------------------------------------

// Vectors of sums a tile holds. What they leave of the registers is for weights, a token's number and a mask. 12 hide
// the latency of two FMA units (2 x 4 cycles = 8).
constexpr int ACCUMULATORS = REGISTERS == 32 ? 24 : 12;
constexpr int MAX_TOKENS = 12;  // in a tile; more only lengthens the code, one instance for each number of tokens
// Multiply-adds below which waking another thread costs more than it saves.
constexpr int64_t GRAIN = 1 << 19;

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

template <int NR>
constexpr int LANES = NR < BLOCKVIT_LANES ? NR : BLOCKVIT_LANES;

// Whether tiles of NR outputs are made in AMX's registers, which hold 16 tokens x 16 outputs each.
template <int NR, typename T>
constexpr bool ON_AMX = amx::PRESENT && NR % 16 == 0 && sizeof(T) == 2;

// Tokens of a full tile that is NR outputs wide. On AMX as many registers as leave room for the tokens and the weights:
// 2 x 2, or 3 x 1.
template <int NR, typename T>
constexpr int MR = ON_AMX<NR, T> ? (NR == 32 ? 32 : 48) : std::clamp(ACCUMULATORS * LANES<NR> / NR, 1, MAX_TOKENS);

// --- operands --------------------------------------------------------------------------------------------------------

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

#if BLOCKVIT_AVX512_BF16
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
#if BLOCKVIT_AVX512_BF16
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

// Sums of more products than about this are added up in parts, for two reasons. The weights of a part (16 outputs: 6
// KiB) stay in the first-level cache while all tokens of a unit pass by. And rounding errors grow with the square root
// of the number of products added in one run. PyTorch's dense linear adds 128, most of them zeros where the weight is
// sparse. Largest error, as a multiple of its own, over shapes and sparsities of ViT-B/16: 2.9 with parts of 256, 2.1
// with 128 (with blocks of 32 and less; 1.3 above), 1.7 with 64, which is 3% slower.
//
// On AMX a sum goes on from part to part, and the reason is the first one alone: parts of 256 are with dense rows 1.2
// times as fast as of 512 and 1.02 times as of 96.
template <int NR, typename T>
constexpr int64_t PART = ON_AMX<NR, T> ? 256 : 96;

// Where a tile finds its tokens: element k of input block c of its token m is x[c * block_stride + m * stride + k].
template <typename T>
struct Tokens {
  const T* x;
  int64_t stride, block_stride;
};

// What a tile does: `blocks` blocks of the panel from `first_block` on, for the tokens from `token` on.
struct Step {
  int64_t token, first_block, blocks;
  float* totals;  // (mr, NR): sums of the parts before; and, unless they go to y at once, of this one. AMX writes 16 rows
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

// --- one tile on AMX -------------------------------------------------------------------------------------------------

// Steps in k that a register holds: 32, or 16 where the block size is no multiple of that.
constexpr int64_t amx_steps(int64_t block_size) { return block_size % 32 ? 16 : 32; }

// What the registers hold for tiles TN registers wide: sums of tokens x outputs, weights, tokens. Rows of weights are
// pairs of steps in k, which is how they lie in memory.
template <int TN>
struct AmxRegisters {
  static constexpr int MOST = MR<16 * TN, bf16> / 16, WEIGHTS = MOST * TN, TOKENS = WEIGHTS + TN, COUNT = TOKENS + MOST;
  static_assert(COUNT <= amx::TILES);

  static amx::Configuration configuration(int64_t block_size) {
    amx::Configuration wanted;
    for (int i = 0; i < COUNT; ++i) {
      const bool is_weight = WEIGHTS <= i && i < TOKENS;
      wanted.rows[i] = is_weight ? uint8_t(amx_steps(block_size) / 2) : amx::ROWS;
      wanted.row_bytes[i] = i < TOKENS ? amx::ROW_BYTES : uint16_t(2 * amx_steps(block_size));
    }
    return wanted;
  }
};

// A tile of TM x TN registers of sums.
template <int TM, int TN>
struct AmxTile {
  static constexpr int WEIGHTS = AmxRegisters<TN>::WEIGHTS, TOKENS = AmxRegisters<TN>::TOKENS;

  template <int... i, typename Function>
  static BLOCKVIT_INLINE void each(std::integer_sequence<int, i...>, const Function& function) {
    (function(std::integral_constant<int, i>{}), ...);
  }
  template <int count, typename Function>
  static BLOCKVIT_INLINE void each(const Function& function) {
    each(std::make_integer_sequence<int, count>{}, function);
  }

  template <int m>
  static BLOCKVIT_INLINE void multiply_by() {
    each<TN>([](auto n) { amx::dot<m * TN + n, TOKENS + m, WEIGHTS + n>(); });
  }

  static void run(const Layer<bf16>& layer, const Panel<TN * 16, bf16>& panel, const Tokens<bf16>& tokens,
                  const Step& step) {
    constexpr int NR = TN * 16;
    const int64_t b = layer.block_size, steps = amx_steps(b), x_stride = 2 * tokens.stride;
    const auto total = [&](int i) { return step.totals + (i / TN) * 16 * NR + (i % TN) * 16; };
    each<TM * TN>([&](auto i) {
      if (step.first) {
        amx::zero<i>();
      } else {
        amx::load<i>(total(i), 4 * NR);
      }
    });
    const bf16* weight = panel.weight + step.first_block * b * NR;
    for (int64_t i = 0; i < step.blocks; ++i) {
      const bf16* x = tokens.x + panel.col[step.first_block + i] * tokens.block_stride;
      for (int64_t k = 0; k < b; k += steps, x += steps, weight += steps * NR) {
        each<TN>([&](auto n) { amx::load<WEIGHTS + n>(weight + 32 * n, 4 * NR); });
        each<TM>([&](auto m) {
          amx::load<TOKENS + m>(x + 16 * m * tokens.stride, x_stride);
          multiply_by<m>();
        });
      }
    }
    each<TM * TN>([&](auto i) { amx::store<i>(total(i), 4 * NR); });
  }
};

// --- results ---------------------------------------------------------------------------------------------------------

template <int NR, typename T, typename Function>
BLOCKVIT_INLINE void apply(const Layer<T>& layer, const float* sums, int64_t output, int64_t first_token,
                           int64_t last_token, const Function& function) {
  constexpr int N = LANES<NR>, V = NR / N;
  f32v<N> bias[V]{};
  if (ON_AMX<NR, T> && layer.bias) {  // other tiles have added it
    BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) bias[v] = load<N>(layer.bias + output + v * N);
  }
  T* y = layer.y + first_token * layer.outputs + output;
  for (int64_t token = first_token; token < last_token; ++token, y += layer.outputs, sums += NR) {
    BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) {
      f32v<N> sum = load<N>(sums + v * N);
      if constexpr (ON_AMX<NR, T>) sum += bias[v];
      store<N>(y + v * N, function(sum));
    }
  }
}

// y[tokens, panel] = activation(sums). For all tokens of a unit at once, so that the processor finds vectors enough to
// work on side by side: 3% of a layer with GELU.
template <int NR, typename T>
void finish(const Layer<T>& layer, const float* sums, int64_t output, int64_t first_token, int64_t last_token) {
  constexpr int N = LANES<NR>;
  const auto finished_by = [&](const auto& function) {
    apply<NR>(layer, sums, output, first_token, last_token, function);
  };
  if (layer.activation == GELU) {
    finished_by([](f32v<N> x) { return sizeof(T) == 2 ? gelu_bf16<N>(x) : gelu<N>(x); });
  } else if (layer.activation == GELU_TANH) {
    finished_by([](f32v<N> x) { return gelu_tanh<N>(x); });
  } else {
    finished_by([](f32v<N> x) { return x; });
  }
}

// --- any tile --------------------------------------------------------------------------------------------------------

// The registers that a thread's tiles need beside those that compilers know of.
template <int NR, typename T>
struct TileRegisters {
  explicit TileRegisters([[maybe_unused]] int64_t block_size) {
    if constexpr (ON_AMX<NR, T>) amx::configure(AmxRegisters<NR / 16>::configuration(block_size));
  }
  ~TileRegisters() {
    if constexpr (ON_AMX<NR, T>) amx::release();
  }
  TileRegisters(const TileRegisters&) = delete;
};

// Runs the tile function for `mr` tokens, of which there are more instances than one only for the last tokens.
template <int NR, typename T>
struct Tiles {
  static constexpr int HEIGHT = ON_AMX<NR, T> ? 16 : 1;  // tokens by which instances differ
  static constexpr int COUNT = MR<NR, T> / HEIGHT;
  using Function = void (*)(const Layer<T>&, const Panel<NR, T>&, const Tokens<T>&, const Step&);

  template <int i>
  static constexpr Function instance() {
    if constexpr (ON_AMX<NR, T>) {
      return AmxTile<i, NR / 16>::run;
    } else {
      return tile<i, NR, T>;
    }
  }
  template <int... i>
  static constexpr Function at(int index, std::integer_sequence<int, i...>) {
    constexpr Function functions[] = {instance<i + 1>()...};
    return functions[index];
  }
  static void run(int mr, const Layer<T>& layer, const Panel<NR, T>& panel, const Tokens<T>& tokens,
                  const Step& step) {
    if (mr == MR<NR, T>) {
      instance<COUNT>()(layer, panel, tokens, step);
    } else {
      at((mr - 1) / HEIGHT, std::make_integer_sequence<int, COUNT>{})(layer, panel, tokens, step);
    }
  }
};

}  // namespace blockvit

// Block-sparse linear layer for CPUs: y = activation(x W^T + bias), W block-sparse, float32 or bfloat16. Here the work is
// shared out among threads; tiles.h does the arithmetic. No header of PyTorch is needed, so that the kernel can be tested
// alone, under sanitizers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"

namespace blockvit {

// x of the tokens that are worked on at once is to stay in a core's second-level cache beside the weights that stream
// by. 192 to 384 KiB are alike at 768 inputs; at 3072 a larger tile means that the weights stream by less often (up to
// 1.1 times faster). CPUs with AMX have 2 MiB at least.
#ifndef BLOCKVIT_CACHE_KIB
#define BLOCKVIT_CACHE_KIB 384
#endif
template <int NR, typename T>
constexpr int64_t CACHE_BYTES = int64_t(ON_AMX<NR, T> ? 1024 : BLOCKVIT_CACHE_KIB) << 10;
// Tokens of a unit at most: their sums (16 outputs: 8 KiB) stay in the first-level cache beside a part of the weights.
// AMX waits for the weights of dense layers, so that they stream by seldom counts more (28 KiB of 48: 1.1 to 1.3 times
// as fast as 12).
template <int NR, typename T>
constexpr int64_t MAX_UNIT_TOKENS = ON_AMX<NR, T> ? 224 : 120;
// Weights that stay in the second-level cache of a CPU with AMX, whichever tokens pass by.
constexpr int64_t AMX_WEIGHT_BYTES = 5 << 18;
// Per panel and thread: what it costs beside its blocks, in steps of k.
constexpr int64_t PANEL_OVERHEAD = 16;
// Units of work a thread, so that none waits long for the last. AMX is done with one so soon that beginning it counts: 4
// are 1.1 times as fast as 16 at 197 tokens and 90%.
template <int NR, typename T>
constexpr int64_t UNITS_PER_THREAD = ON_AMX<NR, T> ? 4 : 16;

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
    token_cuts_ = ceil_div(layer.tokens, most_tokens());
    tokens_ = ceil_div(ceil_div(layer.tokens, token_cuts_), MR<NR, T>) * MR<NR, T>;
    token_cuts_ = ceil_div(layer.tokens, tokens_);
    panel_cuts_ = threads_ == 1 ? 1 : std::min(panels_, ceil_div(threads_ * UNITS_PER_THREAD<NR, T>, token_cuts_));
    taken_ = std::vector<std::atomic<int64_t>>(token_cuts_);
  }

  int64_t threads() const { return threads_; }

  // The share of one thread; all are done when as many as there are threads, or one alone, have returned. A core may be
  // busy with other work: units go to whoever is free.
  void work() {
    const TileRegisters<NR, T> registers(layer_.block_size);
    const int64_t start = arrived_++ * token_cuts_ / threads_;
    for (int64_t i = 0; i < token_cuts_; ++i) {
      const int64_t token_cut = (start + i) % token_cuts_;
      int64_t panel_cut = taken_[token_cut]++;
      if (panel_cut >= panel_cuts_) continue;
      const int64_t first_token = token_cut * tokens_;
      const int64_t last_token = std::min(first_token + tokens_, layer_.tokens);
      const int64_t count = last_token - first_token;
      const Tokens<T> tokens = copies(count, panel_cut) ? gather(first_token, count) : in_place(first_token);
      for (; panel_cut < panel_cuts_; panel_cut = taken_[token_cut]++) {
        const int64_t last_panel = panel_at(panel_cut + 1);
        for (int64_t index = panel_at(panel_cut); index < last_panel; ++index) {
          run_panel(Panel<NR, T>(layer_, index), tokens, first_token, last_token);
        }
      }
    }
  }

 private:
  // Tokens of a unit at most.
  int64_t most_tokens() const {
    if constexpr (ON_AMX<NR, T>) {
      // One tile: on 4 threads and 197 tokens 1.2 to 1.5 times as fast as 96 tokens, which have to be shared out in
      // three parts. But all weights pass by for each unit, so large ones must not come from behind the second-level
      // cache; with panels of 16, of which a register has half the work, that costs less than it saves.
      const int64_t stored = layer_.crow[layer_.outputs / layer_.block_size];
      const int64_t weight_bytes = stored * layer_.block_size * layer_.block_size * int64_t(sizeof(T));
      if (NR == 16 || weight_bytes <= AMX_WEIGHT_BYTES) return MR<NR, T>;
    }
    const int64_t token_bytes = std::max<int64_t>(layer_.inputs, 1) * int64_t(sizeof(T));
    const int64_t fit = std::max<int64_t>(CACHE_BYTES<NR, T> / token_bytes, MR<NR, T>);
    return std::min(fit, MAX_UNIT_TOKENS<NR, T> / MR<NR, T> * MR<NR, T>);
  }

  // Whether the tokens of a unit are copied together. Not for a single tile, nor for the last panels of another thread's
  // tokens, for which it would take longer than it saves. A register of AMX fetches a line of memory for each token,
  // whole but for blocks of 16: with those copying is 1.1 to 1.3 times as fast also for a single tile, with larger ones
  // 0.7 to 1 times. But it fetches 16 tokens, and behind the last there may be nothing.
  bool copies(int64_t count, int64_t panel_cut) const {
    if constexpr (ON_AMX<NR, T>) return amx_steps(layer_.block_size) == 16 || count % Tiles<NR, T>::HEIGHT;
    return count > MR<NR, T> && 2 * panel_cut <= panel_cuts_;
  }

  Tokens<T> in_place(int64_t first_token) const {
    return {layer_.x + first_token * layer_.x_stride, layer_.x_stride, layer_.block_size};
  }

  // The unit's tokens copied together, block column by block column. In place, the rows of a tile lie a power of two
  // apart or nearly so, which lets them fall on the same few sets of the first-level cache, and the processor fetches
  // neighbours of a block that nobody reads: at 3072 inputs and 90% sparsity copying is 1.5 times faster with blocks of
  // 16, 1.15 times with 64.
  Tokens<T> gather(int64_t first_token, int64_t count) const {
    const int64_t b = layer_.block_size, height = Tiles<NR, T>::HEIGHT, rows = ceil_div(count, height) * height;
    const T* from = layer_.x + first_token * layer_.x_stride;
    thread_local std::vector<T> buffer;
    const size_t size = size_t(rows * layer_.inputs) + LINE / sizeof(T);
    if (buffer.size() < size) buffer = std::vector<T>(size);
    const size_t ahead = -reinterpret_cast<uintptr_t>(buffer.data()) % LINE / sizeof(T);
    T* const aligned = buffer.data() + ahead;
    for (int64_t token = 0; token < count; ++token, from += layer_.x_stride) {
      T* to = aligned + token * b;
      for (int64_t k = 0; k < layer_.inputs; k += b, to += rows * b) {
        for (int64_t i = 0; i < b; i += 8) std::memcpy(to + i, from + k + i, 8 * sizeof(T));
      }
    }
    return {aligned, b, rows * b};
  }

  void run_panel(const Panel<NR, T>& panel, const Tokens<T>& tokens, int64_t first_token, int64_t last_token) const {
    alignas(64) float totals[MAX_UNIT_TOKENS<NR, T> * NR];
    const int64_t b = layer_.block_size, part = ceil_div(PART<NR, T>, b);
    int64_t first_block = 0;
    do {
      const int64_t blocks = std::min(part, panel.blocks - first_block);
      const bool last = first_block + blocks == panel.blocks;
      uintptr_t next = reinterpret_cast<uintptr_t>(panel.weight + (first_block + blocks) * b * NR);
      for (int64_t token = first_token; token < last_token; token += MR<NR, T>) {
        const int mr = int(std::min<int64_t>(MR<NR, T>, last_token - token));
        float* sums = totals + (token - first_token) * NR;
        const Tokens<T> here{tokens.x + (token - first_token) * tokens.stride, tokens.stride, tokens.block_stride};
        const Step step{token, first_block, blocks, sums, first_block == 0, last};
        // Where rows are short the weights stay in the second-level cache anyway, and asking costs 3%.
        if (!ON_AMX<NR, T> && blocks == part) next = prefetch(next, blocks * b * NR * int64_t(sizeof(T)));
        Tiles<NR, T>::run(mr, layer_, panel, here, step);
      }
      first_block += blocks;
    } while (first_block < panel.blocks);
    if (layer_.activation != NONE || ON_AMX<NR, T>) finish<NR>(layer_, totals, panel.output, first_token, last_token);
  }

  // Asks for a tile's share of the weights that are read after this part, which follow in memory: `bytes` in all, line
  // by line from `address` on. Returns the address behind it. May point behind the last weight, where it does nothing.
  uintptr_t prefetch(uintptr_t address, int64_t bytes) const {
    const uintptr_t end = address + uintptr_t(bytes * MR<NR, T> / tokens_);
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

}  // namespace blockvit

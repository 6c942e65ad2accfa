// Attention for CPUs: y = softmax(q k^T / sqrt(size)) v in each head, without a mask; float32 or bfloat16, computed in
// float32. It takes the tiles of tiles.h: keys and values are packed into panels as weights are, and the scores of a tile
// of queries stay in the first-level cache (12 queries x 600 keys: 29 KB; more in the second) until they have met the
// values.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "activations.h"
#include "tiles.h"
#include "vectors.h"

namespace blockvit {

// (batch, heads, tokens, size); the numbers of a token are neighbours.
template <typename T>
struct Heads {
  const T* data;
  int64_t batch_stride, head_stride, token_stride;

  const T* at(int64_t image, int64_t head) const { return data + image * batch_stride + head * head_stride; }
};

template <typename T>
struct Attention {
  Heads<T> q, k, v;
  T* y;  // (batch, queries, heads, size), contiguous
  int64_t batch, heads, queries, keys, size;
};

// One number of all of a vector's, in halves: one after the other each would wait for the last.
template <int N, typename Function>
BLOCKVIT_INLINE float reduce(f32v<N> numbers, const Function& function) {
  float parts[N];
  std::memcpy(parts, &numbers, sizeof parts);
  BLOCKVIT_UNROLL for (int half = N / 2; half > 0; half /= 2) {
    BLOCKVIT_UNROLL for (int i = 0; i < half; ++i) parts[i] = function(parts[i], parts[i + half]);
  }
  return parts[0];
}

// scores = 2^(scores - their maximum), 0 below 2^-126; returns the sum. NaN stays NaN, and infinity becomes it; minus
// infinity becomes 0, where not all are. `count` is a multiple of N.
template <int N>
float exponentiate(float* scores, int64_t count) {
  f32v<N> most = load<N>(scores);
  for (int64_t i = N; i < count; i += N) {
    const f32v<N> next = load<N>(scores + i);
    most = next > most ? next : most;
  }
  const float maximum = reduce<N>(most, [](float a, float b) { return a > b ? a : b; });
  const f32v<N> lowest = f32v<N>{} - 126.0f;
  f32v<N> sum{};
  for (int64_t i = 0; i < count; i += N) {
    const f32v<N> exponent = load<N>(scores + i) - maximum;
    f32v<N> power = exp2<N>(exponent > lowest ? exponent : lowest);
    power = exponent > lowest ? power : f32v<N>{};
    power = exponent == exponent ? power : exponent;
    store<N>(scores + i, power);
    sum += power;
  }
  return reduce<N>(sum, [](float a, float b) { return a + b; });
}

template <typename T>
class AttentionPlan {
 public:
  AttentionPlan(const Attention<T>& attention, int64_t threads) : a_(attention) {
    const int64_t pairs = a_.batch * a_.heads, work = pairs * a_.queries * a_.keys * a_.size * 2;
    threads_ = std::clamp<int64_t>(work / GRAIN, 1, threads);
    // Each part of a head's queries packs its keys and values again, so parts are made only to keep threads busy.
    const int64_t parts = std::min(ceil_div(UNITS * threads_, pairs), ceil_div(a_.queries, MR<NR, float>));
    queries_ = ceil_div(ceil_div(a_.queries, parts), MR<NR, float>) * MR<NR, float>;
    parts_ = ceil_div(a_.queries, queries_);
    padded_keys_ = ceil_div(a_.keys, NR) * NR;
    padded_size_ = ceil_div(a_.size, NR) * NR;
  }

  int64_t threads() const { return threads_; }

  // The share of one thread; all are done when as many as there are threads, or one alone, have returned.
  void work() {
    thread_local Buffers buffers;
    buffers.reserve(padded_keys_ * a_.size, a_.keys * padded_size_, MR<NR, float> * (padded_keys_ + a_.size));
    int64_t packed = -1;
    const int64_t units = a_.batch * a_.heads * parts_;
    for (int64_t unit = next_++; unit < units; unit = next_++) {
      const int64_t pair = unit / parts_, image = pair / a_.heads, head = pair % a_.heads;
      if (pair != packed) {
        pack_keys(a_.k.at(image, head), buffers.keys.data());
        pack_values(a_.v.at(image, head), buffers.values.data());
        packed = pair;
      }
      const int64_t first = unit % parts_ * queries_, last = std::min(first + queries_, a_.queries);
      for (int64_t query = first; query < last; query += MR<NR, float>) {
        const int mr = int(std::min<int64_t>(MR<NR, float>, last - query));
        run(mr, a_.q.at(image, head) + query * a_.q.token_stride,
            a_.y + ((image * a_.queries + query) * a_.heads + head) * a_.size, buffers,
            std::make_integer_sequence<int, MR<NR, float>>{});
      }
    }
  }

 private:
  static constexpr int NR = int(panel_width(32)), N = LANES<NR>, V = NR / N;
  static constexpr int64_t UNITS = 3;  // a thread, so that none waits long for the last

  struct Buffers {
    std::vector<float> keys, values, scores;

    void reserve(int64_t of_keys, int64_t of_values, int64_t of_scores) {
      for (const auto& [buffer, size] : {std::pair{&keys, of_keys}, {&values, of_values}, {&scores, of_scores}}) {
        if (int64_t(buffer->size()) < size) *buffer = std::vector<float>(size);
      }
    }
  };

  static float number(float value) { return value; }
  static float number(bf16 value) { return widen(value); }

  // [panel of keys][size][NR], zeros behind the last key.
  void pack_keys(const T* from, float* to) const {
    for (int64_t first = 0; first < padded_keys_; first += NR, to += a_.size * NR) {
      const int64_t count = std::min<int64_t>(NR, a_.keys - first);
      for (int64_t key = 0; key < count; ++key, from += a_.k.token_stride) {
        for (int64_t i = 0; i < a_.size; ++i) to[i * NR + key] = number(from[i]);
      }
      for (int64_t key = count; key < NR; ++key) {
        for (int64_t i = 0; i < a_.size; ++i) to[i * NR + key] = 0;
      }
    }
  }

  // [panel of numbers][keys][NR], zeros behind a token's last number.
  void pack_values(const T* from, float* to) const {
    for (int64_t first = 0; first < padded_size_; first += NR) {
      const int64_t count = std::min<int64_t>(NR, a_.size - first);
      for (int64_t key = 0; key < a_.keys; ++key, to += NR) {
        const T* of_key = from + key * a_.v.token_stride + first;
        if (count == NR) {
          BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) store<N>(to + v * N, load<N>(of_key + v * N));
        } else {
          for (int64_t i = 0; i < NR; ++i) to[i] = i < count ? number(of_key[i]) : 0;
        }
      }
    }
  }

  template <int mr>
  void tile(const T* q, T* y, Buffers& buffers) const {
    const float scale = 1.44269504f / std::sqrt(float(a_.size));  // log2(e): powers of two are what follows
    float *const scores = buffers.scores.data(), *const queries = scores + MR<NR, float> * padded_keys_;
    for (int m = 0; m < mr; ++m) {
      for (int64_t i = 0; i < a_.size; ++i) queries[m * a_.size + i] = number(q[m * a_.q.token_stride + i]) * scale;
    }
    const float* keys = buffers.keys.data();
    for (int64_t first = 0; first < padded_keys_; first += NR, keys += a_.size * NR) {
      Sums<mr, NR> sums{};
      add_block<mr, NR>(sums, queries, a_.size, keys, a_.size);
      BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) {
        BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) store<N>(scores + m * padded_keys_ + first + v * N, sums[m][v]);
      }
    }
    float factor[mr];
    for (int m = 0; m < mr; ++m) {
      float* const of_query = scores + m * padded_keys_;
      std::fill(of_query + a_.keys, of_query + padded_keys_, -INFINITY);
      factor[m] = 1 / exponentiate<N>(of_query, padded_keys_);
    }
    const float* values = buffers.values.data();
    for (int64_t first = 0; first < padded_size_; first += NR, values += a_.keys * NR) {
      Sums<mr, NR> sums{};
      for (int64_t key = 0; key < a_.keys; key += PART<NR, float>) {
        Sums<mr, NR> part{};
        add_block<mr, NR>(part, scores + key, padded_keys_, values + key * NR, std::min(PART<NR, float>, a_.keys - key));
        BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) {
          BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) sums[m][v] += part[m][v];
        }
      }
      const int64_t count = std::min<int64_t>(NR, a_.size - first);
      BLOCKVIT_UNROLL for (int m = 0; m < mr; ++m) {
        T whole[NR], *const to = y + m * a_.heads * a_.size + first, *const into = count == NR ? to : whole;
        BLOCKVIT_UNROLL for (int v = 0; v < V; ++v) store<N>(into + v * N, sums[m][v] * factor[m]);
        if (count < NR) std::memcpy(to, whole, count * sizeof(T));
      }
    }
  }

  // The instance of `tile` for `mr` queries; fewer than MR are only the last of a unit.
  template <int... i>
  void run(int mr, const T* q, T* y, Buffers& buffers, std::integer_sequence<int, i...>) const {
    (void)((mr == i + 1 && (tile<i + 1>(q, y, buffers), true)) || ...);
  }

  const Attention<T>& a_;
  int64_t threads_, queries_, parts_, padded_keys_, padded_size_;
  std::atomic<int64_t> next_{0};
};

// `parallel` as for block_linear (block_linear.h). There is at least one key.
template <typename T, typename Parallel>
void attend(const Attention<T>& attention, int64_t threads, const Parallel& parallel) {
  if (attention.batch * attention.heads * attention.queries * attention.size == 0) return;
  AttentionPlan<T> plan(attention, threads);
  if (plan.threads() == 1) {
    plan.work();
  } else {
    parallel(plan.threads(), [&] { plan.work(); });
  }
}

}  // namespace blockvit

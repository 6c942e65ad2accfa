// The kernels of block_linear.h and attention.h against sums in double, without PyTorch, so that sanitizers can watch
// them. Every buffer is exactly as long as it may be read or written; those that a thread keeps are its first, as threads
// are new. Prints what failed; the exit status is 1 if anything did.
#include "attention.h"
#include "block_linear.h"
#include "peak.h"

#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace blockvit;

struct Case {
  int64_t tokens, block_size, panel_width, block_rows, block_columns, stride_extra;
  double density;  // below 0: one long row, the others empty
  bool bias;
  Activation activation;
  int threads;
};

std::mt19937 generator(0);

float to_float(float value) { return value; }
float to_float(bf16 value) { return widen(value); }

void assign(float& to, float value) { to = value; }
void assign(bf16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to.bits = uint16_t(bits >> 16);
}

template <typename T>
std::vector<T> normal(size_t count) {
  std::normal_distribution<float> distribution;
  std::vector<T> numbers(count);
  for (T& number : numbers) assign(number, distribution(generator));
  return numbers;
}

double reference_activation(double x, Activation activation) {
  if (activation == GELU) return x / 2 * std::erfc(-x / std::sqrt(2.0));
  if (activation == GELU_TANH) return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  return x;
}

struct Threads {
  void operator()(int64_t count, const std::function<void()>& body) const {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back(body);
    for (std::thread& thread : threads) thread.join();
  }
};

struct Indices {
  std::vector<int32_t> crow{0}, col;
};

Indices random_indices(const Case& c) {
  std::bernoulli_distribution kept(std::max(c.density, 0.0));
  Indices indices;
  for (int64_t row = 0; row < c.block_rows; ++row) {
    for (int64_t column = 0; column < c.block_columns; ++column) {
      if (c.density < 0 ? row == c.block_rows / 2 : kept(generator)) indices.col.push_back(int32_t(column));
    }
    indices.crow.push_back(int32_t(indices.col.size()));
  }
  return indices;
}

// Where weight (output o, step k) of stored block `block` of row `row` lies in the packed weights.
template <typename T>
size_t place(const Case& c, const Indices& indices, int64_t row, int64_t block, int64_t o, int64_t k) {
  const int64_t b = c.block_size, w = c.panel_width, first = indices.crow[row], in_row = indices.crow[row + 1] - first;
  const int64_t run = first * (b / w) + (o / w) * in_row + (block - first);
  if constexpr (sizeof(T) == 4) return run * b * w + k * w + o % w;
  return run * b * w + (k / 2) * w * 2 + (o % w) * 2 + k % 2;
}

template <typename T>
int run(const Case& c) {
  const int64_t b = c.block_size, inputs = c.block_columns * b, outputs = c.block_rows * b;
  const int64_t stride = inputs + c.stride_extra;
  const Indices indices = random_indices(c);
  const auto x = normal<T>((c.tokens - 1) * stride + inputs);
  const auto weight = normal<T>(indices.col.size() * b * b);
  const auto bias = normal<T>(outputs);
  std::vector<T> y(c.tokens * outputs);
  const Layer<T> layer{x.data(), weight.data(), indices.crow.data(), indices.col.data(), c.bias ? bias.data() : nullptr,
                       y.data(), c.tokens, inputs, outputs, stride, b, c.activation};
  std::thread([&] { block_linear(layer, c.panel_width, c.threads, Threads{}); }).join();

  double worst = 0;
  for (int64_t token = 0; token < c.tokens; ++token) {
    for (int64_t output = 0; output < outputs; ++output) {
      const int64_t row = output / b;
      double sum = c.bias ? to_float(bias[output]) : 0, size = 1;
      for (int64_t block = indices.crow[row]; block < indices.crow[row + 1]; ++block) {
        for (int64_t k = 0; k < b; ++k) {
          const double product = double(to_float(weight[place<T>(c, indices, row, block, output % b, k)])) *
                                 to_float(x[token * stride + indices.col[block] * b + k]);
          sum += product;
          size += product * product;
        }
      }
      const double error = std::abs(to_float(y[token * outputs + output]) - reference_activation(sum, c.activation));
      worst = std::max(worst, std::isnan(error) ? 1e9 : error / (std::sqrt(size) + std::abs(sum)));
    }
  }
  if (worst <= (sizeof(T) == 4 ? 3e-6 : 8e-3)) return 0;
  std::printf("%zu-byte numbers, tokens %ld, block %ld, panel %ld, %ld x %ld blocks, density %g, activation %ld, "
              "threads %d: error %g\n", sizeof(T), long(c.tokens), long(b), long(c.panel_width), long(c.block_rows),
              long(c.block_columns), c.density, long(c.activation), c.threads, worst);
  return 1;
}

int run_both(const Case& c) { return run<float>(c) + run<bf16>(c); }

template <typename T>
int tails(int64_t b, int64_t width, int64_t mr) {
  int failed = 0;
  for (const int64_t tokens : {int64_t(1), mr / 2 + 1, mr - 1, mr, mr + 1, 3 * mr + 2}) {
    if (tokens == 0) continue;
    failed += run<T>({tokens, b, width, 3, 300 / b + 1, 0, 0.4, true, NONE, 1});
    if (tokens == mr + 1) {
      for (const double density : {0.0, 1.0, -1.0}) {
        failed += run<T>({tokens, b, width, 2, 300 / b + 1, 0, density, true, NONE, 1});
      }
    }
  }
  return failed;
}

int sizes() {
  int failed = 0;
  for (const int64_t b : {8, 16, 24, 32, 48, 64, 128}) {
    for (const int64_t width : {8, 16, 32}) {
      if (b % width) continue;
      failed += tails<float>(b, width, width == 8 ? MR<8, float> : width == 16 ? MR<16, float> : MR<32, float>);
      failed += tails<bf16>(b, width, width == 8 ? MR<8, bf16> : width == 16 ? MR<16, bf16> : MR<32, bf16>);
    }
  }
  return failed;
}

// Weights of 2 MiB in bfloat16: the most tokens in a unit, in several parts, on a thread that may go on to the next.
int large() {
  int failed = 0;
  for (const int64_t tokens : {33, 48, 70, 98, 200}) {
    failed += run_both({tokens, 128, 32, 8, 8, 0, 1.0, true, tokens == 70 ? GELU : NONE, tokens == 200 ? 3 : 1});
  }
  return failed;
}

int layouts() {  // many tokens, many units, x with gaps and x that is one row for all tokens
  int failed = 0;
  for (const Activation activation : {NONE, GELU, GELU_TANH}) {
    for (const double density : {0.2, -1.0}) {
      for (const int64_t stride_extra : {0, 3, -(30 * 16)}) {
        const int threads = 1 + int(stride_extra & 3) + activation;
        failed += run_both({131, 16, panel_width(16), 30, 30, stride_extra, density, density < 0, activation, threads});
      }
    }
  }
  return failed;
}

// Infinite, NaN, tiny and huge numbers through an activation; all but one in a vector with ordinary ones. Errors are
// allowed in proportion to the larger of the result and `least`.
template <typename Function>
int extremes(const char* name, Activation activation, const Function& function, double tolerance, double least) {
  constexpr int N = BLOCKVIT_LANES;
  int failed = 0;
  for (const float x : {0.0f, 1e-40f, -1e-40f, 1e-6f, -1e-6f, -0.7f, -5.0f, -8.9f, 11.6f, 11.8f, -11.8f, 90.0f, -90.0f,
                        3e38f, -3e38f, INFINITY, NAN}) {
    f32v<N> numbers = f32v<N>{} + 1.0f;
    numbers[N - 1] = x;
    const f32v<N> results = function(numbers);
    const double expected = std::abs(x) > 1e30f ? std::max(x, 0.0f) : reference_activation(x, activation);
    const double got = results[N - 1], allowed = tolerance * std::max(least, std::abs(expected));
    const bool right = std::isnan(x) ? std::isnan(got) : got == expected || std::abs(got - expected) <= allowed;
    const bool neighbour = std::abs(results[0] - reference_activation(1, activation)) <= tolerance;
    if (right && neighbour) continue;
    std::printf("%s of %g is %g, expected %g; of 1: %g\n", name, x, got, expected, double(results[0]));
    ++failed;
  }
  return failed;
}

int extremes() {
  constexpr int N = BLOCKVIT_LANES;
  return extremes("gelu", GELU, [](f32v<N> x) { return gelu<N>(x); }, 3e-7, 1) +
         extremes("gelu_bf16", GELU, [](f32v<N> x) { return gelu_bf16<N>(x); }, 5e-4, 1e-14) +
         extremes("gelu_tanh", GELU_TANH, [](f32v<N> x) { return gelu_tanh<N>(x); }, 3e-7, 1);
}

// --- attention -------------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t batch, heads, queries, keys, size;
  int threads = 1;
  float factor = 1;  // of q: at large ones most weights are 0
  float spoiled = 0;  // if not 0, in place of one number of the second query
};

template <typename T>
int attention(const Sizes& s) {
  const int64_t width = s.heads * s.size;
  auto q = normal<T>(s.batch * s.queries * width);
  const auto k = normal<T>(s.batch * s.keys * width), v = normal<T>(s.batch * s.keys * width);
  for (T& number : q) assign(number, s.factor * to_float(number));
  if (s.spoiled) assign(q[width], s.spoiled);
  std::vector<T> y(q.size());
  const auto heads = [&](const std::vector<T>& t, int64_t tokens) {
    return Heads<T>{t.data(), tokens * width, s.size, width};
  };
  const Attention<T> all{heads(q, s.queries), heads(k, s.keys), heads(v, s.keys), y.data(), s.batch, s.heads, s.queries,
                         s.keys, s.size};
  std::thread([&] { attend(all, s.threads, Threads{}); }).join();

  double worst = 0;
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t head = 0; head < s.heads; ++head) {
      for (int64_t query = 0; query < s.queries; ++query) {
        const auto at = [&](const std::vector<T>& t, int64_t tokens, int64_t token, int64_t i) {
          return double(to_float(t[((image * tokens + token) * s.heads + head) * s.size + i]));
        };
        std::vector<double> scores(s.keys);
        double most = -INFINITY, sum = 0;
        for (int64_t key = 0; key < s.keys; ++key) {
          for (int64_t i = 0; i < s.size; ++i) scores[key] += at(q, s.queries, query, i) * at(k, s.keys, key, i);
          most = std::max(most, scores[key] /= std::sqrt(double(s.size)));
        }
        for (double& score : scores) sum += score = std::exp(score - most);
        for (int64_t i = 0; i < s.size; ++i) {
          double expected = 0;
          for (int64_t key = 0; key < s.keys; ++key) expected += scores[key] / sum * at(v, s.keys, key, i);
          const double got = at(y, s.queries, query, i);
          const bool is_spoiled = s.spoiled && image == 0 && head == 0 && query == 1;
          worst = std::max(worst, std::isnan(got) ? (is_spoiled ? 0 : 1e9) : is_spoiled ? 1e9 : std::abs(got - expected));
        }
      }
    }
  }
  if (worst <= (sizeof(T) == 4 ? 3e-6 * s.factor : 2e-2)) return 0;
  std::printf("attention, %zu-byte numbers, %ld images, %ld heads, %ld queries, %ld keys, size %ld, %d threads, factor "
              "%g, spoiled %g: error %g\n", sizeof(T), long(s.batch), long(s.heads), long(s.queries), long(s.keys),
              long(s.size), s.threads, s.factor, s.spoiled, worst);
  return 1;
}

int attention() {
  int failed = 0;
  const auto both = [&](const Sizes& sizes) { failed += attention<float>(sizes) + attention<bf16>(sizes); };
  for (const int64_t queries : {1, 5, 11, 12, 13, 25}) both({1, 2, queries, 33, 24});
  for (const int64_t keys : {1, 7, 8, 31, 32, 33, 197}) both({2, 1, 13, keys, 32});
  for (const int64_t size : {1, 3, 8, 40, 64, 80}) both({1, 3, 14, 50, size});
  both({1, 1, 300, 70, 64, 3});
  both({3, 4, 90, 60, 16, 5});
  for (const float spoiled : {NAN, INFINITY}) both({1, 2, 14, 20, 16, 1, 1, spoiled});
  failed += attention<float>({1, 2, 14, 40, 16, 1, 300});
  return failed;
}

int rounding() {
  constexpr int N = BLOCKVIT_LANES;
  const std::pair<uint32_t, uint16_t> cases[] = {{0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81},
                                                 {0x7f800000, 0x7f80}, {0xff800000, 0xff80}, {0x7fc00000, 0x7fc0},
                                                 {0x7f7fffff, 0x7f80}, {0x80000000, 0x8000}};
  int failed = 0;
  for (const auto& [from, to] : cases) {
    bf16 stored[N];
    store<N>(stored, (f32v<N>)(u32v<N>{} + from));
    for (const bf16& number : stored) failed += number.bits != to;
  }
  bf16 stored[N];
  store<N>(stored, (f32v<N>)(u32v<N>{} + 0x7f800001));  // truncated, this NaN would be infinity
  for (const bf16& number : stored) failed += !std::isnan(widen(number));
  if (failed) std::printf("bfloat16 is rounded wrongly %d times\n", failed);
  return failed;
}

int main() {
#if defined(__linux__) && defined(__AMX_BF16__) && !defined(BLOCKVIT_EMULATE_AMX)
  constexpr long ASK_FOR_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA)) return std::puts("no AMX for this process"), 1;
#endif
  const int failed = sizes() + large() + layouts() + attention() + extremes() + rounding();
  multiply_add(1000);
  multiply_add_bf16(100);
  std::printf("%d failures, %d lanes\n", failed, BLOCKVIT_LANES);
  return failed ? 1 : 0;
}

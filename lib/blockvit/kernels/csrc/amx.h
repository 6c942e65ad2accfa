// The tile registers of AMX: eight, of up to 16 rows x 64 bytes, and the product of two of them in bfloat16.
//
// Written as assembly because compilers' intrinsics take the register as a literal, where a template has a parameter,
// and GCC's do not say that they read memory. All of it is volatile, which keeps it in order; only what touches memory
// says so; and compilers keep nothing of their own in these registers. With BLOCKVIT_EMULATE_AMX they are ordinary memory,
// so that the same kernel runs on any CPU and sanitizers see what it reads and writes. Where there is neither, nothing
// here is called.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace blockvit::amx {

#if defined(__AMX_BF16__) || defined(BLOCKVIT_EMULATE_AMX)
constexpr bool PRESENT = true;
#else
constexpr bool PRESENT = false;
#endif

constexpr int ROWS = 16, ROW_BYTES = 64, TILES = 8;

// As LDTILECFG reads it.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64);

#if defined(BLOCKVIT_EMULATE_AMX) || !defined(__AMX_BF16__)

inline thread_local Configuration configuration;
inline thread_local uint8_t registers[TILES][ROWS][ROW_BYTES];

// What a processor answers by a fault.
inline void require(bool met) {
  if (!met) std::abort();
}

inline void configure(const Configuration& wanted) {
  for (int i = 0; i < 16; ++i) {
    require(wanted.rows[i] <= ROWS && wanted.row_bytes[i] <= ROW_BYTES && wanted.row_bytes[i] % 4 == 0);
    require((wanted.rows[i] == 0) == (wanted.row_bytes[i] == 0) && (i < TILES || wanted.rows[i] == 0));
  }
  configuration = wanted;
  std::memset(registers, 0, sizeof registers);
}
inline void release() { configuration = {}; }

template <int tile>
void zero() {
  require(configuration.rows[tile] > 0);
  std::memset(registers[tile], 0, sizeof registers[tile]);
}

template <int tile>
void load(const void* from, int64_t stride) {
  zero<tile>();
  for (int row = 0; row < configuration.rows[tile]; ++row) {
    std::memcpy(registers[tile][row], static_cast<const uint8_t*>(from) + row * stride, configuration.row_bytes[tile]);
  }
}

template <int tile>
void store(void* to, int64_t stride) {
  require(configuration.rows[tile] > 0);
  for (int row = 0; row < configuration.rows[tile]; ++row) {
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, registers[tile][row], configuration.row_bytes[tile]);
  }
}

// Half of a pair of bfloat16 numbers, as float32.
inline float half(uint32_t pair, bool upper) {
  const uint32_t bits = upper ? pair & 0xffff0000u : pair << 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

template <int sums, int left, int right>
void dot() {
  require(configuration.rows[sums] > 0 && configuration.rows[left] == configuration.rows[sums]);
  require(configuration.rows[right] == configuration.row_bytes[left] / 4);
  require(configuration.row_bytes[right] == configuration.row_bytes[sums]);
  for (int row = 0; row < configuration.rows[sums]; ++row) {
    for (int column = 0; column < configuration.row_bytes[sums] / 4; ++column) {
      float sum;
      std::memcpy(&sum, &registers[sums][row][4 * column], 4);
      for (int k = 0; k < configuration.row_bytes[left] / 4; ++k) {
        uint32_t a, b;
        std::memcpy(&a, &registers[left][row][4 * k], 4);
        std::memcpy(&b, &registers[right][k][4 * column], 4);
        sum += half(a, false) * half(b, false) + half(a, true) * half(b, true);
      }
      std::memcpy(&registers[sums][row][4 * column], &sum, 4);
    }
  }
}

#else

inline void configure(const Configuration& wanted) { asm volatile("ldtilecfg %0" ::"m"(wanted)); }
inline void release() { asm volatile("tilerelease"); }

template <int tile>
inline __attribute__((always_inline)) void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

template <int tile>
inline __attribute__((always_inline)) void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline __attribute__((always_inline)) void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}

// sums (rows, 16) += left (rows, k) @ right (k / 2, 16 pairs), in float32.
template <int sums, int left, int right>
inline __attribute__((always_inline)) void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right));
}

#endif

}  // namespace blockvit::amx

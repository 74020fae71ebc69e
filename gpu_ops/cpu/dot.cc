// See dot.h. One tile of a few rows and outputs is summed in registers; all instruction sets give the
// same sums, as no partial sum saturates.
#include "dot.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && !defined(DOT_PLAIN)
#include <immintrin.h>
#endif

namespace gpu_ops {
namespace {

constexpr int kInstructionSets = 5;

inline int32_t Quad(const uint8_t* codes) {
  int32_t value;
  std::memcpy(&value, codes, sizeof value);
  return value;
}

void DotPlain(const uint8_t* codes, int64_t row, int64_t rows, const int8_t* weights,
              int64_t quads, int64_t outputs, int32_t* sums) {
  for (int64_t i = 0; i < rows; ++i, codes += row, sums += kSlice) {
    std::memset(sums, 0, outputs * sizeof *sums);
    for (int64_t q = 0; q < quads; ++q)
      for (int64_t o = 0; o < outputs; ++o) {
        const int8_t* w = weights + (q * outputs + o) * kQuad;
        const uint8_t* c = codes + q * kQuad;
        sums[o] += c[0] * w[0] + c[1] * w[1] + c[2] * w[2] + c[3] * w[3];
      }
  }
}

#if defined(__x86_64__) && !defined(DOT_PLAIN)

#define UNROLLED(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); ++i)

// The tile of the rows that are left, fewer than `ROWS`.
#define REST(COUNT, NAME, ROWS)                                                              \
  case COUNT:                                                                                \
    Tile##NAME<COUNT < ROWS ? COUNT : 1, kVectors>(codes + i * row, row, weights, quads,     \
                                                   outputs, sums + i * kSlice);              \
    break;

// Defines Dot`NAME`, of tiles of at most `ROWS` rows and `VECTORS` vectors of VECTOR.
#define DOT_TILES(NAME, TARGET, VECTOR, ROWS, VECTORS)                                            \
  template <int kRows, int kVectors>                                                              \
  TARGET inline void Tile##NAME(const uint8_t* codes, int64_t row, const int8_t* weights,         \
                                int64_t quads, int64_t outputs, int32_t* sums) {                  \
    VECTOR sum[kRows][kVectors];                                                                  \
    UNROLLED(i, kRows)                                                                            \
      UNROLLED(v, kVectors) sum[i][v] = VECTOR{};                                                 \
    for (int64_t q = 0; q < quads; ++q, weights += outputs * kQuad) {                             \
      VECTOR weight[kVectors];                                                                    \
      UNROLLED(v, kVectors)                                                                       \
        std::memcpy(&weight[v], weights + v * sizeof(VECTOR), sizeof(VECTOR));                    \
      UNROLLED(i, kRows) {                                                                        \
        const VECTOR code = Every##NAME(Quad(codes + i * row + q * kQuad));                       \
        UNROLLED(v, kVectors) sum[i][v] = Add##NAME(sum[i][v], code, weight[v]);                  \
      }                                                                                           \
    }                                                                                             \
    UNROLLED(i, kRows)                                                                            \
      UNROLLED(v, kVectors) {                                                                     \
        const VECTOR value = sum[i][v]; /* the address of a sum would put it in memory */         \
        std::memcpy(sums + i * kSlice + v * sizeof(VECTOR) / 4, &value, sizeof value);            \
      }                                                                                           \
  }                                                                                               \
                                                                                                  \
  template <int kVectors>                                                                         \
  TARGET inline void Rows##NAME(const uint8_t* codes, int64_t row, int64_t rows,                  \
                                const int8_t* weights, int64_t quads, int64_t outputs,            \
                                int32_t* sums) {                                                  \
    int64_t i = 0;                                                                                \
    for (; i + ROWS <= rows; i += ROWS)                                                           \
      Tile##NAME<ROWS, kVectors>(codes + i * row, row, weights, quads, outputs,                   \
                                 sums + i * kSlice);                                              \
    switch (rows - i) {                                                                           \
      REST(5, NAME, ROWS)                                                                         \
      REST(4, NAME, ROWS)                                                                         \
      REST(3, NAME, ROWS)                                                                         \
      REST(2, NAME, ROWS)                                                                         \
      REST(1, NAME, ROWS)                                                                         \
    }                                                                                             \
  }                                                                                               \
                                                                                                  \
  TARGET void Dot##NAME(const uint8_t* codes, int64_t row, int64_t rows, const int8_t* weights,   \
                        int64_t quads, int64_t outputs, int32_t* sums) {                          \
    constexpr int64_t kLanes = sizeof(VECTOR) / sizeof(int32_t);                                  \
    int64_t o = 0;                                                                                \
    for (; o + VECTORS * kLanes <= outputs; o += VECTORS * kLanes)                                \
      Rows##NAME<VECTORS>(codes, row, rows, weights + o * kQuad, quads, outputs, sums + o);       \
    for (; o < outputs; o += kLane)                                                               \
      Rows##NAME<kLane / kLanes>(codes, row, rows, weights + o * kQuad, quads, outputs,           \
                                 sums + o);                                                       \
  }

#define AVX512_VNNI __attribute__((target("avx512f,avx512vnni")))
#define AVX_VNNI __attribute__((target("avx2,avxvnni")))
#define AVX2 __attribute__((target("avx2")))

AVX512_VNNI inline __m512i EveryAvx512Vnni(int32_t quad) { return _mm512_set1_epi32(quad); }
AVX512_VNNI inline __m512i AddAvx512Vnni(__m512i sum, __m512i codes, __m512i weights) {
  // GCC 12 copies the sum before the intrinsic, and 24 of them do not fit the registers twice.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
  return sum;
}
DOT_TILES(Avx512Vnni, AVX512_VNNI, __m512i, 6, 4)

AVX_VNNI inline __m256i EveryAvxVnni(int32_t quad) { return _mm256_set1_epi32(quad); }
AVX_VNNI inline __m256i AddAvxVnni(__m256i sum, __m256i codes, __m256i weights) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(weights));
  return sum;
}
DOT_TILES(AvxVnni, AVX_VNNI, __m256i, 6, 2)

AVX2 inline __m256i EveryAvx2(int32_t quad) { return _mm256_set1_epi32(quad); }
// The products of even and of odd bytes in 16 bits, as those of vpmaddubsw would saturate.
AVX2 inline __m256i AddAvx2(__m256i sum, __m256i codes, __m256i weights) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8));
  const __m256i odd =
      _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(weights, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
DOT_TILES(Avx2, AVX2, __m256i, 3, 2)

#endif

void Nothing() {}

const InstructionSet* Sets() {
#if defined(__x86_64__) && !defined(DOT_PLAIN)
  static const InstructionSet sets[] = {
      Amx(),
      {"avx512_vnni", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"),
       DotAvx512Vnni, Nothing},
      {"avx_vnni", bool(__builtin_cpu_supports("avxvnni")), DotAvxVnni, Nothing},
      {"avx2", bool(__builtin_cpu_supports("avx2")), DotAvx2, Nothing},
      {"plain", true, DotPlain, Nothing}};
#else
  static const InstructionSet sets[] = {Amx(),
                                        {"avx512_vnni", false, nullptr, nullptr},
                                        {"avx_vnni", false, nullptr, nullptr},
                                        {"avx2", false, nullptr, nullptr},
                                        {"plain", true, DotPlain, Nothing}};
#endif
  return sets;
}

}  // namespace

const InstructionSet* ChooseInstructions() {
  const char* most = std::getenv("GPU_OPS_INSTRUCTIONS");
  const InstructionSet *set = Sets(), *end = set + kInstructionSets;
  if (most != nullptr && *most != '\0')
    while (set < end && std::strcmp(most, set->name) != 0) ++set;
  while (set < end && !set->present) ++set;
  return set == end ? nullptr : set;
}

}  // namespace gpu_ops

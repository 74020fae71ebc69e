// The products of dot.h by AMX: 16 rows of codes and four tiles of 16 outputs at a time, whose sums stay
// in tiles. Rows of codes and weights are loaded six times as fast where they are aligned to 64 bytes.
#include "dot.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(DOT_PLAIN)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX
#endif

namespace gpu_ops {
#ifdef HAS_AMX
namespace {

#define AMX __attribute__((target("amx-tile,amx-int8")))

constexpr int64_t kTileQuads = kTileBytes / kQuad;

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};

  void Shape(int tile, int64_t height, int64_t quads) {
    rows[tile] = static_cast<uint8_t>(quads > 0 ? height : 0);
    bytes[tile] = static_cast<uint16_t>(height > 0 ? quads * kQuad : 0);
  }
};

// What the tiles of this thread have been shaped for: rows and the quads that are left, or two runs.
thread_local int64_t shaped_for[2] = {};

AMX void LoadShapes(const TileShapes& shapes, int64_t first, int64_t second) {
  asm volatile("" ::: "memory");  // GCC 12 takes it that only the first eight bytes are read
  _tile_loadconfig(&shapes);
  shaped_for[0] = first;
  shaped_for[1] = second;
}

// Tiles 0 to 3 are sums, 4 and 5 codes and weights of 16 quads, 6 and 7 those of the quads that are
// left.
AMX void ShapeTiles(int64_t rows, int64_t rest) {
  if (rows == shaped_for[0] && rest == shaped_for[1]) return;
  TileShapes shapes;
  for (int tile = 0; tile < 4; ++tile) shapes.Shape(tile, rows, kLane);
  shapes.Shape(4, rows, kTileQuads);
  shapes.Shape(5, kTileQuads, kLane);
  shapes.Shape(6, rows, rest);
  shapes.Shape(7, rest, kLane);
  LoadShapes(shapes, rows, rest);
}

// Tiles 0 to 3 are the sums of both runs with 32 outputs, 4 and 5 codes, 6 and 7 weights.
AMX void ShapeRuns(const TapCodes& codes) {
  const int64_t first = -1 - codes.count[0], second = codes.count[1];  // of no ShapeTiles
  if (first == shaped_for[0] && second == shaped_for[1]) return;
  TileShapes shapes;
  for (int run = 0; run < 2; ++run) {
    for (int lane = 0; lane < 2; ++lane) shapes.Shape(2 * run + lane, codes.count[run], kLane);
    shapes.Shape(4 + run, codes.count[run], kTileQuads);
    shapes.Shape(6 + run, kTileQuads, kLane);
  }
  LoadShapes(shapes, first, second);
}

// Tiles that are in use are saved whenever the thread is switched.
AMX void End() {
  _tile_release();
  shaped_for[0] = 0;
}

// Adds the products of a tile of codes with a tile of weights of each of the sums.
#define ADD_PRODUCTS(CODES, WEIGHTS)                         \
  _tile_loadd(CODES, codes, row);                            \
  _tile_loadd(WEIGHTS, weights, line);                       \
  _tile_dpbusd(0, CODES, WEIGHTS);                           \
  if (kTiles > 1) {                                          \
    _tile_loadd(WEIGHTS, weights + kLane * kQuad, line);     \
    _tile_dpbusd(1, CODES, WEIGHTS);                         \
  }                                                          \
  if (kTiles > 2) {                                          \
    _tile_loadd(WEIGHTS, weights + 2 * kLane * kQuad, line); \
    _tile_dpbusd(2, CODES, WEIGHTS);                         \
  }                                                          \
  if (kTiles > 3) {                                          \
    _tile_loadd(WEIGHTS, weights + 3 * kLane * kQuad, line); \
    _tile_dpbusd(3, CODES, WEIGHTS);                         \
  }

// The sums of as many rows as the tiles have, and of `kTiles` times `kLane` outputs.
template <int kTiles>
AMX inline void Tile(const uint8_t* codes, int64_t row, const int8_t* weights, int64_t quads,
                     int32_t* sums) {
  constexpr int64_t line = kTiles * kLane * kQuad, stride = kSlice * sizeof(int32_t);
  _tile_zero(0);
  if (kTiles > 1) _tile_zero(1);
  if (kTiles > 2) _tile_zero(2);
  if (kTiles > 3) _tile_zero(3);
  for (; quads >= kTileQuads; quads -= kTileQuads) {
    ADD_PRODUCTS(4, 5)
    codes += kTileQuads * kQuad;
    weights += kTileQuads * line;
  }
  if (quads > 0) {
    ADD_PRODUCTS(6, 7)
  }
  _tile_stored(0, sums, stride);
  if (kTiles > 1) _tile_stored(1, sums + kLane, stride);
  if (kTiles > 2) _tile_stored(2, sums + 2 * kLane, stride);
  if (kTiles > 3) _tile_stored(3, sums + 3 * kLane, stride);
}

template <int kTiles>
AMX void Rows(const uint8_t* codes, int64_t row, int64_t rows, const int8_t* weights, int64_t quads,
              int32_t* sums) {
  if (rows >= kTileRows) ShapeTiles(kTileRows, quads % kTileQuads);
  for (; rows >= kTileRows; rows -= kTileRows, codes += kTileRows * row, sums += kTileRows * kSlice)
    Tile<kTiles>(codes, row, weights, quads, sums);
  if (rows == 0) return;
  ShapeTiles(rows, quads % kTileQuads);
  Tile<kTiles>(codes, row, weights, quads, sums);
}

void Dot(const uint8_t* codes, int64_t row, int64_t rows, const int8_t* weights, int64_t quads,
         int64_t outputs, int32_t* sums) {
  switch (outputs / kLane) {
    case 1: return Rows<1>(codes, row, rows, weights, quads, sums);
    case 2: return Rows<2>(codes, row, rows, weights, quads, sums);
    case 3: return Rows<3>(codes, row, rows, weights, quads, sums);
    default: return Rows<4>(codes, row, rows, weights, quads, sums);
  }
}

// The sums of both runs, or of the first alone, with one or two lanes of outputs.
template <bool kBoth, bool kPair>
AMX inline void Runs(const TapCodes& codes, const int8_t* weights, int64_t line, int32_t* sums) {
  constexpr int64_t stride = kSlice * sizeof(int32_t), lane = kLane * kQuad;
  _tile_zero(0);
  if (kPair) _tile_zero(1);
  if (kBoth) _tile_zero(2);
  if (kBoth && kPair) _tile_zero(3);
  for (const int64_t tap : codes.taps)
    for (int64_t k = tap; k < tap + codes.size; k += kTileBytes, weights += kTileQuads * line) {
      _tile_loadd(6, weights, line);
      _tile_loadd(4, codes.first[0] + k, codes.step);
      _tile_dpbusd(0, 4, 6);
      if (kPair) {
        _tile_loadd(7, weights + lane, line);
        _tile_dpbusd(1, 4, 7);
      }
      if (kBoth) {
        _tile_loadd(5, codes.first[1] + k, codes.step);
        _tile_dpbusd(2, 5, 6);
      }
      if (kBoth && kPair) _tile_dpbusd(3, 5, 7);
    }
  _tile_stored(0, sums, stride);
  if (kPair) _tile_stored(1, sums + kLane, stride);
  int32_t* second = sums + codes.count[0] * kSlice;
  if (kBoth) _tile_stored(2, second, stride);
  if (kBoth && kPair) _tile_stored(3, second + kLane, stride);
}

template <bool kBoth>
AMX inline void EachPair(const TapCodes& codes, const int8_t* weights, int64_t outputs, int32_t* sums) {
  ShapeRuns(codes);
  const int64_t line = outputs * kQuad;
  for (int64_t o = 0; o < outputs; o += 2 * kLane)
    if (outputs - o > kLane)
      Runs<kBoth, true>(codes, weights + o * kQuad, line, sums + o);
    else
      Runs<kBoth, false>(codes, weights + o * kQuad, line, sums + o);
}

void TapDot(const TapCodes& codes, const int8_t* weights, int64_t outputs, int32_t* sums) {
  if (codes.count[1] > 0)
    EachPair<true>(codes, weights, outputs, sums);
  else
    EachPair<false>(codes, weights, outputs, sums);
}

// Whether the CPU has AMX, and Linux lets this process use it.
bool Present() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kInt8) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

InstructionSet Amx() { return {"amx_int8", Present(), Dot, End, TapDot}; }
#else
InstructionSet Amx() { return {"amx_int8", false, nullptr, nullptr}; }
#endif

}  // namespace gpu_ops

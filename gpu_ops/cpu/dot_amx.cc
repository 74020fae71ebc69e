// The products of dot.h by AMX: 16 rows of codes and four tiles of 16 outputs at a time, whose sums stay
// in tiles. Rows of codes and weights are loaded six times as fast where they are aligned to 64 bytes.
#include "amx.h"

namespace gpu_ops {
#ifdef HAS_AMX
namespace {

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

// Whether the CPU has AMX, and Linux lets this process use it.
bool Present() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kInt8) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

InstructionSet Amx() { return {"amx_int8", Present(), Dot, End, true}; }
#else
InstructionSet Amx() { return {"amx_int8", false, nullptr, nullptr}; }
#endif

}  // namespace gpu_ops

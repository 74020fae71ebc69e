// The tiles of AMX: how they are shaped, and whether there are any.
#pragma once

#include "border_math.h"
#include "dot.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(DOT_PLAIN)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX
// No CPU has AMX without these instructions of AVX-512.
#define AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl")))
#define AMX_INLINE AMX BORDER_INLINE
#endif

namespace gpu_ops {

constexpr int64_t kTileQuads = kTileBytes / kQuad;

#ifdef HAS_AMX
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
inline thread_local int64_t shaped_for[2] = {};

AMX inline void LoadShapes(const TileShapes& shapes, int64_t first, int64_t second) {
  asm volatile("" ::: "memory");  // GCC 12 takes it that only the first eight bytes are read
  _tile_loadconfig(&shapes);
  shaped_for[0] = first;
  shaped_for[1] = second;
}
#endif

}  // namespace gpu_ops

// Products of unsigned activation codes and signed weights, summed exactly in int32.
//
// Four codes of a row meet four weights of an output at a time (a quad), which is what one lane of
// the VNNI instructions multiplies.
#pragma once

#include <cstdint>

namespace gpu_ops {

constexpr int64_t kQuad = 4;
constexpr int64_t kLane = 16;   // outputs that a packed vector holds
constexpr int64_t kSlice = 64;  // most outputs of one product
constexpr int64_t kTileRows = 16;   // most of a tile of AMX
constexpr int64_t kTileBytes = 64;  // of a row

inline int64_t RoundTo(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// sums[i * kSlice + o] = sum_k codes[i * row + k] weights(k, o), for `rows` rows and `outputs`
// outputs, a multiple of kLane and at most kSlice. The weights are packed as [quad][output][4].
using DotFunction = void (*)(const uint8_t* codes, int64_t row, int64_t rows,
                             const int8_t* weights, int64_t quads, int64_t outputs, int32_t* sums);

// Products by one kind of instructions. A thread that has called one calls `end` after the last.
struct InstructionSet {
  const char* name;
  bool present;  // on this CPU
  DotFunction dot;
  void (*end)();
  bool tiles = false;  // of codes where they lie can be multiplied; else columns are gathered
};

// That of AMX, in tiles of 16 rows and 16 outputs.
InstructionSet Amx();

// The widest instructions that this CPU has, and that the environment variable GPU_OPS_INSTRUCTIONS
// allows; null where it names none.
const InstructionSet* ChooseInstructions();

}  // namespace gpu_ops

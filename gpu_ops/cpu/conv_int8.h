// A deployed convolution on CPU in one pass: the codes of a few pixels' columns, their products with
// weight codes, and what becomes of the sums.
//
// A task is a block of rows of one image's result, or some whole images. The rows of the input that
// it reads are made once, with their padding: units where every column element has its own border,
// codes where an activation has one code whatever tap reads it, and the input itself where that is
// codes already. Where AMX finds the channels of a tap in whole tiles, it multiplies codes where they
// lie in these rows, two runs of pixels at a time. Else the columns of some pixels, a panel, are
// gathered and multiplied slice by slice of the outputs. Weights that do not stay in a core's cache
// are read once a panel, which is large then, of several images if these are small.
//
// The sums of up to `kSumPixels` pixels and one slice are scaled, added to, clipped and stored as
// floats, as codes, or as both, a vector of outputs after the other, whose constants stay in
// registers for all these pixels. Operations that a bound on all values makes idle are left out. A
// depthwise convolution sums the taps of a vector of channels in float32, in which its sums are
// exact. A maximum over windows of the result is taken from the floats of a task's rows, which stay
// in its memory.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "column.h"
#include "dot.h"

namespace gpu_ops {

constexpr int64_t kPanelBytes = 1 << 17;
constexpr int64_t kPooledBytes = 1 << 19;  // of the floats that a task takes maxima of
constexpr int64_t kSumPixels = 48;  // most whose sums stay in the first-level cache
constexpr int64_t kTilePixels = 2 * kTileRows;  // of two runs

// Bytes of a core's second-level cache that weights, or columns, may take.
inline int64_t CacheShare() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);  // which may leave a virtual machine
#else
  constexpr int64_t size = 0;
#endif
  return (size > 0 ? size : int64_t{1} << 20) / 2;
}

// A tensor of codes of the result's shape.
struct CodeGrid {
  Grid grid;
  Phi phi;
  const float* coefficients;  // b0, b1, b2 of every channel
  uint8_t* codes;
  bool bounded = false;   // no value is near 2^23 units, or not a number
  bool positive = false;  // nor below zero, which is code 0; and all borders are below 1
};

// What becomes of the sums; absent operands are null.
struct Results {
  const float *scale, *bias, *residual;
  const uint8_t* residual_codes;
  Grid residual_grid;
  float low, high;
  float* values;
  std::vector<CodeGrid> codes;
  bool finite = false;  // all values are
};

// Rows [first, first + count) of an image.
struct RowRange {
  int64_t first, count;
};

struct Int8Convolution {
  ColumnJob columns;
  Geometry pool;     // of the windows of a maximum over the sums; without taps for none
  bool per_element;  // the borders are those of column elements
  int64_t outputs;   // of all groups
  int64_t weight_bits;
  const uint8_t* weights;
  const float* weight_zero;
  Results results;
  const InstructionSet* instructions;

  const Geometry& Window() const { return columns.g; }
  int64_t Outer() const { return outputs / columns.g.groups; }
  int64_t Elements() const { return columns.g.Taps() * columns.g.Inner(); }
  int64_t Quads() const { return RoundTo(Elements(), kQuad) / kQuad; }
  // A product of codes of 8 bits is below 2^16, and sums below 2^24 are exact in float32.
  bool Depthwise() const {
    return columns.g.Inner() == 1 && Outer() == 1 && columns.g.groups > 1 &&
           columns.g.Taps() < (1 << 8);
  }
  // The rows of the input are the columns.
  bool RowsAreColumns() const {
    const Geometry& g = columns.g;
    return !per_element && !Depthwise() && g.groups == 1 && g.Taps() == 1 && g.stride[0] == 1 &&
           g.stride[1] == 1 && g.channels % kQuad == 0;
  }
  // Codes are multiplied where they lie in the rows, in tiles that are mostly full.
  bool RowsAreTiles() const;
  bool NeedsPanel() const { return !Depthwise() && !RowsAreColumns() && !RowsAreTiles(); }
  bool Pooled() const { return pool.Taps() > 0; }
  int64_t ResultRows() const { return Pooled() ? pool.Out(0) : Window().Out(0); }
  // The rows of sums that these rows of the result are made of.
  RowRange SumRows(const RowRange& rows) const {
    if (!Pooled()) return rows;
    const int64_t most = Window().Out(0), top = rows.first * pool.stride[0] - pool.low[0];
    const int64_t first = std::clamp<int64_t>(top, 0, most);
    const int64_t end = top + (rows.count - 1) * pool.stride[0] + pool.Span(0);
    return {first, std::clamp(end, first, most) - first};
  }
  // The most of them for `count` rows of the result.
  int64_t MostSumRows(int64_t count) const {
    if (!Pooled()) return count;
    return std::min((count - 1) * pool.stride[0] + pool.Span(0), Window().Out(0));
  }
  // Rows of the result whose sums, and what these read, stay in a core's cache.
  int64_t BlockRows() const {
    const int64_t read = columns.BlockRows(RowElement());
    if (!Pooled()) return read;
    const int64_t line = Window().Out(1) * outputs * static_cast<int64_t>(sizeof(float));
    const int64_t sums = std::min(read, kPooledBytes / std::max<int64_t>(line, 1));
    return std::clamp<int64_t>((sums - pool.Span(0)) / pool.stride[0] + 1, 1, pool.Out(0));
  }
  size_t RowElement() const { return per_element || Depthwise() ? sizeof(float) : sizeof(uint8_t); }
};

// The weights of every group, sliced by outputs and packed for the products; `constant` and
// `factor` complete the sum of an output: total + constant + factor * (sum of the codes).
struct PackedWeights {
  Scratch<int8_t> packed;
  std::vector<int8_t> ones;  // of 8 bits, to sum codes
  std::vector<int32_t> constant, factor;
  std::vector<float> depthwise;
  int64_t width, slices;  // outputs of a group, filled up, and its slices

  explicit PackedWeights(const Int8Convolution& job)
      : packed(job.Depthwise() ? 0 : Bytes(job)),
        width(Width(job)),
        slices((width + kSlice - 1) / kSlice) {
    const int64_t groups = job.Window().groups;
    if (job.Depthwise()) {
      depthwise.resize(job.Window().Column());
      return;
    }
    if (job.weight_bits == 8) ones.resize(job.Quads() * kLane * kQuad);
    for (int64_t i = 0; i < static_cast<int64_t>(ones.size()); ++i)
      ones[i] = i / (kLane * kQuad) * kQuad + i % kQuad < job.Elements();
    constant.resize(groups * width);
    factor.resize(groups * width);
  }

  static int64_t Width(const Int8Convolution& job) { return RoundTo(job.Outer(), kLane); }
  static int64_t Bytes(const Int8Convolution& job) {
    return Width(job) * job.Window().groups * job.Quads() * kQuad;
  }
  int64_t First(int64_t slice) const { return slice * kSlice; }
  int64_t Count(int64_t slice) const { return std::min(kSlice, width - First(slice)); }
  int64_t At(int64_t group, int64_t slice, int64_t quads) const {
    return (group * width + First(slice)) * quads * kQuad;
  }
};

inline bool Int8Convolution::RowsAreTiles() const {
  const Geometry& g = columns.g;
  return instructions->tiles && !per_element && !RowsAreColumns() && g.groups == 1 &&
         g.channels % kTileBytes == 0 && 4 * g.Out(1) >= 3 * RoundTo(g.Out(1), kTileRows) &&
         PackedWeights::Bytes(*this) <= CacheShare();
}

// Fills the weights of one slice of one group.
void Pack(const Int8Convolution& job, int64_t group, int64_t slice, PackedWeights& to);
// Fills the weights of a depthwise convolution, [taps, channels].
void PackDepthwise(const Int8Convolution& job, PackedWeights& to);

// A slice of the outputs of `kSumPixels` pixels: their values, `kSlice` apart, and beside them the
// residuals that are added, and then the codes.
struct Strip {
  Scratch<float> values{kSumPixels * kSlice}, residuals{kSumPixels * kSlice};
  Scratch<int32_t> codes{kSumPixels * kSlice};
};

// Memory of one task, of `rows` rows of sums.
struct TaskScratch {
  Scratch<float> units, values;
  Scratch<uint8_t> codes, panel, column;
  Scratch<int32_t> sums, code_sums;
  Strip strip;
  ColumnScratch pixel;
  int64_t filled = 0;  // pixels of the panel

  explicit TaskScratch(const Int8Convolution& job, int64_t rows)
      : units(job.RowElement() == sizeof(float) ? RowElements(job, rows) + kSlack : 0),
        values(job.Pooled() ? SumValues(job, rows) : 0),
        codes(job.RowElement() == sizeof(float) ? 0 : RowElements(job, rows) + kSlack),
        panel(job.NeedsPanel() ? Pixels(job) * PanelRow(job) + kSlack : 0),
        column(job.per_element && !job.Depthwise() ? job.Window().Column() + kSlack : 0),
        sums(job.Depthwise() ? 0 : SumPixels(job) * kSlice),
        code_sums(job.Depthwise() || job.weight_bits < 8 ? 0 : CodeSums(job)),
        pixel(job.columns) {}

  // Bytes of a pixel's codes in one group, and in a panel.
  static int64_t GroupRow(const Int8Convolution& job) {
    return RoundTo(job.Quads() * kQuad, kCacheLine);
  }
  static int64_t PanelRow(const Int8Convolution& job) {
    return job.Window().groups * GroupRow(job);
  }
  // Most of a panel, in whole tiles.
  static int64_t Pixels(const Int8Convolution& job) {
    const Geometry& g = job.Window();
    const bool cached = PackedWeights::Bytes(job) <= CacheShare();
    const int64_t bytes = cached ? kPanelBytes : CacheShare();
    const int64_t most = cached ? kSumPixels : RoundTo(g.images * g.Pixels(), kTileRows);
    const int64_t pixels = RoundTo(bytes / std::max<int64_t>(PanelRow(job), 1), kTileRows);
    return std::min(std::max(pixels, kTileRows), most);
  }
  // Of a product; tiles have those of the one before besides.
  static int64_t SumPixels(const Int8Convolution& job) {
    return job.RowsAreTiles() ? 2 * kTilePixels : kSumPixels;
  }
  static int64_t CodeSums(const Int8Convolution& job) {
    return job.RowsAreTiles() ? 2 * kTilePixels : Pixels(job);
  }
  static int64_t RowElements(const Int8Convolution& job, int64_t rows) {
    return job.columns.InputRows(rows) * job.columns.Line();
  }
  static int64_t SumValues(const Int8Convolution& job, int64_t rows) {
    return rows * job.Window().Out(1) * job.outputs;
  }
  static int64_t Bytes(const Int8Convolution& job, int64_t rows) {
    const int64_t pooled = job.Pooled() ? SumValues(job, rows) : 0;
    return RowElements(job, rows) * job.RowElement() + pooled * sizeof(float) +
           Pixels(job) * PanelRow(job) + CodeSums(job) * sizeof(int32_t) +
           (SumPixels(job) + 3 * kSumPixels) * kSlice * sizeof(int32_t) + job.Window().Column() +
           ColumnScratch::Bytes(job.Window());
  }
};

// Rows [first, first + rows) of the sums of image `n`, and slices [slice, slices) of every group.
// Unless they are the `last` of a task, their pixels may wait for more in the panel.
struct Task {
  int64_t n, first, rows, slice, slices;
  bool last;
};

// Fills the rows that a task reads, from an image of floats, of bfloat16 or of codes.
void FillRows(const Int8Convolution& job, const float* image, const Task& task, TaskScratch& s);
void FillRows(const Int8Convolution& job, const uint16_t* image, const Task& task, TaskScratch& s);
void FillRows(const Int8Convolution& job, const uint8_t* image, const Task& task, TaskScratch& s);

// The results of a task, or, of a pooled convolution, its floats. `direct` is where its columns lie,
// if they are not made of the rows.
void MultiplyRows(const Int8Convolution& job, const PackedWeights& w, const uint8_t* direct,
                  const Task& task, TaskScratch& s);

// Those of a task whose rows are tiles.
void MultiplyTiles(const Int8Convolution& job, const PackedWeights& w, const Task& task,
                   TaskScratch& s);

// Rows of the result of a pooled convolution, from the floats of a task that has multiplied.
void PoolRows(const Int8Convolution& job, const RowRange& rows, const Task& task, TaskScratch& s);

}  // namespace gpu_ops

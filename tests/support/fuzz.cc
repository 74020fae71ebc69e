// Random calls of all CPU handlers, for a build with a sanitizer: fuzz SECONDS [FIRST_SEED]. A
// hundred seeds run however long they take.
//
// A call that fits must succeed, and give the same bits with another number of threads over other
// garbage; one that does not fit, or whose memory runs out, must be an error. One translation unit,
// as the headers take most of the time.
#include "ffi_runtime.h"

#include "../../gpu_ops/cpu/border_columns.cc"
#include "../../gpu_ops/cpu/border_conv.cc"
#include "../../gpu_ops/cpu/conv_int8.cc"
#include "../../gpu_ops/cpu/conv_int8_rows.cc"
#include "../../gpu_ops/cpu/conv_int8_task.cc"
#include "../../gpu_ops/cpu/conv_int8_tiles.cc"
#include "../../gpu_ops/cpu/depthwise.cc"
#include "../../gpu_ops/cpu/dot.cc"
#include "../../gpu_ops/cpu/dot_amx.cc"
#include "../../gpu_ops/cpu/img2col.cc"
#include "../../gpu_ops/cpu/img2col_border.cc"
#include "../../gpu_ops/cpu/missing.cc"
#include "../../gpu_ops/cpu/multiply.cc"
#include "../../gpu_ops/cpu/packed_weights.cc"
#include "../../gpu_ops/cpu/pool.cc"

#include <chrono>
#include <cstdio>
#include <limits>
#include <random>

namespace {

using runtime::Buffer;
using runtime::Call;

struct Random {
  std::mt19937_64 bits;

  int64_t Below(int64_t count) { return static_cast<int64_t>(bits() % count); }
  bool Chance(int64_t of) { return Below(of) == 0; }
  int64_t Of(std::initializer_list<int64_t> values) { return values.begin()[Below(values.size())]; }
  double Uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(bits);
  }
  float Value() {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const float odd[] = {NAN, infinity, -infinity, 1e-40f, -1e-40f, 0.0f, -0.0f, 3e38f, -3e38f};
    return Chance(8) ? odd[Below(9)] : static_cast<float>(Uniform(-4, 4));
  }
};

// A window over x, and what it gives.
struct Window {
  int64_t images, channels, groups, bits, degree;
  std::vector<int64_t> size, kernel, stride, dilation, padding, out;

  int64_t Column() const { return kernel[0] * kernel[1] * channels; }
};

Window RandomWindow(Random& r, bool padded) {
  Window w{r.Below(4), r.Of({0, 1, 2, 3, 5, 16, 20, 33}), 1, 2 + r.Below(7), r.Below(3),
           {}, {}, {}, {}, {}, {}};
  if (w.channels > 0 && r.Chance(2)) w.groups = w.channels;
  for (int axis = 0; axis < 2; ++axis) {
    w.kernel.push_back(1 + r.Below(3));
    w.stride.push_back(1 + r.Below(3));
    w.dilation.push_back(1 + r.Below(2));
    const int64_t low = padded ? r.Below(3) : 0, high = padded ? r.Below(3) : 0;
    const int64_t span = (w.kernel[axis] - 1) * w.dilation[axis] + 1;
    w.size.push_back(std::max<int64_t>(span - low - high, 1) + r.Below(5));
    w.padding.insert(w.padding.end(), {low, high});
    w.out.push_back((w.size[axis] + low + high - span) / w.stride[axis] + 1);
  }
  return w;
}

Buffer Array(XLA_FFI_DataType type, std::vector<int64_t> sizes) { return {type, sizes, nullptr}; }
Buffer Floats(std::vector<int64_t> sizes) { return Array(XLA_FFI_DataType_F32, sizes); }

// A kind of call: its handler, its operands and results.
struct Kind {
  const char* name;
  XLA_FFI_Handler* handler;
  bool padded, trains, multiplies, pulls;
};

constexpr Kind kKinds[] = {
    {"img2col", gpu_ops::Img2colHandler, true, false, false, false},
    {"img2col_border", gpu_ops::Img2colBorderHandler, true, false, false, false},
    {"border_columns", gpu_ops::BorderColumnsForward, false, true, false, false},
    {"border_columns_vjp", gpu_ops::BorderColumnsBackward, false, true, false, true},
    {"border_conv", gpu_ops::BorderConvForward, false, true, true, false},
    {"border_conv_vjp", gpu_ops::BorderConvBackward, false, true, true, true},
    {"conv_int8", gpu_ops::ConvInt8Handler, true, false, false, false}};

constexpr size_t kWeightZero = 5, kCodeGrids = 10;  // of the last kind's arguments

void AddDeployed(Random& r, const Window& w, bool border, Call& call) {
  const int64_t row = w.Column() / w.groups + r.Below(3);
  const XLA_FFI_DataType from = r.Chance(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F32;
  const XLA_FFI_DataType to = r.Chance(2) ? XLA_FFI_DataType_S8 : XLA_FFI_DataType_F32;
  call.arguments.push_back(Array(from, {w.images, w.size[0], w.size[1], w.channels}));
  call.results.push_back(
      Array(border ? to : from, {w.images, w.out[0], w.out[1], w.groups, row}));
}

void AddTrained(Random& r, Window& w, const Kind& kind, Call& call) {
  const std::vector<int64_t> x{w.images, w.size[0], w.size[1], w.channels};
  const int64_t outputs = r.Of({0, 1, 3, 16, 17});
  if (!kind.multiplies) w.groups = 1;
  const bool depthwise = w.groups > 1;
  call.arguments.push_back(Floats(x));
  const bool masked = r.Chance(2);
  call.arguments.push_back(
      Array(XLA_FFI_DataType_PRED, masked ? x : std::vector<int64_t>{0}));
  std::vector<int64_t> y{w.images, w.out[0], w.out[1], w.kernel[0] * w.kernel[1], w.channels};
  const std::vector<int64_t> kernel{w.Column(), depthwise ? 1 : outputs};
  if (kind.multiplies) y = {w.images, w.out[0], w.out[1], depthwise ? w.channels : outputs};
  const std::vector<int64_t> coefficients{w.degree + 1, w.kernel[0] * w.kernel[1], w.channels};
  for (int scalar = 0; scalar < 2; ++scalar) call.arguments.push_back(Floats({}));
  call.arguments.push_back(Floats(coefficients));
  if (kind.multiplies) call.arguments.push_back(Floats(kernel));
  if (!kind.pulls) return call.results.push_back(Floats(y));
  call.arguments.push_back(Floats(y));
  call.results.push_back(Floats(x));
  call.results.push_back(Floats({}));
  call.results.push_back(Floats(coefficients));
  if (kind.multiplies) call.results.push_back(Floats(kernel));
}

// The windows of a maximum over results of the shape `y`, which becomes that of the maximum.
std::vector<int64_t> MakePool(Random& r, std::vector<int64_t>& y) {
  const int64_t stride = 1 + r.Below(3), low = r.Below(3), high = r.Below(3);
  std::vector<int64_t> kernel, dilation;
  for (int axis = 1; axis <= 2; ++axis) {
    const int64_t padded = low + y[axis] + high;
    kernel.push_back(1 + r.Below(std::max<int64_t>(std::min<int64_t>(padded, 3), 1)));
    dilation.push_back(kernel.back() == 1 ? 1 + r.Below(2) : 1);
    y[axis] = std::max<int64_t>((padded - kernel.back()) / stride + 1, 0);
  }
  return {kernel[0], kernel[1], stride, stride, dilation[0], dilation[1], low, high, low, high};
}

// All arguments and results of a deployed convolution, and the attributes that only it has.
Call MakeConvolution(Random& r, const Window& w) {
  const bool channel = r.Chance(2), added = r.Chance(2), coded = r.Chance(2), values = r.Chance(2);
  const int64_t outputs = w.groups * r.Of({1, 2, 17, 70}), tensors = r.Below(3) + (values ? 0 : 1);
  const int64_t taps = channel ? 1 : w.kernel[0] * w.kernel[1];
  const int64_t powers = w.channels == 0 ? 0 : r.Below(4);
  const std::vector<int64_t> sums{w.images, w.out[0], w.out[1], outputs};
  std::vector<int64_t> y = sums, pool;
  if (r.Chance(3)) pool = MakePool(r, y);
  const XLA_FFI_DataType kinds[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16,
                                    XLA_FFI_DataType_U8};
  Call call{gpu_ops::ConvInt8Handler, {}, {}, {}};
  auto& a = call.arguments;
  a.push_back(Array(kinds[r.Below(3)], {w.images, w.size[0], w.size[1], w.channels}));
  for (int scalar = 0; scalar < 2; ++scalar) a.push_back(Floats({}));
  a.push_back(Floats({powers, taps, w.channels}));
  a.push_back(Array(XLA_FFI_DataType_U8,
                    {w.kernel[0], w.kernel[1], w.channels / w.groups, outputs}));
  for (int each = 0; each < 2; ++each) a.push_back(Floats({outputs}));
  a.push_back(Floats({r.Chance(2) ? outputs : 0}));
  a.push_back(Array(coded ? XLA_FFI_DataType_U8 : XLA_FFI_DataType_F32,
                    added ? sums : std::vector<int64_t>{0}));
  a.push_back(Floats({added && coded ? 2 : 0}));
  a.push_back(Floats({tensors, 2}));
  a.push_back(Floats({tensors, 3, outputs}));
  if (values) call.results.push_back(Floats(y));
  for (int64_t t = 0; t < tensors; ++t) call.results.push_back(Array(XLA_FFI_DataType_U8, y));
  call.attributes = {{"weight_bits", 2 + r.Below(7)}, {"per_channel", channel},
                     {"values", values}, {"low", static_cast<float>(-r.Below(3))},
                     {"high", static_cast<float>(r.Below(3))},
                     {"code_bits", std::vector<int64_t>(tensors, 2 + r.Below(7))},
                     {"code_phis", std::vector<int64_t>(tensors, r.Below(3))},
                     {"pool", pool}};
  return call;
}

Call MakeCall(Random& r, const Kind& kind) {
  Window w = RandomWindow(r, kind.padded);
  const bool border = kind.handler != gpu_ops::Img2colHandler;
  const bool convolves = kind.handler == gpu_ops::ConvInt8Handler;
  Call call = convolves ? MakeConvolution(r, w) : Call{kind.handler, {}, {}, {}};
  if (kind.trains) {
    AddTrained(r, w, kind, call);
  } else if (!convolves) {
    AddDeployed(r, w, border, call);
    if (border) {
      for (int scalar = 0; scalar < 2; ++scalar) call.arguments.push_back(Floats({}));
      const int64_t powers = w.channels == 0 ? 0 : r.Below(4);
      call.arguments.push_back(Floats({powers, w.kernel[0] * w.kernel[1], w.channels}));
    }
  }
  call.attributes.insert({{"kernel", w.kernel}, {"stride", w.stride}, {"dilation", w.dilation},
                          {"padding", w.padding}, {"groups", w.groups}});
  if (border)
    call.attributes.insert({{"bits", w.bits}, {"shared_across_taps", r.Chance(2)},
                            {"phi", r.Below(3)}});
  return call;
}

// Makes something of the call not fit, perhaps.
void Spoil(Random& r, Call& call) {
  auto& list = r.Chance(3) ? call.results : call.arguments;
  Buffer& buffer = list[r.Below(list.size())];
  auto at = call.attributes.begin();
  std::advance(at, r.Below(call.attributes.size()));
  const int64_t odd = r.Of({-1, 0, 1, 2, 7, int64_t{1} << 20, int64_t{1} << 29,
                            std::numeric_limits<int32_t>::max(), int64_t{1} << 40,
                            std::numeric_limits<int64_t>::max(),
                            std::numeric_limits<int64_t>::min()});
  switch (r.Below(7)) {
    case 0: return buffer.sizes.push_back(1 + r.Below(2));
    case 1:
      if (!buffer.sizes.empty()) buffer.sizes.pop_back();
      return;
    case 2:
      if (!buffer.sizes.empty()) buffer.sizes[r.Below(buffer.sizes.size())] = r.Below(6);
      return;
    case 3:
      buffer.type = r.Chance(2) ? XLA_FFI_DataType_S32 : XLA_FFI_DataType_PRED;
      return;
    case 4: call.attributes.erase(at); return;
    case 5: list.pop_back(); return;
    default:
      if (auto* array = std::get_if<std::vector<int64_t>>(&at->second)) {
        if (array->empty()) return array->push_back(odd);
        if (r.Chance(4)) return array->pop_back();
        (*array)[r.Below(array->size())] = odd;
      } else if (auto* number = std::get_if<int64_t>(&at->second)) {
        *number = odd;
      }
  }
}

void Fill(Random& r, Call& call) {
  for (Buffer& buffer : call.arguments) {
    buffer.data.reset(new char[buffer.Bytes()]);
    for (int64_t i = 0; i < buffer.Count(); ++i) {
      const float value = r.Value();
      char* to = buffer.data.get() + i * buffer.Width();
      if (buffer.type == XLA_FFI_DataType_PRED)
        *to = r.Chance(2);
      else  // a bfloat16 is the upper half of a float
        std::memcpy(to, reinterpret_cast<const char*>(&value) + 4 - buffer.Width(),
                    buffer.Width());
    }
  }
  for (Buffer& buffer : call.results) buffer.data.reset(new char[buffer.Bytes()]);
}

// Zero points, and the grids of the codes that result, which a call must have right.
void FillGrids(Random& r, Call& call) {
  auto set = [&](size_t argument, int64_t i, float value) {
    std::memcpy(call.arguments[argument].data.get() + 4 * i, &value, 4);
  };
  for (int64_t i = 0; i < call.arguments[kWeightZero].Count(); ++i)
    set(kWeightZero, i, static_cast<float>(r.Below(4)));
  for (int64_t i = 0; i < call.arguments[kCodeGrids].Count(); ++i)
    set(kCodeGrids, i, static_cast<float>(1 + r.Below(3)));
}

std::string Results(Call& call) {
  std::string bytes;
  for (Buffer& buffer : call.results) bytes.append(buffer.data.get(), buffer.Bytes());
  return bytes;
}

void Dirty(Call& call, char with) {
  for (Buffer& buffer : call.results) std::memset(buffer.data.get(), with, buffer.Bytes());
}

struct Counts {
  int64_t good = 0, refused = 0, exhausted = 0;
};

// A single random call; false with a message where it does what it must not.
bool Check(const Kind& kind, uint64_t seed, runtime::Pool& many, runtime::Pool& none,
           Counts& counts) {
  Random r{std::mt19937_64(seed)};
  Call call = MakeCall(r, kind);
  // XLA's own decoding of a call that does not fit cannot do without memory.
  const bool spoilt = r.Chance(3), scarce = !spoilt && r.Chance(3);
  if (spoilt) Spoil(r, call);
  Fill(r, call);
  if (kind.handler == gpu_ops::ConvInt8Handler && !spoilt) FillGrids(r, call);
  const bool wrong_step = r.Chance(16);
  const size_t step = kind.trains ? 2 : 1;
  if (kind.handler != gpu_ops::Img2colHandler && call.arguments.size() > step + 1) {
    const double size = wrong_step ? -1.0 : std::pow(10, r.Uniform(-38, 38));
    const float values[] = {static_cast<float>(size), static_cast<float>(r.Below(4))};
    for (size_t i = 0; i < 2; ++i)
      if (call.arguments[step + i].Bytes() == 4)
        std::memcpy(call.arguments[step + i].data.get(), &values[i], 4);
  }
  Dirty(call, '\x55');
  std::string message;
  const auto code = call.Run(many, scarce ? r.Below(r.Of({5, 40})) : runtime::kNoLimit, message);
  const bool fits = !spoilt && !(wrong_step && kind.handler != gpu_ops::Img2colHandler);
  const bool good = code == XLA_FFI_Error_Code_OK;
  const bool exhausted = code == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED;
  counts.good += good, counts.exhausted += exhausted, counts.refused += !good && !exhausted;
  if (exhausted ? !scarce : !good && fits) {
    std::fprintf(stderr, "%s, seed %llu: error %d: %s\n", kind.name,
                 static_cast<unsigned long long>(seed), code, message.c_str());
    return false;
  }
  if (!good) return true;
  const std::string first = Results(call);
  Dirty(call, '\xaa');
  call.Run(none, runtime::kNoLimit, message);
  if (Results(call) == first) return true;
  std::fprintf(stderr, "%s, seed %llu: a second run gives other bits\n", kind.name,
               static_cast<unsigned long long>(seed));
  return false;
}

bool CheckMissing(runtime::Pool& pool) {
  bool all = true;
  for (XLA_FFI_Handler* handler : {gpu_ops::Missing, gpu_ops::CpuOnly, gpu_ops::GpuOnly}) {
    Call call{handler, {}, {}, {{"kernel", std::vector<int64_t>{3, 3}}}};
    std::string message;
    all &= call.Run(pool, runtime::kNoLimit, message) == XLA_FFI_Error_Code_UNIMPLEMENTED;
  }
  return all;
}

// No images of no channels, whose column no int64 counts.
bool CheckHuge(runtime::Pool& pool) {
  const int64_t huge = std::numeric_limits<int32_t>::max();
  const std::vector<int64_t> two{huge, huge}, one{1, 1};
  Call call{gpu_ops::BorderColumnsForward, {}, {}, {}};
  for (auto sizes : std::vector<std::vector<int64_t>>{{0, huge, huge, huge}, {0}, {}, {}, {0}})
    call.arguments.push_back(Floats(sizes));
  call.arguments[1].type = XLA_FFI_DataType_PRED;
  call.results.push_back(Floats({0}));
  call.attributes = {{"kernel", two}, {"stride", one}, {"dilation", one},
                     {"padding", std::vector<int64_t>(4)}, {"groups", int64_t{1}},
                     {"bits", int64_t{4}}, {"shared_across_taps", true}, {"phi", int64_t{0}}};
  Random r{};
  Fill(r, call);
  std::string message;
  return call.Run(pool, runtime::kNoLimit, message) == XLA_FFI_Error_Code_INVALID_ARGUMENT &&
         message.find("32-bit") != std::string::npos;
}

}  // namespace

int main(int count, char** arguments) {
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::milliseconds(static_cast<int64_t>(1000 * std::atof(arguments[1])));
  uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  runtime::Pool many(3), none(0);
  Counts counts[std::size(kKinds)];
  bool good = CheckMissing(none) && CheckHuge(none);
  const uint64_t least = seed + 100;
  for (; good && (seed < least || std::chrono::steady_clock::now() < end); ++seed)
    for (size_t i = 0; good && i < std::size(kKinds); ++i)
      good = Check(kKinds[i], seed, many, none, counts[i]);
  for (size_t i = 0; i < std::size(kKinds); ++i)
    std::printf("%s %lld %lld %lld\n", kKinds[i].name, static_cast<long long>(counts[i].good),
                static_cast<long long>(counts[i].refused),
                static_cast<long long>(counts[i].exhausted));
  return good ? 0 : 1;
}
